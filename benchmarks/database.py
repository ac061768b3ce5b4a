"""The databases: an SQLite file, and PostgreSQL where its wheel is installed."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from benchmarks.measure import one_cpu

POOL = {"pool_size": 5, "max_overflow": 0}  # the same for everybody


class Base(DeclarativeBase):
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Item(Base):
    """What is read: one row, its id is 1."""

    __tablename__ = "item"


class Note(Base):
    """What is written."""

    __tablename__ = "note"


@dataclass(frozen=True)
class Database:
    """Where a database is, for a sync and for an async driver."""

    name: str
    url: str
    async_url: str

    def engine(self) -> Engine:
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
        def _(connection: Any, record: object) -> None:
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("PRAGMA journal_mode = WAL")


def _filled(database: Database) -> Database:
    engine = database.engine()
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add(Item(id=1, text="rope"))
    engine.dispose()
    return database


@contextmanager
def sqlite() -> Iterator[Database]:
    with tempfile.TemporaryDirectory(prefix="rope_bench_") as folder:
        file = f"{folder}/bench.sqlite"
        yield _filled(Database("SQLite", f"sqlite:///{file}", f"sqlite+aiosqlite:///{file}"))


@contextmanager
def postgresql() -> Iterator[Database]:
    from tests.servers.postgres import postgres_server

    with one_cpu(0):
        server = postgres_server()
    with server.new_database() as database:
        urls = (database.text_url(driver) for driver in ("psycopg", "asyncpg"))
        yield _filled(Database("PostgreSQL", *urls))


PLACES = {"SQLite": sqlite, "PostgreSQL": postgresql}
