"""Everything that knows SQLAlchemy: from the current scope to its session, and back."""
