"""What a pool is: its name, how many connections it gives, has each thread a database of its own.

Asked once for each pool.
"""

from __future__ import annotations

import logging
from typing import Any, cast

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import Pool, QueuePool, SingletonThreadPool

__all__ = ["engine_text", "is_memory_of_thread", "limit_of"]


class _Arguments(Exception):  # noqa: N818 - carries an answer, is no error
    """The arguments by which a pool would be made again."""

    def __init__(self, *_: object, **arguments: Any) -> None:
        self.arguments: dict[str, Any] = arguments


class _Asking:
    """Stands for a pool whose `recreate()` is asked what it would pass on."""

    # It would say "Pool recreating", and nothing is. (One of getLogger() is heard by the root.)
    logger: logging.Logger = logging.Logger("nobody", logging.CRITICAL)  # noqa: LOG001

    def __init__(self, pool: Pool) -> None:
        self.__pool = pool

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Arguments

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__pool, name)


def limit_of(pool: Pool) -> int | None:
    """Return how many connections `pool` gives at most; None for no limit, or an unknown one.

    `max_overflow` can be given to a `QueuePool`, and not be read. But `Pool.recreate()` passes its
    arguments on to a new pool of its class. No pool is made here: the class is exchanged for one
    that keeps the arguments.
    """
    if not isinstance(pool, QueuePool):
        return None
    try:
        made: object = type(pool).recreate(cast("QueuePool", _Asking(pool)))
    except Exception:  # a pool of somebody's own: then nothing is known
        return None
    if not isinstance(made, _Arguments):
        return None
    overflow, size = made.arguments.get("max_overflow"), made.arguments.get("pool_size")
    if not isinstance(overflow, int) or not isinstance(size, int) or overflow < 0 or size < 1:
        return None
    return size + overflow


def is_memory_of_thread(engine: Engine) -> bool:
    """Tell whether each thread gets an in-memory SQLite database of its own from `engine`."""
    if not isinstance(engine.pool, SingletonThreadPool) or engine.dialect.name != "sqlite":
        return False
    database = engine.url.database
    if not database or database == ":memory:":
        return True
    in_memory = (
        engine.url.query.get("mode") == "memory"
        or "mode=memory" in database
        or database.startswith("file::memory:")
    )
    shared = engine.url.query.get("cache") == "shared" or "cache=shared" in database
    return in_memory and not shared


def engine_text(bind: Engine | Connection | None) -> str:
    """Return the URL of an engine without its password and its query, which may hold one, too."""
    if bind is None:
        return "?"
    return bind.engine.url.set(query={}).render_as_string(hide_password=True).replace(":***@", "@")
