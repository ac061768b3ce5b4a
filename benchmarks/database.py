"""The databases: an SQLite file, and PostgreSQL where its wheel is installed."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, create_engine, event, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

if TYPE_CHECKING:
    from collections.abc import Iterator

POOL = {"pool_size": 5, "max_overflow": 0}
"""The pool's size; the same for everybody."""


class Base(DeclarativeBase):
    """The models of the benchmarks."""


class Item(Base):
    """What is read: one row, its id is 1."""

    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Note(Base):
    """What is written."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


def read(session: Session) -> bytes:
    """Read one row by its ORM class."""
    return session.scalars(select(Item).where(Item.id == 1)).one().name.encode()


async def aread(session: Any) -> bytes:
    """`read`, async."""
    return (await session.scalars(select(Item).where(Item.id == 1))).one().name.encode()


@dataclass(frozen=True)
class Database:
    """Where a database is, for a sync and for an async driver."""

    name: str
    url: str
    async_url: str

    def engine(self) -> Engine:
        """Make a sync engine."""
        engine = create_engine(self.url, **POOL)
        tune(engine)
        return engine

    def async_engine(self) -> AsyncEngine:
        """Make an async engine; to be disposed in the event loop that used it."""
        engine = create_async_engine(self.async_url, **POOL)
        tune(engine.sync_engine)
        return engine


def tune(engine: Engine) -> None:
    """Have SQLite not wait for the disk: the disk is not what is measured."""
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _(connection: object, record: object) -> None:
            cursor = connection.cursor()  # type: ignore[attr-defined]
            cursor.execute("PRAGMA synchronous = OFF")
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.close()


def fill(database: Database) -> None:
    """Make the tables and the row that is read."""
    engine = database.engine()
    try:
        Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.add(Item(id=1, name="rope"))
            session.commit()
    finally:
        engine.dispose()


@contextmanager
def sqlite() -> Iterator[Database]:
    """Make an SQLite file, and remove it in the end."""
    with tempfile.TemporaryDirectory(prefix="rope_bench_") as folder:
        file = Path(folder) / "bench.sqlite"
        database = Database("SQLite", f"sqlite:///{file}", f"sqlite+aiosqlite:///{file}")
        fill(database)
        yield database


@contextmanager
def postgresql() -> Iterator[Database]:
    """Make a database on a PostgreSQL server that is started for it.

    Raises:
        ImportError: its wheel or a driver is not installed.
        RuntimeError: the server did not start.
    """
    import asyncpg as asyncpg

    from tests.servers.postgres import postgres_server

    with postgres_server().new_database() as server:
        database = Database("PostgreSQL", server.text_url("psycopg"), server.text_url("asyncpg"))
        fill(database)
        yield database


PLACES = {"SQLite": sqlite, "PostgreSQL": postgresql}
