"""Databases for the tests of sandboxes: an engine and a jenny of each kind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, ForeignKey, MetaData, String, create_engine, event, func, select
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import NullPool, StaticPool

from rope_middleware import AsyncSessionJenny, SessionJenny
from tests.servers.mariadb import mariadb_server
from tests.servers.postgres import postgres_server


class Base(DeclarativeBase):
    """The models of the sandboxes' tests: MariaDB asks for lengths."""


class Row(Base):
    """One of many."""

    __tablename__ = "row"
    n: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), default="")


class Deferring(DeclarativeBase):
    """Models that MariaDB cannot have: it checks every constraint at once."""


class Parent(Deferring):
    """What a child asks for."""

    __tablename__ = "parent"
    n: Mapped[int] = mapped_column(primary_key=True)


class Child(Deferring):
    """A row whose missing parent is found out by the commit alone."""

    __tablename__ = "child"
    n: Mapped[int] = mapped_column(primary_key=True)
    parent: Mapped[int] = mapped_column(
        ForeignKey("parent.n", name="child_parent", deferrable=True, initially="DEFERRED")
    )


COUNT = select(func.count()).select_from(Row)

PLACES = ["sqlite file", "sqlite memory", "postgresql", "mariadb"]


class Place:
    """A database with the tables of the models, an engine and a jenny of each kind.

    Args:
        engine: the sync one.
        async_engine: the async one, on the same database or, in memory, on its own.
        options: of the session factories.
    """

    def __init__(self, engine: Engine, async_engine: AsyncEngine, **options: Any) -> None:
        self.engine, self.async_engine = engine, async_engine
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _enforce)
            event.listen(async_engine.sync_engine, "connect", _enforce)
        self.maker = sessionmaker(engine, **options)
        self.async_maker = async_sessionmaker(async_engine, **options)
        self.jenny = SessionJenny(self.maker)
        self.ajenny = AsyncSessionJenny(self.async_maker)

    @property
    def is_shared(self) -> bool:
        """Do both engines have the same database?"""
        return not isinstance(self.engine.pool, StaticPool)

    def metadatas(self) -> list[MetaData]:
        """Return what tables the database can have."""
        can_defer = self.engine.dialect.name in ("sqlite", "postgresql")
        return [Base.metadata, *[Deferring.metadata] * can_defer]

    def rows(self) -> int:
        """What another client of the database sees, by the sync engine."""
        with Session(self.engine) as session:
            return session.scalar(COUNT) or 0

    async def arows(self) -> int:
        """What another client of the database sees, by the async engine."""
        async with self.async_engine.connect() as connection:
            return await connection.scalar(COUNT) or 0

    async def create(self) -> None:
        """Make the tables where the async engine has a database of its own."""
        async with self.async_engine.begin() as connection:
            for metadata in self.metadatas():
                await connection.run_sync(metadata.create_all)

    def close(self) -> None:
        self.engine.dispose()
        asyncio.run(self.async_engine.dispose())


def _enforce(connection: Any, record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


@contextlib.contextmanager
def open_urls(kind: str, path: Path) -> Iterator[tuple[Any, Any]]:
    """Give the URLs of one fresh database for a sync and an async driver."""
    if kind == "sqlite file":
        yield f"sqlite:///{path}", f"sqlite+aiosqlite:///{path}"
    elif kind == "sqlite memory":
        yield "sqlite://", "sqlite+aiosqlite://"
    elif kind == "postgresql":
        with postgres_server().new_database() as database:
            yield database.url("psycopg"), database.url("asyncpg")
    else:
        with mariadb_server().new_database() as found:
            yield found.url("mariadb+pymysql"), found.url("mariadb+asyncmy")


@contextlib.contextmanager
def open_place(kind: str, path: Path, **options: Any) -> Iterator[Place]:
    """Make a place on a fresh database."""
    with open_urls(kind, path) as (url, async_url):
        told: dict[str, Any] = {}
        # Each test has a loop of its own, in which the connections of others are none.
        async_told: dict[str, Any] = {"poolclass": NullPool}
        if kind == "sqlite memory":
            told = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
            async_told = {}
        place = Place(
            create_engine(url, **told), create_async_engine(async_url, **async_told), **options
        )
        try:
            for metadata in place.metadatas():
                metadata.create_all(place.engine)
            yield place
        finally:
            place.close()
