"""The search for what is left behind: connections, scopes, the ContextVar."""

from __future__ import annotations

import gc
import logging
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

from rope_middleware import NoScopeError, Scope, current_scope
from tests.kit.waiting import eventually


def checked_out(engine: Engine | AsyncEngine) -> int:
    """Return how many connections are out of the engine's pool."""
    assert isinstance(engine.pool, QueuePool)
    return engine.pool.checkedout()


def nothing_checked_out(engine: Engine) -> None:
    """Wait until every connection is back in the engine's pool."""
    eventually(lambda: checked_out(engine) == 0, lambda: f"all back in {engine.pool.status()}")


def open_scopes() -> list[Scope]:
    """Return every Scope of this process that has not given back everything."""
    # Not isinstance(): it asks lazy proxies for their __class__, which wakes them up.
    return [x for x in gc.get_objects() if issubclass(type(x), Scope) and not x.closed]


def no_scope_open() -> None:
    """Wait until no scope of this process is open."""
    eventually(lambda: not open_scopes(), lambda: f"no scope open: {open_scopes()}")


def no_scope_here() -> bool:
    """Tell whether no scope is current."""
    try:
        current_scope()
    except NoScopeError:
        return True
    return False


class LostConnections(logging.Handler):
    """Hears of connections that only the garbage collector finds."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "garbage collector is trying to clean up" in text:
            self.lost.append(text)

    def __enter__(self) -> LostConnections:
        logging.getLogger("sqlalchemy.pool").addHandler(self)
        return self

    def __exit__(self, *told: Any) -> None:
        logging.getLogger("sqlalchemy.pool").removeHandler(self)
