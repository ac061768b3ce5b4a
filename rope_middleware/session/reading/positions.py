"""How far a primary has written, and how far a replica has replayed it (R3): PostgreSQL's log.

The *insert* position, asked for after the commit: it lies behind the commit's own record. Asked for
before the commit it lies before that record, and a replica that has reached it need not have it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rope_middleware.position import UNKNOWN, Position
from rope_middleware.scope.context import class_of, logger
from rope_middleware.session.reading.autocommit import ask_outside_transaction
from rope_middleware.session.sql.writes import has_only_read

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from rope_middleware.position import Carried

__all__ = ["note_written", "replayed", "wait_for"]

# The first 8 digits of a log file's name are the timeline.
# https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADMIN-BACKUP
_TIMELINE = "('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint"

_WRITTEN = f"""
SELECT s.system_identifier, {_TIMELINE}, pg_current_wal_insert_lsn() - '0/0'::pg_lsn
FROM pg_control_system() s
"""  # noqa: S608 - nothing of anybody's in it

# A replica tells no timeline of its replay. Each of these three has only come to a timeline once
# the replay follows its history; the last one is told to the members of pg_read_all_stats alone,
# and the others know of a fail-over after the next checkpoint. Too old a timeline costs nothing but
# reads from the primary.
# A replica that was promoted meanwhile has everything it has written itself.
_REPLAYED = f"""
SELECT s.system_identifier,
  CASE WHEN pg_is_in_recovery()
    THEN greatest(c.timeline_id, r.min_recovery_end_timeline, w.received_tli) ELSE {_TIMELINE} END,
  CASE WHEN pg_is_in_recovery()
    THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END - '0/0'::pg_lsn
FROM pg_control_system() s, pg_control_checkpoint() c, pg_control_recovery() r
LEFT JOIN pg_stat_wal_receiver w ON true
"""  # noqa: S608

# https://www.postgresql.org/docs/19/sql-wait-for.html; it looks at no timeline.
_WAITS_FROM = (19,)
_WAIT = "WAIT FOR LSN '{:X}/{:X}' WITH (TIMEOUT '100ms', NO_THROW)"


def note_written(carried: Carried, connections: Iterable[Connection]) -> None:
    """Ask how far the log is, over the connections that have just committed; never fails.

    Where the server cannot tell (no PostgreSQL, no rights), only the primary is sure to have it.
    """
    for connection in connections:
        if not has_only_read(connection):
            carried.tell(_written(connection))


def _written(connection: Connection) -> dict[int, Position]:
    if connection.dialect.name != "postgresql":
        return UNKNOWN
    try:
        return dict([_position(ask_outside_transaction(connection, _WRITTEN))])
    except Exception as error:
        logger.warning(
            "%s does not tell its log position (%s): for the next minute, reads of this client go "
            "to the primary",
            connection.engine.url,
            class_of(error),
        )
        return UNKNOWN


def replayed(connection: Connection) -> tuple[int, Position]:
    """Ask a replica how far it has replayed: its system, and the position."""
    return _position(connection.exec_driver_sql(_REPLAYED).one())


def wait_for(connection: Connection, position: Position) -> None:
    """Let the replica come as far as `position`, for a moment, where the server can do that."""
    version = connection.dialect.server_version_info
    if version is not None and version >= _WAITS_FROM:
        statement = _WAIT.format(position.lsn >> 32, position.lsn & 0xFFFFFFFF)
        connection.exec_driver_sql(statement)


def _position(row: Any) -> tuple[int, Position]:
    system, timeline, lsn = row
    return int(system), Position(int(timeline), int(lsn))
