"""What a session knows of its scope: each carries a `Tie` as an attribute.

(Its ``info`` stays the application's.) The listeners on the session's class read it.
"""

from __future__ import annotations

from asyncio import Task
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard
from weakref import ReferenceType

from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction

from rope_middleware.errors import RopeError
from rope_middleware.scope.scope import Scope, is_over, keep
from rope_middleware.session.code.lines import Line
from rope_middleware.session.holding.begun import note_begin
from rope_middleware.session.unsaved import Written

if TYPE_CHECKING:
    from rope_middleware.scope.kind import PlainKind, SessionKind

__all__ = ["TIE", "PlainTie", "Tie", "check_own", "is_session", "keep_also", "tie_of", "tie_to"]

TIE = "_rope_middleware_tie"
"""The name of that attribute."""


class Tie:
    """What a session must know of where it comes from; an attribute of the session."""

    # What most never change has its value on the class.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "connections",
        "flush",
        "is_async",
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
    is_async: bool  # as the kind: each transaction asks
    is_removed: bool  # from its scope, which does not know it any more
    transaction: SessionTransaction | None  # the last one that the session began
    connections: Sequence[Connection]  # of earlier ones, where an end has failed
    flush: tuple[SessionTransaction, int] | None  # the last one, and the thread it ran in
    follow: Callable[[Collection[Connection]], None] | None = (
        None  # called after each commit: see R3
    )
    # Of the last transaction: see `holding.begun`.
    line: Line | None
    since: float
    thread: int
    task: ReferenceType[Task[Any]] | None
    written: Written | None  # and neither committed nor rolled back


class PlainTie(Tie):
    """Of the session of a plain scoped_session, its `owner`."""

    __slots__ = ("owner",)

    def __init__(self, owner: PlainKind) -> None:
        self.owner: PlainKind = owner


def tie_to(
    session: Session,
    scope: Scope | None = None,
    kind: SessionKind | None = None,
    made: Tie | None = None,
) -> Tie:
    """Tie `session` to its scope, or to none: then only its connections count.

    The session must be listened to: see `listen`.
    """
    tie = session.__dict__[TIE] = Tie() if made is None else made
    tie.scope = scope
    tie.kind = kind
    tie.is_async = kind is not None and kind.is_async
    tie.is_removed = False
    tie.connections = ()
    tie.transaction = tie.flush = tie.line = tie.task = tie.written = None
    if session.in_transaction():  # a factory may have begun one
        tie.transaction = session.get_transaction()
        note_begin(tie, 2)
    return tie


def is_session(thing: object) -> TypeGuard[Session]:
    """Tell whether `thing` is a Session: a ``Mock(spec=Session)`` is none, whatever it says."""
    return issubclass(type(thing), Session)


def tie_of(session: Session) -> Tie | None:
    """Return the tie of `session`, or None where it has none."""
    return session.__dict__.get(TIE)


def check_own(session: Session, scope: Scope | None) -> None:
    """Check that a session that is new here is not that of another scope.

    Args:
        session: what a factory has made, or ``registry.set()`` was given.
        scope: that it is to belong to; None outside of any.

    Raises:
        RopeError: two would share it, and one of them commit and close for the other.
    """
    tie = tie_of(session)
    other = None if tie is None else tie.scope
    if other is None or other is scope or is_over(other):
        return
    raise RopeError(
        f"This session is that of {other.name!r}, which is still open: the two would commit and "
        "close for one another. A session factory returns a new session each time: give the "
        "sessionmaker itself, as in SessionJenny(sessionmaker(engine)). And registry.set() takes "
        "a session that is in no scope."
    )


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
