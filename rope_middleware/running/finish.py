"""Running work to its end, however often the caller is cancelled meanwhile.

Knows neither scopes nor sessions. anyio is imported when it is first needed, so that an
application without async code never loads it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from typing import Any, Generic, NoReturn, TypeVar

__all__ = [
    "at_most",
    "finish",
    "is_async_running",
    "may_block",
    "pause",
    "running_loop",
    "shield",
]

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


def may_block() -> bool:
    """Tell whether the caller may wait in its thread: it runs no event loop."""
    return running_loop() is None and not is_async_running()


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
        with shield():
            return await work
    task = loop.create_task(work)
    _ending.add(task)
    try:
        return await _End(task)
    except asyncio.CancelledError:
        await _outlast(task, loop, grace)
        raise
    finally:
        if task.done():
            _ending.discard(task)
        else:  # the waiter itself is thrown away
            task.add_done_callback(_ending.discard)


class _End(Generic[_T]):
    """The end of a task, for another one to await: if that is cancelled, the first one is not.

    It is a future, as far as tasks ask. A future of asyncio's, and a callback to set it, would be
    120 more of Python's instructions.
    """

    _asyncio_future_blocking = False
    _wakes: tuple[Callable[[Any], object], Context]
    _why: tuple[object, ...] = ()

    def __init__(self, task: asyncio.Task[_T]) -> None:
        self._task = task

    def __await__(self) -> Generator[_End[_T], None, _T]:
        if not self._task.done():
            self._asyncio_future_blocking = True
            yield self
        return self._task.result()

    # What a task asks of a future

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._task.get_loop()

    def add_done_callback(self, wake: Callable[[Any], object], *, context: Context) -> None:
        self._wakes = wake, context
        self._task.add_done_callback(wake, context=context)

    def cancel(self, msg: object = None) -> bool:
        wake, context = self._wakes
        if not self._task.remove_done_callback(wake):
            return False  # it has ended in this turn of the loop, and wakes the waiter
        self._why = () if msg is None else (msg,)  # anyio tells its own cancellations by it
        self.get_loop().call_soon(wake, self, context=context)
        return True

    def result(self) -> NoReturn:
        """Wake the waiter to hear that it was cancelled.

        Raises:
            asyncio.CancelledError: always.
        """
        raise asyncio.CancelledError(*self._why)


async def _outlast(
    task: asyncio.Task[Any], loop: asyncio.AbstractEventLoop, grace: float | None
) -> None:
    """Wait for `task` in a caller that has been cancelled."""
    timer = None if grace is None else loop.call_later(grace, task.cancel)
    # anyio cancels a task again at every turn of the loop until it has left the
    # cancelled scope: without the shield this would spin.
    with shield():
        while not task.done():
            try:
                await _End(task)
            except asyncio.CancelledError:
                pass
            except BaseException:
                if not task.done():
                    raise
                # else the task's own: cancellation is what the caller has to hear
    if timer is not None:
        timer.cancel()
    if not task.cancelled():
        task.exception()  # retrieved: nobody will


def shield() -> AbstractContextManager[object]:
    """Return a context in which no anyio or trio cancel scope outside of it is felt."""
    if "anyio" not in sys.modules and "trio" not in sys.modules:
        return nullcontext()
    if not is_async_running():  # somebody drives the coroutine by hand: nobody can cancel it
        return nullcontext()
    import anyio

    return anyio.CancelScope(shield=True)


async def pause(seconds: float) -> None:
    """Sleep, under asyncio or trio."""
    import anyio

    await anyio.sleep(seconds)


async def at_most(seconds: float, work: Awaitable[_T]) -> _T:
    """Await `work` for at most `seconds`, in any task. `deadlines.within` is cheaper, but for some.

    Raises:
        TimeoutError: the time was up.
    """
    import anyio

    with anyio.fail_after(seconds):
        return await work
