"""A line: so many are served at a time, the others wait, first come, first served (`max_active`).

Knows no protocol and no event loop. Whoever wants to be served calls `Line.enter`, waits until the
place has its turn, and calls `Place.give_back` in the end, whatever has happened meanwhile. All of
them can stand in one line, threads, greenlets and several event loops: whoever waits leaves a
function that wakes it, to be called in any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakSet

from rope_middleware.running.forks import at_fork

__all__ = ["AGAIN", "LONG", "Line", "Place", "wait_in_thread"]

LONG = 5.0  # seconds in line that are worth a word in the log
AGAIN = 60.0  # seconds until the next one

logger: logging.Logger = logging.getLogger("rope_middleware")


class Place:
    """What one who wants to be served has: first a place in the line, then the turn."""

    __slots__ = ("_line", "has_turn", "since", "wake")

    def __init__(self, line: Line, wake: Callable[[], object] | None) -> None:
        self._line = line
        self.wake: Callable[[], object] | None = wake
        self.since: float = time.monotonic()
        self.has_turn: bool = False

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Leave the line, or pass the turn on to the next one. Called again it does nothing."""
        self._line.leave(self)


class Line:
    """Serves so many at a time.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._served: set[Place] = set()
        self._waiting: OrderedDict[Place, None] = OrderedDict()
        # Held for instants, never while somebody is called. The garbage collector may come by in
        # such an instant, find a response that a server has dropped, and give its place back.
        self._lock = threading.RLock()
        self._told = -AGAIN  # when the log heard of it
        _lines.add(self)

    def enter(self, wake: Callable[[], object] | None = None) -> Place | None:
        """Come into the line; the place has its turn at once where one is free.

        Args:
            wake: called once, in any thread, when the turn has come. What it raises means that
                nobody waits there any more. None: do not wait.

        Returns:
            The place; None where there is no `wake` and no turn.
        """
        place = Place(self, wake)
        with self._lock:
            if wake is None and (self._waiting or len(self._served) >= self._size):
                return None
            self._waiting[place] = None
            woken = self._next_ones()
        self._wake_all([one for one in woken if one is not place])
        return place

    def leave(self, place: Place) -> None:
        """Take `place` out of the line. See `Place.give_back`."""
        with self._lock:
            self._waiting.pop(place, None)
            self._served.discard(place)
            woken = self._next_ones()
        self._wake_all(woken)

    def _next_ones(self) -> list[Place]:
        """Give the turns that are free to the first in line."""
        woken: list[Place] = []
        while self._waiting and len(self._served) < self._size:
            first = next(iter(self._waiting))
            first.has_turn = True
            self._served.add(first)  # before it leaves the line: see `_lock`
            self._waiting.pop(first, None)
            woken.append(first)
        return woken

    def _wake_all(self, woken: list[Place]) -> None:
        for place in woken:
            wake, place.wake = place.wake, None
            try:
                if wake is not None:
                    wake()
            except Exception:  # its event loop is closed
                self.leave(place)

    def tell(self) -> None:
        """Say in the log that the line is full for long, once a minute."""
        now = time.monotonic()
        with self._lock:
            first = next(iter(self._waiting), None)
            if first is None or now - first.since < LONG or now - self._told < AGAIN:
                return
            self._told = now
            waiting, served = len(self._waiting), len(self._served)
        logger.warning(
            "max_active=%d: %d %s in line, the first one for %.1f seconds, while %d %s served. "
            "Requests come faster than they are served, or something keeps its place: holders() "
            "tells who has a connection, and release() gives it back before a wait.",
            self._size,
            waiting,
            "request waits" if waiting == 1 else "requests wait",
            now - first.since,
            served,
            "is" if served == 1 else "are",
        )

    def clear(self) -> None:
        """Forget everybody, in a forked process: it serves none of its parent's requests."""
        self._lock = threading.RLock()
        self._served.clear()
        self._waiting.clear()


def wait_in_thread(line: Line) -> Place:
    """Come into the line and wait for the turn, in a thread or in a greenlet of patched threads.

    Raises:
        BaseException: what ended the wait (KeyboardInterrupt, the end of a greenlet); nothing is
            left in the line.
    """
    place = line.enter()
    if place is not None:
        return place
    # A bare lock, not an Event: an Event's set() takes a lock of its own, which this very thread
    # may hold in wait() when the garbage collector gives a place back (see `Line._lock`).
    turn = threading.Lock()
    turn.acquire()
    place = line.enter(turn.release)
    assert place is not None  # noqa: S101 - there always is one with a `wake`
    try:
        seconds = LONG
        while not place.has_turn and not turn.acquire(timeout=seconds):
            line.tell()
            seconds = AGAIN
    except BaseException:
        place.give_back()
        raise
    return place


_lines: WeakSet[Line] = WeakSet()


def _after_fork() -> None:
    for line in list(_lines):
        line.clear()


at_fork(after_in_child=_after_fork)
