"""Calls in worker threads: what blocks leaves the event loop, at most 40 threads for each loop.

Two kinds of call are told apart. A call that *gives a connection back* ends by itself. A call that
runs *code of the application* (a commit with its listeners) may wait for a connection. The second
kind can take at most `MOST_WAITING` of the places, so the first kind never waits for the second.

Under asyncio, calls of the first kind go to threads of our own (`_Worker`): each request that
leaves a transaction open waits for one such hop, and anyio's own takes more than twice as long
(73 us against 172 us).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from rope_middleware.running.anyio_threads import in_anyio_thread, into_anyio_thread
from rope_middleware.running.finish import finish, outlast

__all__ = ["finish_in_app_thread", "finish_in_thread", "in_app_thread", "in_thread"]

_T = TypeVar("_T")

MOST = 40  # threads for each event loop
MOST_WAITING = 24  # of them, in calls that may wait for a connection
IDLE_SECONDS = 10.0  # a worker thread without work is kept so long


async def in_thread(func: Callable[[Any], _T], argument: Any) -> _T:
    """Call `func`, which gives a connection back, in a worker thread.

    It needs no token of anyio's shared limiter. Handlers hold those tokens, and they may be
    waiting for the very connection that this call is about to give back.

    Under asyncio `func` cannot use ``anyio.from_thread``: see `in_app_thread`.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return await in_anyio_thread(func, argument, MOST - MOST_WAITING)
    return await _start(loop, MOST - MOST_WAITING, func, argument).waiter  # type: ignore[no-any-return]


async def in_app_thread(func: Callable[[Any], _T], argument: Any) -> _T:
    """`in_thread`, for code of the application: it may wait, and use ``anyio.from_thread``."""
    call = _start_app_call(func, argument)
    if call is None:
        return await in_anyio_thread(func, argument, MOST_WAITING)
    return await call.waiter  # type: ignore[no-any-return]


async def finish_in_thread(func: Callable[[Any], _T], argument: Any, grace: float | None) -> _T:
    """``finish(in_thread(func, argument), grace)``, without the price of a task.

    When the grace is over the caller goes on, and the thread comes to its end without it.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return await finish(in_thread(func, argument), grace)
    call = _start(loop, MOST - MOST_WAITING, func, argument)
    try:
        return await call.waiter  # type: ignore[no-any-return]
    except asyncio.CancelledError:
        await call.outlast(loop, grace)
        raise
    finally:
        del call  # an error of `func` refers to this frame


async def finish_in_app_thread(func: Callable[[Any], _T], argument: Any, grace: float | None) -> _T:
    """`finish_in_thread`, for code of the application: see `in_app_thread`."""
    call = _start_app_call(func, argument)
    if call is None:
        return await finish(in_anyio_thread(func, argument, MOST_WAITING), grace)
    try:
        return await call.waiter  # type: ignore[no-any-return]
    except asyncio.CancelledError:
        await call.outlast(asyncio.get_running_loop(), grace)
        raise
    finally:
        del call


# -- asyncio: threads of our own -----------------------------------------------------------------


class _Line:
    """The calls of one event loop: under way, and waiting for a place. Used in its thread only."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._running = 0
        self._waiting: deque[_Call] = deque()

    def enter(self, call: _Call) -> None:
        if self._running < self._most:
            self._hand_over(call)
        else:
            self._waiting.append(call)

    def leave(self) -> None:
        """A call has ended: the next one in line takes its place."""
        self._running -= 1
        while self._waiting and self._running < self._most:
            call = self._waiting.popleft()
            try:
                self._hand_over(call)
            except BaseException as error:  # no thread could be started
                if not call.waiter.done():
                    call.waiter.set_exception(error)

    def _hand_over(self, call: _Call) -> None:
        try:
            worker = _idle.pop()
        except IndexError:
            worker = _Worker()
            worker.start()
        self._running += 1
        worker.calls.put(call)


class _Call:
    """A call on its way to a thread, and back to its event loop."""

    __slots__ = (
        "_argument",
        "_context",
        "_error",
        "_func",
        "_has_ended",
        "_line",
        "_result",
        "waiter",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        line: _Line,
        func: Callable[[Any], Any],
        argument: Any,
    ) -> None:
        self._line = line
        self._func = func
        self._argument = argument
        self._context = copy_context()
        self._result: Any = None
        self._error: BaseException | None = None
        self._has_ended = False
        self.waiter: asyncio.Future[Any] = loop.create_future()

    def make(self) -> None:
        """In the thread: call the function."""
        try:
            self._result = self._context.run(self._func, self._argument)
        except StopIteration as error:
            # In a future it means "done": the waiter would take it for a result, or, where
            # the future refuses it, wait for ever.
            self._error = RuntimeError("a call in a thread raised StopIteration")
            self._error.__cause__ = error
        except BaseException as error:
            self._error = error

    def end(self) -> None:
        """On the event loop: the call has come to its end."""
        self._has_ended = True
        self._line.leave()
        error, self._error = self._error, None
        if self.waiter.done():  # the grace is over
            return
        if error is None:
            self.waiter.set_result(self._result)
        else:
            self.waiter.set_exception(error)

    async def outlast(self, loop: asyncio.AbstractEventLoop, grace: float | None) -> None:
        """On the event loop: who waits is cancelled; let the call come to its end all the same."""
        if not self._has_ended:
            self.waiter = loop.create_future()
            await outlast(loop, self.waiter, grace)


_lines: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, _Line]] = WeakKeyDictionary()

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


def _start(
    loop: asyncio.AbstractEventLoop, most: int, func: Callable[[Any], Any], argument: Any
) -> _Call:
    lines = _lines.get(loop)
    if lines is None:
        lines = _lines[loop] = {n: _Line(n) for n in (MOST - MOST_WAITING, MOST_WAITING)}
    call = _Call(loop, lines[most], func, argument)
    lines[most].enter(call)
    return call


def _start_app_call(func: Callable[[Any], Any], argument: Any) -> _Call | None:
    """Start a call that can use ``anyio.from_thread``; None where anyio's own threads have to."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return None
    call = into_anyio_thread()
    return None if call is None else _start(loop, MOST_WAITING, call, (loop, func, argument))


class _Worker(threading.Thread):
    """Makes one call after the other, and ends when there has been none for a while."""

    def __init__(self) -> None:
        # A daemon, so that an idle one does not keep the process. What is under way is waited for
        # by its event loop, which ends before the process does.
        try:
            super().__init__(name="rope_middleware", daemon=True)
        except RuntimeError:  # isolated subinterpreters refuse daemons, and wait for all others
            super().__init__(name="rope_middleware", daemon=False)
        self.calls: SimpleQueue[_Call | None] = SimpleQueue()

    def run(self) -> None:
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
            _idle.append(self)  # before the wake-up: the woken task may need a worker at once
            try:
                call.waiter.get_loop().call_soon_threadsafe(call.end)
            except RuntimeError:  # the event loop is closed, and nobody waits
                pass
            del call  # an idle thread keeps nothing alive
