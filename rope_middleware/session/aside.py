"""The commit has its sessions for itself, also from who has kept one (C10).

Who asks a jenny meanwhile gets another session (see `settling`). But the application may have kept
the commit's own one: ``session = jenny.session`` in the view, for the body's generator. So in a
scope that commits while its application goes on, the methods of a session are guarded: a call waits
for a commit that is under way, and the commit waits for calls that are under way.

The guards are put on the session itself, which takes 1.5 us; on its class they would cost every use
of every session. They do not refer to it: that would be a cycle.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from weakref import ReferenceType, ref

from sqlalchemy.orm import Session

from rope_middleware.scope.scope import Scope
from rope_middleware.scope.settling import calls_of, must_wait_for
from rope_middleware.session.turns import wait_for_commit

__all__ = ["guard", "is_guard", "is_guarded"]

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


class _Guard:
    """A method of a session, in front of the session's own."""

    __slots__ = ("_calls", "_name", "_scope", "_session")

    def __init__(
        self, session: ReferenceType[Session], name: str, scope: Scope, calls: list[object]
    ) -> None:
        self._session = session
        self._name = name
        self._scope = scope
        self._calls = calls

    def __call__(self, *args: Any, **named: Any) -> Any:
        session = self._session()
        assert session is not None  # noqa: S101 - who calls its method has it
        method = getattr(type(session), self._name)
        calls, who = self._calls, _strand()
        if who in calls:  # a call within a call: the commit waits for the outer one
            return method(session, *args, **named)
        # Order matters. We note the call, then look for a commit; a commit makes itself known, then
        # looks for calls. So one of the two sees the other.
        calls.append(who)
        if must_wait_for(self._scope) is not None:
            calls.remove(who)
            wait_for_commit(self._scope)
            calls.append(who)
        try:
            return method(session, *args, **named)
        finally:
            calls.remove(who)


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


def is_guard(method: object) -> bool:
    """Tell whether `method` of a session is the session's own one behind a guard."""
    return isinstance(method, _Guard)


def is_guarded(session: Session) -> bool:
    """Tell whether calls on `session` wait for commits."""
    return isinstance(session.__dict__.get("flush"), _Guard)
