"""The door of a pool: who is between it and a connection.

SQLAlchemy has no event for "somebody is about to wait". What is public is `Pool.connect()`, by
which every connection leaves its pool. So a `Door` stands in front of it, on the pool object alone
(see `waits.put_door`). Who comes through leaves a mark for as long as it takes.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any
from weakref import ref

from sqlalchemy.engine import Connection
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool, PoolProxiedConnection, QueuePool

from rope_middleware.running.forks import at_fork
from rope_middleware.scope.context import with_outer
from rope_middleware.scope.scope import Scope, is_over
from rope_middleware.session.holding.begun import Strand, strand_of

if TYPE_CHECKING:
    from rope_middleware.session.tie import Tie

__all__ = [
    "DOOR",
    "LEFT",
    "Door",
    "came_by",
    "deciding",
    "door_of",
    "is_waiting",
    "mark_of",
    "marks",
    "through_door",
]

DOOR = "_rope_middleware_door"
"""Under this name a pool has its door."""

LEFT = "rope_middleware.left"
"""In the record of a connection: which connection is still as a read-only scope has left it, and a
function that brings it back to what it was. The next one calls it who comes by the door and does
not read: see `autocommit`."""

marks: dict[Strand, tuple[Door, Scope | None]] = {}
"""Who is between a door and a connection: by which door, in which scope."""

deciding: threading.RLock = threading.RLock()
"""Held while somebody finds out whether it closes a circle."""


class Door:
    """What is known of a pool that somebody may have to wait for."""

    __slots__ = (
        *("__weakref__", "engine", "has_left", "is_async"),
        *("overflow", "pool", "size", "told"),
    )

    def __init__(self, pool: QueuePool, engine: str, limit: int | None) -> None:
        self.pool: ref[QueuePool] = ref(pool)
        self.engine: str = engine
        self.is_async: bool = isinstance(pool, AsyncAdaptedQueuePool)
        self.overflow: float = math.inf if limit is None else limit - pool.size()
        self.size: float = math.inf if limit is None else limit
        self.told: float = -math.inf  # when a time-out was logged last
        self.has_left: bool = False  # some of its connections may be `LEFT`

    def waiting(self) -> int:
        """Return how many are between this door and a connection."""
        return sum(door is self for door, _ in list(marks.values()))


def through_door(pool: Pool) -> PoolProxiedConnection:
    """Take a connection out of `pool` for one who reads: as it was `LEFT`, if it was."""
    connect = pool.__dict__.get("connect")
    return pool.connect() if connect is None else connect(True)


def door_of(connection: Connection) -> Door | None:
    """Return the door by which a connection that is out has left its pool, or None."""
    if connection.closed or connection.invalidated:
        return None
    return came_by(connection.connection)


def came_by(connection: PoolProxiedConnection) -> Door | None:
    """Return the door of the pool that `connection` belongs to, or None.

    Not by its engine: that has another pool after Engine.dispose(). The pool's name in it is
    SQLAlchemy's own (`tests/promises/test_H3_deadlock.py` pins it).
    """
    pool: Any = None if connection.is_detached else getattr(connection, "_pool", None)
    door: Any = None if pool is None else pool.__dict__.get(DOOR)
    return door if type(door) is Door else None


def is_waiting(tie: Tie) -> bool:
    """Tell whether the session of `tie` waits for a connection."""
    transaction = tie.transaction
    if transaction is None or transaction.is_active:
        return False
    who = strand_of(tie)
    return any(
        scope is tie.scope and (scope is not None or key == who)
        for key, (_, scope) in list(marks.items())
    )


def mark_of(tie: Tie) -> Door | None:
    """Return what the thread or task that works on the transaction of `tie` waits for, or None.

    None also where that is not certain: another thread may go on with it, it is being cancelled, or
    its scope is ending.
    """
    who = strand_of(tie)
    mark = None if who is None else marks.get(who)
    if mark is None or (tie.scope is not None and is_over(tie.scope)):
        return None
    cancelling: Any = getattr(who, "cancelling", None)
    if cancelling is not None and cancelling():
        return None
    door, scope = mark
    # A thread of a pool may have begun it for one request, and wait for another one now.
    if tie.scope is not None and not any(tie.scope is outer for outer in with_outer(scope)):
        return None
    return door


def _after_fork() -> None:
    """Forget, in a forked process, who waited in its parent."""
    marks.clear()
    deciding.release()


# Held by no thread at the fork, so that nobody is missing who would release it.
at_fork(before=deciding.acquire, after_in_parent=deciding.release, after_in_child=_after_fork)
