"""The commit has its sessions for itself, also from who has kept one (C10).

Who asks a jenny meanwhile gets another session (see `settling`). But the application may have kept
the commit's own one: ``session = jenny.session`` in the view, for the body's generator. So in a
scope that commits while its application goes on, the methods of a session are guarded: a call waits
for a commit that is under way, and the commit waits for calls that are under way.

The guards are put on the session itself, and on what a block begins, which takes 1.5 us; on the
class they would cost every use of every session. They do not refer to it: that would be a cycle.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable
from itertools import repeat
from threading import get_ident
from types import MethodType
from typing import Any
from weakref import ReferenceType, ref

from sqlalchemy.orm import Session, SessionTransaction

from rope_middleware.scope.asking import is_thread_of
from rope_middleware.scope.scope import Scope
from rope_middleware.scope.settling import calls_of, must_wait_for

__all__ = [
    "BY_ERROR",
    "CLOSES",
    "call_at_close",
    "commit_unguarded",
    "guard",
    "guard_transaction",
    "in_turn",
    "is_guarded",
    "note_error",
    "tell_of_close",
]

# What begins, uses or ends a transaction.
_METHODS = (
    "execute",
    "scalar",
    "scalars",
    "connection",
    "flush",
    "commit",
    "rollback",
    "close",
    "reset",
    "begin",
    "begin_nested",
    "refresh",
)

# What closes a session: what it has written is rolled back.
_CLOSING = ("close", "reset")

# What ends the transaction of a `begin()` block, and of a savepoint: by no method of the session.
_ENDS = ("commit", "rollback", "close")


class _Guards:
    """Stands in front of the methods of a session, or of its transaction: see `_in_front`."""

    __slots__ = ("_of", "calls", "scope")

    def __init__(self, of: ReferenceType[Any], scope: Scope, calls: list[object]) -> None:
        self._of = of
        self.scope = scope
        self.calls = calls

    def call(self, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        of = self._of()
        assert of is not None  # noqa: S101 - who calls its method has it
        method: Callable[..., Any] = getattr(of.__class__, name)
        calls, who = self.calls, _strand(self.scope)
        if who in calls:  # a call within a call: the commit waits for the outer one
            return method(of, *args, **named)
        # Order matters. We note the call, then look for a commit; a commit makes itself known, then
        # looks for calls. So one of the two sees the other.
        calls.append(who)
        try:
            if must_wait_for(self.scope) is not None:
                calls.remove(who)
                try:
                    _wait(self.scope)
                finally:
                    calls.append(who)
                if isinstance(of, SessionTransaction) and _is_over(of):
                    return None
            if name in _CLOSING and not isinstance(of, SessionTransaction):
                _tell(of, name)
            return method(of, *args, **named)
        finally:
            calls.remove(who)


_at_close: list[Callable[[Session, str], None]] = []


def call_at_close(func: Callable[[Session, str], None]) -> None:
    """Call `func` where the application is about to close a session of a scope that commits.

    Args:
        func: called with the session, and with what the application calls.
    """
    _at_close.append(func)


def _tell(session: Session, name: str) -> None:
    for func in _at_close:
        func(session, f"{name}()")


def _wait(scope: Scope) -> None:
    from rope_middleware.session.turns import wait_for_commit  # few ever wait

    wait_for_commit(scope)


def _is_over(transaction: SessionTransaction) -> bool:
    """Tell whether a transaction has been ended, by the commit that was waited for."""
    session = transaction.session
    one = session.get_nested_transaction()
    while one is not None and one is not transaction:
        one = one.parent
    return one is None and session.get_transaction() is not transaction


def _guarded(name: str) -> Callable[..., Any]:
    def guarded(guards: _Guards, /, *args: Any, **named: Any) -> Any:
        return guards.call(name, args, named)

    return guarded


_GUARDED = {name: _guarded(name) for name in _METHODS}


def _in_front(guards: _Guards, names: Iterable[str]) -> Iterable[tuple[str, Any]]:
    """Bind what stands in the place of these methods.

    Bound methods of one object: an object for each would take four times as long to make.
    """
    return zip(
        names, map(MethodType, map(_GUARDED.__getitem__, names), repeat(guards)), strict=False
    )


def _strand(scope: Scope) -> object:
    """Return who is running: a task of asyncio, or a thread."""
    thread = get_ident()
    if not is_thread_of(scope, thread):
        return thread  # also of another loop's task: no other task runs until its call is over
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return thread if task is None else task


def guard(session: Session, scope: Scope, handed_out: Any = None) -> None:
    """Let calls on `session` and commits of `scope` wait for each other.

    Args:
        session: what is guarded.
        scope: its own.
        handed_out: the AsyncSession around it.
    """
    own = session.__dict__
    if "flush" not in own:
        methods = _in_front(_Guards(ref(session), scope, calls_of(scope)), _METHODS)
        if own.keys().isdisjoint(_METHODS):
            own.update(methods)
        else:  # the application has put its own there: nobody knows what it does
            own.update([one for one in methods if one[0] not in own])
    if handed_out is not None and "close" not in (own := handed_out.__dict__):
        of = ref(handed_out)
        own["close"] = MethodType(_note_and_close, of)
        own.setdefault("reset", MethodType(_note_and_reset, of))


def tell_of_close(session: Session) -> None:
    """Call what waits for a ``close()``, where nothing else of a session has to be guarded."""
    own = session.__dict__
    if "close" not in own:
        of = ref(session)
        own["close"] = MethodType(_tell_and_close, of)
        own.setdefault("reset", MethodType(_tell_and_reset, of))


def _telling(name: str) -> Callable[[ReferenceType[Session]], None]:
    def tell_and_call(of: ReferenceType[Session]) -> None:
        session = of()
        assert session is not None  # noqa: S101 - who calls its method has it
        _tell(session, name)
        getattr(type(session), name)(session)

    return tell_and_call


_tell_and_close, _tell_and_reset = map(_telling, _CLOSING)


BY_ERROR = "_rope_middleware_by_error"
"""In a session's ``__dict__``: was an error being handled when its AsyncSession was closed?"""


