"""Fixtures of the promises: the same text for both kinds of session and both protocols."""

from __future__ import annotations

import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url

from rope_middleware import open_scope
from tests.kit.engines import create_tables
from tests.kit.sandboxes import PLACES, Place, open_place
from tests.kit.sessions import Around
from tests.kit.shop import SHOPS
from tests.kit.stores import Lock, Store, connections_at_work, open_store
from tests.kit.waiting import poll
from tests.kit.ways import WAYS, Way
from tests.kit.web import KINDS, Web
from tests.kit.wsgi import WRAPS, Wrap, wrapped
from tests.servers.postgres import Database

# Python 3.13, and aiosqlite, warn of every connection that nobody closed. Those that are cut off in
# tests on purpose (cancelled while they connect, invalidated) are left to their finaliser by the
# drivers; what our own code leaves is found in the pools.
LEFT_BY_DRIVERS = (
    "ignore:unclosed database in <sqlite3.Connection:ResourceWarning",
    "ignore:.*was deleted before:ResourceWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Async tests know what the drivers do; the tests of other folders are none of ours."""
    for item in items:
        if "anyio_backend" in getattr(item, "fixturenames", ()) and Path(__file__).parent in (
            item.path.parents
        ):
            for text in LEFT_BY_DRIVERS:
                item.add_marker(pytest.mark.filterwarnings(text))


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request: pytest.FixtureRequest) -> Way:
    """A way to open a scope: ``way(body, **options of open_scope)``."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=[open_scope, nullcontext], ids=["in a scope", "by rope"])
def around(request: pytest.FixtureRequest) -> Around:
    """What is around the application's code: a scope, or nothing."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=WRAPS)
def wrap(request: pytest.FixtureRequest) -> Wrap:
    """The middleware with one of the sets of options that change the path of a request."""
    return partial(wrapped, request.param)


@pytest.fixture
async def store(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Store]:
    """A database file and a jenny of AsyncSessions."""
    before = set(threading.enumerate())
    async with open_store(tmp_path / "async.db") as found:
        yield found
        gc.collect()
        assert found.held() == 0, "a connection is still out of its pool"
    await poll(lambda: not connections_at_work(before))


@pytest.fixture(params=KINDS)
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Web]:
    """One of the ways to serve a handler."""
    found = Web(request.param, tmp_path / "first.db")
    yield found
    held = found.store.held()
    found.close()
    assert held == 0, "a connection is still out of its pool"


@pytest.fixture(scope="module", params=PLACES)
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """A database, for all tests of a module: sandboxes leave nothing in it."""
    with open_place(request.param, tmp_path_factory.mktemp("place") / "s.db") as found:
        yield found


@pytest.fixture(params=SHOPS)
def kind(request: pytest.FixtureRequest) -> str:
    """One of the ways to serve a `Shop` on PostgreSQL."""
    return str(request.param)


@pytest.fixture(
    params=[
        *("sqlite", "sqlite+aiosqlite"),
        *("postgresql+psycopg", "postgresql+asyncpg", "postgresql+psycopg_async"),
    ]
)
def driver_url(
    request: pytest.FixtureRequest, tmp_path: Path, emptied: Callable[[], Database]
) -> URL:
    """A database with the models' tables, by each driver."""
    if "sqlite" in request.param:
        create_tables(tmp_path / "x.db")
        return make_url(f"{request.param}:///{tmp_path / 'x.db'}")
    return emptied().url("psycopg").set(drivername=request.param)


@pytest.fixture
def lock(web: Web) -> Iterator[Lock]:
    """Somebody else who writes to the database of `web`."""
    found = Lock(web.store.path)
    yield found
    found.close()
