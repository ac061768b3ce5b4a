"""Looking after something every so often, in a thread that is there only while it is needed.

Knows neither scopes nor sessions.
"""

from __future__ import annotations

import atexit
import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from typing import Any

from rope_middleware.running.deadlines import look_at_deadlines
from rope_middleware.running.forks import at_fork

__all__ = ["Ticker"]

QUIET_SECONDS = 10.0  # without anything to look at, until the thread ends
_PATIENCE = 1.0  # seconds that a look may go on while somebody waits for its end


class Ticker:
    """Calls a function again and again in a daemon thread, which ends when it is not needed.

    Args:
        look: looks, and tells whether there was anything to look at. What it raises is swallowed.
        every: returns the seconds between two looks.
        arm: is given `start`, to call it when there is something to look at, until it returns True.
    """

    def __init__(
        self,
        look: Callable[[], bool],
        every: Callable[[], float],
        arm: Callable[[Callable[[], bool]], object],
    ) -> None:
        self._look = look
        self._every = every
        self._arm = arm
        self._lock = threading.Lock()
        self._running: tuple[threading.Thread, threading.Event] | None = None
        atexit.register(self._end)
        at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork,
            after_in_child=self._after_fork,
        )
        arm(self.start)  # this may be the start: another thread may fork from here on

    def start(self) -> bool:
        """Start the thread, unless it runs.

        Returns:
            Whether this need not be called any more.
        """
        # Not waited for: it may be held by this very thread, in which a finaliser has come by.
        if not self._lock.acquire(blocking=False):
            return True  # somebody else is just starting it
        try:
            return self._running is not None or self._start()
        finally:
            self._lock.release()

    def _start(self) -> bool:
        stop = threading.Event()
        try:
            thread = threading.Thread(
                target=self._run, args=[stop], name="rope_middleware.ticker", daemon=True
            )
        except RuntimeError:
            # Isolated subinterpreters refuse daemons, and would wait for any other thread at their
            # end. They go without.
            return True
        self._running = thread, stop
        try:
            # An empty context: a thread may inherit that of whoever starts it (3.14, gevent), and
            # the scope in it would live as long.
            Context().run(thread.start)
        except RuntimeError:  # no more threads now, or the interpreter ends
            self._running = None
            return False
        return True

    def stop(self) -> None:
        """End the thread and wait for it."""
        running, self._running = self._running, None
        if running is not None:
            thread, stop = running
            stop.set()
            if thread is not threading.current_thread():
                with suppress(RuntimeError):  # another thread is just starting it
                    thread.join(_PATIENCE)

    def _run(self, stop: threading.Event) -> None:
        last = time.monotonic()
        while not self._wait(stop):
            is_needed = False
            with suppress(Exception):  # a log handler's, say
                is_needed = self._look()
            if is_needed:
                last = time.monotonic()
            elif time.monotonic() - last >= QUIET_SECONDS:
                break
        look_at_deadlines(-math.inf)
        if stop.is_set():
            return  # and is forgotten already; the lock may be held for a fork
        with self._lock:
            if self._running is not None and self._running[1] is stop:
                self._running = None
        self._arm(self.start)

    def _wait(self, stop: threading.Event) -> bool:
        seconds = self._every()
        if not _is_green():  # where threads are greenlets, an event loop may keep this one waiting
            look_at_deadlines(time.monotonic() + seconds)
        return _wait(stop, seconds)

    def _end(self) -> None:
        """End before the interpreter does."""
        if not _is_green():
            self.stop()

    def _before_fork(self) -> None:
        """End the thread: Python warns of a fork beside one, and the child would not have it."""
        if _is_green():  # a greenlet is there after the fork as well
            self._lock.acquire()
            return
        self.stop()
        self._lock.acquire()
        if self._running is not None:  # started in the last instant
            self._running[1].set()
            self._running = None

    def _after_fork(self) -> None:
        """Begin anew where there is something to look at."""
        self._lock.release()
        if self._running is None:
            self._arm(self.start)


def _is_green() -> bool:
    """Tell whether threads are greenlets: gevent or eventlet have patched them."""
    gevent: Any = sys.modules.get("gevent.monkey")
    if gevent is not None and gevent.is_module_patched("threading"):
        return True
    eventlet: Any = sys.modules.get("eventlet.patcher")
    return eventlet is not None and bool(eventlet.is_monkey_patched("thread"))


def _wait(stop: threading.Event, seconds: float) -> bool:
    """Wait so long, or until `stop` is set; return whether it is."""
    gevent: Any = sys.modules.get("gevent")
    if gevent is not None and _is_green():
        gevent.sleep(seconds, ref=False)  # gevent.wait() waits for everything else, not for this
        return stop.is_set()
    return stop.wait(seconds)
