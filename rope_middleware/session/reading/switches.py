"""How the drivers enter and leave autocommit, and nothing else of a connection is changed."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Dialect, Engine
from sqlalchemy.pool import SingletonThreadPool, StaticPool

__all__ = ["Switch", "switch_of"]


class Switch:
    """Through the dialect: what SQLAlchemy does for ``isolation_level="AUTOCOMMIT"``."""

    skips_rollback = True
    told_in_use = False
    """Whether it takes a note at each statement to tell that one is running."""
    may_stay = False
    """Whether a connection may lie in its pool in autocommit: `off` then says nothing, and fails at
    most where the connection is lost."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect: Any = dialect

    def on(self, connection: Any, /) -> Any:
        """Enter autocommit; return what `off` must know, or None where nothing was changed."""
        try:
            if self._dialect.detect_autocommit_setting(connection):
                return None
            self._dialect.set_isolation_level(connection, "AUTOCOMMIT")
        except NotImplementedError:
            return None  # a dialect without autocommit, or one that cannot tell
        return True

    def off(self, connection: Any, _: Any, /) -> None:
        """Leave autocommit again."""
        self._dialect.reset_isolation_level(connection)

    def ends_at_once(self, _: Any, __: bool, /) -> bool:
        """Tell whether rollback and `off` say nothing to the database, and wait for nothing."""
        return False


class _AutocommitAttribute(Switch):
    """Through the driver's ``autocommit``: nothing but that is changed."""

    skips_rollback = False  # without a transaction, rollback() of these drivers says nothing
    may_stay = True

    def on(self, connection: Any, /) -> Any:
        if connection.autocommit:
            return None
        try:
            connection.autocommit = True
        except self._dialect.loaded_dbapi.Error:
            return None  # a listener of the application's has begun a transaction: it stays
        return True

    def off(self, connection: Any, _: Any, /) -> None:
        connection.autocommit = False

    def ends_at_once(self, connection: Any, is_on: bool, /) -> bool:
        # No statement is running, which would hold the driver's lock.
        return is_on and not self._dialect.is_async and not _is_active(connection)


def _is_active(connection: Any) -> bool:
    # psycopg, psycopg2: https://www.postgresql.org/docs/current/libpq-status.html (PQTRANS_ACTIVE)
    return int(connection.info.transaction_status) == 1


class _Asyncpg(Switch):
    """SQLAlchemy's adapter begins before the first statement, if at all."""

    skips_rollback = False
    told_in_use = True

    def on(self, connection: Any, /) -> Any:
        before = connection.isolation_level
        if before == "autocommit" or connection.driver_connection.is_in_transaction():
            return None
        connection.isolation_level = "autocommit"
        return (before,)  # which may be None

    def off(self, connection: Any, before: Any, /) -> None:
        (connection.isolation_level,) = before

    def ends_at_once(self, _: Any, is_on: bool, /) -> bool:
        return is_on


class _Sqlite(Switch):
    """By default, and through aiosqlite, nothing begins before a statement that writes."""

    skips_rollback = False

    def on(self, connection: Any, /) -> Any:
        # False is PEP 249's way, from Python 3.12 on: there is always a transaction.
        if getattr(connection, "autocommit", None) is not False:
            return None
        connection.autocommit = True
        return True

    def off(self, connection: Any, _: Any, /) -> None:
        connection.autocommit = False

    def ends_at_once(self, connection: Any, _: bool, /) -> bool:
        return not self._dialect.is_async and not connection.in_transaction


_SWITCHES: dict[str, type[Switch]] = {
    "psycopg": _AutocommitAttribute,
    "psycopg2": _AutocommitAttribute,
    "asyncpg": _Asyncpg,
    "pysqlite": _Sqlite,
    "aiosqlite": _Sqlite,
}


def switch_of(engine: Engine) -> Switch | None:
    """Return how connections of `engine` enter autocommit; None where they must not.

    The pools that hand one connection to several at once would switch it for all of them.
    """
    if isinstance(engine.pool, StaticPool | SingletonThreadPool):
        return None
    dialect: Any = engine.dialect
    return _SWITCHES.get(dialect.driver, Switch)(dialect)
