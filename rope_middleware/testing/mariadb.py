"""What MariaDB does by itself: it commits around DDL."""

from __future__ import annotations

import re

from rope_middleware.errors import RopeError
from rope_middleware.testing.database import Database
from rope_middleware.testing.sql import Said, body_of

__all__ = ["MariaDB"]

_WAITED, _DEADLOCK = 1205, 1213
_COMMITS = re.compile(
    r"\s*(?:CREATE|DROP)\s+(?!TEMPORARY\b)|\s*(?:ALTER|TRUNCATE|RENAME|ANALYZE|OPTIMIZE|REPAIR|GRANT"
    r"|REVOKE|LOCK|UNLOCK|FLUSH)\b",
    re.IGNORECASE,
)


class MariaDB(Database):
    """MariaDB and MySQL, by PyMySQL, asyncmy and their like."""

    may_cancel = False

    def in_transaction(self) -> bool:
        driver = getattr(self.real, "driver_connection", self.real)
        status = getattr(driver, "server_status", None)
        return not isinstance(status, int) or bool(status & 1)  # SERVER_STATUS_IN_TRANS

    def pid(self) -> int | None:
        return int(self.rows("SELECT CONNECTION_ID()")[0][0])

    def blockers(self, pid: int | None) -> list[int]:
        found = self.rows(
            "SELECT r.trx_mysql_thread_id, b.trx_mysql_thread_id"
            " FROM information_schema.innodb_lock_waits w"
            " JOIN information_schema.innodb_trx b ON b.trx_id = w.blocking_trx_id"
            " JOIN information_schema.innodb_trx r ON r.trx_id = w.requesting_trx_id"
        )
        return [int(blocker) for waiting, blocker in found if waiting == pid]

    def cancel(self, pid: int | None) -> None:
        self.run(f"KILL QUERY {pid}")

    def ends_wait(self, error: BaseException) -> bool:
        return bool(error.args) and error.args[0] in (_WAITED, _DEADLOCK)

    def is_victim(self, error: BaseException) -> bool:
        # https://mariadb.com/kb/en/innodb-lock-modes/: of a deadlock, not of a lock wait time-out.
        return bool(error.args) and error.args[0] == _DEADLOCK

    def refuse(self, _: Said, text: str) -> None:
        # https://mariadb.com/kb/en/sql-statements-that-cause-an-implicit-commit/
        body = body_of(text, self.dialect.name)
        if _COMMITS.match(body):
            raise RopeError(
                f"MariaDB commits by itself before {' '.join(body.split()[:2])!r}, which "
                "would leave the rows of this sandbox in the database; the statement was not sent. "
                "Do it outside of the sandbox, or use DELETE instead of TRUNCATE."
            )
