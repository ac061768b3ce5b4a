"""The listeners that heed what a session's `Tie` tells.

On the session's class, because listening on each session would cost a quarter of a small request.
"""

from __future__ import annotations

import sys
from functools import partial
from threading import get_ident
from typing import Any, cast
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import InstanceState, Session, SessionTransaction, SessionTransactionOrigin

from rope_middleware.errors import CrossLoopError, RopeError
from rope_middleware.running.forks import lock_of_module
from rope_middleware.scope.context import current
from rope_middleware.scope.loop import check_loop
from rope_middleware.scope.outcome import note_commit, retries_of
from rope_middleware.scope.scope import AsyncScope, Scope, is_over, registries_of, require_open
from rope_middleware.scope.settling import (
    may_begin,
    may_begin_in_loop,
    may_begin_plainly,
    needs,
    settling_of,
)
from rope_middleware.session.connections import connections_out, has_made, has_out, made_connections
from rope_middleware.session.guard.blocks import guard_transaction
from rope_middleware.session.guard.busy import wait_in
from rope_middleware.session.guard.sessions import is_guarded, reset
from rope_middleware.session.holding.begun import OF_BODY, is_alone, note_begin
from rope_middleware.session.holding.ended import note_ended
from rope_middleware.session.notice import KNOWN, has_modules, learn_engines, notice_begin
from rope_middleware.session.sql.notes import watch, watch_binds
from rope_middleware.session.tie import TIE, PlainTie, Tie, keep_also, tie_to
from rope_middleware.session.unsaved import (
    forget_committed,
    forget_rolled_back,
    note_flush,
    tell_expired,
)

__all__ = ["listen", "listen_to", "refuse_late"]

# Not event.contains(): it goes by ids, which come again. A sessionmaker makes a class each time.
_listening_to: WeakSet[type[Session]] = WeakSet()
_listening = lock_of_module()


def listen(session_class: type[Session]) -> None:
    """Listen to the events of `session_class`, once."""
    with _listening:
        if session_class not in _listening_to:
            _listen(session_class)
            if session_class.get_bind is not Session.get_bind:
                watch_binds(session_class)
                learn_engines(session_class)
            _listening_to.add(session_class)


def _listen(target: type[Session] | Session) -> None:
    event.listen(target, "after_transaction_create", _on_begin)
    # First: one of the application's that raises must not keep the commit from being known.
    event.listen(target, "after_commit", _on_commit, insert=True)
    event.listen(target, "after_rollback", _on_rollback)
    event.listen(target, "after_flush", _on_flush)
    event.listen(target, "pending_to_transient", _on_expunge, raw=True)


MAX_CLASSES = 8  # that are listened to only because a session of theirs came along
_found: list[None] = []  # one for each of them


def listen_to(session: Session) -> bool:
    """Listen to the events of `session`.

    Returns:
        Whether its class is listened to now, so that the next one needs nothing.
    """
    session_class = type(session)
    if any(base in _listening_to for base in session_class.__mro__):
        return True
    # A sessionmaker makes a class, of the application's own or of `Session`.
    is_makers = session_class.__module__ == Session.__module__
    base = session_class.__mro__[1] if is_makers else session_class
    if not issubclass(base, Session) or base is Session:
        # `Session` itself is the class of everybody's sessions. And a factory that makes a
        # sessionmaker each time makes a class each time: SQLAlchemy keeps a listener's entry for
        # each of them.
        if session_class is Session or len(_found) >= MAX_CLASSES:
            _listen(session)
            return False
        _found.append(None)
        base = session_class
    listen(base)
    return True


_AUTOBEGIN = SessionTransactionOrigin.AUTOBEGIN

# What is ended by a block of the application's, and by no method of the session.
_BLOCKS = (SessionTransactionOrigin.BEGIN, SessionTransactionOrigin.BEGIN_NESTED)


def _on_begin(session: Session, transaction: SessionTransaction) -> None:
    """Note who begins; refuse to begin in a scope that has ended: nothing is checked out yet."""
    tie: Tie | None = session.__dict__.get(TIE)
    if (
        tie is not None
        and transaction.origin is _AUTOBEGIN
        and ((before := tie.transaction) is None or not (before is transaction or has_out(before)))
        and not (tie.is_removed or tie.connections)
        and type(bind := session.bind) is Engine
        and bind.pool.__dict__.get(KNOWN) is bind.dialect
        and not has_modules
        and (
            (scope := tie.scope) is None
            or (
                tie.kind is not None
                and (may_begin_in_loop if tie.is_async else may_begin_plainly)(scope)
            )
        )
    ):
        # The transactions of nearly every request, and of ropes: 2 to 3 us less for each.
        tie.transaction = transaction
        tie.written = None
        note_begin(tie)
    else:
        _begin(session, transaction)


