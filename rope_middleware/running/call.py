"""A call in a thread, as what a task of asyncio's awaits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextvars import Context, copy_context
from typing import Any

from rope_middleware.running.finish import shield
from rope_middleware.running.places import Limiter, Places

__all__ = ["Call"]


class Call:
    """A call on its way to a thread and back to its event loop, which one task awaits.

    It is a future, as far as tasks ask. A future of asyncio's own would be told of the end in one
    turn of the loop and wake its task in the next one: 8 us of the 60 that a hop takes.
    """

    # What is otherwise only later has its value on the class: one is made for each hop.
    outcome: Any = None
    _error: BaseException | None = None
    _wakes: tuple[Callable[[Any], object], Context] | None = None
    _why: tuple[object, ...] = ()
    _asyncio_future_blocking = False
    _is_cancelled = False
    _is_left = False
    has_ended: bool = False

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        limiter: Limiter[Call],
        places: Places,
        func: Callable[[Any], Any],
        argument: Any,
    ) -> None:
        self._loop = loop
        self._limiter = limiter
        self._places = places
        self._func = func
        self._argument = argument
        self._context = copy_context()

    # In the thread

    def make(self) -> None:
        """Call the function, and go back."""
        try:
            self.outcome = self._context.run(self._func, self._argument)
        except StopIteration as error:
            # In a coroutine it means "done": the waiter would take it for a result.
            self._error = RuntimeError("a call in a thread raised StopIteration")
            self._error.__cause__ = error
        except BaseException as error:
            self._error = error

    def go_back(self) -> None:
        """Wake who waits."""
        try:
            self._loop.call_soon_threadsafe(self.end)
        except RuntimeError:  # the event loop is closed, and nobody waits
            pass

    # On the event loop

    def end(self) -> None:
        """The call has come to its end."""
        self._limiter.leave(self._places)
        self.has_ended = True
        if self._wakes is not None:
            (wake, context), self._wakes = self._wakes, None
            context.run(wake, self)
            del wake  # of a task that may keep an error, whose traceback refers to this frame

    def fail(self, error: BaseException) -> None:
        """The call cannot be made."""
        self._error = error
        self.has_ended = True
        self._wake_soon()

    def _wake_soon(self) -> None:
        if self._wakes is not None:
            (wake, context), self._wakes = self._wakes, None
            self._loop.call_soon(wake, self, context=context)

    async def outlast(self, grace: float | None) -> None:
        """Wait for the call in a caller that has been cancelled, for so many seconds."""
        self._is_cancelled = False
        timer = None if grace is None else self._loop.call_later(grace, self._leave)
        # anyio cancels a task again at every turn of the loop until it has left the
        # cancelled scope: without the shield this would spin.
        with shield():
            while not (self.has_ended or self._is_left):
                try:
                    await self
                except asyncio.CancelledError:
                    pass
                except BaseException:
                    if not self.has_ended:
                        raise
                    # else the call's own: cancellation is what the caller has to hear
        self._is_cancelled = False  # another time, in the turn in which the call came back
        if timer is not None:
            timer.cancel()

    def _leave(self) -> None:
        self._is_left = True
        self._wake_soon()

    # What a task asks of a future

    def __await__(self) -> Generator[Call, None, Any]:
        if not self.has_ended:
            self._is_cancelled = False
            self._asyncio_future_blocking = True
            yield self
        return self.result()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, wake: Callable[[Any], object], *, context: Context) -> None:
        self._wakes = wake, context
        if self.has_ended:
            self._wake_soon()

    def cancel(self, msg: object = None) -> bool:
        if self._wakes is None:
            return False
        self._is_cancelled = True
        self._why = () if msg is None else (msg,)  # anyio tells its own cancellations by it
        self._wake_soon()
        return True

    def result(self) -> Any:
        if self._is_cancelled:
            raise asyncio.CancelledError(*self._why)
        if self._error is None:
            return self.outcome
        error, self._error = self._error, None
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame
