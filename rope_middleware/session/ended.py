"""The transactions that have written and have just ended: `locks` may ask who had a lock (H5)."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection, Engine

from rope_middleware.session.begun import name_of
from rope_middleware.session.connections import driver_of
from rope_middleware.session.lines import text_of

if TYPE_CHECKING:
    from rope_middleware.session.tie import Tie

__all__ = ["database_of", "ended_now", "note_ended", "process_of"]

_SECOND = 1.0

_Ended = tuple[str, str, tuple[Any, ...], int | None]
"""The name of its scope, the line that began it, its database, the process of the server."""

_ended: deque[tuple[float, _Ended]] = deque(maxlen=250)


def note_ended(tie: Tie, connections: Collection[Connection]) -> None:
    """Write down that a transaction which has written ends now."""
    time = monotonic()
    while _ended and time - _ended[0][0] > _SECOND:
        _ended.popleft()
    if tie.line is None:
        return
    with suppress(Exception):  # a driver's own: no commit fails for a note
        for connection in connections:
            process = process_of(driver_of(connection))
            database = database_of(connection.engine)
            _ended.append((time, (name_of(tie), text_of(tie.line), database, process)))


def ended_now() -> list[_Ended]:
    """Return those of the last second."""
    return [one for at, one in list(_ended) if monotonic() - at <= _SECOND]


def database_of(engine: Engine) -> tuple[Any, ...]:
    """Return by what two engines of one database are known."""
    url = engine.url
    return url.get_backend_name(), url.host, url.port, url.database


def process_of(driver: Any) -> int | None:
    """Return the server's process that serves a driver's connection."""
    for found in _ways(driver):
        if isinstance(found, int):
            return found
    return None


def _ways(driver: Any) -> Iterable[Any]:
    yield getattr(getattr(driver, "info", None), "backend_pid", None)  # psycopg, psycopg2
    ask = getattr(driver, "get_server_pid", None)  # asyncpg
    yield None if ask is None else ask()
