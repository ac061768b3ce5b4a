"""The commit before a response's start has the sessions for itself (C10).

The start of a response may reach the middleware while the application goes on: start and body are
sent from two tasks by `BaseHTTPMiddleware`, by bridges to WSGI, by some streams. So for as long as
that commit is under way its sessions are set aside. Who asks for one meanwhile gets another one of
the same scope, which begins only when the commit stands, and is committed at the scope's end.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import ContextVar, Token
from functools import partial
from typing import TYPE_CHECKING, Any

from rope_middleware.running.forks import lock_of_module
from rope_middleware.scope.scope import OPEN, Scope, is_request

if TYPE_CHECKING:
    from rope_middleware.scope.kind import SessionKey, SessionKind

__all__ = [
    "GUARDED",
    "READING",
    "TELLING",
    "TIED",
    "Aside",
    "Calls",
    "Settling",
    "bare_settling",
    "calls_of",
    "is_after_response",
    "may_begin",
    "must_wait_for",
    "needs",
    "needs_for_commit",
    "reset_committing",
    "set_committing",
    "settling_of",
]

# The scope whose commit the running code is part of: its listeners have the commit's own sessions.
_committing: ContextVar[Scope | None] = ContextVar("rope_middleware.committing", default=None)

# Bound once: each commit of a sync scope comes by here.
set_committing: Callable[[Scope | None], Token[Scope | None]] = _committing.set
reset_committing: Callable[[Token[Scope | None]], None] = _committing.reset


class Calls(list[object]):
    """Who is inside of a call on a guarded session of a scope: see `session.guard`."""

    __slots__ = ("settling", "thread")

    thread: int
    """That of the scope's event loop."""
    settling: Settling | None
    """The scope's, where each call looks for it: a call for each would cost as much again."""


class Aside:
    """Under what a session is kept that a commit has for itself."""

    __slots__ = ("kind",)
    kind: SessionKind


_wait_or_late = lock_of_module()  # held for the instant in which somebody is noted


