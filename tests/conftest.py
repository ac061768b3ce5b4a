"""Fixtures for everybody: databases with small pools, and the search for leaks."""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import sessionmaker

from rope_middleware import SessionJenny
from tests.kit.engines import MakeEngine, counter_engine, fill
from tests.kit.leaks import LostConnections, no_scope_here, nothing_checked_out, open_scopes
from tests.kit.ropes import tracing
from tests.kit.said import Said, listening
from tests.kit.sessions import Around, Jenny
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from tests.servers.postgres import Database
    from tests.servers.replicas import Cluster

HERE = Path(__file__).parent
NOT_QUICK = {
    "test_docs.py",
    "test_examples_served.py",
    "test_make.py",
    "test_migration_docs.py",
    "test_P_cost.py",
    "test_package.py",
}
SERVED = {"emptied", "servers"}
STARTS = {"cluster", "mariadb_server", "open_place", "postgres_server"}


def pytest_configure(config: pytest.Config) -> None:
    """Have the servers that tests start hear Ctrl-C, also where the tests run in the background.

    A shell's ``&`` has SIGINT ignored, and a new process inherits that; a handler it does not.
    """
    config.addinivalue_line(
        "markers", "quick: in process and soon over: an answer in under a minute on two cores"
    )
    config.addinivalue_line("markers", "slow: takes seconds, so that it is no part of `-m quick`")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _has_quick(path: Path) -> bool:
    return path.parent in (HERE, HERE / "promises") and path.name not in NOT_QUICK


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m quick` imports nothing that has no quick test: that takes as long as a third of it."""
    if config.option.markexpr != "quick" or HERE not in collection_path.parents:
        return None
    if collection_path.is_dir():
        return collection_path.name != "promises" or None
    return not _has_quick(collection_path) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick is what lies here and in promises/, but what is slow or on a server."""
    for item in items:
        has_server = any(name in item.nodeid for name in ("postgres", "mariadb"))
        if isinstance(item, pytest.Function) and "sqlite" not in item.nodeid:
            has_server = has_server or not STARTS.isdisjoint(vars(item.module))
            has_server = has_server or not SERVED.isdisjoint(item.fixturenames)
        if _has_quick(item.path) and not has_server and not item.get_closest_marker("slow"):
            item.add_marker("quick")


def pytest_runtest_logstart(nodeid: str, location: tuple[str, int | None, str]) -> None:
    """Spare the search for leaks what imports and earlier files have left: most of its time."""
    if location[0] != _file[0]:
        _file[0] = location[0]
        gc.collect()
        gc.freeze()


_file = [""]


def pytest_sessionfinish() -> None:
    """What comes now may ask the garbage collector for its objects."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    """Take back what a framework does to the root logger: its stream is that of one test."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers = [one for one in root.handlers if one in handlers or _is_pytests(one)]


def _is_pytests(handler: logging.Handler) -> bool:
    return type(handler).__module__.startswith("_pytest")


@pytest.fixture(autouse=True)
def said(request: pytest.FixtureRequest) -> Iterator[Said]:
    """Fail a test in which the package tells of a misuse, unless it is marked as `told`."""
    with listening() as said:
        yield said
    if request.node.get_closest_marker("told") is None:
        assert not said.unexpected, "the package tells of a misuse; mark the test as `told`?"


@pytest.fixture(scope="module")
def servers() -> Iterator[Cluster]:
    """A PostgreSQL and two replicas of it."""
    from tests.servers.replicas import cluster

    with cluster(replicas=2) as found:
        yield found


@pytest.fixture(scope="module")
def emptied() -> Iterator[Callable[[], Database]]:
    """A database of PostgreSQL, made for a module when a test asks for it; each finds it empty."""
    from tests.servers.postgres import postgres_server

    with ExitStack() as stack:
        made: list[Database] = []

        def empty() -> Database:
            if not made:
                made.append(stack.enter_context(postgres_server().new_database()))
                fill(made[0].url("psycopg"), 0)
            made[0].terminate()  # whoever is left would hold its locks
            made[0].query("TRUNCATE row, child, data RESTART IDENTITY")
            return made[0]

        yield empty


@pytest.fixture
def anyio_backend() -> str:
    """SQLAlchemy's asyncio half runs under asyncio alone; what runs under trio says so."""
    return "asyncio"


@pytest.fixture
def make_engine(tmp_path: Path, no_leaks: None) -> Iterator[MakeEngine]:
    """Make engines on SQLite files that hold one `Data` row of count 0.

    ``make_engine(pool_size=5, writer=False, **options of create_engine)``. After the test each
    one must have all its connections back.
    """
    engines: list[Engine] = []

    def make(pool_size: int = 5, *, writer: bool = False, **options: Any) -> Engine:
        file = tmp_path / f"{len(engines)}.sqlite"
        engines.append(counter_engine(file, pool_size, writer=writer, **options))
        return engines[-1]

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


@pytest.fixture
def jenny(engine: Engine) -> Jenny:
    """A jenny for the engine."""
    return SessionJenny(sessionmaker(engine))


@pytest.fixture(params=[nullcontext, tracing], ids=["no_tracing", "tracing"])
def traced(request: pytest.FixtureRequest) -> Around:
    """A context in which to run the code that ropes hang on."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a scope open or current, or a connection to the garbage collector."""
    before = open_scopes()
    with LostConnections() as pools:
        yield
        assert no_scope_here(), "the ContextVar still shows a scope"
        eventually(
            lambda: all(any(scope is old for old in before) for scope in open_scopes()),
            lambda: f"no scope open: {open_scopes()}",
        )
        # A connection that only the garbage collector finds is found now, and not in some
        # other test.
        gc.collect()
    assert not pools.lost
