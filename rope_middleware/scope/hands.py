"""How what blocks or awaits is carried out, while a scope commits or ends.

`Here` works in this thread, `Async` on the event loop and in worker threads, `InThread` all in one
worker thread, `Closing` where a coroutine is being closed and nothing can be awaited any more.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeAlias, TypeVar

from rope_middleware.errors import RopeError
from rope_middleware.running.finish import within
from rope_middleware.running.threads import in_app_thread, in_thread
from rope_middleware.scope.context import is_async_callable
from rope_middleware.scope.kind import SessionKey, SessionKind
from rope_middleware.scope.options import DEFAULT

__all__ = ["CLOSING", "HERE", "Async", "Hands", "InThread", "Work", "run_now"]

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

    async def use(self, kind: SessionKind, call: _Call, session: Any) -> None:
        """Flush or commit: functions of the application may run, and the pool be waited for."""

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

    async def use(self, kind: SessionKind, call: _Call, session: Any) -> None:  # noqa: ARG002
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

    async def use(self, kind: SessionKind, call: _Call, session: Any) -> None:
        if kind.is_async:
            await call(session)
        else:
            await in_app_thread(call, session)

    async def release(self, kind: SessionKind, call: _Call, session: Any) -> None:
        if kind.is_async:
            await within(self._close_timeout, call(session))
        else:
            await in_thread(call, session)

    async def run(self, fn: Callable[[], Any], limited: bool = False) -> None:
        result = fn() if is_async_callable(fn) else await in_app_thread(lambda _: fn(), None)
        if inspect.isawaitable(result):  # also of a lambda around an async function
            await (within(self._close_timeout, result) if limited else result)


class InThread(Here):
    """Carries everything out in a worker thread of an event loop, which awaits what is async."""

    def __init__(self, loop: asyncio.AbstractEventLoop, close_timeout: float) -> None:
        self._loop = loop
        self._close_timeout = close_timeout
        self.is_left = False
        """Whether nobody waits for this thread any more: it commits nothing else."""

    def takes(self, work: Work) -> Work:
        return work

    async def use(self, kind: SessionKind, call: _Call, session: Any) -> None:
        if self.is_left:
            raise RopeError("its request was cancelled, and has ended meanwhile")
        result = call(session)
        if kind.is_async:
            self._await(result)

    async def release(self, kind: SessionKind, call: _Call, session: Any) -> None:
        result = call(session)
        if kind.is_async:
            self._await(within(self._close_timeout, result))

    async def run(self, fn: Callable[[], Any], limited: bool = False) -> None:  # noqa: ARG002
        result = fn()
        if inspect.isawaitable(result):
            self._await(result)

    def _await(self, work: Awaitable[Any]) -> None:
        async def wait() -> None:
            await work

        asyncio.run_coroutine_threadsafe(wait(), self._loop).result()


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
