"""The code of a driver's error: each driver has a place of its own for it."""

from __future__ import annotations

from typing import Any, cast

__all__ = ["mysql_code_of", "sqlite_code_of", "sqlstate_of"]

_LENGTH_OF_SQLSTATE = 5


def sqlstate_of(error: BaseException | None) -> str:
    """Return the SQLSTATE of an error; "" where it has none.

    Args:
        error: the driver's own.
    """
    # psycopg, asyncpg and their like: sqlstate. psycopg2, SQLAlchemy's asyncpg: pgcode.
    state: object = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if state is None:
        state = _first_of(error)
        if isinstance(state, dict):  # pg8000
            state = cast("dict[str, object]", state).get("C")
        elif isinstance(state, str) and len(state) != _LENGTH_OF_SQLSTATE:
            state = None  # a text; pyodbc's first argument is the SQLSTATE
    return state if isinstance(state, str) else ""


def sqlite_code_of(error: BaseException) -> int | None:
    """Return the primary result code of an error of SQLite's: https://www.sqlite.org/rescode.html."""
    code = getattr(error, "sqlite_errorcode", None)  # sqlite3 (Python 3.11), aiosqlite
    return code & 0xFF if isinstance(code, int) else None


def mysql_code_of(error: BaseException) -> object:
    """Return the number of an error of MariaDB or MySQL; None, or something else, for others."""
    module = type(error).__module__.lower()  # MySQLdb.…, pymysql.…, asyncmy.…, mariadb.…
    if not any(name in module for name in ("sql", "maria", "asyncmy")):
        return None
    # mysql-connector, mariadb: errno. PyMySQL, mysqlclient, asyncmy: the first argument.
    return getattr(error, "errno", None) or _first_of(error)


def _first_of(error: BaseException | None) -> Any:
    return error.args[0] if error is not None and error.args else None
