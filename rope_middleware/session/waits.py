"""Waiting for a connection: time-outs that name the holders (H2), deadlocks at once (H3).

Nobody is asked to wait for anybody else here: the pool decides as before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.engine import Engine
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import PoolProxiedConnection, QueuePool

from rope_middleware.errors import PoolDeadlockError, pool_deadlock
from rope_middleware.scope.asking import with_outer
from rope_middleware.scope.context import current, logger
from rope_middleware.scope.scope import Scope
from rope_middleware.session.begun import Strand, open_ties, strand, strand_of
from rope_middleware.session.connections import connections_out
from rope_middleware.session.door import LEFT, TAG, Door, deciding, door_of, mark_of, marks
from rope_middleware.session.giving_way import give_way
from rope_middleware.session.holders import Holder, Holders, engine_text, holder_of
from rope_middleware.session.pools import is_memory_of_thread
from rope_middleware.session.where import note_greenlet

if TYPE_CHECKING:
    from rope_middleware.session.tie import Tie

__all__ = ["put_door"]

_DOOR = "_rope_middleware_door"


def put_door(engine: Engine) -> dict[str, int] | None:
    """Put a door in front of the pool of `engine`, once.

    Returns:
        Of an in-memory SQLite database that each thread has for itself: where the thread is noted
        that has the first one. Else None.
    """
    pool = engine.pool
    known: Any = pool.__dict__.get(_DOOR, pool)
    if type(known) is Door:
        return None
    if known is not pool:
        return cast("dict[str, int]", known) if type(known) is dict else None
    with deciding:
        if _DOOR not in vars(pool):
            door = Door(pool, engine_text(engine)) if isinstance(pool, QueuePool) else None
            if door is not None and isinstance(pool, QueuePool):
                # Under its name on this one object: everything else about the pool stays as it is.
                pool.connect = _through(door, pool, pool.connect)  # type: ignore[method-assign]
            vars(pool)[_DOOR] = {} if is_memory_of_thread(engine) else door
    return put_door(engine)


def _through(
    door: Door, pool: QueuePool, connect: Callable[[], PoolProxiedConnection]
) -> Callable[[], PoolProxiedConnection]:
    is_async, overflow, here = door.is_async, door.overflow, current.get

    def through(reads: bool = False) -> PoolProxiedConnection:
        who = strand(True) if is_async else threading.get_ident()
        before = marks.get(who)
        marks[who] = door, here(None)
        try:
            is_full = pool.overflow() >= overflow and not pool.checkedin()
            if is_full and not give_way(pool, here(None)):
                _refuse_deadlock(door, who)
            fairy = connect()
        except PoolDeadlockError:
            raise
        except PoolTimeout as error:
            _tell(door, error, here(None))
            raise
        finally:
            if before is None:
                marks.pop(who, None)
            else:
                marks[who] = before  # to connect, this pool has asked another one
        info = fairy.record_info
        if info is not None:
            info[TAG] = door
            if LEFT in info and not reads:
                return _as_before(fairy, info.pop(LEFT), through)
        return fairy

    return through


def _as_before(
    fairy: PoolProxiedConnection,
    left: tuple[object, Callable[[object], None]],
    connect: Callable[[], PoolProxiedConnection],
) -> PoolProxiedConnection:
    """Bring a connection back to what it was before a read-only scope: see `door.LEFT`."""
    connection, bring_back = left
    if connection is fairy.dbapi_connection:  # else it was replaced by a new one
        try:
            bring_back(connection)
        except Exception:  # it was lost meanwhile
            fairy.invalidate()
            return connect()
    return fairy


# -- deadlocks -------------------------------------------------------------------------------------


def _refuse_deadlock(door: Door, who: Strand) -> None:
    """Check that whoever is about to wait does not close a circle.

    Raises:
        PoolDeadlockError: every connection of the pool, or of a ring of pools, is held by a thread
            or task that itself waits for another one.
    """
    note_greenlet()  # whoever closes the circle says where this one is, and at once
    with deciding:
        stuck = _circle(door, who)
        if stuck:
            marks.pop(who, None)  # before anybody else decides: this one waits no more
    if stuck:
        raise pool_deadlock(door.engine, int(door.size), str(_rows(stuck, None)))


def _circle(door: Door, who: Strand) -> list[Tie]:
    """Return who holds the connections of the circle that `who` is about to close; else nothing.

    What is not known for certain is no deadlock: somebody else's connections, a session that
    another thread may go on with, a scope that is ending.
    """
    ties = open_ties()
    if not any(strand_of(tie) == who and connections_out(tie) for tie in ties):
        return []  # whoever holds nothing closes nothing
    held = _by_door(ties)
    stuck: list[Tie] = []
    seen: list[Door] = []
    pending = [door]
    while pending:
        door = pending.pop()
        if door in seen:
            continue
        seen.append(door)
        holding = held.get(door, [])
        pool = door.pool()
        if len(holding) != door.size or pool is None or pool.checkedout() != door.size:
            return []
        for tie in holding:
            mark = mark_of(tie)
            if mark is None:
                return []
            pending.append(mark)
        stuck += holding
    return stuck


def _by_door(ties: Iterable[Tie]) -> dict[Door, list[Tie]]:
    """Return who holds what came by each door: once for each connection."""
    held: dict[Door, list[Tie]] = {}
    for tie in ties:
        for connection in connections_out(tie):
            door = door_of(connection)
            if door is not None:
                held.setdefault(door, []).append(tie)
    return held


# -- time-outs -------------------------------------------------------------------------------------

_MINUTE = 60.0


def _tell(door: Door, error: PoolTimeout, scope: Scope | None) -> None:
    """Add to a time-out who holds the connections of the pool; log it once a minute."""
    ties = [tie for tie in open_ties() if _holds(tie, door)]
    others = door.waiting() - 1
    text = (
        f"Who holds the connections of {door.engine} in this process (each worker process has a "
        f"pool of its own), {others} more wait for one:\n{_rows(ties, scope)}"
    )
    error.add_note(text)
    if monotonic() - door.told >= _MINUTE:
        door.told = monotonic()
        logger.warning("%s\n%s", error.args[0], text)


def _holds(tie: Tie, door: Door) -> bool:
    """Tell whether the session of `tie` has a connection of that pool out."""
    for connection in connections_out(tie):
        came_by = door_of(connection)
        if came_by is door or (came_by is None and connection.engine.pool is door.pool()):
            return True
    return False


def _rows(ties: Iterable[Tie], scope: Scope | None) -> Holders:
    """Return the holders, and name those that belong to an outer scope of `scope`."""
    rows: list[Holder] = []
    outer = list(with_outer(scope))[1:]
    for tie in ties:
        row = holder_of(tie)
        if row is not None:
            is_outer = any(tie.scope is one for one in outer)
            rows.append(replace(row, scope=f"{row.scope} (outer scope)") if is_outer else row)
    return Holders(rows)
