"""Calls in worker threads: what blocks leaves the event loop, at most 40 threads for each loop.

Calls wait for one another: one for the connection that another one has, one for a row that another
one has locked. So each kind has places of its own, and what ends a wait never stands in line behind
those who wait:

- RELEASES: gives a connection back without a commit. It ends by itself.
- COMMITS: sends a COMMIT over the connection that it has, and gives it back.
- WRITES: has its connection, and may wait for a row's lock.
- NEEDS: may wait for a connection. So may the application's own functions.

Under asyncio, the first kind goes to threads of our own (`_Worker`): each request that leaves a
transaction open waits for one such hop, and anyio's own takes more than twice as long (73 us
against 172 us).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, copy_context
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from rope_middleware.running.finish import finish, to_end

__all__ = ["COMMITS", "NEEDS", "WRITES", "finish_in_thread", "in_app_thread", "in_thread"]

_T = TypeVar("_T")
_Call = tuple[Context, Callable[[Any], Any], Any, asyncio.Future[Any]]

# Threads for each event loop, 40 in all. A pool of SQLAlchemy's default size, 15, has a place for
# each of its connections.
RELEASES = 10
NEEDS = (12,)
COMMITS = (18,)
WRITES = (18, 15)  # of the places of COMMITS
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
        return await _in_anyio_thread(func, argument, _limiter(RELEASES))
    return await _start(loop, func, argument)


async def in_app_thread(
    func: Callable[[Any], _T], argument: Any, places: tuple[int, ...] = NEEDS
) -> _T:
    """`in_thread`, for code of the application: it may wait, and use ``anyio.from_thread``.

    Args:
        func: what is called.
        argument: of it.
        places: COMMITS, WRITES or NEEDS, see above.
    """
    all_of_them, *part = map(_limiter, places)
    if not part:
        return await _in_anyio_thread(func, argument, all_of_them)
    (limiter,), who = part, object()
    if limiter.available_tokens:
        limiter.acquire_on_behalf_of_nowait(who)  # saves a turn of the loop
    else:
        await limiter.acquire_on_behalf_of(who)
    try:
        return await _in_anyio_thread(func, argument, all_of_them)
    finally:
        limiter.release_on_behalf_of(who)


async def finish_in_thread(func: Callable[[Any], _T], argument: Any, grace: float | None) -> _T:
    """``finish(in_thread(func, argument), grace)``, without the price of a task.

    When the grace is over the caller goes on, and the thread comes to its end without it.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return await finish(in_thread(func, argument), grace)
    return await to_end(loop, _start(loop, func, argument), grace)


async def _in_anyio_thread(func: Callable[[Any], _T], argument: Any, limiter: Any) -> _T:
    import anyio.to_thread

    return await anyio.to_thread.run_sync(func, argument, limiter=limiter)


def _limiter(most: int) -> Any:
    """Return this event loop's limiter for so many threads."""
    import anyio
    from anyio.lowlevel import RunVar

    kept = _limiters.get(most)
    if kept is None:
        kept = _limiters.setdefault(most, RunVar(f"rope_middleware.threads.{most}"))
    limiter = kept.get(None)
    if limiter is None:
        limiter = anyio.CapacityLimiter(most)
        kept.set(limiter)
    return limiter


# Of anyio's RunVar: a value for each event loop, forgotten with it.
_limiters: dict[int, Any] = {}


# -- asyncio: threads of our own -----------------------------------------------------------------


class _Line:
    """The calls of one event loop: under way, and waiting for a place. Used in its thread only."""

    def __init__(self) -> None:
        self.running = 0
        self.waiting: deque[_Call] = deque()


_lines: WeakKeyDictionary[asyncio.AbstractEventLoop, _Line] = WeakKeyDictionary()

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
    loop: asyncio.AbstractEventLoop, func: Callable[[Any], _T], argument: Any
) -> asyncio.Future[_T]:
    done: asyncio.Future[_T] = loop.create_future()
    line = _lines.get(loop)
    if line is None:
        line = _lines[loop] = _Line()
    call = copy_context(), func, argument, done
    if line.running < RELEASES:
        _hand_over(line, call)
    else:
        line.waiting.append(call)
    return done


def _hand_over(line: _Line, call: _Call) -> None:
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
        worker.start()
    line.running += 1
    worker.calls.put(call)


def _ended(line: _Line) -> None:
    """A call of the loop has ended: the next one in line takes its place."""
    line.running -= 1
    while line.waiting and line.running < RELEASES:
        call = line.waiting.popleft()
        try:
            _hand_over(line, call)
        except BaseException as error:  # no thread could be started
            if not call[3].done():
                call[3].set_exception(error)


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
        while True:
            try:
                call = self.calls.get(timeout=IDLE_SECONDS if self.daemon else 0.01)
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
        loop = done.get_loop()

        def wake() -> None:
            if not done.done():  # the waiter's grace may be over
                tell(outcome)
            _ended(_lines[loop])

        _idle.append(self)  # before the wake-up: the woken task may need a worker at once
        with suppress(RuntimeError):  # the event loop is closed, and nobody waits
            loop.call_soon_threadsafe(wake)