def _begin(session: Session, transaction: SessionTransaction) -> None:
    """`_on_begin`, in whatever case."""
    is_outermost = transaction.parent is None
    if is_outermost:
        try:
            watch(session)
        except RopeError:  # its engine is async
            reset(session)  # for the next use to come by here again
            raise
    tie: Tie | None = session.__dict__.get(TIE)
    if tie is None:
        tie = _adopted(session)
        if tie is None:
            # Not a session of ours: only of a class that we listen to. Or not yet: its factory has
            # begun this, which is noted for `ScopeRegistry.first_use`.
            session.__dict__[TIE] = None
            return
    scope = tie.scope
    if tie.transaction is transaction:
        return  # a base class of its class is listened to as well
    if scope is not None and not may_begin(scope):
        _wait_or_refuse(session, tie, scope, is_outermost)
    if is_outermost:
        if tie.transaction is not None or tie.connections:
            tie.connections = connections_out(tie)
        tie.transaction = transaction
    elif not transaction.nested:
        # The transaction within a transaction that SQLAlchemy opens for each flush.
        tie.flush = transaction, get_ident()
    if transaction.origin in _BLOCKS:
        guard_transaction(session, transaction)
        if is_outermost and scope is not None and needs(scope):
            _note_body(transaction)
    if is_outermost and scope is not None and isinstance(tie, PlainTie):
        _note_removed(tie, session, scope)
    kind = tie.kind
    if scope is not None and kind is not None:
        if tie.is_removed:
            keep_also(tie, kind.handed_out(session))
        if kind.is_async:
            _check_loop(session, scope, is_outermost)
    if is_outermost and (kind is not None or scope is None):
        tie.written = None  # of one that the application has closed
        try:
            notice_begin(tie, session)
        except RopeError:
            reset(session)
            raise


def _note_body(transaction: SessionTransaction) -> None:
    """Note whether a block of a response's body has begun `transaction`: see `code.bodies`."""
    if sys.is_finalizing():
        return
    from rope_middleware.session.code.bodies import is_in_body

    if is_in_body():
        transaction.__dict__[OF_BODY] = True


def _note_removed(tie: PlainTie, session: Session, scope: Scope) -> None:
    """Note whether its scoped_session has removed it, and the application goes on with it."""
    if tie.kind is None and not tie.owner.owns(session, scope):
        tie.kind, tie.is_removed = tie.owner.besides, True
        tie.is_async = tie.kind.is_async


def _check_loop(session: Session, scope: Scope, is_outermost: bool) -> None:
    try:
        check_loop(cast("AsyncScope", scope))
    except CrossLoopError:
        if is_outermost:
            reset(session)
        raise


def _adopted(session: Session) -> Tie | None:
    """Tie a session of a plain scoped_session to the scope that will remove it."""
    scope = current.get(None)
    if scope is None:
        return None
    owner = next((kind for kind in registries_of(scope) if kind.owns(session, scope)), None)
    if owner is None:
        return None
    tie = tie_to(session, scope, made=PlainTie(owner))
    tie.transaction = None  # the one that is beginning: whether it may is asked now
    return tie


def _wait_or_refuse(session: Session, tie: Tie, scope: Scope, is_outermost: bool) -> None:
    """Wait for a commit of `scope` that is under way, and refuse to begin where it has ended."""
    if settling_of(scope) is not None and not is_guarded(session):
        wait_in(session, tie, scope)
    if is_over(scope):
        if is_outermost:
            # SQLAlchemy has assigned the transaction already; it must go, for the next use
            # to come by here again.
            reset(session)
        require_open(scope)


def refuse_late(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """Give back the connection that a call waited for while its scope ended (after_begin)."""
    tie: Tie = session.__dict__[TIE]
    if tie.scope is not None and is_over(tie.scope):
        # Session.close() cannot be called in here (https://docs.sqlalchemy.org/en/20/errors.html#error-isce).
        if connection in made_connections(transaction):
            connection.close()
        # So its transaction goes on, and what is used next would come by no listener.
        session.__dict__["get_bind"] = partial(_refuse_bind, tie.scope)
        require_open(tie.scope)


def _refuse_bind(scope: Scope, *_: object, **__: object) -> None:
    require_open(scope)


def _on_commit(session: Session) -> None:
    """Tell the scope that something is committed."""
    tie: Tie | None = session.__dict__.get(TIE)
    if tie is None:
        return
    # Each commit comes by here. Where no other session lives, nobody can have waited for this one.
    if (tie.written is not None or not is_alone()) and not session.in_nested_transaction():
        note_ended(tie)
    if tie.written is not None:
        forget_committed(tie, session)
    if session.identity_map._modified and not session.in_nested_transaction():  # noqa: SLF001
        tell_expired(tie, session)  # the commit began with everything flushed
    scope = tie.scope
    # Whether something has been committed matters to `retries` and to R3 alone.
    if scope is None or not (tie.follow is not None or retries_of(scope)):
        return
    if session.in_nested_transaction():
        return
    if tie.connections or has_made(tie.transaction):
        note_commit(scope)
        if tie.follow is not None:
            tie.follow(made_connections(tie.transaction))


def _on_rollback(session: Session) -> None:
    tie: Tie | None = session.__dict__.get(TIE)
    if tie is not None and tie.written is not None:
        forget_rolled_back(tie, session)


def _on_flush(session: Session, _: object) -> None:
    tie: Tie | None = session.__dict__.get(TIE)
    if tie is not None:
        note_flush(tie, session)


def _on_expunge(session: Session, state: InstanceState[Any]) -> None:
    """Something pending goes: by a rollback, by close(), or by the application's expunge_all().

    By then nothing may hold the object any more: only its state.
    """
    tie: Tie | None = session.__dict__.get(TIE)
    if tie is not None and not sys.is_finalizing():
        from rope_middleware.session.closed_early import note_expunged

        note_expunged(tie, session, state.class_)
