"""J7 on PostgreSQL: the server tells what was written, locks go, nobody is idle in transaction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import create_engine, insert, select, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from starlette.responses import StreamingResponse

from rope_middleware import AsyncSessionJenny, RopeError, RopeMiddleware, SessionJenny, open_scope
from tests.kit.asgi import ASGIClient, client
from tests.kit.engines import fill
from tests.kit.leaks import checked_out
from tests.kit.models import Row
from tests.kit.sessions import Jenny
from tests.kit.waiting import PATIENCE, poll
from tests.servers.postgres import Database, postgres_server

pytestmark = pytest.mark.anyio

FUNCTION = """
CREATE FUNCTION note(n int) RETURNS int LANGUAGE sql AS $$
    INSERT INTO row (n) VALUES ($1) RETURNING n
$$"""


@pytest.fixture(scope="module")
def server_database() -> Iterator[Database]:
    """A database with 100 rows."""
    with postgres_server().new_database() as found:
        fill(found.url("psycopg"), 100, FUNCTION, "CREATE SEQUENCE numbers")
        yield found


@pytest.fixture
def database(server_database: Database) -> Iterator[Database]:
    """It, and in the end nobody is connected to it any more."""
    yield server_database
    assert not server_database.backends("idle in transaction")


@pytest.fixture
def sync_jenny(database: Database) -> Iterator[Jenny]:
    engine = create_engine(database.url("psycopg"))
    yield SessionJenny(sessionmaker(engine))
    assert checked_out(engine) == 0
    engine.dispose()


@pytest.fixture(params=["psycopg", "asyncpg"])
async def async_jenny(
    request: pytest.FixtureRequest, database: Database, anyio_backend: str
) -> AsyncIterator[AsyncSessionJenny[Any]]:
    engine = create_async_engine(database.url(request.param), pool_timeout=PATIENCE)
    yield AsyncSessionJenny(async_sessionmaker(engine, expire_on_commit=False))
    assert checked_out(engine) == 0
    await engine.dispose()


WRITES = {
    "insert": "INSERT INTO row (n) VALUES (1000)",
    "update": "UPDATE row SET name = 'x' WHERE n = 1",
    "nothing found": "DELETE FROM row WHERE n < 0 OR n = 50",
    "in a query": "WITH gone AS (DELETE FROM row WHERE n = 51 RETURNING n) SELECT n FROM gone",
    "by a function": "SELECT note(1001)",
    "after a lock": "SELECT n FROM row FOR UPDATE; UPDATE row SET name = 'x' WHERE n = 1",
    "table": "CREATE TABLE other (n int)",
    "type": "CREATE TYPE mood AS ENUM ('good')",
}
READS = {
    "select": "SELECT n FROM row",
    "row lock": "SELECT n FROM row WHERE n = 1 FOR UPDATE",
    "weak row lock": "SELECT n FROM row WHERE n = 1 FOR KEY SHARE",
    "advisory lock": "SELECT pg_advisory_xact_lock(1)",
    "sequence": "SELECT nextval('numbers')",
    "table lock": "LOCK TABLE row IN SHARE MODE",
    "setting": "SELECT set_config('work_mem', '8MB', true)",
}


@pytest.mark.parametrize("how", WRITES)
def test_J7_text_that_writes_is_refused_on_postgresql(sync_jenny: Jenny, how: str) -> None:
    """The server is asked; what was written stands until the application decides."""
    for execute in (
        lambda statement: sync_jenny.session.execute(text(statement)),
        lambda statement: sync_jenny.session.connection().exec_driver_sql(statement),
    ):
        with open_scope():
            for statement in WRITES[how].split(";"):
                execute(statement)
            with pytest.raises(RopeError, match=r"release\(\) would lose .* commit\(\)"):
                sync_jenny.release()
            assert sync_jenny.session.in_transaction()
            sync_jenny.session.rollback()
            sync_jenny.release()


@pytest.mark.parametrize("how", READS)
def test_J7_what_reads_and_locks_is_released_on_postgresql(sync_jenny: Jenny, how: str) -> None:
    """A lock goes, and a setting for the transaction; a number of a sequence is not lost."""
    with open_scope():
        sync_jenny.session.execute(text(READS[how])).close()
        sync_jenny.release()
        assert checked_out(sync_jenny.session.get_bind()) == 0  # type: ignore[arg-type]


def test_J7_a_lock_is_gone_and_objects_are_as_they_were(sync_jenny: Jenny) -> None:
    """Somebody else can lock the row; the object still has what was read."""
    with open_scope():
        row = sync_jenny.session.get_one(Row, 1, with_for_update=True)
        sync_jenny.release()
        with open_scope():
            other = sync_jenny.session.get(Row, 1, with_for_update={"nowait": True})
            assert other is not None
        assert row.name == ""


def test_J7_after_an_error_of_the_database_there_is_nothing_to_lose(sync_jenny: Jenny) -> None:
    """The transaction is aborted already: nothing of it can be committed."""
    with open_scope():
        sync_jenny.session.get(Row, 1)
        with pytest.raises(Exception, match="division by zero"):
            sync_jenny.session.execute(text("SELECT 1 / 0"))
        sync_jenny.release()
        assert sync_jenny.session.get(Row, 2) is not None


def test_J7_a_connection_that_is_lost_meanwhile(sync_jenny: Jenny, database: Database) -> None:
    """There is nothing to give back but a dead connection; the session goes on."""
    with open_scope():
        row = sync_jenny.session.get_one(Row, 1)
        database.terminate(sync_jenny.session.scalar(text("SELECT pg_backend_pid()")) or 0)
        sync_jenny.release()
        assert row.n == 1
        assert sync_jenny.session.get(Row, 2) is not None


def test_J7_two_phases(database: Database) -> None:
    """A session that commits in two phases gives back what it has only read."""
    engine = create_engine(database.url("psycopg"))
    jenny: Jenny = SessionJenny(sessionmaker(engine, twophase=True))
    with open_scope():
        jenny.session.get(Row, 1)
        jenny.release()
        assert checked_out(engine) == 0
        jenny.session.execute(insert(Row).values(n=2000))
        with pytest.raises(RopeError, match="INSERT INTO row"):
            jenny.release()
        jenny.session.prepare()
        with pytest.raises(RopeError):
            jenny.release()
        jenny.session.rollback()
        assert jenny.session.get(Row, 2000) is None
    engine.dispose()


@pytest.mark.parametrize("how", ["insert", "in a query", "by a function", "table"])
async def test_J7_async_text_that_writes_is_refused(
    async_jenny: AsyncSessionJenny[Any], how: str
) -> None:
    """By both drivers."""
    async with open_scope():
        await async_jenny.session.execute(text(WRITES[how]))
        with pytest.raises(RopeError, match=r"commit\(\)"):
            await async_jenny.release()
        await async_jenny.session.rollback()
        await async_jenny.release()


async def test_J7_async_a_server_side_cursor_is_not_cut_off(
    async_jenny: AsyncSessionJenny[Any],
) -> None:
    """A portal of the server ends with its transaction."""
    async with open_scope():
        result = await async_jenny.session.stream_scalars(
            select(Row.n).order_by(Row.n).execution_options(yield_per=10)
        )
        assert await anext(result) == 0
        with pytest.raises(RopeError, match="result is still being read"):
            await async_jenny.release()
        assert len([n async for n in result]) == 99
        await async_jenny.release()


# -- the scenarios of the field --------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_J7_20_requests_wait_for_another_service_with_a_pool_of_5(
    database: Database, driver: str
) -> None:
    """20 of 20 are answered (without `release()`: 5), and none is idle in transaction meanwhile."""
    engine = create_async_engine(database.url(driver), pool_size=5, max_overflow=0, pool_timeout=2)
    jenny = AsyncSessionJenny(async_sessionmaker(engine, expire_on_commit=False))
    waiting, answers = 0, anyio.Event()
    app = FastAPI()
    app.add_middleware(RopeMiddleware)

    @app.get("/")
    async def chat() -> int:
        nonlocal waiting
        row = await jenny.session.get_one(Row, 7)
        await jenny.release()
        waiting += 1
        await answers.wait()  # the model's
        return int(row.n)

    async with client(app) as http, anyio.create_task_group() as group:
        statuses: list[int] = []

        async def ask() -> None:
            statuses.append((await http.get("/", timeout=PATIENCE)).status_code)

        for _ in range(20):
            group.start_soon(ask)
        await poll(lambda: waiting == 20)
        assert not database.backends("idle in transaction")
        assert checked_out(engine) == 0
        answers.set()
    assert statuses == [200] * 20
    await engine.dispose()


@pytest.mark.parametrize(
    "options", [{}, {"commit_on_success": True}], ids=["app commits", "commit"]
)
async def test_J7_25_of_25_viewers_and_a_request_beside_them(
    database: Database, options: dict[str, Any]
) -> None:
    """Streams that have read who the user is hold nothing; the pool is SQLAlchemy's default."""
    engine = create_async_engine(database.url("asyncpg"), pool_timeout=2)
    jenny = AsyncSessionJenny(async_sessionmaker(engine, expire_on_commit=False))
    app = FastAPI()
    app.add_middleware(RopeMiddleware, **options)

    async def user() -> int:
        found = await jenny.session.scalar(select(Row.n).where(Row.n == 7))
        await jenny.release()
        return int(found or 0)

    @app.get("/events")
    async def events(user: int = Depends(user)) -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            while True:
                yield f"data: {user}\n\n"
                await asyncio.sleep(0.1)

        return StreamingResponse(chunks(), media_type="text/event-stream")

    @app.get("/number")
    async def number(user: int = Depends(user)) -> int:
        return user

    viewers = [ASGIClient(reads=1) for _ in range(25)]
    async with anyio.create_task_group() as group:
        for viewer in viewers:
            group.start_soon(viewer, app, "/events")
        await poll(lambda: all(len(viewer.messages) == 2 for viewer in viewers))
        assert {viewer.status for viewer in viewers} == {200}
        assert not database.backends("idle in transaction")
        async with client(app) as http:
            answer = await http.get("/number")
        assert (answer.status_code, answer.json()) == (200, 7)
        group.cancel_scope.cancel()
    assert checked_out(engine) == 0
    await engine.dispose()
