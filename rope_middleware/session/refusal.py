"""Which database errors ask for the transaction to be tried again, and telling the scope of them.

Frameworks turn an exception into a 5xx before a middleware sees it. The engine's
``handle_error`` event sees it first.
"""

from __future__ import annotations

import random
from typing import cast

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext

from rope_middleware.scope.context import current
from rope_middleware.scope.scope import note_refusal

__all__ = ["backoff", "is_refusal", "listen_for_refusals"]

# SQLSTATE 40001 serialization_failure, 40P01 deadlock_detected:
# https://www.postgresql.org/docs/current/errcodes-appendix.html (class 40),
# https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html
# CockroachDB and SQL Server (through ODBC) give 40001, too.
_SQLSTATES = frozenset({"40001", "40P01"})

# 1205 ER_LOCK_WAIT_TIMEOUT, 1213 ER_LOCK_DEADLOCK, of MariaDB and MySQL:
# https://mariadb.com/kb/en/mariadb-error-codes/
_MYSQL_CODES = frozenset({1205, 1213})

# 5 SQLITE_BUSY, 6 SQLITE_LOCKED; extended codes carry the primary one in their lowest byte:
# https://www.sqlite.org/rescode.html
_SQLITE_CODES = frozenset({5, 6})


def is_refusal(error: BaseException | None) -> bool:
    """Tell whether the database refused a transaction as one to try again.

    Args:
        error: the driver's own exception.
    """
    if error is None:
        return False
    # psycopg, asyncpg and their like: sqlstate. psycopg2, SQLAlchemy's asyncpg: pgcode.
    for attribute in ("sqlstate", "pgcode"):
        if getattr(error, attribute, None) in _SQLSTATES:
            return True
    # sqlite3 (Python 3.11), aiosqlite.
    code = getattr(error, "sqlite_errorcode", None)
    if isinstance(code, int):
        return code & 0xFF in _SQLITE_CODES
    # mysql-connector, mariadb: errno. PyMySQL, mysqlclient, asyncmy: the first argument.
    first = error.args[0] if error.args else None
    if isinstance(first, dict):  # pg8000
        return cast("dict[str, str]", first).get("C") in _SQLSTATES
    if isinstance(first, str) and first in _SQLSTATES:  # pyodbc
        return True
    module = type(error).__module__.lower()  # MySQLdb.…, pymysql.…, asyncmy.…, mariadb.…
    if any(name in module for name in ("sql", "maria", "asyncmy")):
        return getattr(error, "errno", first) in _MYSQL_CODES
    return False


def listen_for_refusals() -> None:
    """Note refused transactions on the scope that they happen in. Done once."""
    if not event.contains(Engine, "handle_error", _on_error):
        event.listen(Engine, "handle_error", _on_error)


def _on_error(context: ExceptionContext) -> None:
    scope = current.get(None)
    if scope is not None and is_refusal(context.original_exception):
        note_refusal(scope, context.original_exception)


def backoff(tries: int) -> float:
    """Return the seconds to wait before the next try: "full jitter", at most one second.

    Args:
        tries: how many tries there have been.

    See https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    return random.uniform(0, min(1.0, 0.005 * 2.0 ** min(tries, 10)))  # noqa: S311 - no secret
