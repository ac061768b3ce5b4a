"""Waiting for a connection: who comes through the door of a pool leaves a mark (see `door`).

Nobody is asked to wait for anybody else here: the pool decides as before. What is done where
somebody would wait, or has waited too long, stands in `giving_way` and `stuck`. Both are imported
when that happens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import get_ident
from typing import Any, cast

from sqlalchemy.engine import Engine
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import NullPool, PoolProxiedConnection, QueuePool

from rope_middleware.errors import PoolDeadlockError
from rope_middleware.scope.context import current
from rope_middleware.scope.scope import Scope
from rope_middleware.session.holding.begun import Strand, strand
from rope_middleware.session.holding.door import DOOR, LEFT, Door, deciding, marks

__all__ = ["call_at_errors", "put_door"]


def put_door(engine: Engine) -> dict[str, int] | None:
    """Put a door in front of the pool of `engine`, once.

    Returns:
        Of an in-memory SQLite database that each thread has for itself: where the thread is noted
        that has the first one. Else None.
    """
    pool = engine.pool
    known: Any = pool.__dict__.get(DOOR, pool)
    if type(known) is Door:
        return None
    if known is not pool:
        return cast("dict[str, int]", known) if type(known) is dict else None
    if sys.is_finalizing():
        return None  # a first transaction at the interpreter's end, which imports nothing any more
    from rope_middleware.session.holding.pools import engine_text, is_memory_of_thread, limit_of

    with deciding:
        if DOOR not in vars(pool):
            door = None
            if isinstance(pool, QueuePool):
                door = Door(pool, engine_text(engine), limit_of(pool))
                # Under its name on this one object: everything else about the pool stays as it is.
                pool.connect = _through(door, pool, pool.connect)  # type: ignore[method-assign]
            elif isinstance(pool, NullPool):
                pool.connect = _telling(pool.connect)  # type: ignore[method-assign]
            vars(pool)[DOOR] = {} if is_memory_of_thread(engine) else door
    return put_door(engine)


def _through(
    door: Door, pool: QueuePool, connect: Callable[[], PoolProxiedConnection]
) -> Callable[[], PoolProxiedConnection]:
    is_async, overflow, here = door.is_async, door.overflow, current.get

    def through(reads: bool = False) -> PoolProxiedConnection:
        who = strand() if is_async else get_ident()
        mark = door, here(None)
        before = marks.setdefault(who, mark)
        if before is not mark:
            marks[who] = mark
        try:
            if pool.overflow() >= overflow and not pool.checkedin():
                _before_wait(door, pool, who, here(None))
            fairy = connect()
        except PoolDeadlockError:
            raise
        except PoolTimeout as error:
            if not sys.is_finalizing():
                from rope_middleware.session.holding.stuck import tell_holders

                tell_holders(door, error, here(None))
            raise
        except Exception as error:
            _tell_of(error)
            raise
        finally:
            if before is mark:
                marks.pop(who, None)
            else:
                marks[who] = before  # to connect, this pool has asked another one
        if door.has_left and not reads:
            info = fairy.record_info
            if info is not None and LEFT in info:
                return _as_before(fairy, info.pop(LEFT), through)
        return fairy

    return through


def _telling(connect: Callable[[], PoolProxiedConnection]) -> Callable[[], PoolProxiedConnection]:
    def connect_and_tell(_reads: bool = False) -> PoolProxiedConnection:  # as `through`
        try:
            return connect()
        except Exception as error:
            _tell_of(error)
            raise

    return connect_and_tell


_listeners: set[Callable[[Exception], None]] = set()


def call_at_errors(func: Callable[[Exception], None]) -> None:
    """Call `func` with each error by which a pool gives no connection, from now on."""
    _listeners.add(func)


def _tell_of(error: Exception) -> None:
    for func in _listeners:
        func(error)


def _before_wait(door: Door, pool: QueuePool, who: Strand, scope: Scope | None) -> None:
    """Somebody is about to wait: let an outer scope give way, or refuse what would be a deadlock.

    Raises:
        PoolDeadlockError: see `stuck.refuse_deadlock`.
    """
    if sys.is_finalizing():
        return
    from rope_middleware.session.holding.giving_way import give_way

    if not give_way(pool, scope):
        from rope_middleware.session.holding.stuck import refuse_deadlock

        refuse_deadlock(door, who)


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
