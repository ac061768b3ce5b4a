"""S6, H3: an inner scope that would wait gets what its outer scope holds and will not miss."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from sqlalchemy import Engine, create_engine, event, func, insert, select, text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from rope_middleware import AsyncSessionJenny, SessionJenny, open_scope
from rope_middleware.session.holding.giving_way import is_plain_read
from tests.kit.engines import MakeEngine, begin_as_writer, fill
from tests.kit.leaks import checked_out
from tests.kit.models import Data, Row
from tests.kit.sessions import Jenny, beside, run_threads, touch
from tests.kit.stores import Store
from tests.kit.waiting import PATIENCE
from tests.servers.postgres import Database, postgres_server

pytestmark = pytest.mark.anyio


@pytest.fixture
def one(make_engine: MakeEngine) -> Engine:
    """An engine whose pool has one connection, which nobody waits for in vain for long."""
    return make_engine(1, pool_timeout=0.2)


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    with postgres_server().new_database() as found:
        fill(found.url("psycopg"), 10)
        yield found


# -- nobody stands still ---------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_S6_20_requests_that_gather_five_scopes_each(database: Database, driver: str) -> None:
    """All hold a connection before the first one asks for more: 20 of 20, SQLAlchemy's pool."""
    engine = create_async_engine(database.url(driver), pool_timeout=PATIENCE)
    jenny = AsyncSessionJenny(async_sessionmaker(engine))
    holding, all_hold = 0, anyio.Event()

    @open_scope()
    async def count(n: int) -> int:
        return int(await jenny.session.scalar(select(func.count() + n).select_from(Row)))

    async def request() -> list[int]:
        nonlocal holding
        async with open_scope():
            row = await jenny.session.get_one(Row, 1)
            holding += 1
            if holding == 15:
                all_hold.set()
            await all_hold.wait()
            found = await asyncio.gather(*(count(n) for n in range(5)))
            assert row.n == 1  # as loaded: with the default, it would be expired by a commit
            assert await jenny.session.scalar(select(func.count()).select_from(Row)) == 10
            return list(found)

    with anyio.fail_after(PATIENCE):
        found = await asyncio.gather(*(request() for _ in range(20)))
    assert found == [[10, 11, 12, 13, 14]] * 20
    assert checked_out(engine) == 0
    await engine.dispose()


def test_S6_requests_with_an_inner_scope_in_as_many_threads_as_there_are_connections(
    make_engine: MakeEngine,
) -> None:
    """Three of three, where each one holds the pool's last connection when it asks for another."""
    engine = make_engine(3, pool_timeout=PATIENCE)
    jenny: Jenny = SessionJenny(sessionmaker(engine))
    barrier = threading.Barrier(3)

    def request() -> None:
        with open_scope():
            data = jenny.session.scalars(select(Data)).one()
            barrier.wait(PATIENCE)
            with open_scope():
                touch(jenny)
            assert data.count == 0

    run_threads([request] * 3)


async def test_S6_async_the_outer_session_goes_on_as_before(store: Store) -> None:
    """Its objects are loaded and its own, and it writes and commits in a new transaction."""
    jenny = store.jenny
    async with open_scope():
        await store.add(1)
        await store.commit()
    async with open_scope(), open_scope():
        row = await jenny.session.get_one(Row, 1)
        async with open_scope():
            await jenny.session.get(Row, 1)
            async with open_scope():
                await jenny.session.get(Row, 1)
                assert store.held() == 2
        assert row in jenny.session
        row.name = "changed"
        await jenny.session.commit()
    assert store.rows() == [1]


def test_S6_nothing_is_given_while_nobody_waits(make_engine: MakeEngine) -> None:
    """With a connection left in the pool both scopes have their own."""
    engine = make_engine(2)
    jenny: Jenny = SessionJenny(sessionmaker(engine))
    with open_scope():
        outer = touch(jenny)
        transaction = outer.get_transaction()
        with open_scope():
            touch(jenny)
            assert checked_out(engine) == 2
        assert outer.get_transaction() is transaction


# -- what an outer scope keeps ---------------------------------------------------------------------


def written(session: Session) -> Any:
    session.add(Row(n=1))
    session.flush()


def core_written(session: Session) -> Any:
    session.execute(insert(Row.__table__).values(n=1))


def text_written(session: Session) -> Any:
    session.execute(text("INSERT INTO row (n) VALUES (1)"))


def unread(session: Session) -> Any:
    return session.execute(select(Data.__table__).where(Data.count == 0))


def began(session: Session) -> Any:
    session.begin()
    session.scalar(select(Data.count))


def in_a_savepoint(session: Session) -> Any:
    session.scalar(select(Data.count))
    return session.begin_nested()


def connection_kept(session: Session) -> Any:
    return session.connection()


KEPT = [written, core_written, text_written, unread, began, in_a_savepoint, connection_kept]


@pytest.mark.parametrize("use", KEPT, ids=lambda use: use.__name__)
def test_S6_what_an_outer_scope_would_miss_it_keeps(
    one: Engine, use: Callable[[Session], Any]
) -> None:
    """The inner one waits as before and is told why; the outer one's transaction goes on."""
    jenny: Jenny = SessionJenny(sessionmaker(one))
    with open_scope():
        session = jenny.session
        kept = use(session)
        transaction = session.get_transaction()
        with open_scope(), pytest.raises(PoolTimeout):
            touch(jenny)
        assert session.get_transaction() is transaction
        session.execute(text("SELECT 1"))
        assert checked_out(one) == 1
        del kept
        session.rollback()