class Settling:
    """One commit that is under way while its scope, or what it has left behind, goes on.

    From when it is made until its `end`, the sessions are set aside.

    Args:
        scope: whose commit.
        is_last: it is the one with which the scope ends.
        alone: under what (a SessionKey) there was one session, which is guarded and of no body. If
            there still is no other one, nothing has to be asked.
    """

    # Nearly always nobody comes meanwhile: what notes that is made where somebody does.
    _late: tuple[SessionKey, ...] = ()  # whose session was made meanwhile by somebody else
    _wakers: tuple[Callable[[], object], ...] = ()
    _has_ended = False
    _token: Token[Scope | None] | None = None
    _scope: Scope
    _aside: tuple[tuple[SessionKey, Aside, Any], ...] = ()
    is_last: bool = False

    def __init__(self, scope: Scope, is_last: bool = False, alone: Any = None) -> None:
        self._scope = scope
        if is_last:
            self.is_last = True
        # Order matters. We note the commit, then look for who counts the calls; `calls_of` makes
        # itself known, then looks for a commit. So one of the two sees the other.
        scope._settling = self
        if (calls := scope._calls) is not None:
            calls.settling = self
        sessions = scope._sessions
        if sessions is None:
            return
        work = list(sessions.items())
        asks = scope._is_async and list(sessions) != [alone]
        for key, session in work:
            if key in scope._registries or (asks and key.kind.is_of_body(session)):
                continue  # the commit leaves it alone
            aside = Aside()
            aside.kind = key.kind
            taken = sessions.pop(key, None)
            if taken is not None:  # else another thread has removed it in this instant
                sessions[aside] = taken
                self._aside = *self._aside, (key, aside, taken)
        if asks:
            for key, session in list(sessions.items()):
                key.kind.guard(session, scope)

    def __enter__(self) -> Settling:
        self._token = _committing.set(self._scope)
        return self

    def join(self) -> None:
        """Let the running code be part of the commit, in a context that is its own."""
        _committing.set(self._scope)

    def __exit__(self, *_: object) -> None:
        self.end()
        if self._token is not None:
            _committing.reset(self._token)

    def end(self) -> None:
        """Put the sessions back where nobody has another one by now; who has waited goes on."""
        scope = self._scope
        if scope._settling is not self:
            return
        scope._settling = None
        if (calls := scope._calls) is not None:
            calls.settling = None
        sessions = scope._sessions or {}
        for key, aside, session in self._aside:
            if sessions.setdefault(key, session) is session:
                sessions.pop(aside, None)
        # Order matters. We note the end, then look for who waits; who is about to wait makes itself
        # known, then looks for the end. So one of the two sees the other.
        self._has_ended = True
        for wake in self._wakers:
            wake()

    def session_for(self, key: SessionKey) -> Any:
        """Return the commit's session, to the commit's own listeners; None for a new one."""
        if self.is_ours():
            return next((session for one, _, session in self._aside if one is key), None)
        self.leave_out(key)
        return None

    def leave_out(self, key: SessionKey) -> None:
        """Do not commit the session of `key`: somebody else has made it meanwhile."""
        with _wait_or_late:
            self._late = *self._late, key

    def takes(self, key: SessionKey) -> bool:
        """Tell whether the session of `key` belongs to this commit."""
        return key not in self._late

    def is_ours(self) -> bool:
        """Tell whether the running code is part of the commit."""
        return _committing.get() is self._scope

    def wait(self, seconds: float) -> None:
        """Wait in this thread until the commit has ended."""
        ended = threading.Event()
        self._call_at_end(ended.set)
        if not self._has_ended:
            ended.wait(seconds)

    def _call_at_end(self, wake: Callable[[], object]) -> None:
        with _wait_or_late:
            self._wakers = *self._wakers, wake

    def waiter(self) -> asyncio.Future[None]:
        """Return a future that is done when the commit has ended."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._call_at_end(lambda: loop.call_soon_threadsafe(_wake, waiter))
        if self._has_ended:
            _wake(waiter)
        return waiter


bare_settling: Callable[[], Settling] = partial(object.__new__, Settling)  # see `ending.commit`


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def calls_of(scope: Any) -> Calls:
    """Return who is inside of a call on a guarded session of `scope`."""
    calls: Calls | None = scope._calls
    if calls is None:
        made = Calls()
        made.thread = scope._thread if scope._is_async else 0
        made.settling = None
        found: Calls = scope.__dict__.setdefault("_calls", made)  # two threads may come at once
        found.settling = scope._settling
        return found
    return calls


# What a session of a scope is besides being tied to it.
TIED, TELLING, GUARDED, READING = range(4)


def needs(scope: Scope) -> int:
    """Tell what a session of `scope` needs: nothing more, to tell of its close(), or a guard.

    READING where it may be one that only reads: then it is asked more.
    """
    options = scope._options
    if options.read_only:
        return READING
    if not options.commit_on_success:
        return TIED
    return GUARDED if scope._is_async else TELLING


def needs_for_commit(scope: Scope) -> int:
    """Tell what a session of `scope` needs, whether it reads or writes."""
    if not scope._options.commit_on_success:
        return TIED
    return GUARDED if scope._is_async else TELLING  # an async one may go on meanwhile


def settling_of(scope: Scope) -> Settling | None:
    """Return the commit that is under way in `scope`, or None."""
    settling: Settling | None = scope._settling
    return settling


def may_begin(scope: Scope) -> bool:
    """Tell whether a session may begin in `scope` at once: it is open, no commit is under way."""
    return scope._state == OPEN and scope._settling is None


def is_after_response(scope: Scope) -> bool:
    """Tell whether a commit of `scope` is of what was done after its response's start."""
    is_http = is_request(scope) and not scope._is_accepted
    return is_http and (scope._settling is None or scope._settling.is_last)


def must_wait_for(scope: Scope) -> Settling | None:
    """Return the commit that has to stand before the running code may begin something."""
    settling: Settling | None = scope._settling
    return None if settling is None or settling.is_ours() else settling
