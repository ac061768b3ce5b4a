"""How many threads each kind of call may have at once, for each event loop.

Calls wait for one another: one for the connection that another one has, one for a row that another
one has locked. So each kind has places of its own, and what ends a wait never stands in line behind
those who wait:

- RELEASES: gives a connection back without a commit. It ends by itself.
- COMMITS: sends a COMMIT over the connection that it has, and gives it back.
- WRITES: has its connection, and may wait for a row's lock.
- NEEDS: may wait for a connection. So may the application's own functions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

__all__ = ["COMMITS", "NEEDS", "RELEASES", "WRITES", "Limiter", "Places"]

_C = TypeVar("_C")


class Places(NamedTuple):
    """What a kind of call has."""

    name: str
    most: int
    part: int | None = None
    """At most so many of them are taken by this kind; None: all."""


# 40 in all. A pool of SQLAlchemy's default size, 15, has a place for each of its connections.
RELEASES = Places("releases", 10)
NEEDS = Places("needs", 12)
COMMITS = Places("commits", 18)
WRITES = Places("commits", 18, 15)


class Limiter(Generic[_C]):
    """The calls of one event loop under one name: under way, and waiting. Used in its thread only.

    What anyio's CapacityLimiter is for tasks.

    Args:
        places: what there is.
        start: starts a call.
        fail: is told of a call that has waited, and that could not be started.
    """

    def __init__(
        self,
        places: Places,
        start: Callable[[_C], object],
        fail: Callable[[_C, BaseException], object],
    ) -> None:
        self._most = places.most
        self._start = start
        self._fail = fail
        self._running = 0
        self._waiting: deque[tuple[_C, Places]] = deque()
        self._in_part = 0
        self._waiting_for_part: deque[tuple[_C, Places]] = deque()

    def enter(self, call: _C, places: Places) -> None:
        """Start `call`, or let it wait for its place."""
        part = places.part
        if part is not None:
            if self._in_part >= part:
                self._waiting_for_part.append((call, places))
                return
            self._in_part += 1
        if self._running >= self._most:
            self._waiting.append((call, places))
            return
        self._running += 1
        try:
            self._start(call)
        except BaseException:
            self.leave(places)
            raise

    def leave(self, places: Places) -> None:
        """A call has ended: the next ones take its place, first come, first served."""
        self._running -= 1
        if places.part is not None:
            if self._waiting_for_part:
                self._waiting.append(self._waiting_for_part.popleft())
            else:
                self._in_part -= 1
        while self._waiting and self._running < self._most:
            call, its_places = self._waiting.popleft()
            self._running += 1
            try:
                self._start(call)
            except BaseException as error:
                self._fail(call, error)
                self.leave(its_places)
