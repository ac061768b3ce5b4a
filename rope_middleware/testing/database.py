"""What SQLite, PostgreSQL and MariaDB do differently inside a sandbox.

A `Database` speaks to the one real connection of a sandbox, in the words of its server. Its methods
run where the connection lives: in the calling thread, or in a greenlet on the sandboxes' loop.

Two savepoints stand in the real transaction. Everything is rolled back to ROOT at the end: where
ROOT is not there any more, somebody has committed. TURN is where the present writer began.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, ClassVar

from rope_middleware.testing.sql import Said

__all__ = ["BEGIN", "ROOT", "Database"]

ROOT, TURN = "rope_sandbox", "rope_turn"

BEGIN = ("BEGIN", f"SAVEPOINT {ROOT}", f"SAVEPOINT {TURN}")


class Database:
    """One real connection, and how its server is spoken to."""

    undoes_settings: ClassVar[bool] = False
    """A rollback undoes SET."""
    one_writer: ClassVar[bool] = False
    """Only one connection at a time can write at all."""
    reads_late: bool = False
    """The driver reads rows from the database when they are fetched."""
    may_cancel: ClassVar[bool] = True
    """The async driver's connection is as good as new after a statement was cancelled."""

    def __init__(self, real: Any, dialect: Any) -> None:
        self.real = real
        self.dialect = dialect
        self.begins_itself: bool = False
        """What the application configured: the driver's own autocommit."""

    @property
    def is_clean(self) -> bool:
        """Whether the connection is as good as new for another sandbox."""
        return False

    def open(self) -> None:
        """Begin the transaction that is rolled back in the end."""
        self.run(*BEGIN)

    def release(self) -> None:
        """Make what was written since TURN a part of the sandbox's transaction."""
        self.run(f"RELEASE SAVEPOINT {TURN}", f"SAVEPOINT {TURN}")

    def back(self) -> None:
        """Undo what was done since TURN."""
        self.run(f"ROLLBACK TO SAVEPOINT {TURN}")

    def close(self) -> bool:
        """Roll everything back; tell whether nothing was committed meanwhile."""
        kept = True
        try:
            self.run(f"ROLLBACK TO SAVEPOINT {ROOT}")
        except self.dialect.loaded_dbapi.Error:
            kept = False
        self.run("ROLLBACK")
        return kept

    def in_transaction(self) -> bool:
        """Tell, without asking the server, whether the transaction still stands."""
        return True

    def is_spoilt(self, error: BaseException) -> bool:
        """Tell whether `error` has spoilt the transaction, until a rollback to a savepoint."""
        del error
        return False

    def is_victim(self, error: BaseException) -> bool:
        """Tell whether the server has rolled back the whole transaction, to end a deadlock."""
        del error
        return False

    def ends_wait(self, error: BaseException) -> bool:
        """Tell whether the statement had waited for somebody else's lock."""
        del error
        return False

    def refuse(self, _: Said, text: str) -> None:
        """Raise a RopeError where `text` would commit by itself."""

    def writes(self, said: Said) -> bool:
        """Tell whether what looks like a read writes."""
        del said
        return False

    def before_write(self, text: str) -> None:
        """Remember what the check of the commit has to compare with."""

    def after_ddl(self) -> None:
        """Forget what was known of the schema."""

    def check(self) -> None:
        """Check what the database would check at a commit.

        Raises:
            Exception: the driver's own error, as of the commit.
        """

    def after_end(self) -> None:
        """Put back what the server puts back at each end of a transaction."""

    def pid(self) -> int | None:
        """Return by what number the server knows the connection, if it tells who waits."""
        return None

    def blockers(self, pid: int | None) -> list[int]:
        """Return whom the connection of that number waits for."""
        del pid
        return []

    def cancel(self, pid: int | None) -> None:
        """Stop the statement of the connection of that number."""

    def setting(self, name: str) -> str | None:
        """Return the value of a setting."""
        del name
        return None

    def restore(self, settings: dict[str, str | None]) -> None:
        """Set settings to what they were."""

    def run(self, *statements: str) -> None:
        """Run statements of the sandbox's own."""
        cursor = self.real.cursor()
        try:
            for statement in statements:
                cursor.execute(statement)
        finally:
            cursor.close()

    def rows(self, statement: str) -> list[Any]:
        """Run a query of the sandbox's own."""
        cursor = self.real.cursor()
        try:
            cursor.execute(statement)
            return list(cursor.fetchall())
        finally:
            cursor.close()

    def repeat(self, statement: str, parameters: Any) -> None:
        """Run a statement of the application's again, whose result nobody wants."""
        cursor = self.real.cursor()
        try:
            if parameters is None:
                cursor.execute(statement)
            else:
                cursor.execute(statement, parameters)
        finally:
            cursor.close()

    def spoil(self) -> None:
        """Bring the transaction to where an error had brought it, for the driver's own error."""
        with suppress(Exception):
            self.run("SELECT 1/0")
