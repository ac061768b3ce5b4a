"""A transaction begins: whose session is it, may it, and what is noted of it.

Nothing is checked out yet: so what may not begin in its scope any more leaves nothing behind.
"""

from __future__ import annotations

import sys
from functools import partial
from threading import get_ident
from time import monotonic
from typing import Any, cast
from weakref import ref

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction, SessionTransactionOrigin

from rope_middleware.errors import CrossLoopError, RopeError
from rope_middleware.scope.context import current
from rope_middleware.scope.loop import check_loop, may_use
from rope_middleware.scope.scope import AsyncScope, Scope, is_over, registries_of, require_open
from rope_middleware.scope.settling import (
    may_begin,
    needs,
    settling_of,
)
from rope_middleware.session.code.lines import kinds
from rope_middleware.session.connections import connections_out, has_out, made_connections
from rope_middleware.session.guard.blocks import guard_transaction
from rope_middleware.session.guard.busy import wait_in
from rope_middleware.session.guard.sessions import is_guarded, reset
from rope_middleware.session.holding.begun import DEPTH, OF_BODY, listing, note_begin, unlist
from rope_middleware.session.notice import KNOWN, has_modules, notice_begin
from rope_middleware.session.sql.notes import watch
from rope_middleware.session.tie import TIE, PlainTie, Tie, keep_also, tie_to

__all__ = ["on_begin", "refuse_late"]

_DEPTH = DEPTH - 2  # of `on_begin` itself
_getframe = sys._getframe
_AUTOBEGIN = SessionTransactionOrigin.AUTOBEGIN

# What is ended by a block of the application's, and by no method of the session.
_BLOCKS = (SessionTransactionOrigin.BEGIN, SessionTransactionOrigin.BEGIN_NESTED)


def on_begin(session: Session, transaction: SessionTransaction) -> None:
    """Note who begins; refuse to begin in a scope that has ended: nothing is checked out yet."""
    tie: Tie | None = session.__dict__.get(TIE)
    # All that `_begin` asks, in one look: what is left is the transaction of nearly every request.
    if (
        tie is None
        or transaction.origin is not _AUTOBEGIN
        or ((before := tie.transaction) is not None and (before is transaction or has_out(before)))
        or (tie.is_removed or tie.connections)
        or type(bind := session.bind) is not Engine
        or bind.pool.__dict__.get(KNOWN) is not bind.dialect
        or has_modules
        or (
            (scope := tie.scope) is not None
            and (
                tie.kind is None
                or (scope._state or scope._settling is not None)
                or ((scope._is_async or tie.is_async) and not may_use(scope, tie.is_async))
            )
        )
    ):
        _begin(session, transaction)
        return
    tie.transaction = transaction
    tie.written = None
    if tie.is_async:
        note_begin(tie)
        return
    # As `note_begin`, in nearly every request: two calls less.
    try:
        frame: Any = _getframe(_DEPTH)
        while kinds[frame.f_code.co_filename]:
            frame = frame.f_back
        is_applications = kinds[frame.f_code.co_filename] is not None
        line = (frame.f_code, frame.f_lasti) if is_applications else None
    except (AttributeError, ValueError):  # there are no more frames
        line = None
    if line is None:
        note_begin(tie)
        return
    is_new = tie.line is None
    tie.since = monotonic()
    tie.line = line
    tie.thread = get_ident()
    if is_new:
        listing.add(ref(tie, unlist))


def _begin(session: Session, transaction: SessionTransaction) -> None:
    """`on_begin`, in whatever case."""
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
