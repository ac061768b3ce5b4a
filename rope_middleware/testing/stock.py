"""Real connections, kept from one sandbox to the next: making one takes longer than a test."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.pool import Pool, SingletonThreadPool, StaticPool

from rope_middleware.errors import RopeError
from rope_middleware.testing.database import Database
from rope_middleware.testing.lanes import Lane, LoopLane, ThreadLane, at_exit
from rope_middleware.testing.mariadb import MariaDB
from rope_middleware.testing.postgresql import PostgreSQL
from rope_middleware.testing.sqlite import SQLite

__all__ = ["Stock", "root_of", "stock_of"]

_DATABASES: dict[str, type[Database]] = {
    "sqlite": SQLite,
    "postgresql": PostgreSQL,
    "mysql": MariaDB,
    "mariadb": MariaDB,
}
_STOCK = "_rope_middleware_stock"
_making = threading.Lock()


class Holder(Protocol):
    """Who has a real connection."""

    name: str


class Stock:
    """The real connections to one engine, for all sandboxes.

    Args:
        engine: the application's.
    """

    def __init__(self, engine: Engine) -> None:
        self._is_async = engine.dialect.is_async
        self._dialect = engine.dialect
        self._database = _database_of(engine)
        # A database in memory is the connection of the application's own pool.
        self._is_own = not isinstance(engine.pool, (StaticPool, SingletonThreadPool))
        self._pool = self._pool_of(engine)
        self._fairies: dict[Database, Any] = {}
        self.free: list[Database] = []
        self._holder: Holder | None = None

    def lane(self) -> Lane:
        """Return a lane for one connection."""
        return LoopLane(self._database.may_cancel) if self._is_async else ThreadLane()

    def take(self, opened: Holder) -> Database:
        """Return a real connection whose transaction has just begun. Runs in the lane."""
        if self._database.one_writer:
            with _making:
                holder, self._holder = self._holder, self._holder or opened
            if holder is not None:
                raise RopeError(
                    f"The sandbox {opened.name!r} cannot use this SQLite database: the sandbox "
                    f"{holder.name!r} holds it, and SQLite lets one connection write at a time. "
                    "End that one first, give each test a database of its own, or use PostgreSQL."
                )
        try:
            while self.free:
                database = self.free.pop()
                try:
                    database.open()
                except Exception:  # it was lost while it idled
                    self._throw_away(database)
                else:
                    return database
            return self._new()
        except BaseException:
            self._holder = None if self._holder is opened else self._holder
            raise

    def put(self, opened: Holder, database: Database, is_sound: bool) -> None:
        """Take a connection back. Runs in the lane."""
        try:
            if is_sound and database.is_clean:
                self.free.append(database)
            else:
                self._throw_away(database)
        finally:
            if self._holder is opened:
                self._holder = None

    def ask(self, question: Callable[[Database], Any]) -> Any:
        """Ask the server something over a connection of its own. Blocks."""
        return self.lane().block(lambda: self._ask(question))

    def _ask(self, question: Callable[[Database], Any]) -> Any:
        database = self.free.pop() if self.free else self._make()
        answer = question(database)
        self.free.append(database)
        return answer

    def close(self) -> None:
        """Close the connections that idle."""
        _close_all(self._is_async, self.free)

    def begin_anew(self, engine: Engine) -> None:
        """Close them, and connect as the engine does from now on: it has a new pool."""
        self.close()
        self._pool = self._pool_of(engine)

    def _pool_of(self, engine: Engine) -> Pool:
        return engine.pool.recreate() if self._is_own else engine.pool

    def _new(self) -> Database:
        database = self._make()
        try:
            database.open()
        except BaseException:
            self._throw_away(database)
            raise
        return database

    def _make(self) -> Database:
        fairy = self._pool.connect()
        try:
            database = self._database(fairy.dbapi_connection, self._dialect)
        except BaseException:
            fairy.invalidate()
            raise
        if self._is_own:
            fairy.detach()
        else:
            self._fairies[database] = fairy
        return database

    def _throw_away(self, database: Database) -> None:
        fairy = self._fairies.pop(database, None)
        with suppress(Exception):
            (fairy or database.real).close()


def _close_all(is_async: bool, free: list[Database]) -> None:
    while free:
        real = free.pop().real
        with suppress(Exception):
            if is_async:
                LoopLane(may_cancel=True).later(real.close)
            else:
                real.close()


def _close_stocks() -> None:
    for stock in list(_stocks):
        stock.close()


_stocks: weakref.WeakSet[Stock] = weakref.WeakSet()
atexit.register(_close_stocks)
at_exit.append(_close_stocks)


def stock_of(engine: Engine) -> Stock:
    """Return the stock of an engine; the engine keeps it."""
    with _making:
        stock: Stock | None = engine.__dict__.get(_STOCK)
        if stock is None:
            stock = engine.__dict__[_STOCK] = Stock(engine)
            _stocks.add(stock)
            event.listen(engine, "engine_disposed", _disposed)
            weakref.finalize(engine, _close_all, engine.dialect.is_async, stock.free)
        return stock


def _disposed(engine: Engine) -> None:
    stock: Stock | None = engine.__dict__.get(_STOCK)
    if stock is not None:
        stock.begin_anew(engine)


def root_of(engine: Engine) -> Engine:
    """Return the engine at the root of those that share its pool."""
    while isinstance(engine, OptionEngine):
        engine = engine._proxied  # noqa: SLF001 - the engine whose pool it shares
    return engine


def _database_of(engine: Engine) -> type[Database]:
    try:
        return _DATABASES[engine.dialect.name]
    except KeyError:
        raise RopeError(
            f"A Sandbox works on SQLite, PostgreSQL and MariaDB, not on {engine.dialect.name!r}."
        ) from None
