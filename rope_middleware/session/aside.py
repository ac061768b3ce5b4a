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
import threading
from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, ref

from sqlalchemy.orm import Session, SessionTransaction

from rope_middleware.scope.scope import Scope
from rope_middleware.scope.settling import calls_of, must_wait_for
from rope_middleware.session.turns import wait_for_commit

__all__ = ["guard", "guard_transaction", "in_turn", "is_guard", "is_guarded"]

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
    "begin",
    "begin_nested",
    "refresh",
)


# What ends the transaction of a `begin()` block, and of a savepoint: by no method of the session.
_ENDS = ("commit", "rollback", "close")


class _Guard:
    """A method of a session or of its transaction, in front of its own."""

    __slots__ = ("_name", "_of", "calls", "scope")

    def __init__(
        self, of: ReferenceType[Any], name: str, scope: Scope, calls: list[object]
    ) -> None:
        self._of = of
        self._name = name
        self.scope = scope
        self.calls = calls

    def __call__(self, *args: Any, **named: Any) -> Any:
        of = self._of()
        assert of is not None  # noqa: S101 - who calls its method has it
        method: Callable[..., Any] = getattr(of.__class__, self._name)
        calls, who = self.calls, _strand()
        if who in calls:  # a call within a call: the commit waits for the outer one
            return method(of, *args, **named)
        # Order matters. We note the call, then look for a commit; a commit makes itself known, then
        # looks for calls. So one of the two sees the other.
        calls.append(who)
        try:
            if must_wait_for(self.scope) is not None:
                calls.remove(who)
                try:
                    wait_for_commit(self.scope)
                finally:
                    calls.append(who)
                if isinstance(of, SessionTransaction) and _is_over(of):
                    return None
            return method(of, *args, **named)
        finally:
            calls.remove(who)


def _is_over(transaction: SessionTransaction) -> bool:
    """Tell whether a transaction has been ended, by the commit that was waited for."""
    session = transaction.session
    one = session.get_nested_transaction()
    while one is not None and one is not transaction:
        one = one.parent
    return one is None and session.get_transaction() is not transaction


def _strand() -> object:
    """Return who is running: a task of asyncio, or a thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident() if task is None else task


def guard(session: Session, scope: Scope) -> None:
    """Let calls on `session` and commits of `scope` wait for each other."""
    own = session.__dict__
    if "flush" not in own:
        this, calls = ref(session), calls_of(scope)
        for name in _METHODS:
            if name not in own:  # else the application's own: nobody knows what it does
                own[name] = _Guard(this, name, scope, calls)


def guard_transaction(session: Session, transaction: SessionTransaction) -> None:
    """Let the end of `transaction`, where its session is guarded, and commits wait, too."""
    flush = session.__dict__.get("flush")
    if isinstance(flush, _Guard):
        this, own = ref(transaction), transaction.__dict__
        for name in _ENDS:
            own[name] = _Guard(this, name, flush.scope, flush.calls)


def in_turn(session: Session, call: Callable[[Session], None]) -> None:
    """Make `call`, which uses `session`, as if it were one of its methods."""
    flush = session.__dict__.get("flush")
    if not isinstance(flush, _Guard):
        call(session)
        return
    calls, who = flush.calls, _strand()
    wait_for_commit(flush.scope)
    calls.append(who)
    try:
        call(session)
    finally:
        calls.remove(who)


def is_guard(method: object) -> bool:
    """Tell whether `method` of a session is the session's own one behind a guard."""
    return isinstance(method, _Guard)


def is_guarded(session: Session) -> bool:
    """Tell whether calls on `session` wait for commits."""
    return isinstance(session.__dict__.get("flush"), _Guard)
