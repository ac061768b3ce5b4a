"""Engines whose pools run dry at the first leaks, instead of hiding them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, func, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

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


def small_engine(path: Path, pool_size: int = 3, **options: Any) -> Engine:
    """Make an engine on an SQLite file, with the tables of the models in it."""
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
    Base.metadata.create_all(engine)
    return engine


def small_async_engine(path: Path, **options: Any) -> AsyncEngine:
    """Make an async engine on an SQLite file that may be there already."""
    told: dict[str, Any] = {"pool_size": 2, "max_overflow": 0, "pool_timeout": PATIENCE}
    return create_async_engine(f"sqlite+aiosqlite:///{path}", **(told | options))


def counter_engine(path: Path, pool_size: int, *, writer: bool, **options: Any) -> Engine:
    """Make an engine as `small_engine` does, with one `Data` row of count 0."""
    engine = small_engine(path, pool_size, **options)
    if writer:
        begin_as_writer(engine)
    with Session(engine) as session:
        session.add(Data(count=0))
        session.commit()
    return engine


def rows(engine: Engine) -> int:
    """Count the `Row`s that are committed."""
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(Row)) or 0
