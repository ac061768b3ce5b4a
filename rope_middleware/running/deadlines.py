"""Work that may take only so long: cheaper than a timer for each.

Knows neither scopes nor sessions. anyio is imported when it is first needed, as in `finish`.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Awaitable
from contextlib import suppress
from contextvars import Context
from inspect import CORO_CREATED, getcoroutinestate, iscoroutine
from time import monotonic
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

__all__ = [
    "LATE",
    "Looks",
    "OutOfTimeError",
    "deadlines",
    "ending",
    "has_ended",
    "limit",
    "look_at_deadlines",
    "see_to_next",
    "why_cut_off",
    "within",
]

_T = TypeVar("_T")


class OutOfTimeError(TimeoutError):
    """Work was cut off because it took too long; see `within`."""


async def within(seconds: float, work: Awaitable[_T]) -> _T:
    """Await `work` for at most `seconds`; cheaper than ``asyncio.timeout``.

    Only for code that runs in a task of its own (see `finish`), because the whole task is
    cancelled.

    Raises:
        OutOfTimeError: the time was up.
    """
    try:
        task = limit(seconds)
    except RuntimeError:  # trio
        import anyio

        with anyio.move_on_after(seconds):
            return await work
        raise OutOfTimeError(f"gave up after {seconds} seconds") from None
    try:
        return await work
    except asyncio.CancelledError as error:
        why = why_cut_off(error, seconds)
        if why is error:
            raise
        raise why from None
    finally:
        deadlines.pop(task, None)
        del task  # it may be about to keep an error, whose traceback refers to this frame


def limit(seconds: float) -> asyncio.Task[Any]:
    """Let the running task, which does nothing else, have so many seconds from now on.

    Then it is cancelled: see `why_cut_off`.

    Returns:
        The task. It is taken out of `deadlines` at the end of the work.

    Raises:
        RuntimeError: no event loop of asyncio's is running.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task(loop)
    assert task is not None  # noqa: S101 - no user input: `finish` has made the task
    now = monotonic()
    deadlines[task] = deadline = now + seconds
    # Order matters. We note the task, then ask for the next look; who looks says when the next one
    # will be, then goes through the tasks. So one of the two sees to it.
    if not now - LATE < Looks.next <= deadline:
        see_to_next(loop)
    return task


def why_cut_off(error: BaseException, seconds: float) -> BaseException:
    """Return what has cut off the running task's work: `error` itself, or that its time was up."""
    if isinstance(error, asyncio.CancelledError):
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        if task is None or task in deadlines:
            return error
        task.uncancel()
    else:
        # Under trio `finish` has shielded the work from whatever else would cancel it.
        trio = sys.modules.get("trio")
        if trio is None or not isinstance(error, trio.Cancelled):
            return error
    late = OutOfTimeError(f"gave up after {seconds} seconds")
    return late.with_traceback(error.__traceback__)


LATE = 1.0  # seconds after which a look that has not come is not counted on any more


class Looks:
    """When the `ticker` looks at the deadlines."""

    next: ClassVar[float] = -math.inf
    """By `time.monotonic`; none is to come where that is long ago. Not by the loop's clock:
    uvloop's stands still while the loop waits."""


# Not by the event loop: to find its own would be two calls more for each session that is closed.
deadlines: dict[asyncio.Task[Any], float] = {}
"""Tasks of all event loops, each with the time at which it is cancelled and taken out."""


ending: dict[asyncio.Task[Any], asyncio.Future[None]] = {}
"""Tasks that are ending something, each with what its waiter awaits: see `finish`."""


def has_ended(task: asyncio.Task[Any]) -> None:
    """Wake the waiter of a task that is done, if the task has not."""
    deadlines.pop(task, None)
    ended = ending.pop(task, None)
    if ended is not None and not ended.done():  # it was cancelled before its first step
        ended.set_result(None)


def see_to_next(loop: asyncio.AbstractEventLoop) -> None:
    """Set a timer in `loop` for its first task that is due, unless there is a look before."""
    timer = _timers.get(loop)
    if timer is None:
        timer = _timers[loop] = _Timer()
    timer.set(loop)


class _Timer:
    """What has to be done by when in one event loop, under one timer for all.

    A timer for each costs 6 to 12 us more, and one that is there at all 3 % of a request: asyncio
    computes its wait for the next timer at each turn of the loop. So what is due after the next
    look of the `ticker` is left to that look.
    """

    def __init__(self) -> None:
        self._wakes_at = math.inf

    def set(self, loop: asyncio.AbstractEventLoop) -> None:
        """See `see_to_next`."""
        deadline = min((due for _, due in _noted(loop)), default=math.inf)
        now = monotonic()
        if deadline < self._wakes_at and not now - LATE < Looks.next <= deadline:
            self._wakes_at = deadline
            # The handle is not kept: it refers to the loop, which would then live as long. An empty
            # context: one timer follows from the other, and would keep the first request's.
            loop.call_later(deadline - now, self._wake, deadline, context=Context())

    def _wake(self, now: float) -> None:
        if now != self._wakes_at:
            return  # an earlier one came in between, and has seen to the next
        self._wakes_at = math.inf
        loop = asyncio.get_running_loop()
        for task, deadline in _noted(loop):
            if deadline > now:
                continue
            if _has_begun(task):
                del deadlines[task]
                if not task.cancel():
                    has_ended(task)
            else:
                # Something has blocked the loop, and uvloop calls timers before what is ready. Its
                # work is to give back a connection: cancelled now, it would not even begin.
                deadlines[task] = now + LATE
        self.set(loop)


_timers: WeakKeyDictionary[asyncio.AbstractEventLoop, _Timer] = WeakKeyDictionary()


def _noted(loop: asyncio.AbstractEventLoop | None = None) -> list[tuple[asyncio.Task[Any], float]]:
    """Return the tasks of `loop`, or of all, and when each is due."""
    while True:
        try:
            noted = list(deadlines.items())
        except RuntimeError:  # another thread has changed it meanwhile
            continue
        return noted if loop is None else [one for one in noted if one[0].get_loop() is loop]


def _has_begun(task: asyncio.Task[Any]) -> bool:
    work = task.get_coro()
    return not iscoroutine(work) or getcoroutinestate(work) != CORO_CREATED


def look_at_deadlines(next_look: float) -> None:
    """See to what is due before the next look. Called again and again, in a thread of its own.

    Args:
        next_look: when this will be called again, by `time.monotonic`; minus infinity for never.
    """
    Looks.next = next_look
    first: dict[asyncio.AbstractEventLoop, float] = {}
    for task, deadline in _noted():
        loop = task.get_loop()
        first[loop] = min(deadline, first.get(loop, math.inf))
    for loop, deadline in first.items():
        if not monotonic() - LATE < next_look <= deadline:
            with suppress(RuntimeError):  # the loop is closed: nothing goes on in it
                loop.call_soon_threadsafe(see_to_next, loop, context=Context())
