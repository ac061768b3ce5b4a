"""Is somebody in the middle of something in a session? Its commit waits for that (C10).

The end of its scope does, too, but not for long: who is busy may have outlived the request (S4).
"""

from __future__ import annotations

from threading import get_ident

from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from rope_middleware.running.finish import may_block
from rope_middleware.scope.hands import MAX_SECONDS, wait_until
from rope_middleware.scope.options import DEFAULT
from rope_middleware.scope.outcome import is_committing, timeout_of
from rope_middleware.scope.scope import Scope
from rope_middleware.scope.settling import calls_of, must_wait_for
from rope_middleware.session.connections import made_connections
from rope_middleware.session.guard.sessions import is_guarded
from rope_middleware.session.sql.notes import NOTES, Notes, notes_of
from rope_middleware.session.tie import PlainTie, Tie, tie_of

__all__ = [
    "allow_others",
    "has_unread",
    "is_busy",
    "is_flushing",
    "wait_for_flush",
    "wait_for_statement",
    "wait_in",
]


def has_unread(connection: Connection) -> bool:
    """Tell whether a statement on `connection` is under way, or a result is still being read."""
    notes: Notes | None = getattr(connection, NOTES, None)  # as `notes_of`, in each request
    if notes is not None:
        for one, _ in notes:
            if one() is not None:  # of most statements nothing is left
                return notes.has_unread()
    return False


def is_flushing(tie: Tie, session: Session) -> bool:
    """Tell whether a flush is under way."""
    # The second: its transaction is not active while it gets its connection.
    return (tie.flush is not None and tie.flush[0].is_active) or session._flushing  # noqa: SLF001


def is_busy(session: Session) -> bool:
    """Tell whether a statement or a flush of `session` is under way, or another call."""
    tie = tie_of(session)
    if tie is None:
        return False
    if tie.scope is not None and is_guarded(session) and calls_of(tie.scope):
        return True
    if is_flushing(tie, session):
        return True
    for connection in made_connections(tie.transaction):
        if notes_of(connection).is_executing():
            return True
    return False


def wait_in(session: Session, tie: Tie, scope: Scope) -> None:
    """Let a commit of `scope` end that is under way, before `session` begins something."""
    settling = must_wait_for(scope)
    if settling is None:
        return
    if isinstance(tie, PlainTie):
        settling.leave_out(tie.owner)  # else that commit would wait for it
    elif is_flushing(tie, session) and not is_committing(scope):
        return  # that commit waits for this flush, whose writes belong to it
    from rope_middleware.session.guard.turns import wait_for  # few ever wait

    wait_for(settling)


# -- the end of a scope: see `closing.close` ------------------------------------------------------


def wait_for_flush(tie: Tie) -> None:
    """Let a flush end that another thread is in the middle of.

    Its next statement would land on a connection that is back in the pool already, and be
    committed by whoever has it then.
    """
    assert tie.flush is not None  # noqa: S101 - the caller has looked
    transaction, thread = tie.flush
    tie.flush = None
    if thread != get_ident() and transaction.is_active and may_block():
        wait_until(lambda: not transaction.is_active, DEFAULT.close_timeout)


def allow_others(tie: Tie) -> None:
    """Let other threads begin statements again: the end has to wait for a call of one of them."""
    for connection in made_connections(tie.transaction):
        notes_of(connection).gone = None


def wait_for_statement(notes: Notes, scope: Scope) -> None:
    """Let a statement end, within half of the time after which a cancelled request goes on."""
    if notes.is_executing() and may_block():
        seconds = min(MAX_SECONDS, timeout_of(scope) / 2)
        wait_until(lambda: not notes.is_executing(), seconds)
