"""The transactions that have written and have just ended: `locks` asks who had a lock (H5)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine
from sqlalchemy.orm import SessionTransaction

from rope_middleware.session.code.lines import text_of
from rope_middleware.session.connections import connections_of, driver_of, made_connections
from rope_middleware.session.holding.begun import name_of
from rope_middleware.session.sql.notes import notes_of

if TYPE_CHECKING:
    from rope_middleware.session.tie import Tie

__all__ = ["database_of", "ended_since", "note_ended", "process_of"]

_SECOND = 1.0

_Ended = tuple[str, str, tuple[Any, ...], int | None]
"""The name of its scope, the line that began it, its database, the process of the server."""

_ended: deque[tuple[float, _Ended]] = deque(maxlen=250)


def note_ended(tie: Tie) -> None:
    """Write down, where a transaction is committed, that it has written and ends now."""
    transaction = tie.transaction
    if tie.line is None or transaction is None:
        return
    # A driver's own errors, another thread that forgets the old ones as well, an import at the
    # interpreter's end: the commit stands, and does not fail for a note.
    with suppress(Exception):
        if tie.written is None and not _has_written(transaction):
            return
        time = monotonic()
        for connection in made_connections(transaction):
            process = process_of(driver_of(connection))
            database = database_of(connection.engine)
            _ended.append((time, (name_of(tie), text_of(tie.line), database, process)))
        while time - _ended[0][0] > _SECOND:
            _ended.popleft()


def _has_written(transaction: SessionTransaction) -> bool:
    """Tell whether a statement of `transaction` has written or locked, in 2 us."""
    # Not before a second session lives.
    from rope_middleware.session.sql.statements import effect_of

    last = None
    for known in connections_of(transaction):
        if known is not last:  # each stands there by its engine, and by itself
            last = known
            for statement in notes_of(known[0]).statements():
                sql = statement if type(statement) is str else statement.string
                if effect_of(sql, known[0].dialect.name).writes:
                    return True
    return False


def ended_since(time: float) -> list[_Ended]:
    """Return those of the last second that have ended since a time of `monotonic()`."""
    time = max(time, monotonic() - _SECOND)
    return [one for at, one in list(_ended) if at >= time]


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
