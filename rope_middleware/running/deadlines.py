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
from time import monotonic
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

__all__ = [
    "OutOfTimeError",
    "limit",
    "look_at_deadlines",
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
        deadlines, task = limit(seconds)
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


def limit(seconds: float) -> tuple[dict[asyncio.Task[Any], float], asyncio.Task[Any]]:
    """Let the running task, which does nothing else, have so many seconds from now on.

    Then it is cancelled: see `why_cut_off`.

    Returns:
        Where that is noted, and under what. It is taken out at the end of the work.

    Raises:
        RuntimeError: no event loop of asyncio's is running.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task(loop)
    assert task is not None  # noqa: S101 - no user input: `finish` has made the task
    deadlines = _deadlines.get(loop)
    if deadlines is None:
        deadlines = _deadlines[loop] = _Deadlines()
    now, tasks = monotonic(), deadlines.tasks
    tasks[task] = deadline = now + seconds
    # Order matters. We note the task, then ask for the next look; who looks says when the next one
    # will be, then goes through the tasks. So one of the two sees to it.
    if not now - LATE < deadlines.next_look <= deadline:
        deadlines.see_to_next(loop)
    return tasks, task


def why_cut_off(error: BaseException, seconds: float) -> BaseException:
    """Return what has cut off the running task's work: `error` itself, or that its time was up."""
    if isinstance(error, asyncio.CancelledError):
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        if task is None or task in _deadlines[loop].tasks:
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


class _Deadlines:
    """What has to be done by when in one event loop, under one timer for all.

    A timer for each costs 6 to 12 us more, and one that is there at all 3 % of a request: asyncio
    computes its wait for the next timer at each turn of the loop. So what is due after the next
    look of the `ticker` is left to that look.
    """

    next_look: ClassVar[float] = -math.inf
    """When the ticker looks again, by `time.monotonic`; none is to come where that is long ago.
    Not by the loop's clock: uvloop's stands still while the loop waits."""

    def __init__(self) -> None:
        self.tasks: dict[asyncio.Task[Any], float] = {}
        """Each with the time at which it is cancelled and taken out."""
        self._wakes_at = math.inf

    def see_to_next(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set a timer for the first that is due, unless there is a look before."""
        deadline, now = min(self.tasks.values(), default=math.inf), monotonic()
        if deadline < self._wakes_at and not now - LATE < self.next_look <= deadline:
            self._wakes_at = deadline
            # The handle is not kept: it refers to the loop, which would then live as long. An empty
            # context: one timer follows from the other, and would keep the first request's.
            loop.call_later(deadline - now, self._wake, deadline, context=Context())

    def _wake(self, now: float) -> None:
        if now != self._wakes_at:
            return  # an earlier one came in between, and has seen to the next
        self._wakes_at = math.inf
        for task, deadline in list(self.tasks.items()):
            if deadline <= now:
                del self.tasks[task]
                task.cancel()
        self.see_to_next(asyncio.get_running_loop())


_deadlines: WeakKeyDictionary[asyncio.AbstractEventLoop, _Deadlines] = WeakKeyDictionary()


def look_at_deadlines(next_look: float) -> None:
    """See to what is due before the next look. Called again and again, in a thread of its own.

    Args:
        next_look: when this will be called again, by `time.monotonic`; minus infinity for never.
    """
    _Deadlines.next_look = next_look
    for kept in _deadlines.keyrefs():
        loop = kept()
        deadlines = None if loop is None else _deadlines.get(loop)
        if loop is None or deadlines is None:
            continue
        tasks = list(deadlines.tasks.values())
        if tasks and not monotonic() - LATE < next_look <= min(tasks):
            with suppress(RuntimeError):  # the loop is closed: nothing goes on in it
                loop.call_soon_threadsafe(deadlines.see_to_next, loop, context=Context())
