"""Sessions that have nothing open: their end needs no I/O, so it takes no thread and no task."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from rope_middleware.scope.scope import ENDED, Scope
from rope_middleware.session.closing import close
from rope_middleware.session.connections import has_connection_out
from rope_middleware.session.guard.sessions import CLOSES, WITHOUT, plain_class
from rope_middleware.session.tie import TIE, Tie

__all__ = ["end_at_once", "end_idle", "has_nothing_open"]

_SESSION_CLOSE = Session.close


def has_nothing_open(session: Session) -> bool:
    """Tell whether ending `session` needs no I/O."""
    if session.in_transaction():
        return False
    if session._new or session.identity_map._modified or session._deleted:  # noqa: SLF001
        return False  # added while it was committed, or by a listener of that: see `has_pending`
    tie: Tie | None = session.__dict__.get(TIE)  # as `tie_of`, in each request
    if tie is None or (tie.transaction is None and not tie.connections):
        return plain_class(session) is not None
    return not has_connection_out(tie) and plain_class(session) is not None


def end_at_once(session: Session) -> bool:
    """End `session` where that needs no I/O; tell whether it has ended."""
    if not session.in_transaction() and end_idle(session):
        return True
    ends = getattr(session, "_rope_middleware_ends_at_once", None)  # only reads: see `reading`
    if ends is None or not ends() or plain_class(session) is None:
        return False
    close(session)
    return True


def end_idle(session: Session, scope: Scope | None = None) -> bool:
    """End `session` if it `has_nothing_open`; tell whether it has ended.

    Args:
        session: of whatever scope.
        scope: its own, where that ends together with it; None where that has begun to end, and the
            session is in no transaction.
    """
    tie: Tie | None = session.__dict__.get(TIE)  # as `tie_of`, in each request
    if tie is None:
        return False
    before = tie.transaction
    if before is not None or tie.connections:  # of each transaction that begins the tie knows
        if scope is not None and session.in_transaction():
            return False
        if has_connection_out(tie):
            return False
    if session._new or session.identity_map._modified or session._deleted:  # noqa: SLF001
        return False  # as in `has_nothing_open`
    cls: Any = type(session)  # as `plain_class`, a call less of nearly all
    if cls.close in CLOSES:
        cls = getattr(cls, WITHOUT)
    if cls.close is not _SESSION_CLOSE or "close" in session.__dict__:
        cls = plain_class(session)
        if cls is None:
            return False
    if scope is not None:
        scope._state = ENDED  # noqa: SLF001 - from here on nothing can begin
        if tie.transaction is not before:  # another thread has begun one in this instant
            close(session)
            return True
    cls.reset(session)  # see `close`
    tie.transaction = tie.flush = tie.written = None  # they refer to the session: a cycle
    return True
