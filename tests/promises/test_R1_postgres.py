"""R1 on the wire, on a real PostgreSQL: no BEGIN, no ROLLBACK; a stream is read all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from sqlalchemy import create_engine, event, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import StaticPool

from rope_middleware import ReadOnlyError, SessionJenny, open_scope
from tests.kit.asgi import serve
from tests.kit.either import ONE, Either
from tests.kit.engines import fill
from tests.kit.models import Row
from tests.kit.programs import run_python
from tests.kit.waiting import eventually
from tests.servers.postgres import Database, postgres_server

DRIVERS = ["psycopg", "psycopg async", "asyncpg"]
Body = Callable[[Any], Awaitable[None]]


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    """A database with 100 rows."""
    with postgres_server().new_database() as found:
        fill(found.url("psycopg"), 100, names=True)
        yield found


class Reader(Either):
    """A jenny of one of the drivers, with one connection; a body of either kind from one text."""

    def __init__(self, database: Database, driver: str, **more: Any) -> None:
        self.database = database
        url = database.url(driver.split()[0])
        super().__init__([url], is_async=driver != "psycopg", engine=ONE | more)

    def run(self, body: Body) -> None:
        async def main() -> None:
            async with self:
                await asyncio.wait_for(body(self), 60)

        asyncio.run(main())

    def state(self) -> list[str | None]:
        """What the server says of our connections."""
        return [backend.state for backend in self.database.backends()]

    def last(self) -> list[str]:
        """The last statement of each of our connections: also BEGIN and ROLLBACK are some."""
        return [backend.query.rstrip(";") for backend in self.database.backends()]


@pytest.fixture(params=DRIVERS)
def reader(request: pytest.FixtureRequest, database: Database) -> Reader:
    """A jenny of one of the drivers."""
    eventually(lambda: not database.backends(), "somebody is connected still")
    return Reader(database, request.param)


def test_R1_no_transaction_is_opened_and_none_is_ended(reader: Reader) -> None:
    """It sees the statement: nothing before it, nothing open after it, nothing at the end."""

    async def body(_: Reader) -> None:
        for _ in range(3):
            async with reader.scope(read_only=True):
                row = await reader.do("get", Row, 7)
                assert row.name == "7"
                assert reader.state() == ["idle"]
                await reader.do("commit")
                await reader.do("get", Row, 8)
            assert reader.state() == ["idle"]
            assert [query.split()[0] for query in reader.last()] == ["SELECT"]

    reader.run(body)


@pytest.mark.told
def test_R1_the_next_one_has_its_transaction_again(reader: Reader) -> None:
    """The connection comes back to the pool as it was: others begin, commit and roll back."""

    async def body(_: Reader) -> None:
        async with reader.scope(read_only=True):
            await reader.do("get", Row, 7)
        async with reader.scope():
            await reader.do("get", Row, 7)
            assert reader.state() == ["idle in transaction"]
            reader.jenny.session.add(Row(n=1000))
            await reader.do("flush")
        assert reader.last() == ["ROLLBACK"]
        async with reader.scope(read_only=True):
            assert await reader.do("get", Row, 1000) is None

    reader.run(body)


@pytest.mark.parametrize("level", [None, "REPEATABLE READ", "AUTOCOMMIT"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_R1_the_isolation_level_of_others_stays(
    database: Database, driver: str, level: str | None
) -> None:
    """What the application has set on its engine is there again after a read-only scope."""
    reader = Reader(database, driver, **({} if level is None else {"isolation_level": level}))

    async def seen() -> tuple[Any, list[str | None]]:
        async with reader.scope():
            now = await reader.do("scalar", text("SHOW transaction_isolation"))
            return now, reader.state()

    async def body(_: Reader) -> None:
        before = await seen()
        for _ in range(2):
            async with reader.scope(read_only=True):
                await reader.do("get", Row, 7)
                assert reader.state() == ["idle"]
        assert await seen() == before

    reader.run(body)


@pytest.mark.parametrize("how", ["yield_per", "query", "text"])
def test_R1_a_streamed_result_is_read_all_the_same(reader: Reader, how: str) -> None:
    """A cursor on the server lives in a transaction: it has one, of the same connection."""
    statement: Any = select(Row).order_by(Row.n).execution_options(yield_per=10)
    if how == "text":
        statement = text("SELECT n FROM row ORDER BY n").execution_options(stream_results=True)

    async def read() -> list[int]:
        if not reader.is_async:
            session = reader.jenny.session
            if how == "query":
                return [row.n for row in session.query(Row).order_by(Row.n).yield_per(10)]
            return [row[0] if how == "text" else row[0].n for row in session.execute(statement)]
        result = await reader.jenny.session.stream(statement)
        return [row[0] if how == "text" else row[0].n async for row in result]

    async def body(_: Reader) -> None:
        async with reader.scope(read_only=True):
            assert (await reader.do("get", Row, 7)).n == 7
            assert await read() == list(range(100))
            assert await reader.do("scalar", select(func.count()).select_from(Row)) == 100
            with pytest.raises(ReadOnlyError):
                await reader.do("execute", text("DELETE FROM row"))
        assert reader.state() == ["idle"]
        async with reader.scope(read_only=True):
            await reader.do("get", Row, 7)
            assert reader.state() == ["idle"]

    reader.run(body)


def test_R1_what_lives_in_a_transaction_gets_one(reader: Reader) -> None:
    """`set_config(..., true)` of row-level security, said at the begin, holds for what follows."""

    @event.listens_for(reader.engine, "begin")
    def tell(connection: Any) -> None:
        connection.exec_driver_sql("SELECT set_config('app.tenant', '42', true)")

    tenant = text("SELECT current_setting('app.tenant', true)")

    async def body(_: Reader) -> None:
        async with reader.scope(read_only=True):
            await reader.do("get", Row, 7)
            assert await reader.do("scalar", tenant) == "42"
        event.remove(reader.engine, "begin", tell)
        async with reader.scope(read_only=True):
            assert await reader.do("scalar", tenant) in (None, "")
            await reader.do("execute", text("SET LOCAL app.tenant = '43'"))
            assert await reader.do("scalar", tenant) == "43"
        assert reader.state() == ["idle"]

    reader.run(body)


def test_R1_listeners_find_a_connection_as_it_always_is(reader: Reader) -> None:
    """Whatever was read before, and whenever they came: what they say holds for the transaction."""
    said, heard = "SELECT set_config('app.tenant', '42', true)", []
    tenant = text("SELECT current_setting('app.tenant', true)")

    async def ask(**options: Any) -> Any:
        async with reader.scope(**options):
            return await reader.do("scalar", tenant)

    async def body(_: Reader) -> None:
        assert await ask(read_only=True) in (None, "")
        event.listen(reader.engine, "before_cursor_execute", lambda *args: heard.append(args[2]))
        assert await ask(read_only=True) in (None, "")
        assert heard == [str(tenant)]
        await ask()

        @event.listens_for(reader.engine, "checkout")
        def tell(connection: Any, *_: object) -> None:
            connection.cursor().execute(said)

        for reads in (True, False, True):
            assert await ask(read_only=reads) == "42"

    reader.run(body)


def test_R1_who_does_not_read_gets_the_connection_as_it_was(database: Database) -> None:
    """Whichever way it is taken out of the pool."""
    engine = create_engine(database.url("psycopg"), pool_size=1, max_overflow=0)
    jenny = SessionJenny(sessionmaker(engine))
    other = engine.execution_options(logging_token="other")
    ways: list[Callable[[], Any]] = [engine.raw_connection, engine.connect, other.connect]
    for take in ways:
        with open_scope(read_only=True):
            driver: Any = jenny.session.connection().connection.driver_connection
            assert driver.autocommit
        with closing(take()):  # the same one: the pool has no other
            assert not driver.autocommit
    engine.dispose()


LOST = """
import sys
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker
from rope_middleware import SessionJenny, open_scope

