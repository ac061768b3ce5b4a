"""Engines whose pools run dry at the first leaks, instead of hiding them."""

from __future__ import annotations

import functools
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, QueuePool

from tests.kit.models import Base, Data, Row
from tests.kit.waiting import PATIENCE

MakeEngine = Callable[..., Engine]


def begin_as_writer(engine: Engine) -> None:
    """Have SQLite begin each transaction as a writer, see `examples/responder_app.py`."""

    @event.listens_for(engine, "connect")
    def _(dbapi_connection: Any, connection_record: Any) -> None:
        dbapi_connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def hold_up(target: Any, name: str = "commit") -> tuple[threading.Event, threading.Event]:
    """Hold an event of `target` up: return what says that it came, and what lets it go on."""
    came, may_go = threading.Event(), threading.Event()

    @event.listens_for(target, name)
    def wait(*_: object) -> None:
        came.set()
        assert may_go.wait(PATIENCE)

    return came, may_go


def trust_the_disk(engine: Engine) -> None:
    """Have SQLite not wait for the disk: the machine does not crash in a test."""

    @event.listens_for(engine, "connect")
    def _(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA synchronous = OFF")
        cursor.close()


@functools.cache
def _file(count: int | None) -> bytes:
    """What is in a file with the tables of the models, made once; with a `Data` row of `count`."""
    with tempfile.TemporaryDirectory(prefix="rope_kit_") as folder:
        path = Path(folder) / "made.sqlite"
        engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
        Base.metadata.create_all(engine)
        if count is not None:
            with Session(engine) as session:
                session.add(Data(count=count))
                session.commit()
        return path.read_bytes()


def is_async_driver(url: URL) -> bool:
    """Is it one for AsyncSessions?"""
    return url.get_dialect().is_async


def create_tables(path: Path) -> None:
    """Make a file with the tables of the models, unless it is there."""
    if not path.exists():
        path.write_bytes(_file(None))


def small_engine(path: Path, pool_size: int = 3, **options: Any) -> Engine:
    """Make an engine on an SQLite file, with the tables of the models in it."""
    create_tables(path)
    engine = create_engine(
        f"sqlite:///{path}",
        pool_size=pool_size,
        **{
            "max_overflow": 0,
            "pool_timeout": 20,
            "poolclass": QueuePool,
            "connect_args": {"timeout": 30, "check_same_thread": False},
        }
        | options,
    )
    trust_the_disk(engine)
    engine.connect().close()  # what SQLAlchemy does at the first connection is no test's matter
    return engine


def small_async_engine(path: Path, **options: Any) -> AsyncEngine:
    """Make an async engine on an SQLite file that may be there already."""
    told: dict[str, Any] = {"pool_size": 2, "max_overflow": 0, "pool_timeout": PATIENCE}
    return create_async_engine(f"sqlite+aiosqlite:///{path}", **(told | options))


def counter_engine(path: Path, pool_size: int, *, writer: bool, **options: Any) -> Engine:
    """Make an engine as `small_engine` does, with one `Data` row of count 0."""
    path.write_bytes(_file(0))
    engine = small_engine(path, pool_size, **options)
    if writer:
        begin_as_writer(engine)
    return engine


def fill(url: URL, number: int, *statements: str, names: bool = False) -> None:
    """Make the tables of the models in a new database, with `number` rows from 0, and more."""
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    made = [{"n": n, "name": str(n) if names else ""} for n in range(number)]
    with engine.begin() as connection:
        if made:
            connection.execute(insert(Row), made)
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


def rows(engine: Engine) -> int:
    """Count the `Row`s that are committed."""
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(Row)) or 0


def counts(engine: Engine) -> list[int]:
    """Return the counts of all `Data` that is committed, the smallest first."""
    with Session(engine) as session:
        return sorted(session.scalars(select(Data.count)))
