"""Connections that are taken from who may still be using them.

A statement that another thread begins in this instant is either seen, as one that is under way; or
it sees that its connection is gone, before it is executed. (It notes itself, then looks; we mark
the connection, then look.) So nobody sends a statement over a connection that is back in its pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING
from weakref import ref

from sqlalchemy.exc import IllegalStateChangeError

from rope_middleware.errors import RopeError
from rope_middleware.running.finish import may_block
from rope_middleware.running.forks import lock_of_module
from rope_middleware.scope.hands import MAX_SECONDS, wait_until
from rope_middleware.scope.scope import require_open

if TYPE_CHECKING:
    from sqlalchemy.engine import ExecutionContext

    from rope_middleware.scope.scope import Scope
    from rope_middleware.session.sql.notes import Notes

__all__ = ["refuse_gone", "take"]

_TAKEN: tuple[Scope | None, int] = None, 0
_taking = lock_of_module()


def take(notes: Collection[Notes], end: Callable[[], None]) -> bool:
    """End a transaction, unless a statement of it is under way, or a result is being read.

    Args:
        notes: of its connections.
        end: ends it.

    Returns:
        Whether it was ended.
    """
    with _taking:
        for one in notes:
            one.gone = _TAKEN
        is_used = any(one.has_unread() for one in notes)
    try:
        if not is_used:
            end()
            return True
    except IllegalStateChangeError:  # another call of the session's is under way: a commit, say
        pass
    for one in notes:
        if one.gone is _TAKEN:  # and its scope does not end in this instant
            one.gone = None
    return False


def refuse_gone(notes: Notes, context: ExecutionContext) -> None:
    """Refuse a statement whose connection is gone, or is about to.

    Raises:
        RopeError: an inner scope has the connection.
        ScopeClosedError: the end of its scope is giving it back.
    """
    with _taking:  # somebody may be about to decide
        gone = notes.gone
    if gone is None:
        return
    scope, thread = gone
    if scope is None:
        raise RopeError(
            "The connection of this statement was given to an inner scope, because nobody was "
            "using it. Do not keep what session.connection() returns over an open_scope(): "
            "ask for it again."
        )
    if thread == threading.get_ident():
        return  # the end's own: of a savepoint, or of a close() of the application's
    notes.forget(context)  # the end would wait for it
    if may_block():
        # SQLAlchemy's handling of our error rolls back where no transaction is begun. It must not
        # do so while the end is about to give the connection back.
        connection = context.root_connection
        wait_until(lambda: connection.closed or notes.gone is not gone, MAX_SECONDS)
    if notes.gone is gone:
        require_open(scope)
    statement = context.statement if context.compiled is None else context.compiled
    notes.append((ref(context), statement))  # the end waits for the call that this is part of
