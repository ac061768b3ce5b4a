"""The DBAPI connection that sessions of a sandbox get in the place of a real one.

Its commit() releases a savepoint, its rollback() goes back to it. SQLAlchemy above does not know;
what is asked for and does not concern the transaction goes to the real connection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rope_middleware.session.code.lines import application_line, text_of
from rope_middleware.session.release import HAS_WRITTEN
from rope_middleware.testing.cursor import WRITE, VirtualCursor, refuse
from rope_middleware.testing.errors import closed
from rope_middleware.testing.shared import SharedConnection
from rope_middleware.testing.sql import Kind, Said
from rope_middleware.testing.statement import Statement

__all__ = ["VirtualConnection", "virtual_class"]

_UNSEEN = frozenset(
    {"transaction", "pipeline", "backup", "blobopen", "iterdump", "deserialize", "tpc_recover"}
)
# What asks for a cursor on the server: a virtual cursor has read everything before others go on.
_ON_SERVER = frozenset({"name", "server_side", "withhold", "scrollable"})


class VirtualConnection:
    """One session's use of the shared connection.

    Attributes that SQLAlchemy sets (isolation levels, `autocommit`) stay here.

    Args:
        shared: the real connection, which it shares with others.
    """

    def __init__(self, shared: SharedConnection) -> None:
        self._shared = shared
        self._real: Any = shared.database.real
        self.again: list[tuple[str, Callable[[], Any]]] = []
        """What is said again after an interruption: savepoints by name, settings, an error."""
        self.settings: dict[str, str | None] = {}
        """What settings were before this transaction set them for itself."""
        self.is_used: bool = False
        self.has_written: bool = False
        self.is_spoilt: bool = False
        self.is_in_block: bool = False
        """Between a BEGIN and a COMMIT that were sent as text."""

    # DBAPI

    def cursor(self, *args: Any, **options: Any) -> VirtualCursor:
        """Return a cursor. It reads all rows when it executes."""
        if args and (isinstance(args[0], str) or args[0].__name__.startswith("SS")):
            args = args[1:]
        kept = {name: value for name, value in options.items() if name not in _ON_SERVER}
        return VirtualCursor(self, self._shared, partial(self._real.cursor, *args, **kept))

    def execute(self, statement: Any, *args: Any, **options: Any) -> VirtualCursor:
        """Execute on a cursor of its own, as several drivers' connections do."""
        cursor = self.cursor()
        cursor.execute(statement, *args, **options)
        return cursor

    def commit(self) -> None:
        """Release the savepoint.

        Raises:
            ScopeClosedError: the sandbox has ended, and rolled back what was to be committed.
        """
        shared = self._shared
        if shared.is_closed and self.is_used:
            raise closed(shared.name)
        if self.has_something:
            shared.lane.call(partial(shared.commit, self))
        self.reset()

    def rollback(self) -> None:
        """Go back to the savepoint."""
        shared = self._shared
        if self.has_something and not shared.is_closed:
            shared.lane.call(partial(shared.roll_back, self))
        self.reset()

    def close(self) -> None:
        """Roll back what was left; the real connection stays."""
        self.terminate()

    def terminate(self) -> None:
        """Roll back, without waiting where the caller is async: it may not be able to."""
        shared = self._shared
        if self.has_something and not shared.is_closed:
            shared.lane.later(partial(shared.roll_back, self))

    def ping(self, *_: Any, **__: Any) -> None:
        """The real connection is there."""

    def tpc_begin(self, xid: Any) -> None:
        """Begin a transaction of two phases; here it is one like any other."""

    def tpc_prepare(self) -> None:
        """First phase: nothing that is written can be prepared in a sandbox."""

    def tpc_commit(self, xid: Any = None) -> None:
        """Second phase."""
        del xid
        self.commit()

    def tpc_rollback(self, xid: Any = None) -> None:
        """Second phase, the other way."""
        del xid
        self.rollback()

    def run_async(self, fn: Callable[[Any], Any]) -> Any:
        """Run an async function of the driver's connection, as SQLAlchemy's adapters do."""
        return self.say(WRITE, "", None, partial(self._real.run_async, fn))

    def __getattr__(self, name: str) -> Any:
        if name in _UNSEEN:
            refuse(name)
        return getattr(self._real, name)

    # What the shared connection has to know

    @property
    def commits_itself(self) -> bool:
        """Whether each statement is a transaction of its own."""
        return not self.is_in_block and self._is_autocommit()

    def _is_autocommit(self) -> bool:
        return bool(self.autocommit)

    @property
    def has_something(self) -> bool:
        """Whether its end has to say something to the real connection."""
        return self is self._shared.writer or self is self._shared.tainting

    @property
    def has_settings(self) -> bool:
        """Whether it has set something that is to stay after its commit."""
        return any(not name for name, _ in self.again)

    def translate(self, statement: Any) -> Any:
        """Return what to send in the place of `statement`."""
        return statement

    def say(self, said: Said, text: str, parameters: Any, run: Callable[[], Any]) -> Any:
        """Carry a statement out."""
        shared = self._shared
        line = ""
        if said.kind is not Kind.READ and shared.writer is not self:
            line = text_of(application_line(1))
        statement = Statement(said, text, parameters, run, line or "a SELECT that writes")
        return shared.lane.call(
            partial(shared.say, self, statement), partial(shared.cancel, statement)
        )

    def forget(self, savepoint: str, *, keep_settings: bool) -> None:
        """Forget what is not said again: a savepoint was released, or gone back to."""
        names = [name for name, _ in self.again]
        if savepoint not in names:
            return
        at = len(names) - 1 - names[::-1].index(savepoint)
        if keep_settings:
            self.again[at:] = [(name, repeat) for name, repeat in self.again[at:] if not name]
        else:
            del self.again[at + 1 :]
            self.is_spoilt = False

    def reset(self) -> None:
        """Begin anew: a transaction has ended."""
        self.again.clear()
        self.settings.clear()
        self.is_used = self.has_written = self.is_spoilt = self.is_in_block = False


