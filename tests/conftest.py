"""Fixtures for everybody: databases with small pools, one model, and the search for leaks."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import QueuePool

from rope_middleware import Scope
from tests.e2e.servers import eventually

MakeEngine = Callable[..., Engine]


def pytest_configure() -> None:
    """Have the servers that tests start hear Ctrl-C, also where the tests run in the background.

    A shell's ``&`` has SIGINT ignored, and a new process inherits that; a handler it does not.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Spare the search for leaks what the imports have made: half of the time of the suite."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """What comes now may ask the garbage collector for its objects."""
    gc.unfreeze()


class Base(DeclarativeBase):
    """The tests' models."""


class Data(Base):
    """The counter of the documentation."""

    __tablename__ = "data"

    id: Mapped[int] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(default=0)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Both event loops. AsyncSession knows asyncio only: its tests override this."""
    return str(request.param)


# -- databases ---------------------------------------------------------------------------------


def begin_as_writer(engine: Engine) -> None:
    """Have SQLite begin each transaction as a writer, see `examples/responder_app.py`."""

    @event.listens_for(engine, "connect")
    def _(dbapi_connection: Any, connection_record: Any) -> None:
        dbapi_connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def checked_out(engine: Engine) -> int:
    """Return how many connections are out of the engine's pool."""
    assert isinstance(engine.pool, QueuePool)
    return engine.pool.checkedout()


@pytest.fixture
def make_engine(tmp_path: Path, no_leaks: None) -> Iterator[MakeEngine]:
    """Make engines on SQLite files that hold one `Data` row of count 0.

    ``make_engine(pool_size=5, writer=False, **options of create_engine)``. After the test each
    one must have all its connections back.
    """
    engines: list[Engine] = []

    def make(pool_size: int = 5, *, writer: bool = False, **options: Any) -> Engine:
        engine = create_engine(
            f"sqlite:///{tmp_path}/{len(engines)}.sqlite",
            pool_size=pool_size,
            **{
                "max_overflow": 0,
                "pool_timeout": 20,
                "poolclass": QueuePool,
                "connect_args": {"timeout": 30, "check_same_thread": False},
            }
            | options,
        )
        if writer:
            begin_as_writer(engine)
        engines.append(engine)
        Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.add(Data(count=0))
            session.commit()
        return engine

    yield make
    try:
        for engine in engines:
            nothing_checked_out(engine)
    finally:
        for engine in engines:
            engine.dispose()


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    """An SQLite file behind a pool of 5 connections, with one `Data` row of count 0."""
    return make_engine()


# -- leaks -------------------------------------------------------------------------------------


def nothing_checked_out(engine: Engine) -> None:
    """Wait until every connection is back in the engine's pool."""
    eventually(lambda: checked_out(engine) == 0, lambda: f"all back in {engine.pool.status()}")


def open_scopes() -> list[Scope]:
    """Return every Scope of this process that has not given back everything."""
    # Not isinstance(): it asks lazy proxies for their __class__, which wakes them up.
    return [x for x in gc.get_objects() if issubclass(type(x), Scope) and not x.closed]


def no_scope_open() -> None:
    """Wait until no scope of this process is open."""
    eventually(lambda: not open_scopes(), lambda: f"no scope open: {open_scopes()}")


class _PoolLog(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lost: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "garbage collector is trying to clean up" in text:
            self.lost.append(text)


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a scope open or a connection to the garbage collector."""
    before = open_scopes()
    handler = _PoolLog()
    pool_log = logging.getLogger("sqlalchemy.pool")
    pool_log.addHandler(handler)
    try:
        yield
        eventually(
            lambda: all(any(scope is old for old in before) for scope in open_scopes()),
            lambda: f"no scope open: {open_scopes()}",
        )
        # A connection that only the garbage collector finds is found now, and not in some
        # other test.
        gc.collect()
    finally:
        pool_log.removeHandler(handler)
    assert not handler.lost
