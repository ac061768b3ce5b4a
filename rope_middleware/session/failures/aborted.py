"""Was the transaction aborted? Then its COMMIT is a ROLLBACK, and no driver says so.

An application may swallow the error of a statement and go on. PostgreSQL has aborted the
transaction then, answers COMMIT with ROLLBACK, and every driver takes that for success
(https://github.com/tlocke/pg8000/issues/36). MariaDB rolls the whole transaction back at a
deadlock, and SQLite at some errors; what follows is then a transaction of its own. So a commit of
ours looks first: at what psycopg knows (it costs nothing), or, where a statement has failed, by a
question to the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any
from weakref import ref

from sqlalchemy import event
from sqlalchemy.engine import Connection, ExceptionContext
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from rope_middleware.errors import RopeError, aborted
from rope_middleware.scope.context import current
from rope_middleware.scope.outcome import is_committing
from rope_middleware.scope.scope import Scope
from rope_middleware.session.connections import driver_of
from rope_middleware.session.failures.codes import mysql_code_of, sqlite_code_of, sqlstate_of

__all__ = [
    "ACTIVE",
    "TELLING",
    "aborted_by",
    "ask_for_aborted",
    "knows_aborted",
    "refuse_aborted",
    "suspect",
    "tells_of_aborted",
    "transaction_status",
]

# https://www.psycopg.org/psycopg3/docs/api/pq.html#psycopg.pq.TransactionStatus, and psycopg2's
# psycopg2.extensions.TRANSACTION_STATUS_ACTIVE and _INERROR.
ACTIVE, _IN_ERROR = 1, 3
TELLING = frozenset({"psycopg", "psycopg2", "psycopg2cffi"})  # drivers that know it

# https://www.postgresql.org/docs/current/errcodes-appendix.html: in_failed_sql_transaction
_ABORTED = "25P02"

# 1213 ER_LOCK_DEADLOCK: "InnoDB rolls back the entire transaction"
# (https://dev.mysql.com/doc/refman/8.4/en/innodb-error-handling.html).
_DEADLOCK = 1213

# SQLITE_BUSY, NOMEM, INTERRUPT, IOERR, FULL, CONSTRAINT (by ON CONFLICT ROLLBACK):
# https://www.sqlite.org/lang_transaction.html#response_to_errors_within_a_transaction
_SQLITE_ENDS = frozenset({5, 7, 9, 10, 13, 19})


def suspect(context: ExceptionContext) -> None:
    """A statement has failed: a commit of ours has to look whether its transaction still stands.

    It is noted on the connection. The running code may know of no scope: a thread, or a task of
    another context, that uses the session of a request.

    Args:
        context: of the engine's ``handle_error`` event.
    """
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return
    transaction = connection.get_transaction()
    if transaction is None or _first_error(connection) is not None:
        return
    if connection.dialect.name == "postgresql" or _has_ended(context, connection):
        attributes = connection.__dict__
        if _SUSPECT not in attributes:
            # Right before the COMMIT, when the listeners of the application have had their turn.
            event.listen(connection, "commit", _look)
            event.listen(connection, "prepare_twophase", _look)
        attributes[_SUSPECT] = ref(transaction), context.original_exception


_SUSPECT = "_rope_middleware_suspect"


def _first_error(connection: Connection) -> BaseException | None:
    """Return the first error of a statement in the transaction, if there was one."""
    transaction = connection.get_transaction()
    of, error = connection.__dict__.get(_SUSPECT, (None, None))
    return None if of is None or transaction is None or of() is not transaction else error


def _has_ended(context: ExceptionContext, connection: Connection) -> bool:
    """Tell whether the database has rolled the whole transaction back already."""
    error = context.original_exception
    if connection.dialect.name in ("mysql", "mariadb"):
        return mysql_code_of(error) == _DEADLOCK
    from rope_middleware.session.sql.writes import may_write  # here: it takes its time

    return (
        sqlite_code_of(error) in _SQLITE_ENDS
        and context.statement is not None
        and may_write(context.statement, connection.dialect.name)
        and connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT"
        and getattr(driver_of(connection), "in_transaction", True) is False
    )


def _look(connection: Connection, *_: Any) -> None:
    scope = current.get(None)
    if scope is None or not is_committing(scope):
        return  # the application's own commit
    if _first_error(connection) is not None and _is_aborted(connection):
        raise aborted_by(scope, connection)


def aborted_by(scope: Scope, connection: Connection) -> RopeError:
    """Make the error, with the statement's as its cause."""
    error = aborted(scope.name)
    error.__cause__ = _first_error(connection)
    return error


def _is_aborted(connection: Connection) -> bool:
    if connection.dialect.name != "postgresql":
        return True  # rolled back: see `_has_ended`
    status = transaction_status(connection)
    if status is not None:
        return status == _IN_ERROR
    try:  # asyncpg keeps to itself what it knows
        connection.exec_driver_sql("SELECT 1")
    except DBAPIError as error:
        if tells_of_aborted(error):
            return True
        raise
    return False


def tells_of_aborted(error: DBAPIError) -> bool:
    """Tell whether PostgreSQL refused a statement because its transaction is aborted."""
    return sqlstate_of(error.orig) == _ABORTED


def refuse_aborted(scope: Scope, connections: Iterable[Connection]) -> None:
    """Refuse to commit where the driver knows that the transaction is aborted.

    Also by a statement that the application gave to the driver's own connection.

    Raises:
        RopeError: it is.
    """
    for connection in connections:
        if connection.dialect.driver not in TELLING:
            continue
        if transaction_status(connection) == _IN_ERROR:
            raise aborted_by(scope, connection)


def knows_aborted(connection: Connection) -> bool:
    """Tell whether the driver, one that is TELLING, knows that a transaction is aborted.

    Asked before nearly each commit: as `transaction_status`, four calls less.

    Args:
        connection: it is in a transaction that is active.
    """
    try:
        pooled = connection.connection
        driver = (
            pooled.driver_connection if connection.dialect.is_async else pooled.dbapi_connection
        )
        return _ways[type(driver)](driver) == _IN_ERROR
    except (SQLAlchemyError, AttributeError):  # it is lost: the commit says so
        return False


def ask_for_aborted(scope: Scope, connections: Iterable[Connection]) -> None:
    """`refuse_aborted`, also where the driver does not know: the database is asked.

    Raises:
        RopeError: one of the transactions is aborted.
    """
    refuse_aborted(scope, connections)
    for connection in connections:
        is_usable = not connection.closed and not connection.invalidated
        if is_usable and _first_error(connection) is not None and _is_aborted(connection):
            raise aborted_by(scope, connection)


def transaction_status(connection: Connection) -> object:
    """Return what psycopg knows of the transaction; None where nobody knows."""
    driver = driver_of(connection)
    try:
        return _ways[type(driver)](driver)
    except AttributeError:
        return None


class _Ways(dict[type, Callable[[Any], object]]):
    """How a driver's connection tells the status of its transaction, by its class."""

    def __missing__(self, kind: type) -> Callable[[Any], object]:
        # psycopg's `info` makes an object and an enum each time, in each commit.
        is_psycopg = any(base.__module__.startswith("psycopg.") for base in kind.__mro__)
        path = "pgconn.transaction_status" if is_psycopg else "info.transaction_status"
        way = self[kind] = attrgetter(path)
        return way


_ways = _Ways()