jenny = SessionJenny(sessionmaker(create_engine(sys.argv[1], pool_size=1, max_overflow=0)))
with open_scope(read_only=True):
    driver = jenny.session.connection().connection.driver_connection
assert driver.autocommit  # it was left so
driver.close()
with open_scope():
    assert jenny.session.scalar(text("SELECT 1")) == 1
"""


def test_R1_a_connection_that_was_left_in_autocommit_and_is_lost_is_replaced(
    database: Database,
) -> None:
    """In a process of its own: with a listener on every engine (retries) none is left so."""
    run_python("-c", LOST, database.text_url("psycopg"))


def test_R1_for_update_and_ctes_are_refused(reader: Reader) -> None:
    """Locks and data-modifying CTEs, as SQLAlchemy compiles them."""
    lock = select(Row).where(Row.n == 1).with_for_update()
    gone = Row.__table__.delete().returning(Row.__table__.c.n).cte("gone")

    async def body(_: Reader) -> None:
        async with reader.scope(read_only=True):
            for statement in (lock, select(gone), select(Row).with_for_update(read=True)):
                with pytest.raises(ReadOnlyError):
                    await reader.do("execute", statement)
            assert await reader.do("scalar", select(func.count()).select_from(Row)) == 100

    reader.run(body)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_P5_the_end_of_a_read_only_scope_needs_no_hop(database: Database, driver: str) -> None:
    """Nothing is said to the database at the end: no task, no thread, no turn of the loop."""
    reader = Reader(database, driver)

    async def body(_: Reader) -> None:
        turns: list[int] = []
        ended: list[int] = []

        async def handler() -> None:
            await reader.do("get", Row, 7)
            asyncio.get_running_loop().call_soon(lambda: turns.append(len(ended)))

        for _ in range(3):
            await serve(handler, read_only=("GET",))
            ended.append(1)
            await asyncio.sleep(0)
        assert turns == [1, 2, 3]

    reader.run(body)


def test_S3_a_connection_in_use_is_not_given_back(database: Database) -> None:
    """A task that goes on past the end of its read-only scope is not alone with its connection."""
    reader = Reader(database, "asyncpg")

    async def body(_: Reader) -> None:
        session: list[AsyncSession] = []
        pids: list[int] = []
        left: list[asyncio.Task[Any]] = []

        async def handler() -> None:
            session.append(reader.jenny.session)
            pids.append(await session[0].scalar(text("SELECT pg_backend_pid()")))
            left.append(asyncio.create_task(session[0].execute(text("SELECT pg_sleep(0.5)"))))
            await asyncio.sleep(0.1)

        await serve(handler, read_only=("GET",))
        async with open_scope():
            pids.append(await reader.jenny.session.scalar(text("SELECT pg_backend_pid()")))
        await asyncio.gather(*left, return_exceptions=True)
        assert pids[0] != pids[1], "two at once had one connection"

    reader.run(body)


def test_R1_one_connection_for_all_is_not_switched(database: Database) -> None:
    """Such a pool lends one to several: a transaction beside a read-only scope stays one."""
    engine = create_engine(database.url("psycopg"), poolclass=StaticPool)
    jenny = SessionJenny(sessionmaker(engine))
    with open_scope(read_only=True):
        assert jenny.session.get(Row, 1) is not None
        with open_scope():
            jenny.session.add(Row(n=2000))
            jenny.session.flush()
            jenny.session.rollback()
            assert jenny.session.get(Row, 2000) is None
    engine.dispose()
