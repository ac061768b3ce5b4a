"""Calls in worker threads: what blocks leaves the event loop, at most 40 threads for each loop.

Under asyncio the threads are our own (`_Worker`): each request that leaves a transaction open, or
that has it committed, waits for one such hop, and anyio's own takes more than twice as long (73 us
against 172 us). Under trio they are anyio's. Which call waits for which is told in `places`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from rope_middleware.running.anyio_threads import in_anyio_thread, into_anyio_thread
from rope_middleware.running.call import Call
from rope_middleware.running.finish import finish
from rope_middleware.running.forks import at_fork
from rope_middleware.running.places import COMMITS, NEEDS, RELEASES, WRITES, Limiter, Places

__all__ = [
    "COMMITS",
    "NEEDS",
    "WRITES",
    "finish_in_thread",
    "in_app_thread",
    "in_thread",
    "there_and_back",
]

_T = TypeVar("_T")

IDLE_SECONDS = 10.0  # a worker thread without work is kept so long


async def in_thread(func: Callable[[Any], _T], argument: Any) -> _T:
    """Call `func`, which gives a connection back, in a worker thread.

    It needs no token of anyio's shared limiter. Handlers hold those tokens, and they may be
    waiting for the very connection that this call is about to give back.

    Under asyncio `func` cannot use ``anyio.from_thread``: see `in_app_thread`.
    """
    call = _started(func, argument, RELEASES)
    return await (call or in_anyio_thread(func, argument, RELEASES))


async def in_app_thread(func: Callable[[Any], _T], argument: Any, places: Places = NEEDS) -> _T:
    """`in_thread`, for code of the application: it may wait, and use ``anyio.from_thread``.

    Args:
        func: what is called.
        argument: of it.
        places: COMMITS, WRITES or NEEDS.
    """
    call = _started(func, argument, places)
    return await (call or in_anyio_thread(func, argument, places))


async def finish_in_thread(
    func: Callable[[Any], _T], argument: Any, grace: float | None, places: Places = RELEASES
) -> _T:
    """Finish `in_thread`, or `in_app_thread`, however often the caller is cancelled meanwhile.

    It is `finish` without the price of a task. When the grace is over the caller goes on, and the
    thread comes to its end without it.
    """
    call = _started(func, argument, places)
    if call is None:
        return await finish(in_anyio_thread(func, argument, places), grace)
    try:
        result: _T = await call
    except asyncio.CancelledError:
        await call.outlast(grace)
        raise
    return result


async def there_and_back(
    func: Callable[[Any], _T], argument: Any, grace: float | None, places: Places
) -> tuple[_T, asyncio.CancelledError | None]:
    """`finish_in_thread`, for what raises nothing: its result is not lost to a cancellation.

    Only under asyncio.

    Returns:
        What `func` returned, and the cancellation that came meanwhile.

    Raises:
        asyncio.CancelledError: the grace is over, and nobody knows what becomes of the call.
        RuntimeError: no thread could be started.
    """
    call = _started(func, argument, places)
    if call is None:
        return await finish(in_anyio_thread(func, argument, places), grace), None
    try:
        return await call, None
    except asyncio.CancelledError as cancelled:
        await call.outlast(grace)
        if not call.has_ended:
            raise
        return call.result(), cancelled
    finally:
        call.outcome = None  # an error that it has returned refers to the call by its traceback


# -- asyncio: threads of our own -----------------------------------------------------------------


_Limiters = dict[str, Limiter[Call]]
_limiters: WeakKeyDictionary[asyncio.AbstractEventLoop, _Limiters] = WeakKeyDictionary()

# Threads without work, the last to be free on the right. They hold nothing of a request, so they
# serve every event loop of the process.
_idle: deque[_Worker] = deque()


def _end_idle() -> None:
    with suppress(IndexError):
        while True:
            worker = _idle.pop()
            worker.calls.put(None)
            worker.join()


# A forked process has none of its parent's threads, and Python warns of a fork beside them: those
# without work end before it.
at_fork(before=_end_idle, after_in_child=_idle.clear)


def _started(func: Callable[[Any], Any], argument: Any, places: Places) -> Call | None:
    """Start a call in a thread of our own; None where anyio's have to make it."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return None
    if places is not RELEASES:
        into = into_anyio_thread()
        if into is None:
            return None
        func, argument = into, (loop, func, argument)
    limiters = _limiters.get(loop)
    if limiters is None:
        kinds = RELEASES, NEEDS, COMMITS
        limiters = {one.name: Limiter(one, _hand_over, Call.fail) for one in kinds}
        _limiters[loop] = limiters
    limiter = limiters[places.name]
    call = Call(loop, limiter, places, func, argument)
    limiter.enter(call, places)
    return call


def _hand_over(call: Call) -> None:
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
        # Python 3.14 may have it inherit a context: the request's, and the scope in it.
        Context().run(worker.start)
    worker.calls.put(call)


class _Worker(threading.Thread):
    """Makes one call after the other, and ends when there has been none for a while."""

    def __init__(self) -> None:
        # A daemon, so that an idle one does not keep the process. What is under way is waited for
        # by its event loop, which ends before the process does.
        try:
            super().__init__(name="rope_middleware", daemon=True)
        except RuntimeError:  # isolated subinterpreters refuse daemons, and wait for all others
            super().__init__(name="rope_middleware", daemon=False)
        from queue import SimpleQueue  # here: it is 0.5 ms of the import

        self.calls: SimpleQueue[Call | None] = SimpleQueue()

    def run(self) -> None:
        from queue import Empty

        seconds = IDLE_SECONDS if self.daemon else 0.01
        while True:
            try:
                call = self.calls.get(timeout=seconds)
            except Empty:
                try:
                    _idle.remove(self)
                except ValueError:
                    continue  # taken in this instant: a call is on its way
                return
            if call is None:
                return
            call.make()
            _idle.append(self)  # before the way back: the woken task may need a worker at once
            call.go_back()
            del call  # an idle thread keeps nothing alive
