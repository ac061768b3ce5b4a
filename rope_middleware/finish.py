"""Running work to its end from async code: past cancellation, and off the event loop.

Knows neither scopes nor sessions. anyio is imported when it is first needed, so that an
application without async code never loads it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

__all__ = ["finish", "in_thread", "is_async_running", "running_loop", "within"]

_T = TypeVar("_T")

# The event loop holds tasks weakly. One that is still ending something must stay alive even
# where its waiter is gone. https://docs.python.org/3/library/asyncio-task.html#creating-tasks
_ending: set[asyncio.Task[Any]] = set()


def running_loop() -> object:
    """Return what stands for the running event loop: asyncio's own, or None (trio, no loop)."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def is_async_running() -> bool:
    """Tell whether the caller runs in a task of asyncio, or in trio."""
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        trio = sys.modules.get("trio")
        return trio is not None and trio.lowlevel.in_trio_task()


async def finish(work: Coroutine[Any, Any, _T], grace: float | None = None) -> _T:
    """Await `work` to its end, however often the caller is cancelled meanwhile.

    A plain ``asyncio.shield`` returns at the first cancellation and leaves the work behind.
    Here the caller comes back only when the work is done, and is then cancelled.

    Args:
        work: what has to come to its end.
        grace: seconds that the work has left after the first cancellation, before it is
            cancelled itself; None for no limit.

    Returns:
        What `work` returned.

    Raises:
        asyncio.CancelledError: the caller was cancelled; the work has ended all the same.
        BaseException: what `work` raised.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        # trio: every cancellation comes from a cancel scope, so a shield stops all of them.
        with _shield():
            return await work
    task = loop.create_task(work)
    _ending.add(task)
    task.add_done_callback(_ending.discard)
    cancelled = await _wait(loop, task)
    if cancelled is not None:
        timer = None if grace is None else loop.call_later(grace, task.cancel)
        # anyio cancels a task again at every turn of the loop until it has left the
        # cancelled scope: without the shield this would spin.
        with _shield():
            while not task.done():
                await _wait(loop, task)
        if timer is not None:
            timer.cancel()
        if not task.cancelled():
            task.exception()  # retrieved: cancellation is what the caller has to hear
        try:
            raise cancelled
        finally:
            del cancelled  # its traceback refers to this frame
    return task.result()


async def _wait(
    loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]
) -> asyncio.CancelledError | None:
    """Wait for `task` without raising its outcome; return the cancellation that came instead."""
    done = loop.create_future()

    def wake(_: asyncio.Task[Any]) -> None:
        if not done.done():
            done.set_result(None)

    task.add_done_callback(wake)
    try:
        await done
    except asyncio.CancelledError as error:
        task.remove_done_callback(wake)
        return error
    return None


def _shield() -> AbstractContextManager[object]:
    """Return a context in which no anyio or trio cancel scope outside of it is felt."""
    if "anyio" not in sys.modules and "trio" not in sys.modules:
        return nullcontext()
    import anyio

    return anyio.CancelScope(shield=True)


async def within(seconds: float, work: Awaitable[_T]) -> _T:
    """Await `work` for at most `seconds`; cheaper than ``asyncio.timeout``.

    Only for code that runs in a task of its own (see `finish`), because the whole task is
    cancelled.

    Raises:
        TimeoutError: the time was up.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - no user input: `finish` has made the task
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        return await work
    except asyncio.CancelledError:
        if expired:
            task.uncancel()
            raise TimeoutError(f"gave up after {seconds} seconds") from None
        raise
    finally:
        timer.cancel()


async def in_thread(func: Callable[..., _T], *args: object) -> _T:
    """Call `func` in a worker thread that needs no token of anyio's shared limiter.

    The shared tokens are held by handlers that may be waiting for the very connection that
    this call is about to give back. A limiter of its own for each call cannot run out; the
    number of threads is bounded by the number of connections that are checked out.
    """
    import anyio
    import anyio.to_thread

    return await anyio.to_thread.run_sync(func, *args, limiter=anyio.CapacityLimiter(1))