def test_S6_a_snapshot_is_kept(make_engine: MakeEngine) -> None:
    """SQLite within a transaction reads what was there at its first statement."""
    engine = make_engine(1, pool_timeout=0.2)
    begin_as_writer(engine)
    engine.dispose()
    jenny: Jenny = SessionJenny(sessionmaker(engine))
    with open_scope():
        touch(jenny)
        with open_scope(), pytest.raises(PoolTimeout):
            touch(jenny)


ON_POSTGRES: dict[str, tuple[str, dict[str, Any]]] = {
    "repeatable read": ("SELECT 1", {"isolation_level": "REPEATABLE READ"}),
    "row lock": ("SELECT n FROM row WHERE n = 1 FOR UPDATE", {}),
    "advisory lock": ("SELECT pg_advisory_xact_lock(1)", {}),
    "tenant": ("SELECT set_config('app.tenant', '1', true)", {}),
    "local setting": ("SET LOCAL app.tenant = '1'", {}),
    "sequence": ("SELECT nextval('numbers')", {}),
}


@pytest.mark.parametrize("how", ON_POSTGRES)
def test_S6_locks_and_settings_are_kept(database: Database, how: str) -> None:
    """Whatever lasts as long as the transaction: for row-level security that would be fatal."""
    statement, options = ON_POSTGRES[how]
    database.query("CREATE SEQUENCE IF NOT EXISTS numbers")
    engine = create_engine(
        database.url("psycopg"), pool_size=1, max_overflow=0, pool_timeout=0.2, **options
    )
    jenny: Jenny = SessionJenny(sessionmaker(engine))
    with open_scope():
        jenny.session.execute(text(statement)).close()
        pid = jenny.session.scalar(text("SELECT pg_backend_pid()"))
        with open_scope(), pytest.raises(PoolTimeout):
            touch(jenny)
        assert jenny.session.scalar(text("SELECT pg_backend_pid()")) == pid
    engine.dispose()


async def test_S6_async_a_session_that_is_being_used_keeps_its_connection(
    database: Database,
) -> None:
    """A statement of the outer session is under way while an inner scope asks."""
    engine = create_async_engine(
        database.url("asyncpg"), pool_size=1, max_overflow=0, pool_timeout=PATIENCE
    )
    jenny = AsyncSessionJenny(async_sessionmaker(engine))

    @open_scope()
    async def count() -> int:
        return int(await jenny.session.scalar(select(func.count()).select_from(Row)))

    async with open_scope():
        await jenny.session.get(Row, 1)
        slow = asyncio.create_task(
            jenny.session.execute(text("SELECT n FROM row, (SELECT pg_sleep(0.2)) AS s"))
        )
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(count())
        assert len((await slow).all()) == 10
        await jenny.release()
        assert await waiting == 10
    await engine.dispose()


def test_S6_another_thread_that_is_inside_of_a_call_keeps_its_connection(
    make_engine: MakeEngine,
) -> None:
    """It flushes, say: what it does next it does on the connection that it has."""
    engine = make_engine(1, pool_timeout=0.2)
    jenny: Jenny = SessionJenny(sessionmaker(engine))
    with open_scope():
        touch(jenny)
        session = jenny.session
        inside, may_go = threading.Event(), threading.Event()

        def wait_in_the_session(*_: Any) -> None:
            inside.set()
            may_go.wait(PATIENCE)

        event.listen(session, "do_orm_execute", wait_in_the_session)
        with beside(lambda: session.scalar(select(Data.count)), until=may_go):
            assert inside.wait(PATIENCE)
            with open_scope(), pytest.raises(PoolTimeout):
                touch(jenny)
            assert session.in_transaction()
        event.remove(session, "do_orm_execute", wait_in_the_session)


# -- what a plain read is --------------------------------------------------------------------------

PLAIN = [
    "SELECT 1",
    'SELECT "user".id, count(*) AS count_1 FROM "user" WHERE "user".id IN (1, 2)',
    "WITH a AS (SELECT n FROM row) SELECT max(n) FROM a",
    "\n  select coalesce(lower(name), '') from row order by n limit 1 offset 2",
    "SELECT cast(a AS VARCHAR(20)), row_number() OVER (PARTITION BY b) FROM t",
    "VALUES (1), (2)",
]
NOT_PLAIN = [
    "INSERT INTO row (n) VALUES (1)",
    "WITH gone AS (DELETE FROM row RETURNING n) SELECT n FROM gone",
    "SELECT n FROM row FOR UPDATE",
    "SELECT n FROM row FOR KEY SHARE",
    "SELECT n FROM row LOCK IN SHARE MODE",
    "SELECT n INTO other FROM row",
    "SELECT set_config('app.tenant', '1', true)",
    "SELECT pg_advisory_xact_lock (1)",
    'SELECT "public"."note"(1)',
    "SELECT note(1)",
    "SELECT 1; SET LOCAL a = 1",
    "SET LOCAL a = 1",
    "LISTEN a",
    "NOTIFY a",
    "BEGIN",
    "CREATE TABLE a (n int)",
    "DECLARE c CURSOR FOR SELECT 1",
    "",
]


@pytest.mark.parametrize("sql", PLAIN)
def test_S6_a_plain_read(sql: str) -> None:
    """What is read leaves no trace."""
    assert is_plain_read(sql)


@pytest.mark.parametrize("sql", NOT_PLAIN)
def test_S6_no_plain_read(sql: str) -> None:
    """What might write, lock or set something, whatever it is."""
    assert not is_plain_read(sql)