def note_error(session: Session) -> None:
    """Note whether an error is being handled where the application closes an AsyncSession.

    SQLAlchemy closes `session`, which is within, in a greenlet, and ``async with`` in a task of its
    own: neither knows of the error.
    """
    session.__dict__[BY_ERROR] = isinstance(sys.exc_info()[1], Exception)


def _noting(name: str) -> Callable[[ReferenceType[Any]], Any]:
    def note_and_call(of: ReferenceType[Any]) -> Any:
        session: Any = of()  # who calls its method has it
        note_error(session.sync_session)
        return getattr(session.__class__, name)(session)

    return note_and_call


_note_and_close, _note_and_reset = map(_noting, _CLOSING)

CLOSES = (_GUARDED["close"], _tell_and_close, _note_and_close)
"""What may stand in front of a session's own ``close()``."""


def commit_unguarded(session: Session) -> None:
    """Commit `session` past its guard: all others wait for the commit that this is part of."""
    if getattr(session.__dict__.get("commit"), "__func__", None) is _GUARDED["commit"]:
        type(session).commit(session)
    else:
        session.commit()


def guard_transaction(session: Session, transaction: SessionTransaction) -> None:
    """Let the end of `transaction`, where its session is guarded, and commits wait, too."""
    guards = _guards_of(session)
    if guards is not None:
        own = _Guards(ref(transaction), guards.scope, guards.calls)
        transaction.__dict__.update(_in_front(own, _ENDS))


def in_turn(session: Session, call: Callable[[Session], None]) -> None:
    """Make `call`, which uses `session`, as if it were one of its methods."""
    guards = _guards_of(session)
    if guards is None:
        call(session)
        return
    calls, who = guards.calls, _strand(guards.scope)
    if must_wait_for(guards.scope) is not None:
        _wait(guards.scope)
    calls.append(who)
    try:
        call(session)
    finally:
        calls.remove(who)


def _guards_of(session: Session) -> _Guards | None:
    flush: Any = session.__dict__.get("flush")
    return flush.__self__ if _is_guard(flush) else None


def _is_guard(method: Any) -> bool:
    """Tell whether `method` of a session is the session's own one behind a guard."""
    return type(method) is MethodType and type(method.__self__) is _Guards


def is_guarded(session: Session) -> bool:
    """Tell whether calls on `session` wait for commits."""
    return _is_guard(session.__dict__.get("flush"))