class VirtualSQLite(VirtualConnection):
    """The one that SQLite's dialects get."""

    def _is_autocommit(self) -> bool:
        return self.isolation_level is None

    def executescript(self, script: str) -> VirtualCursor:
        """Execute statement by statement: sqlite3's own would commit first."""
        cursor = self.cursor()
        cursor.executescript(script)
        return cursor


class _Info:
    """What psycopg tells of a connection, where the transaction is the virtual one.

    Args:
        virtual: the connection.
        info: of the real one.
    """

    def __init__(self, virtual: VirtualConnection, info: Any) -> None:
        self._virtual = virtual
        self._info = info

    @property
    def transaction_status(self) -> Any:
        """IDLE, INTRANS or INERROR."""
        virtual = self._virtual
        number = 3 if virtual.is_spoilt else 2 if virtual.is_used else 0
        return type(self._info.transaction_status)(number)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._info, name)


class _AsyncDriver:
    """psycopg's async connection, for those who ask it for its `info`."""

    def __init__(self, virtual: VirtualConnection, driver: Any) -> None:
        self._driver = driver
        self.info = _Info(virtual, driver.info)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)


class VirtualPostgreSQL(VirtualConnection):
    """The one that PostgreSQL's dialects get; its drivers have setters, too."""

    def __init__(self, shared: SharedConnection) -> None:
        super().__init__(shared)
        self.autocommit: bool = shared.database.begins_itself
        if shared.database.dialect.driver == "psycopg":
            self.info: _Info = _Info(self, self._real.info)
            if shared.database.dialect.is_async:
                self._connection = _AsyncDriver(self, self._real.driver_connection)

    def translate(self, statement: Any) -> Any:
        # release() asks the server what the transaction has written. Here that is the sandbox's,
        # and would answer for everybody.
        if statement == HAS_WRITTEN:
            return f"SELECT {self.has_written}"
        return statement

    def set_autocommit(self, value: bool) -> None:
        """psycopg's, async."""
        self.autocommit = value

    def set_isolation_level(self, level: Any) -> None:
        """Asyncpg's adapter knows autocommit as a level. The others are the sandbox's to choose."""
        if self._shared.database.dialect.driver == "asyncpg":
            self.autocommit = level == "autocommit"

    def set_read_only(self, value: Any) -> None:
        """Nothing: it would outlast the savepoint."""

    set_deferrable = set_read_only


class VirtualMariaDB(VirtualConnection):
    """The one that the dialects of MariaDB and MySQL get."""

    def __init__(self, shared: SharedConnection) -> None:
        super().__init__(shared)
        self._autocommit = False

    def _is_autocommit(self) -> bool:
        return self._autocommit

    def autocommit(self, value: bool) -> None:
        """Make each statement a transaction of its own, or not."""
        self._autocommit = bool(value)

    def get_autocommit(self) -> bool:
        """Tell whether each statement is a transaction of its own."""
        return self._autocommit


def virtual_class(name: str) -> type[VirtualConnection]:
    """Return the class for the dialect of this name."""
    classes = {"sqlite": VirtualSQLite, "postgresql": VirtualPostgreSQL}
    return classes.get(name, VirtualMariaDB)
