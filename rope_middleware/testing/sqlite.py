"""What SQLite does by itself: one writer, and deferred foreign keys that only COMMIT looks at."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rope_middleware.testing.database import BEGIN, Database
from rope_middleware.testing.sql import Said

__all__ = ["SQLite"]


class SQLite(Database):
    """SQLite, by sqlite3 or aiosqlite."""

    one_writer = True

    def __init__(self, real: Any, dialect: Any) -> None:
        super().__init__(real, dialect)
        self.reads_late: bool = not dialect.is_async
        self._known: Counter[Any] | None = None  # foreign keys that were violated before
        self._defers = False  # a PRAGMA was said
        self._has_deferred: bool | None = None

    def open(self) -> None:
        # In a connection of Python 3.12's autocommit=False a transaction is always open.
        self.run(*BEGIN[1 if self.in_transaction() else 0 :])

    def in_transaction(self) -> bool:
        driver = getattr(self.real, "driver_connection", self.real)
        return bool(getattr(driver, "in_transaction", True))

    def refuse(self, _: Said, text: str) -> None:
        self._defers = self._defers or "defer_foreign_keys" in text.lower()

    def before_write(self, text: str) -> None:
        del text
        if self._known is None and self._checks():
            self._known = self._violated()

    def after_ddl(self) -> None:
        self._has_deferred = None

    def check(self) -> None:
        # RELEASE does not look at deferred foreign keys, COMMIT does:
        # https://www.sqlite.org/foreignkeys.html#fk_deferred
        if self._checks() and self._violated() - (self._known or Counter()):
            error = self.dialect.loaded_dbapi.IntegrityError("FOREIGN KEY constraint failed")
            error.sqlite_errorcode, error.sqlite_errorname = 787, "SQLITE_CONSTRAINT_FOREIGNKEY"
            raise error

    def after_end(self) -> None:
        if self._defers:
            self._defers = False
            self.run("PRAGMA defer_foreign_keys = OFF")

    def _checks(self) -> bool:
        if self._has_deferred is None:
            on = self.rows("PRAGMA foreign_keys")[0][0]
            found = self.rows(
                "SELECT 1 FROM sqlite_master WHERE type = 'table' AND sql LIKE '%DEFERRED%' LIMIT 1"
            )
            self._has_deferred = bool(on and found)
        return self._has_deferred or (
            self._defers
            and bool(self.rows("PRAGMA foreign_keys")[0][0])
            and bool(self.rows("PRAGMA defer_foreign_keys")[0][0])
        )

    def _violated(self) -> Counter[Any]:
        return Counter(tuple(row) for row in self.rows("PRAGMA foreign_key_check"))
