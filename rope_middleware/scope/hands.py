"""How what blocks or awaits is carried out, while a scope commits or ends.

`Here` works in this thread, `Closing` where a coroutine is being closed and nothing can be awaited
any more. `Async` (see `async_hands`) works on the event loop and in worker threads.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from rope_middleware.errors import RopeError
from rope_middleware.scope.context import is_async_callable
from rope_middleware.scope.options import DEFAULT

if TYPE_CHECKING:
    from rope_middleware.scope.kind import SessionCall, SessionKind, Work

__all__ = ["CLOSING", "HERE", "MAX_SECONDS", "TURN", "run_now", "wait_until"]

_T = TypeVar("_T")

# Seconds between two looks at a statement that is under way: the drivers have no event for its end.
TURN = 0.001

# Seconds that the end of a scope waits at most for such a statement: nobody wants it any more.
MAX_SECONDS = 1.0


def wait_until(is_free: Callable[[], bool], seconds: float) -> None:
    """Wait in this thread, not longer than so, until a statement of another one is over."""
    deadline = time.monotonic() + seconds
    while not is_free() and time.monotonic() < deadline:
        time.sleep(TURN)


class Here:
    """Carries everything out in this thread."""

    def takes(self, work: Work) -> Work:
        # A WSGI app that is mounted in an ASGI app has that one's scope.
        return [(key, session) for key, session in work if not key.kind.is_async]

    async def until(self, is_free: Callable[[], bool]) -> None:
        wait_until(is_free, DEFAULT.close_timeout)

    async def use(
        self,
        kind: SessionKind,  # noqa: ARG002
        call: SessionCall,
        session: Any,
        work: Work,  # noqa: ARG002
    ) -> None:
        call(session)

    async def release(self, kind: SessionKind, call: SessionCall, session: Any) -> None:  # noqa: ARG002
        call(session)

    async def run(self, fn: Callable[[], Any], limited: bool = False) -> None:  # noqa: ARG002
        result = fn()
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise RopeError(f"{fn!r} is async: it cannot be awaited in a sync scope.")


class Closing(Here):
    """Carries out what can be done while a coroutine is closed: async sessions are invalidated."""

    async def until(self, is_free: Callable[[], bool]) -> None:
        """Wait for nobody: this may be the event loop's thread."""

    async def release(self, kind: SessionKind, call: SessionCall, session: Any) -> None:
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
        # No name for it: from Python 3.12 on an error that it is may keep this frame, by f_back.
        return stop.value  # type: ignore[no-any-return]
    work.close()
    raise RopeError("An async function cannot be awaited in a sync scope.")
