"""How what blocks or awaits is carried out, while a scope commits or ends.

`Here` works in this thread, `Async` on the event loop and in worker threads, `Closing` where a
coroutine is being closed and nothing can be awaited any more.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeAlias, TypeVar

from rope_middleware.errors import RopeError
from rope_middleware.running.finish import within
from rope_middleware.running.places import COMMITS, NEEDS, WRITES, Places
from rope_middleware.running.threads import in_app_thread, in_thread
from rope_middleware.scope.context import is_async_callable
from rope_middleware.scope.kind import SessionKey, SessionKind
from rope_middleware.scope.options import DEFAULT

__all__ = ["CLOSING", "HERE", "Async", "Hands", "Work", "places_of", "run_now"]

_T = TypeVar("_T")
Work: TypeAlias = list[tuple[SessionKey, Any]]
_Call: TypeAlias = Callable[[Any], Any]

# Seconds between two looks at a statement that is under way: the drivers have no event for its end.
TURN = 0.001


class Hands(Protocol):
    """How what blocks or awaits is carried out."""

    def takes(self, work: Work) -> Work:
        """Return the sessions that can be committed so."""
        ...

    async def until(self, is_free: Callable[[], bool]) -> None:
        """Wait, not for ever, until a statement of somebody else's is over."""

    async def use(self, kind: SessionKind, call: _Call, session: Any, work: Work) -> None:
        """Flush or commit: functions of the application may run, and the pool be waited for.

        Args:
            kind: of the session.
            call: what is called with it.
            session: one of those that are committed.
            work: all of them.
        """

    async def release(self, kind: SessionKind, call: _Call, session: Any) -> None:
        """Roll back or close: gives a connection back."""

    async def run(self, fn: Callable[[], Any], limited: bool = False) -> None:
        """Call a function of the application's, sync or async; a limited one may not take long."""


class Here:
    """Carries everything out in this thread."""

    def takes(self, work: Work) -> Work:
        # A WSGI app that is mounted in an ASGI app has that one's scope.
        return [(key, session) for key, session in work if not key.kind.is_async]

    async def until(self, is_free: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEFAULT.close_timeout
        while not is_free() and time.monotonic() < deadline:
            time.sleep(TURN)  # noqa: ASYNC251 - here nothing is async

    async def use(
        self,
        kind: SessionKind,  # noqa: ARG002
        call: _Call,
        session: Any,
        work: Work,  # noqa: ARG002
    ) -> None:
        call(session)

    async def release(self, kind: SessionKind, call: _Call, session: Any) -> None:  # noqa: ARG002
        call(session)

    async def run(self, fn: Callable[[], Any], limited: bool = False) -> None:  # noqa: ARG002
        result = fn()
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise RopeError(f"{fn!r} is async: it cannot be awaited in a sync scope.")


class Async:
    """Awaits what is async, and sends what blocks to a thread.

    Args:
        close_timeout: seconds for each async session to give its connection back, and for each
            async function that runs at the end.
    """

    def __init__(self, close_timeout: float) -> None:
        self._close_timeout = close_timeout

    def takes(self, work: Work) -> Work:
        return work

    async def until(self, is_free: Callable[[], bool]) -> None:
        if not is_free():
            import anyio

            with anyio.move_on_after(self._close_timeout):
                while not is_free():  # noqa: ASYNC110 - there is no event to wait for
                    await anyio.sleep(TURN)

    async def use(self, kind: SessionKind, call: _Call, session: Any, work: Work) -> None:
        if kind.is_async:
            await call(session)
        else:
            await in_app_thread(call, session, places_of(kind, session, work))

    async def release(self, kind: SessionKind, call: _Call, session: Any) -> None:
        if kind.is_async:
            await within(self._close_timeout, call(session))
        else:
            await in_thread(call, session)

    async def run(self, fn: Callable[[], Any], limited: bool = False) -> None:
        result = fn() if is_async_callable(fn) else await in_app_thread(lambda _: fn(), None)
        if inspect.isawaitable(result):  # also of a lambda around an async function
            await (within(self._close_timeout, result) if limited else result)


def places_of(kind: SessionKind, session: Any, work: Work) -> Places:
    """Tell what the commit of a session may wait for, and what others wait for meanwhile."""
    if kind.holds_connection(session):
        return WRITES if kind.has_changes(session) else COMMITS
    # Where another session of its scope has a connection, somebody may be waiting for that one.
    return WRITES if any(key.kind.holds_connection(one) for key, one in work) else NEEDS


class Closing(Here):
    """Carries out what can be done while a coroutine is closed: async sessions are invalidated."""

    async def until(self, is_free: Callable[[], bool]) -> None:
        """Wait for nobody: this may be the event loop's thread."""

    async def release(self, kind: SessionKind, call: _Call, session: Any) -> None:
        if kind.is_async:
            raise RopeError("the coroutine that served it was closed before its end")
        call(session)

    async def run(self, fn: Callable[[], Any], limited: bool = False) -> None:
        if not is_async_callable(fn):
            await super().run(fn, limited)


HERE = Here()
CLOSING = Closing()


def run_now(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine that never suspends, and return its result."""
    try:
        work.send(None)
    except StopIteration as stop:
        result: _T = stop.value
        return result
    work.close()
    raise RopeError("An async function cannot be awaited in a sync scope.")
