"""The cursor of a virtual connection: its statements wait for their turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from rope_middleware.errors import RopeError
from rope_middleware.testing.sql import Kind, Said, read

if TYPE_CHECKING:
    from rope_middleware.testing.shared import SharedConnection
    from rope_middleware.testing.virtual import VirtualConnection

__all__ = ["WRITE", "VirtualCursor", "refuse"]

WRITE = Said(Kind.WRITE)


def refuse(name: str) -> NoReturn:
    """Raise the error for what would steer the shared transaction.

    Raises:
        RopeError: always.
    """
    raise RopeError(
        f"{name!r} of the driver's connection cannot be used in a sandbox: it steers the "
        "transaction that all sessions of the sandbox share. Use the session, or SQLAlchemy's "
        "connection."
    )


class VirtualCursor:
    """A cursor whose statements wait for their turn, and whose rows are all read at once."""

    __slots__ = ("_before", "_buffers", "_make", "_real", "_rows", "_shared", "connection")

    connection: VirtualConnection
    _shared: SharedConnection
    _make: Callable[[], Any]
    _real: Any
    _before: dict[str, Any]
    _rows: deque[Any] | None
    _buffers: bool

    def __init__(
        self, connection: VirtualConnection, shared: SharedConnection, make: Callable[[], Any]
    ) -> None:
        own: tuple[tuple[str, Any], ...] = (
            ("connection", connection),
            ("_shared", shared),
            ("_make", make),  # an async driver's cursor can only be made where its loop is
            ("_real", None),
            ("_before", {}),
            ("_rows", None),
            # sqlite3 reads rows when they are fetched; other drivers have them all by then.
            ("_buffers", shared.database.reads_late),
        )
        for name, value in own:
            object.__setattr__(self, name, value)

    def execute(self, statement: Any, *args: Any, **options: Any) -> Any:
        """Execute a statement when its turn has come."""
        return self._execute("execute", statement, args, options)

    def executemany(self, statement: Any, *args: Any, **options: Any) -> Any:
        """Execute a statement with several sets of parameters."""
        return self._execute("executemany", statement, args, options)

    def executescript(self, script: str) -> VirtualCursor:
        """Execute statement by statement: sqlite3's own would commit first."""
        from sqlite3 import complete_statement

        statement = ""
        for piece in script.split(";"):
            statement += piece + ";"
            if complete_statement(statement):
                if statement.strip(" \n\t;"):
                    self.execute(statement)
                statement = ""
        return self

    def callproc(self, *args: Any) -> Any:
        """Call a procedure."""
        return self._execute("callproc", None, args, {})

    def copy(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: psycopg's COPY holds the connection for as long as its block."""
        refuse("copy")

    def _execute(
        self, how: str, statement: Any, args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        statement = self.connection.translate(statement)
        given = args if statement is None else (statement, *args)

        def run() -> Any:
            real = self._made()
            result = getattr(real, how)(*given, **options)
            if self._buffers and real.description is not None:
                object.__setattr__(self, "_rows", deque(real.fetchall()))
            return self if result is real else result

        said = WRITE if statement is None else read(statement, self._shared.database.dialect.name)
        text = statement if isinstance(statement, str) else ""
        object.__setattr__(self, "_rows", None)
        return self.connection.say(said, text, args[0] if args else None, run)

    def _made(self) -> Any:
        if self._real is None:
            real = self._make()
            for name, value in self._before.items():
                setattr(real, name, value)
            object.__setattr__(self, "_real", real)
        return self._real

    @property
    def description(self) -> Any:
        """What the columns are; None without a result."""
        return None if self._real is None else self._real.description

    @property
    def rowcount(self) -> int:
        """How many rows were touched."""
        return -1 if self._real is None else int(self._real.rowcount)

    def fetchone(self) -> Any:
        """Return the next row, or None."""
        if self._rows is None:
            return self._real.fetchone()
        return self._rows.popleft() if self._rows else None

    def fetchmany(self, size: int | None = None) -> Any:
        """Return the next rows."""
        if self._rows is None:
            return self._real.fetchmany() if size is None else self._real.fetchmany(size)
        count = self._real.arraysize if size is None else size
        return [self._rows.popleft() for _ in range(min(count, len(self._rows)))]

    def fetchall(self) -> Any:
        """Return all rows that are left."""
        if self._rows is None:
            return self._real.fetchall()
        rows = list(self._rows)
        self._rows.clear()
        return rows

    def close(self) -> None:
        """Close the cursor."""
        if self._real is not None:
            self._real.close()

    async def _async_soft_close(self) -> None:
        """Nothing: all rows are read."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.fetchone, None)

    def __enter__(self) -> VirtualCursor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        if self._real is None:
            self._shared.lane.call(self._made)
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._real is None:
            self._before[name] = value
        else:
            setattr(self._real, name, value)
