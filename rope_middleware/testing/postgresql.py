"""What PostgreSQL does by itself: errors that spoil a transaction, deferrable constraints."""

from __future__ import annotations

from typing import Any

from rope_middleware.testing.database import BEGIN, ROOT, Database
from rope_middleware.testing.sql import Said

__all__ = ["PostgreSQL"]

# Whose names say more to a person than the functions of PostgreSQL itself, which write nothing.
_CATALOG = """
SELECT 'function', proname::text, true, true FROM pg_catalog.pg_proc
WHERE oid >= 16384 AND provolatile = 'v' AND prorettype <> 2279
AND prolang NOT IN (SELECT oid FROM pg_catalog.pg_language WHERE lanname IN ('c', 'internal'))
UNION ALL
SELECT 'constraint', quote_ident(n.nspname) || '.' || quote_ident(c.conname),
bool_or(c.condeferred), bool_and(c.condeferred)
FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_namespace n ON n.oid = c.connamespace
WHERE c.oid >= 16384 GROUP BY 2 HAVING bool_or(c.condeferrable)
"""

_KNOWN_FUNCTIONS = frozenset(
    [
        "any",
        "all",
        "and",
        "array_agg",
        "as",
        "avg",
        "between",
        "cast",
        "char",
        "coalesce",
        "concat",
        "count",
        "current_setting",
        "date",
        "date_trunc",
        "exists",
        "extract",
        "from",
        "greatest",
        "having",
        "ilike",
        "in",
        "is",
        "join",
        "json_agg",
        "jsonb_agg",
        "least",
        "length",
        "like",
        "lower",
        "max",
        "min",
        "not",
        "now",
        "nullif",
        "numeric",
        "on",
        "or",
        "over",
        "partition",
        "random",
        "row_number",
        "select",
        "string_agg",
        "substring",
        "sum",
        "then",
        "trim",
        "unnest",
        "upper",
        "using",
        "values",
        "varchar",
        "when",
        "where",
        "with",
    ]
)


class PostgreSQL(Database):
    """PostgreSQL, by psycopg (sync and async), asyncpg or psycopg2."""

    undoes_settings = True

    def __init__(self, real: Any, dialect: Any) -> None:
        super().__init__(real, dialect)
        self._functions: frozenset[str] | None = None
        self._deferrable: list[tuple[str, bool, bool]] = []
        self._has_ddl = False
        # So that the driver says no BEGIN of its own.
        self.begins_itself: bool = bool(real.autocommit)
        real.autocommit = True

    def open(self) -> None:
        self._functions = None
        self.run(*BEGIN)

    def close(self) -> bool:
        # One round trip. What a transaction does not undo: locks of the session, and LISTEN.
        end = ("ROLLBACK", "SELECT pg_advisory_unlock_all()", "UNLISTEN *")
        try:
            self.run(f"ROLLBACK TO SAVEPOINT {ROOT}", *end)
        except Exception:
            self.run(*end)
            return False
        return True

    @property
    def is_clean(self) -> bool:
        # What the driver has prepared may be of a table that is no more.
        return not self._has_ddl

    def in_transaction(self) -> bool:
        driver = getattr(self.real, "driver_connection", self.real)
        if self.dialect.driver == "asyncpg":
            return bool(driver.is_in_transaction())
        info = getattr(driver, "info", None)
        return info is None or info.transaction_status != 0

    def is_spoilt(self, error: BaseException) -> bool:
        driver = getattr(self.real, "driver_connection", self.real)
        info = getattr(driver, "info", None)
        if info is not None:
            return bool(info.transaction_status == 3)  # INERROR
        # asyncpg does not tell the state. What the server said has a severity; what asyncpg says
        # by itself, of an argument, has none, and nothing was sent.
        return not isinstance(error, Exception) or hasattr(error.__cause__, "severity")

    def ends_wait(self, error: BaseException) -> bool:
        # deadlock_detected, lock_not_available
        return getattr(error, "sqlstate", None) in ("40P01", "55P03")

    def writes(self, said: Said) -> bool:
        unknown = said.words - _KNOWN_FUNCTIONS
        return bool(unknown) and not unknown.isdisjoint(self._catalog())

    def after_ddl(self) -> None:
        self._functions = None
        self._has_ddl = True

    def check(self) -> None:
        self._catalog()
        if not self._deferrable:
            return
        checks = "SET CONSTRAINTS ALL IMMEDIATE"
        if any(some and not every for _, some, every in self._deferrable):
            # Two constraints of one name: they cannot be told apart in SET CONSTRAINTS, but the
            # rollback of a savepoint puts all modes back.
            self.run("SAVEPOINT rope_check")
            self._execute(checks)
            self.run("ROLLBACK TO SAVEPOINT rope_check", "RELEASE SAVEPOINT rope_check")
            return
        self._execute(checks)
        deferred = ", ".join(name for name, some, _ in self._deferrable if some)
        if deferred:
            self.run(f"SET CONSTRAINTS {deferred} DEFERRED")

    def pid(self) -> int | None:
        driver = getattr(self.real, "driver_connection", self.real)
        if self.dialect.driver == "asyncpg":
            return int(driver.get_server_pid())
        info = getattr(driver, "info", None)
        return None if info is None else int(info.backend_pid)

    def blockers(self, pid: int | None) -> list[int]:
        return list(self.rows(f"SELECT pg_blocking_pids({pid})")[0][0])

    def cancel(self, pid: int | None) -> None:
        self.rows(f"SELECT pg_cancel_backend({pid})")

    def setting(self, name: str) -> str | None:
        quoted = name.replace("'", "''")
        value = self.rows(f"SELECT current_setting('{quoted}', true)")[0][0]
        return None if value is None else str(value)

    def restore(self, settings: dict[str, str | None]) -> None:
        calls = (
            "set_config('{}', '{}', false)".format(*(part.replace("'", "''") for part in pair))
            for pair in ((name, value or "") for name, value in settings.items())
        )
        self.rows(f"SELECT {', '.join(calls)}")

    def run(self, *statements: str) -> None:
        script = "; ".join(statements)
        if self.dialect.driver == "asyncpg":

            async def execute(driver: Any) -> None:
                await driver.execute(script)

            self.real.run_async(execute)
        else:
            self._execute(script)

    def _execute(self, script: str) -> None:
        cursor = self.real.cursor()
        try:
            cursor.execute(script)
        finally:
            cursor.close()

    def _catalog(self) -> frozenset[str]:
        """Return the functions that may write; learn which constraints are deferrable."""
        if self._functions is None:
            rows = self.rows(_CATALOG)
            self._functions = frozenset(row[1].lower() for row in rows if row[0] == "function")
            self._deferrable = [(row[1], row[2], row[3]) for row in rows if row[0] != "function"]
        return self._functions
