"""The scope: what lives exactly as long as one request, and ends exactly once.

Knows no SQLAlchemy. How a session commits and ends it asks the session's `SessionKind`.
Private attributes of a `Scope` are touched in this folder only; `tests/test_layers.py` names the
few exceptions that speed needs.
"""
