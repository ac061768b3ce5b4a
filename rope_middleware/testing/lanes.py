"""Where the statements of a sandbox run: in the calling thread, or on a loop of the sandboxes' own.

An async connection belongs to one event loop. That of a test or of a server may be gone before the
sandbox is, and another one may want to share the transaction. So all async connections of
sandboxes live on one loop, in a thread that idles between tests; a statement hops there and back.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sqlalchemy.util import await_only, greenlet_spawn

if TYPE_CHECKING:
    from rope_middleware.testing.statement import Statement

__all__ = ["Lane", "LoopLane", "ThreadLane", "at_exit", "loop"]

_T = TypeVar("_T")

_EXIT_SECONDS = 2.0  # that the exit of the process waits for connections to be closed


class Lane(Protocol):
    """Where the statements of one connection run, one at a time."""

    def is_own(self, thread: int) -> bool:
        """Tell whether a statement under way in that thread cannot end before the caller does."""
        ...

    def call(self, job: Callable[[], _T], cancel: Callable[[], None] | None = None) -> _T:
        """Run `job` for the application, to its end.

        Args:
            job: what to run.
            cancel: called where the job runs, if the caller is cancelled meanwhile.
        """
        ...

    def run(self, statement: Statement) -> Any:
        """Run, within a job, what may be cancelled: a statement of the application's."""
        ...

    def block(self, job: Callable[[], _T]) -> _T:
        """Run `job` and block the calling thread until it is done."""
        ...

    def later(self, job: Callable[[], object]) -> None:
        """Run `job`; an async caller does not wait for it."""
        ...

    def wait(self, is_ready: Callable[[], bool], seconds: float | None) -> bool:
        """Wait, within a job, until `is_ready`; tell whether it is so in time."""
        ...

    def wake(self) -> None:
        """Let those who wait look again."""
        ...


class ThreadLane:
    """Jobs run in the thread that asks for them; the connection is used by one at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()

    def is_own(self, thread: int) -> bool:
        return thread == threading.get_ident()

    def call(self, job: Callable[[], _T], cancel: Callable[[], None] | None = None) -> _T:
        del cancel
        return job()

    def run(self, statement: Statement) -> Any:
        return statement.run()

    def block(self, job: Callable[[], _T]) -> _T:
        return job()

    def later(self, job: Callable[[], object]) -> None:
        job()

    def wait(self, is_ready: Callable[[], bool], seconds: float | None) -> bool:
        if seconds is not None:
            seconds = min(seconds, threading.TIMEOUT_MAX)  # inf is more than a lock can wait
        with self._changed:
            return self._changed.wait_for(is_ready, seconds)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class LoopLane:
    """Jobs run in greenlets on the sandboxes' loop.

    Args:
        may_cancel: the driver's connection is as good as new after a statement was cancelled.
    """

    def __init__(self, may_cancel: bool) -> None:
        self._may_cancel = may_cancel
        self._waiting: list[asyncio.Future[None]] = []

    def is_own(self, thread: int) -> bool:
        del thread
        return False  # all of them run in the thread of the loop, and make way

    def call(self, job: Callable[[], _T], cancel: Callable[[], None] | None = None) -> _T:
        # Outside of a greenlet this raises MissingGreenlet, as in production.
        return await_only(self._hop(job, cancel))

    def run(self, statement: Statement) -> Any:
        if not self._may_cancel:
            return statement.run()
        statement.task = loop().create_task(greenlet_spawn(statement.run))
        return await_only(statement.task)

    def block(self, job: Callable[[], _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(greenlet_spawn(job), loop()).result()

    def later(self, job: Callable[[], object]) -> None:
        asyncio.run_coroutine_threadsafe(greenlet_spawn(job), loop())

    def wait(self, is_ready: Callable[[], bool], seconds: float | None) -> bool:
        end = None if seconds is None else time.monotonic() + seconds
        while not is_ready():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            turn = loop().create_future()
            self._waiting.append(turn)
            await_only(asyncio.wait([turn], timeout=left))
        return True

    def wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)

    async def _hop(self, job: Callable[[], _T], cancel: Callable[[], None] | None) -> _T:
        running: Coroutine[Any, Any, _T] = greenlet_spawn(job)
        if asyncio.get_running_loop() is _thread.loop:
            return await running
        here = asyncio.get_running_loop()
        is_done = here.create_future()

        def wake() -> None:
            if not is_done.done():
                is_done.set_result(None)

        def tell(_: object) -> None:
            with suppress(RuntimeError):  # the caller was cancelled, and its loop is closed
                here.call_soon_threadsafe(wake)

        # Never cancelled itself: a savepoint that is set or released half-way would be everybody's
        # loss. Nor a future of the caller's loop, which would log an error that nobody waits for.
        done = asyncio.run_coroutine_threadsafe(running, loop())
        done.add_done_callback(tell)
        try:
            await is_done
        except asyncio.CancelledError:
            if cancel is not None:
                loop().call_soon_threadsafe(cancel)
            raise
        return done.result()


class _LoopThread:
    """The event loop of all sandboxes, and its thread."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._process = 0
        self._start = threading.Lock()

    def running(self) -> asyncio.AbstractEventLoop:
        """Return the loop; start it where it does not run yet in this process."""
        if self.loop is None or self._process != os.getpid():
            with self._start:
                if self.loop is None or self._process != os.getpid():
                    # Both would keep this test's context, and the scope in it: the loop's own pipe
                    # does, and a thread may (Python 3.14).
                    made = Context().run(asyncio.new_event_loop)
                    thread = threading.Thread(
                        target=made.run_forever, name="rope_middleware.testing", daemon=True
                    )
                    Context().run(thread.start)
                    self.loop, self._process = made, os.getpid()
                    atexit.register(self._stop, made, thread, os.getpid())
        return self.loop

    def _stop(
        self, made: asyncio.AbstractEventLoop, thread: threading.Thread, process: int
    ) -> None:
        if process != os.getpid():
            return  # a child's copy of the parent's
        for close in at_exit:
            close()
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_others_ended(), made).result(_EXIT_SECONDS)
        made.call_soon_threadsafe(made.stop)
        thread.join(5)
        if not thread.is_alive():
            made.close()


async def _others_ended() -> None:
    """Wait for what is under way on the loop: connections that are being closed, above all."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others)


_thread = _LoopThread()
at_exit: list[Callable[[], None]] = []
"""Called before the loop stops, at the exit of the process."""


def loop() -> asyncio.AbstractEventLoop:
    """Return the event loop on which the async connections of sandboxes live."""
    return _thread.running()
