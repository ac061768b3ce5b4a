"""Waiting for a connection: time-outs that name the holders (H2), deadlocks at once (H3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

from sqlalchemy.exc import TimeoutError as PoolTimeout

from rope_middleware.errors import pool_deadlock
from rope_middleware.scope.context import logger, with_outer
from rope_middleware.scope.scope import Scope
from rope_middleware.session.code.where import note_greenlet
from rope_middleware.session.connections import connections_out
from rope_middleware.session.holding.begun import Strand, open_ties, strand_of
from rope_middleware.session.holding.door import Door, deciding, door_of, mark_of, marks
from rope_middleware.session.holding.holders import Holder, Holders, holder_of

if TYPE_CHECKING:
    from rope_middleware.session.tie import Tie

__all__ = ["refuse_deadlock", "tell_holders"]


# -- deadlocks -------------------------------------------------------------------------------------


def refuse_deadlock(door: Door, who: Strand) -> None:
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


def tell_holders(door: Door, error: PoolTimeout, scope: Scope | None) -> None:
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
