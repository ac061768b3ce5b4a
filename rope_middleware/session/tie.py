"""What a session knows of its scope, and the listeners that heed it.

Each session carries a `Tie` as an attribute (its ``info`` stays the application's). Listeners on
the session's class read it; on the class, because listening on each session would cost a quarter
of a small request.
"""

from __future__ import annotations

import threading
from asyncio import Task
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast
from weakref import ReferenceType, WeakSet

from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction

from rope_middleware.errors import CrossLoopError, RopeError, other_loop
from rope_middleware.running.finish import running_loop
from rope_middleware.scope.context import current
from rope_middleware.scope.kind import SessionKind
from rope_middleware.scope.outcome import note_commit
from rope_middleware.scope.scope import (
    AsyncScope,
    Scope,
    is_of_loop,
    is_over,
    keep,
    registries_of,
    require_open,
)
from rope_middleware.scope.settling import may_begin, settling_of
from rope_middleware.session.aside import is_guarded
from rope_middleware.session.begun import note_begin
from rope_middleware.session.connections import connections_out, has_made, made_connections
from rope_middleware.session.lines import Line
from rope_middleware.session.locks import note_ended
from rope_middleware.session.notice import learn_engines, notice_begin
from rope_middleware.session.turns import wait_for_commit
from rope_middleware.session.unsaved import (
    Written,
    forget_committed,
    forget_rolled_back,
    note_flush,
)
from rope_middleware.session.written import watch, watch_binds

__all__ = [
    "Tie",
    "check_loop",
    "keep_also",
    "listen",
    "listen_to",
    "refuse_late",
    "tie_of",
    "tie_to",
]

_TIE = "_rope_middleware_tie"

# Not event.contains(): it knows a class by its id, and the ids of dead classes come again. A
# sessionmaker makes a class each time.
_listening_to: WeakSet[type[Session]] = WeakSet()
_listening = threading.Lock()


class Tie:
    """What a session must know of where it comes from; an attribute of the session."""

    __slots__ = (
        "__weakref__",
        "connections",
        "flush",
        "follow",
        "is_removed",
        "kind",
        "line",
        "scope",
        "since",
        "task",
        "thread",
        "transaction",
        "written",
    )

    scope: Scope | None
    kind: SessionKind | None  # None where no jenny has made it
    is_removed: bool  # from its scope, which does not know it any more
    transaction: SessionTransaction | None  # the last one that the session began
    connections: Sequence[Connection]  # of earlier ones, where an end has failed
    flush: tuple[SessionTransaction, int] | None  # the last one, and the thread it ran in
    follow: Callable[[Collection[Connection]], None] | None  # called after each commit: see R3
    # Of the last transaction: see `begun`.
    line: Line | None
    since: float
    thread: int
    task: ReferenceType[Task[Any]] | None
    written: Written | None  # and neither committed nor rolled back


def tie_to(session: Session, scope: Scope | None = None, kind: SessionKind | None = None) -> Tie:
    """Tie `session` to its scope, or to none: then only its connections count.

    The session must be listened to: see `listen`.
    """
    tie = session.__dict__[_TIE] = Tie()
    tie.scope = scope
    tie.kind = kind
    tie.is_removed = False
    tie.transaction = session.get_transaction()  # a factory may have begun one
    tie.connections = ()
    tie.follow = None
    tie.flush = tie.line = tie.task = tie.written = None
    if tie.transaction is not None:
        note_begin(tie, 2)
    return tie


def tie_of(session: Session) -> Tie | None:
    """Return the tie of `session`, or None where it has none."""
    return session.__dict__.get(_TIE)


class _Key:
    """Under what a scope keeps a session that is not its current one."""

    __slots__ = ("kind",)

    def __init__(self, kind: SessionKind) -> None:
        self.kind: SessionKind = kind


def keep_also(tie: Tie, session: Any) -> None:
    """Let the scope end `session`, which is not its current one."""
    if tie.scope is not None and tie.kind is not None:
        tie.is_removed = False
        keep(tie.scope, _Key(tie.kind), session)


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


