"""How one session ends: closed, discarded where it has nothing open, invalidated, detached.

Another thread may be inside a call on the session when its scope ends: see `guard.busy`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import get_ident
from typing import Any

from sqlalchemy import event
from sqlalchemy.exc import IllegalStateChangeError
from sqlalchemy.orm import Session

from rope_middleware.errors import belongs_to_parent
from rope_middleware.running.finish import may_block
from rope_middleware.scope.hands import wait_until
from rope_middleware.scope.options import DEFAULT
from rope_middleware.scope.outcome import is_to_commit
from rope_middleware.session.beginning import refuse_late
from rope_middleware.session.connections import (
    connections_out,
    has_connection_out,
    invalidate_all,
    leave_to_parent,
)
from rope_middleware.session.guard.busy import (
    allow_others,
    is_flushing,
    wait_for_flush,
    wait_for_statement,
)
from rope_middleware.session.guard.sessions import (
    call_at_close,
    plain_class,
    reset,
)
from rope_middleware.session.holding.begun import call_at_forks
from rope_middleware.session.sql.notes import NOTES, Notes, notes_of
from rope_middleware.session.tie import TIE, Tie, tie_of
from rope_middleware.session.unsaved import has_pending, tell_lost

__all__ = [
    "close",
    "close_later",
    "detach",
    "discard",
    "forget",
    "has_begun",
    "has_open_result",
    "holds_connection",
    "invalidate",
]


_SESSION_CLOSE = Session.close


def has_begun(session: Session) -> bool:
    """Tell whether `session` is in a transaction, or has a connection out."""
    if session.in_transaction():
        return True
    tie = tie_of(session)
    return tie is not None and has_connection_out(tie)


def holds_connection(session: Session) -> bool:
    """Tell whether `session` has a connection out of its pool."""
    tie = tie_of(session)
    return tie is not None and has_connection_out(tie)


def has_open_result(session: Session) -> bool:
    """Tell whether a result of `session` is still being read."""
    tie = tie_of(session)
    if tie is not None:
        for connection in connections_out(tie):
            if notes_of(connection).has_unread():
                return True
    return False


def close(session: Session, by: Callable[[], object] | None = None) -> None:
    """Close `session`; what could not be given back to the pool is invalidated.

    Args:
        session: what is closed.
        by: the scoped_session's own ``remove()``, where no jenny has made it.

    Raises:
        BaseException: what `by` or ``session.close()`` raised.
    """
    tie: Tie | None = session.__dict__.get(TIE)  # as `tie_of`, in each request
    if tie is not None:
        if tie.flush is not None:
            wait_for_flush(tie)
        if tie.is_removed:
            _note_closed(session, "remove()")
        elif (scope := tie.scope) is not None:
            if tie.transaction is not None and not tie.is_async:
                # No other thread begins a statement on the connections any more (see `sql.taking`),
                # and we wait for the one under way: two at once break those of many drivers.
                # As `connections_of`; each is there twice, side by side.
                for connection, _, _, is_made in (*tie.transaction._connections.values(),)[::2]:  # noqa: SLF001
                    if is_made:
                        notes: Notes = getattr(connection, NOTES, None) or notes_of(connection)
                        notes.gone = scope, get_ident()  # before the look
                        if notes and notes[-1][0]() is not None:  # only the last can be under way
                            wait_for_statement(notes, scope)
            if by is None and (
                tie.written is not None
                or session._new  # noqa: SLF001 - as in `idle`
                or session.identity_map._modified  # noqa: SLF001
                or session._deleted  # noqa: SLF001
            ):
                tell_lost(tie, session)
    cls: Any = type(session)  # as `plain_class`
    if cls.close is not _SESSION_CLOSE or "close" in session.__dict__:  # else a call less
        cls = plain_class(session)
    try:
        if by is not None or cls is None:
            _close_by(session, by or session.close)
        else:
            # close() without "permanently closed" (Session.close_resets_only=False), after which
            # SQLAlchemy's own error would come before ours.
            cls.reset(session)
    except BaseException as error:
        if _has_failed(session, error, is_plain=cls is not None):
            raise
    if tie is not None:
        # After an end that has succeeded only an earlier one can have left something: it failed,
        # in the application's hands, and its transaction has forgotten its connections.
        if tie.connections:
            invalidate_all([c for c in tie.connections if not c.closed])
        tie.transaction = tie.flush = tie.written = None  # they refer to the session: a cycle


def _has_failed(session: Session, error: BaseException, is_plain: bool) -> bool:
    """Tell whether `error` leaves something open, and invalidate that."""
    is_closed = isinstance(error, IllegalStateChangeError) and close_later(session)
    if is_closed and is_plain:
        return False
    invalidate(session)
    with suppress(Exception):
        reset(session)  # what is left of its transaction must not be used any more
    return True


def _note_closed(session: Session, how: str) -> None:
    """The application is about to close `session`: where that loses something, it may be told."""
    tie = tie_of(session)
    if tie is None or tie.scope is None or not (tie.written is not None or has_pending(session)):
        return
    if is_to_commit(tie.scope) and not sys.is_finalizing():
        from rope_middleware.session.closed_early import note_closed

        note_closed(tie, tie.scope, session, how)


call_at_close(_note_closed)


def discard(session: Session) -> None:
    """`close` for a session that has nothing open: none of its connections can be out."""
    cls = plain_class(session)
    if cls is None:
        _close_by(session, session.close)
    else:
        cls.reset(session)  # see `close`
    forget(session)


def forget(session: Session) -> None:
    """Forget what the tie of a session that has ended refers to."""
    tie: Tie | None = session.__dict__.get(TIE)  # as `tie_of`, in each request
    if tie is not None:
        tie.transaction = tie.flush = tie.written = None  # they refer to the session: a cycle


def invalidate(session: Session) -> None:
    """Throw away the connections that the session still has out; never raises an Exception."""
    tie = tie_of(session)
    if tie is not None:
        invalidate_all(connections_out(tie))


# What was open where this process was forked. Kept for ever: closing or collecting these
# connections would send bytes over the socket that the parent process still uses.
_of_the_parent: list[Any] = []


def detach(session: Session) -> None:
    """Leave to the parent process, in a forked one, the connections that `session` has out.

    See https://docs.sqlalchemy.org/en/20/core/pooling.html#pooling-multiprocessing
    """
    _of_the_parent.append(session)
    tie = tie_of(session)
    if tie is not None:
        _leave_to_parent(tie)


def _leave_to_parent(tie: Tie) -> None:
    name = None if tie.scope is None else tie.scope.name
    for connection in connections_out(tie):
        with suppress(Exception):  # one that is invalidated already
            _of_the_parent.append(leave_to_parent(connection, partial(belongs_to_parent, name)))


call_at_forks(_leave_to_parent)  # sessions of other threads and tasks are the parent's, too


def _close_by(session: Session, by: Callable[[], object]) -> None:
    by()
    if session.in_transaction():
        reset(session)  # somebody's close() does something else


def close_later(session: Session) -> bool:
    """Close a session that another thread is inside a call of: its connection must not stay out.

    If that call is waiting for a connection, `refuse_late` returns the connection when it arrives.
    If it has one (during a commit, say), we wait for the call.

    Returns:
        Whether nothing is left to be done: it is closed, or `refuse_late` does the rest. (Of a task
        that waits so there is something to tell, by the error: see `tell_cut_off`.)
    """
    tie = tie_of(session)
    if tie is None:
        return False
    event.listen(session, "after_begin", refuse_late)
    allow_others(tie)  # that call may have statements to make
    closed: list[None] = []

    def is_done() -> bool:
        if not is_flushing(tie, session):  # else it would be cut off in its middle
            with suppress(IllegalStateChangeError):
                reset(session)
                closed.append(None)
        return bool(closed) or not connections_out(tie)

    wait_until(is_done, DEFAULT.close_timeout if may_block() else 0)
    return bool(closed) or not (tie.is_async or connections_out(tie))
