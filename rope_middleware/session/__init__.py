"""Everything that knows SQLAlchemy: from the current scope to its session, and back.

Here stands what every session meets. The `registry` makes it by the jenny's factory (factories),
and ties it to its scope (tie, listeners). What it begins is noted (beginning, notice). Its kind
(kinds, async_kind, plain) knows how it commits and ends (committing, closing, idle, connections);
release() is such an end, too (release). What is lost by an end is told (unsaved, closed_early).
Each folder has a subject of its own.
"""