MOST_CLASSES = 8  # that are listened to only because a session of theirs came along
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
        if session_class is Session or len(_found) >= MOST_CLASSES:
            _listen(session)
            return False
        _found.append(None)
        base = session_class
    listen(base)
    return True


def _on_begin(session: Session, transaction: SessionTransaction) -> None:
    """Refuse to begin in a scope that has ended: nothing is checked out yet."""
    is_outermost = transaction.parent is None
    if is_outermost:
        watch(session)
    tie: Tie | None = session.__dict__.get(_TIE)
    if tie is None:
        tie = _adopted(session)
        if tie is None:
            return  # not a session of ours: only of a class that we listen to
    scope = tie.scope
    if tie.transaction is transaction:
        return  # a base class of its class is listened to as well
    if scope is not None and not may_begin(scope):
        _wait_or_refuse(session, scope, is_outermost)
    if is_outermost:
        if tie.transaction is not None or tie.connections:
            tie.connections = connections_out(tie)
        tie.transaction = transaction
    elif not transaction.nested:
        # The transaction within a transaction that SQLAlchemy opens for each flush.
        tie.flush = transaction, threading.get_ident()
    kind = tie.kind
    if scope is not None and kind is not None:
        if tie.is_removed:
            keep_also(tie, kind.handed_out(session))
        if kind.is_async:
            try:
                check_loop(cast("AsyncScope", scope))
            except CrossLoopError:
                if is_outermost:
                    session.reset()
                raise
    if is_outermost and (kind is not None or scope is None):
        tie.written = None  # of one that the application has closed
        try:
            notice_begin(tie, session)
        except RopeError:
            session.reset()
            raise


def _adopted(session: Session) -> Tie | None:
    """Tie a session of a plain scoped_session to the scope that will remove it."""
    scope = current.get(None)
    if scope is None or not any(kind.owns(session) for kind in registries_of(scope)):
        return None
    return tie_to(session, scope)


def _wait_or_refuse(session: Session, scope: Scope, is_outermost: bool) -> None:
    """Wait for a commit of `scope` that is under way, and refuse to begin where it has ended."""
    if settling_of(scope) is not None and not is_guarded(session):
        wait_for_commit(scope)
    if is_over(scope):
        if is_outermost:
            # SQLAlchemy has assigned the transaction already; it must go, for the next use
            # to come by here again.
            session.reset()
        require_open(scope)


def check_loop(scope: AsyncScope) -> None:
    """Check that the running event loop is that of `scope`.

    Raises:
        CrossLoopError: it is another one.
    """
    loop = running_loop()
    if loop is not None and not is_of_loop(scope, loop):
        raise other_loop(scope.name)


def refuse_late(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    """Give back the connection that a call waited for while its scope ended (after_begin)."""
    tie: Tie = session.__dict__[_TIE]
    if tie.scope is not None and is_over(tie.scope):
        # Session.close() cannot be called in here (https://docs.sqlalchemy.org/en/20/errors.html#error-isce).
        if connection in made_connections(transaction):
            connection.close()
        require_open(tie.scope)


def _on_commit(session: Session) -> None:
    """Tell the scope that something is committed."""
    tie: Tie | None = session.__dict__.get(_TIE)
    if tie is None:
        return
    if tie.written is not None and not session.in_nested_transaction():
        note_ended(tie, made_connections(tie.transaction))
    forget_committed(tie, session)
    if tie.scope is None or session.in_nested_transaction():
        return
    if tie.connections or has_made(tie.transaction):
        note_commit(tie.scope)
        if tie.follow is not None:
            tie.follow(made_connections(tie.transaction))


def _on_rollback(session: Session) -> None:
    tie: Tie | None = session.__dict__.get(_TIE)
    if tie is not None:
        forget_rolled_back(tie, session)


def _on_flush(session: Session, _: object) -> None:
    tie: Tie | None = session.__dict__.get(_TIE)
    if tie is not None:
        note_flush(tie, session)
