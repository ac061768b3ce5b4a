"""Is somebody in the middle of something in a session? Its commit waits for that (C10)."""

from __future__ import annotations

from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from rope_middleware.scope.settling import calls_of
from rope_middleware.session.aside import is_guarded
from rope_middleware.session.connections import made_connections
from rope_middleware.session.tie import tie_of
from rope_middleware.session.written import NOTES, Notes, notes_of

__all__ = ["has_unread", "is_busy"]


def has_unread(connection: Connection) -> bool:
    """Tell whether a statement on `connection` is under way, or a result is still being read."""
    notes: Notes | None = connection.__dict__.get(NOTES)  # as `notes_of`, in each request
    if notes is not None:
        for one in notes.executions:
            if one() is not None:  # of most statements nothing is left
                return notes.has_unread()
    return False


def is_busy(session: Session) -> bool:
    """Tell whether a statement or a flush of `session` is under way, or another call."""
    tie = tie_of(session)
    if tie is None:
        return False
    if tie.scope is not None and is_guarded(session) and calls_of(tie.scope):
        return True
    # The second: its transaction is not active while it gets its connection.
    if (tie.flush is not None and tie.flush[0].is_active) or session._flushing:  # noqa: SLF001
        return True
    for connection in made_connections(tie.transaction):
        if notes_of(connection).is_executing():
            return True
    return False
