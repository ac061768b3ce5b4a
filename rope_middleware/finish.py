"""Running work to its end from async code: past cancellation, and off the event loop.

Knows neither scopes nor sessions. anyio is imported when it is first needed, so that an
application without async code never loads it.

Under asyncio, work goes to threads of its own (`_Worker`): each request that leaves a transaction
open waits for one such hop, and anyio's own takes more than twice as long.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import Context, copy_context
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

__all__ = [
    "finish",
    "finish_in_thread",
    "in_anyio_thread",
    "in_thread",
    "is_async_running",
    "running_loop",
    "within",
]

_T = TypeVar("_T")

_Call = tuple[Context, Callable[[Any], Any], Any, asyncio.Future[Any]]

IDLE_SECONDS = 10.0
"""How long a worker thread that has nothing to do is kept."""

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
    return await _to_end(loop, task, grace)


async def _to_end(
    loop: asyncio.AbstractEventLoop, work: asyncio.Future[_T], grace: float | None
) -> _T:
    """Wait for a task or future that is under way. See `finish`."""
    cancelled = await _wait(loop, work)
    if cancelled is not None:
        timer = None if grace is None else loop.call_later(grace, work.cancel)
        # anyio cancels a task again at every turn of the loop until it has left the
        # cancelled scope: without the shield this would spin.
        with _shield():
            while not work.done():
                await _wait(loop, work)
        if timer is not None:
            timer.cancel()
        if not work.cancelled():
            work.exception()  # retrieved: cancellation is what the caller has to hear
        try:
            raise cancelled
        finally:
            del cancelled  # its traceback refers to this frame
    return work.result()


async def _wait(
    loop: asyncio.AbstractEventLoop, work: asyncio.Future[Any]
) -> asyncio.CancelledError | None:
    """Wait for `work` without raising its outcome; return the cancellation that came instead."""
    done = loop.create_future()

    def wake(_: asyncio.Future[Any]) -> None:
        if not done.done():
            done.set_result(None)

    work.add_done_callback(wake)
    try:
        await done
    except asyncio.CancelledError as error:
        work.remove_done_callback(wake)
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
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # trio
        import anyio

        with anyio.fail_after(seconds):
            return await work
    task = asyncio.current_task(loop)
    assert task is not None  # noqa: S101 - no user input: `finish` has made the task
    deadlines = _deadlines.get(loop)
    if deadlines is None:
        deadlines = _deadlines[loop] = _Deadlines()
    deadlines.add(task, loop, seconds)
    try:
        return await work
    except asyncio.CancelledError:
        if task in deadlines.tasks:
            raise
        task.uncancel()
        raise TimeoutError(f"gave up after {seconds} seconds") from None
    finally:
        deadlines.tasks.pop(task, None)


class _Deadlines:
    """What has to be done by when in one event loop, under one timer for all.

    A timer for each would cost more than all else that ends an AsyncSession here: asyncio
    computes its wait for the next timer at each turn of the loop.
    """

    def __init__(self) -> None:
        self.tasks: dict[asyncio.Task[Any], float] = {}
        """Each with the time, of the loop's clock, at which it is cancelled and taken out."""
        self._wakes_at = math.inf

    def add(self, task: asyncio.Task[Any], loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self.tasks[task] = deadline = loop.time() + seconds
        self._wake_by(deadline, loop)

    def _wake_by(self, deadline: float, loop: asyncio.AbstractEventLoop) -> None:
        if deadline < self._wakes_at:
            self._wakes_at = deadline
            # The handle is not kept: it refers to the loop, which would then live as long. An
            # empty context: one timer follows from the other, and would keep the first request's.
            loop.call_at(deadline, self._wake, deadline, context=Context())

    def _wake(self, now: float) -> None:
        if now != self._wakes_at:
            return  # an earlier one came in between, and has seen to the next
        self._wakes_at = math.inf
        for task, deadline in list(self.tasks.items()):
            if deadline <= now:
                del self.tasks[task]
                task.cancel()
        if self.tasks:
            self._wake_by(min(self.tasks.values()), asyncio.get_running_loop())


_deadlines: WeakKeyDictionary[asyncio.AbstractEventLoop, _Deadlines] = WeakKeyDictionary()


async def in_thread(func: Callable[[Any], _T], argument: Any) -> _T:
    """Call `func` in a worker thread that needs no token of anyio's shared limiter.

    The shared tokens are held by handlers that may be waiting for the very connection that
    this call is about to give back. The number of threads is bounded by the number of connections
    that are checked out.

    Under asyncio `func` cannot use ``anyio.from_thread``: see `in_anyio_thread`.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return await in_anyio_thread(func, argument)
    return await _start_in_thread(loop, func, argument)


async def in_anyio_thread(func: Callable[[Any], _T], argument: Any) -> _T:
    """`in_thread`, for functions of the application, which may use ``anyio.from_thread``."""
    import anyio
    import anyio.to_thread

    # A limiter of its own for each call cannot run out.
    return await anyio.to_thread.run_sync(func, argument, limiter=anyio.CapacityLimiter(1))


async def finish_in_thread(func: Callable[[Any], _T], argument: Any, grace: float | None) -> _T:
    """``finish(in_thread(func, argument), grace)``, without the price of a task.

    When the grace is over the caller goes on, and the thread comes to its end without it.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return await finish(in_anyio_thread(func, argument), grace)
    return await _to_end(loop, _start_in_thread(loop, func, argument), grace)


# -- worker threads ----------------------------------------------------------------------------

# Threads without work, the last to be free on the right. They hold nothing of a request, so they
# serve every event loop of the process.
_idle: deque[_Worker] = deque()


def _end_idle() -> None:
    with suppress(IndexError):
        while True:
            worker = _idle.pop()
            worker.calls.put(None)
            worker.join()


if hasattr(os, "register_at_fork"):
    # A forked process has none of its parent's threads, and Python warns of a fork beside them:
    # those without work end before it.
    os.register_at_fork(before=_end_idle, after_in_child=_idle.clear)


def _start_in_thread(
    loop: asyncio.AbstractEventLoop, func: Callable[[Any], _T], argument: Any
) -> asyncio.Future[_T]:
    done: asyncio.Future[_T] = loop.create_future()
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
        worker.start()
    worker.calls.put((copy_context(), func, argument, done))
    return done


class _Worker(threading.Thread):
    """Makes one call after the other, and ends when there has been none for a while."""

    def __init__(self) -> None:
        # A daemon, so that an idle one does not keep the process. What is under way is waited for
        # by its event loop, which ends before the process does.
        super().__init__(name="rope_middleware", daemon=True)
        self.calls: SimpleQueue[_Call | None] = SimpleQueue()

    def run(self) -> None:
        while True:
            try:
                call = self.calls.get(timeout=IDLE_SECONDS)
            except Empty:
                try:
                    _idle.remove(self)
                except ValueError:
                    continue  # taken in this instant: a call is on its way
                return
            if call is None:
                return
            self._make(*call)
            del call  # an idle thread keeps nothing alive

    def _make(
        self,
        context: Context,
        func: Callable[[Any], Any],
        argument: Any,
        done: asyncio.Future[Any],
    ) -> None:
        try:
            try:
                result = context.run(func, argument)
            except StopIteration as error:
                # In a future it means "done": the waiter would take it for a result, or, where
                # the future refuses it, wait for ever.
                raise RuntimeError("a call in a thread raised StopIteration") from error
        except BaseException as error:
            self._tell(done, done.set_exception, error)
            del error, done
        else:
            self._tell(done, done.set_result, result)

    def _tell(self, done: asyncio.Future[Any], tell: Callable[[Any], None], outcome: Any) -> None:
        def wake() -> None:
            if not done.done():  # the waiter's grace may be over
                tell(outcome)

        _idle.append(self)  # first: who is woken may have the next call
        with suppress(RuntimeError):  # the event loop is closed, and nobody waits
            done.get_loop().call_soon_threadsafe(wake)
