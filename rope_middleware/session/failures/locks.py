"""Who holds the lock: deadlocks, lock time-outs and "database is locked" name the other side (H5).

The other side is a transaction of this process that is open, or was a second ago. PostgreSQL tells
the process that it belongs to; elsewhere it is one of those that have written or locked. Imported
at the first error of a database.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from sqlalchemy.engine import Connection, ExceptionContext

from rope_middleware.session.code.lines import text_of
from rope_middleware.session.code.where import now
from rope_middleware.session.connections import connections_out, driver_of
from rope_middleware.session.failures.codes import mysql_code_of, sqlite_code_of, sqlstate_of
from rope_middleware.session.holding.begun import name_of, open_ties
from rope_middleware.session.holding.ended import database_of, ended_since, process_of
from rope_middleware.session.sql.literals import late
from rope_middleware.session.sql.notes import notes_of
from rope_middleware.session.sql.statements import effect_of

__all__ = ["name_other_side"]

# 40P01 deadlock_detected, 55P03 lock_not_available:
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_SQLSTATES = frozenset({"40P01", "55P03"})
_MYSQL_CODES = frozenset({1205, 1213})  # lock wait time-out, deadlock
_SQLITE_CODES = frozenset({5, 6})  # SQLITE_BUSY, SQLITE_LOCKED
_PROCESS = late(r"[Pp]rocess (\d+)")


def name_other_side(context: ExceptionContext) -> None:
    """Add to an error of the database the other request and its line, where it is one of ours."""
    error, connection = context.original_exception, context.connection
    if connection is None or not _is_of_lock(error):
        return
    found: list[str] = []
    with suppress(Exception):  # a driver's own, or a session that ends meanwhile
        found = list(dict.fromkeys(_others(connection, _processes(error))))
    if not found:
        return
    one_of = "" if len(found) == 1 else ", is one of these"
    note = f"The other side, in this process{one_of}: " + "; ".join(found) + "."
    for told in (error, context.sqlalchemy_exception):
        if told is not None and note not in getattr(told, "__notes__", ()):
            told.add_note(note)


def _is_of_lock(error: BaseException) -> bool:
    return (
        sqlstate_of(error) in _SQLSTATES
        or sqlite_code_of(error) in _SQLITE_CODES
        or mysql_code_of(error) in _MYSQL_CODES
    )


def _processes(error: BaseException) -> set[int]:
    """Return the processes that PostgreSQL names in a deadlock; nothing elsewhere."""
    detail = getattr(getattr(error, "diag", None), "message_detail", None)
    if detail is None:
        detail = getattr(error.__cause__, "detail", None)
    return {int(number) for number in _PROCESS().findall(detail or "")}


def _others(connection: Connection, processes: set[int]) -> Iterator[str]:
    database = database_of(connection.engine)
    since = 0.0
    for tie in open_ties():
        out = connections_out(tie)
        if any(one is connection for one in out):
            since = tie.since  # who had ended before that holds nobody up
        elif tie.line is not None and any(_is_other(one, database, processes) for one in out):
            began, here = text_of(tie.line), text_of(now(tie) or tie.line)
            yield f"{name_of(tie)} at {here} (its transaction began at {began})"
    own = process_of(driver_of(connection))
    for name, line, where, process in ended_since(since):
        if where != database or (own is not None and process == own):
            continue
        if not processes or process in processes:
            yield f"{name}, which has just ended (its transaction began at {line})"


def _is_other(connection: Connection, database: tuple[Any, ...], processes: set[int]) -> bool:
    if database_of(connection.engine) != database:
        return False
    if processes:
        return process_of(driver_of(connection)) in processes
    notes, dialect = notes_of(connection), connection.dialect.name
    # A flush, UPDATE, FOR UPDATE and their like; names alone, where there were too many to keep.
    return any(effect_of(sql, dialect).writes for sql in notes.sql()) or bool(
        notes.dml() or notes.textual_dml()
    )
