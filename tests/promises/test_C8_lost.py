"""C8: `retries` cover a connection that is lost or cannot be made, before anything is committed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool

from rope_middleware import ASGIRopeMiddleware, AsyncSessionJenny
from rope_middleware.session.failures.refusal import bridging
from tests.kit.asgi import answer
from tests.kit.asgi import ask as ask_app
from tests.kit.models import Row
from tests.kit.shop import SHOPS, Answer, Shop, Work, ask_once, insert, load_over_a_restart
from tests.servers.postgres import Database, postgres_server
from tests.servers.replicas import Server, cluster

PID = text("SELECT pg_backend_pid()")


@pytest.fixture
def database() -> Iterator[Database]:
    table = "CREATE TABLE row (n int PRIMARY KEY, name text NOT NULL DEFAULT '')"
    with postgres_server().new_database(table) as found:
        yield found


def ask(kind: str, database: Database, work: Work, **options: object) -> Answer:
    return ask_once(kind, database.url(SHOPS[kind]), work, **options)


def rows(database: Database) -> list[int]:
    return [n for (n,) in database.query("SELECT n FROM row ORDER BY n")]


@pytest.mark.parametrize("commits", [True, False])
def test_C8_a_connection_that_is_lost_in_the_middle(
    kind: str, database: Database, commits: bool
) -> None:
    """The backend ends between two statements: the request is run again, and writes once."""
    tries: list[int] = []

    def work(session: Session, n: int) -> int:
        pid = session.scalar(PID)
        session.add(Row(n=n))
        session.flush()
        tries.append(n)
        if len(tries) == 1:
            database.terminate(pid or 0)
        session.execute(text("SELECT 1"))
        if not commits:
            session.commit()
        return 201

    assert ask(kind, database, work, commit_on_success=commits, retries=3).status == 201
    assert (len(tries), rows(database)) == (2, [1])


def test_C8_nothing_is_run_again_after_a_commit(kind: str, database: Database) -> None:
    """What the application has committed would be written twice."""
    tries: list[int] = []

    def work(session: Session, n: int) -> int:
        tries.append(n)
        session.add(Row(n=n))
        session.commit()
        database.terminate(session.scalar(PID) or 0)
        session.execute(text("SELECT 1"))
        return 201

    assert ask(kind, database, work, retries=3).status == 500
    assert (len(tries), rows(database)) == (1, [1])


@pytest.mark.parametrize("how", ["autocommit", "core", "another engine's"])
def test_C8_whatever_has_committed_counts(kind: str, database: Database, how: str) -> None:
    """By AUTOCOMMIT, by the connection itself, by a connection besides the session's."""
    tries: list[int] = []
    insert = text("INSERT INTO row (n) VALUES (1)")

    def work(session: Session, n: int) -> int:
        tries.append(n)
        if how == "another engine's":
            with session.get_bind().connect() as other:
                other.execute(insert)
                other.commit()
        else:
            level = "AUTOCOMMIT" if how == "autocommit" else "READ COMMITTED"
            connection = session.connection(execution_options={"isolation_level": level})
            connection.execute(insert)
            if how == "core":
                connection.commit()
                session.rollback()
        database.terminate(session.scalar(PID) or 0)
        session.execute(text("SELECT 1"))
        return 201

    assert ask(kind, database, work, retries=3).status == 500
    assert (len(tries), rows(database)) == (1, [1])


def test_C8_the_first_loss_tells_of_the_whole_pool(kind: str, database: Database) -> None:
    """After a restart no request tries one dead connection after the other."""
    tries: list[int] = []

    def work(session: Session, n: int) -> int:
        tries.append(n)
        session.execute(text("SELECT pg_sleep(0.1)"))
        session.add(Row(n=n))
        return 201

    async def main() -> int:
        shop = Shop(
            kind, database.url(SHOPS[kind]), work, {"pool_size": 8},
            commit_on_success=True, retries=3,
        )  # fmt: skip
        await asyncio.gather(*(shop.ask(n) for n in range(1, 9)))
        tries.clear()
        database.terminate()
        answer = await shop.ask(9)
        await shop.close()
        return answer.status

    assert asyncio.run(main()) == 201
    assert len(tries) == 2


def test_C8_five_waits_bridge_two_seconds() -> None:
    """However the dice fall."""
    for _ in range(1000):
        assert 2.0 < sum(bridging(tried) for tried in range(5)) < 4.0


@pytest.mark.parametrize("pool", [AsyncAdaptedQueuePool, NullPool])
def test_C8_a_connection_that_is_lost_while_it_is_set_up(
    database: Database, pool: type[Pool]
) -> None:
    """asyncpg has made it, SQLAlchemy's set-up finds it closed: the error is asyncpg's own."""
    made: list[int] = []

    async def connect(**parameters: Any) -> Any:
        connection = await asyncpg.connect(**parameters)
        made.append(connection.get_server_pid())
        if len(made) == 1:
            database.terminate(*made)
            while not connection.is_closed():
                await asyncio.sleep(0.001)
        return connection

    async def main() -> list[int]:
        engine = create_async_engine(
            database.url("asyncpg"), connect_args={"async_creator_fn": connect}, poolclass=pool
        )
        jenny = AsyncSessionJenny(async_sessionmaker(engine))

        async def app(scope: Any, receive: Any, send: Any) -> None:
            try:
                jenny.session.add(Row(n=len(made)))
                await jenny.session.flush()
            except Exception:  # as frameworks do
                await answer(send, 500)
            else:
                await answer(send)

        statuses: list[int] = []
        await ask_app(ASGIRopeMiddleware(app, commit_on_success=True, retries=3), statuses)
        await engine.dispose()
        return statuses

    assert asyncio.run(main()) == [200]
    assert (len(made), rows(database)) == (2, [1])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with cluster(replicas=0) as found:
        yield found.primary


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_C8_a_restart_under_load_costs_time_and_no_error(
    kind: str, server: Server, how: str
) -> None:
    """16 clients write while a real PostgreSQL ends, in order or at once, and comes again."""
    with server.running.new_database() as database:
        database.query("CREATE TABLE written (id serial PRIMARY KEY, n int NOT NULL)")

        def restart() -> None:
            getattr(server, how)()
            server.start()

        async def main() -> dict[int, Answer]:
            url = database.url(SHOPS[kind])
            shop = Shop(kind, url, insert, commit_on_success=True, retries=5)
            return await load_over_a_restart(shop, restart)

        answers = asyncio.run(main())
        assert {answer.status for answer in answers.values()} == {201}
        found = dict(database.query("SELECT n, count(*) FROM written GROUP BY n"))
        assert found == dict.fromkeys(answers, 1)


def test_C8_a_connection_that_cannot_be_made(kind: str, server: Server) -> None:
    """The database is away when the request comes, and for a second more."""
    with server.running.new_database() as database:
        database.query("CREATE TABLE row (n int PRIMARY KEY, name text NOT NULL DEFAULT '')")

        async def main() -> int:
            shop = Shop(
                kind, database.url(SHOPS[kind]),
                lambda session, n: session.add(Row(n=n)) or 201,  # type: ignore[func-returns-value]
                commit_on_success=True, retries=5,
            )  # fmt: skip
            await asyncio.to_thread(server.stop)
            asking = asyncio.create_task(shop.ask(1))
            await asyncio.sleep(1)
            await asyncio.to_thread(server.start)
            answer = await asking
            await shop.close()
            return answer.status

        assert asyncio.run(main()) == 201
        assert rows(database) == [1]
