"""A database file, an engine on it and a jenny; sync or async behind the same coroutines."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, event
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from rope_middleware import AsyncSessionJenny, SessionJenny
from tests.kit.engines import create_tables, small_async_engine, trust_the_disk
from tests.kit.leaks import checked_out
from tests.kit.models import Child, Row
from tests.kit.sessions import SELECT
from tests.kit.waiting import PATIENCE, never


class Store:
    """What the application writes to, and what another client of the database sees.

    Args:
        path: the file; its tables are made.
        is_async: are its sessions AsyncSessions?
        patience: seconds until SQLite says "database is locked".
        options: of the engine.
    """

    def __init__(self, path: Path, *, is_async: bool, patience: float = 5, **options: Any) -> None:
        create_tables(path)
        self.path, self.is_async = path, is_async
        told: dict[str, Any] = {"connect_args": {"timeout": patience}} | options
        make: Any

        class OwnSession(Session):
            """The application's class: what listens to it hears of this store alone."""

        self.session_class = OwnSession
        if is_async:
            self.async_engine = small_async_engine(path, **told)
            self.engine = self.async_engine.sync_engine
            make = async_sessionmaker(
                self.async_engine, sync_session_class=OwnSession, expire_on_commit=False
            )
        else:
            told = {"pool_size": 2, "max_overflow": 0, "pool_timeout": PATIENCE} | told
            self.engine = create_engine(f"sqlite:///{path}", **told)
            make = sessionmaker(self.engine, class_=OwnSession, expire_on_commit=False)

        @event.listens_for(self.engine, "connect")
        def enforce(connection: Any, record: object) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA foreign_keys=ON")
            cursor.close()

        trust_the_disk(self.engine)
        self.commits: list[str] = []
        event.listen(self.engine, "commit", lambda connection: self.commits.append(path.stem))
        self.made: list[Any] = []
        self.holding = 0

        def count() -> Any:
            self.made.append(make())
            return self.made[-1]

        self.jenny: Any = AsyncSessionJenny(count) if is_async else SessionJenny(count)

    async def _do(self, name: str, *arguments: object) -> Any:
        found = getattr(self.jenny.session, name)(*arguments)
        return await found if self.is_async else found

    async def add(self, n: int) -> None:
        self.jenny.session.add(Row(n=n))
        await self._do("flush")

    async def add_orphan(self, n: int) -> None:
        self.jenny.session.add(Child(n=n, parent=10**6 + n))
        await self._do("flush")

    async def execute(self, statement: Any) -> Any:
        return await self._do("execute", statement)

    async def read(self) -> int:
        return len(list(await self._do("scalars", Row.__table__.select())))

    async def commit(self) -> None:
        await self._do("commit")

    async def rollback(self) -> None:
        await self._do("rollback")

    async def hold(self) -> None:
        """Begin a transaction and keep it until cancelled; `holding` tells that it is begun."""
        await self._do("execute", SELECT)
        self.holding += 1
        try:
            await never()
        finally:
            self.holding -= 1

    def rows(self) -> list[int]:
        """What another client of the database sees."""
        return [n for (n,) in self._seen("SELECT n FROM row ORDER BY n")]

    def orphans(self) -> int:
        return len(self._seen("SELECT n FROM child"))

    def _seen(self, query: str) -> list[tuple[int]]:
        with sqlite3.connect(self.path) as other:
            found = other.execute(query).fetchall()
        other.close()
        return found

    def held(self) -> int:
        """How many connections are out of the pool."""
        return checked_out(self.engine)

    async def dispose(self) -> None:
        if self.is_async:
            await self.async_engine.dispose()
        else:
            self.engine.dispose()


def connections_at_work(before: set[threading.Thread]) -> list[threading.Thread]:
    """Return the threads of aiosqlite's connections; their last word needs an open loop."""
    return [t for t in set(threading.enumerate()) - before if "_connection_worker" in t.name]


@asynccontextmanager
async def open_store(path: Path, **options: Any) -> AsyncIterator[Store]:
    """Use a store for AsyncSessions for the length of the block."""
    store = Store(path, is_async=True, **options)
    async with store.async_engine.connect():
        pass  # what SQLAlchemy does at the first connection is no test's matter
    try:
        yield store
    finally:
        await store.dispose()


class Lock:
    """Another client of an SQLite database that holds the write lock until it is told to go."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("BEGIN IMMEDIATE")

    def release(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self.release()
        self._connection.close()
