"""Sessions through PgBouncer in transaction mode, with fewer server connections than clients.

What `docs/howto/pgbouncer.md` tells a reader to set is `SETTINGS`; each of its claims has a test
here, also that it fails without.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import flask
import httpx
import pytest
from sqlalchemy import URL, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from rope_middleware import AsyncSessionJenny
from tests.e2e import async_app
from tests.e2e.async_app import App, Client, mixed_load, seed
from tests.e2e.commit_app import (
    WRITERS,
    AsyncWriter,
    Data,
    FlaskWriter,
    bodies_are_collected,
    create_tables,
    serve_any,
)
from tests.e2e.test_commit_postgres import Load
from tests.kit.leaks import open_scopes
from tests.kit.waiting import eventually
from tests.servers.asgi import HOST, serve
from tests.servers.pgbouncer import MISSING, PgBouncer, pgbouncer
from tests.servers.postgres import Database, postgres_server

SERVER_CONNECTIONS = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "psycopg": {"prepare_threshold": None},
    "asyncpg": {"statement_cache_size": 0},
}
POOLS: dict[str, dict[str, Any]] = {
    "pool": {"pool_size": 10, "max_overflow": 0, "pool_timeout": 60, "pool_pre_ping": True},
    "null": {"poolclass": NullPool},
}

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
    # Servers close the sockets of clients that have gone when they are collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.usefixtures("quiet"),
]


@pytest.fixture(scope="module")
def bouncer() -> Iterator[PgBouncer]:
    with pgbouncer(SERVER_CONNECTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def narrow() -> Iterator[PgBouncer]:
    """One server connection for all: what a client leaves in it, the next one finds."""
    with pgbouncer(1) as running:
        yield running


@pytest.fixture
def database() -> Iterator[Database]:
    """One for each test: PgBouncer keeps its connections to it."""
    with postgres_server().new_database() as found:
        create_tables(found.url("psycopg"))
        yield found


@pytest.fixture
def app_database() -> Iterator[Database]:
    """The tables of `async_app`."""
    with postgres_server().new_database() as found:
        async_app.create_tables(found.url("psycopg"))
        yield found


def options(driver: str, pool: str = "pool") -> dict[str, Any]:
    """What `create_engine` is given besides the address."""
    return POOLS[pool] | {"connect_args": SETTINGS[driver]}


def nothing_is_left(bouncer: PgBouncer, database: Database, held: Callable[[], int]) -> None:
    eventually(lambda: held() == 0, lambda: f"{held()} connections are out")
    eventually(lambda: not open_scopes(), lambda: f"no scope is open: {open_scopes()}")
    eventually(
        lambda: bouncer.busy(database) == 0 and not database.backends("idle in transaction"),
        lambda: f"no server connection is taken: {bouncer.show('POOLS')} {database.backends()}",
    )
    assert len(database.backends()) <= SERVER_CONNECTIONS


def no_client_is_left(bouncer: PgBouncer, database: Database) -> None:
    eventually(
        lambda: bouncer.clients(database) == 0,
        lambda: f"no client is connected: {bouncer.show('CLIENTS')}",
    )


# -- it works, with the settings -----------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_C2_S3_writes_through_pgbouncer_are_there_or_not_as_told(
    kind: str, bouncer: PgBouncer, database: Database
) -> None:
    """200 writes by 16 clients, of which some raise, fail to commit or go away."""
    make, driver = WRITERS[kind]
    app = make(bouncer.url(database, driver), options(driver), commit_on_success=True)
    load = Load(seed(20261101))
    with serve_any(app) as port:
        asyncio.run(load.run(port, 200))
        if kind == "wsgi":
            bodies_are_collected()
        nothing_is_left(bouncer, database, app.held)
    load.check(database)
    told = list(load.told.values())
    assert told.count(201) > 80
    assert told.count(500) > 10
    no_client_is_left(bouncer, database)


class CountsAsync(AsyncWriter):
    """Counts instead of writing rows."""

    async def write(self, n: int, do: str) -> None:
        data = await self.jenny.session.get_one(Data, 1, with_for_update=do == "lock")
        data.count += 1
        await self.jenny.session.flush()


class CountsInWSGI(FlaskWriter):
    def view(self) -> tuple[str, int]:
        locks = flask.request.args["do"] == "lock"
        data = self.jenny.session.get_one(Data, 1, with_for_update=locks)
        data.count += 1
        self.jenny.session.flush()
        return str(data.count), 201


COUNTS = {
    "asgi-asyncpg": (CountsAsync, "asyncpg"),
    "asgi-psycopg": (CountsAsync, "psycopg"),
    "wsgi": (CountsInWSGI, "psycopg"),
}


async def count_to(number: int, port: int, do: str) -> list[int]:
    """Send `number` requests from 12 clients; their statuses."""
    limits = httpx.Limits(max_connections=12)
    async with httpx.AsyncClient(limits=limits, timeout=120, verify=False) as client:
        url = f"http://{HOST}:{port}/write?n=0&do={do}"
        answers = await asyncio.gather(*(client.post(url) for _ in range(number)))
    return [answer.status_code for answer in answers]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", COUNTS)
def test_C1_the_counter_is_exact_behind_pgbouncer(
    kind: str, pool: str, bouncer: PgBouncer, database: Database
) -> None:
    """80 requests each lock the row, count and are committed, with and without a pool."""
    make, driver = COUNTS[kind]
    app = make(bouncer.url(database, driver), options(driver, pool), commit_on_success=True)
    with serve_any(app) as port:
        assert asyncio.run(count_to(80, port, "lock")) == [201] * 80
        nothing_is_left(bouncer, database, app.held)
    assert database.query("SELECT count FROM data") == [(80,)]
    no_client_is_left(bouncer, database)


@pytest.mark.parametrize("kind", COUNTS)
def test_C6_retries_count_exactly_behind_pgbouncer(
    kind: str, bouncer: PgBouncer, database: Database
) -> None:
    """An isolation level is sent with each transaction, so SERIALIZABLE and retries work."""
    make, driver = COUNTS[kind]
    app = make(
        bouncer.url(database, driver),
        options(driver) | {"isolation_level": "SERIALIZABLE"},
        commit_on_success=True,
        retries=50,
    )
    with serve_any(app) as port:
        statuses = asyncio.run(count_to(40, port, "count"))
        nothing_is_left(bouncer, database, app.held)
    assert set(statuses) <= {201, 500}
    assert statuses.count(201) > 30
    assert database.query("SELECT count FROM data") == [(statuses.count(201),)]


class BouncedApp(App):
    """`App`, with what PgBouncer needs."""

    def connect(self) -> None:
        self.engine = create_async_engine(self.url, **options(self.url.get_driver_name(), "pool"))
        self.jenny = AsyncSessionJenny(async_sessionmaker(self.engine, expire_on_commit=False))


@pytest.mark.told  # what was written for a client that has left is not committed
@pytest.mark.parametrize("driver", SETTINGS)
def test_Y2_clients_that_leave_keep_no_server_connection(
    driver: str, bouncer: PgBouncer, app_database: Database
) -> None:
    """Of 300 requests a third is cut off at a random moment and a third raises."""
    if bouncer.version < (1, 21):
        found = ".".join(map(str, bouncer.version))
        pytest.skip(f"PgBouncer {found} may crash when a query is cancelled, 1.21 does not")
    app = BouncedApp(bouncer.url(app_database, driver))
    with serve(app) as server:
        counts = asyncio.run(
            mixed_load(HOST, server.port, requests=300, clients=16, seed=seed(20261102))
        )
        assert counts["answered"] == counts["good"] > 75
        nothing_is_left(bouncer, app_database, app.held)
    assert app.complaints.heard == []


@pytest.mark.parametrize("driver", SETTINGS)
def test_Y2_requests_that_are_cut_off_in_a_transaction_free_their_server_connections(
    driver: str, bouncer: PgBouncer, app_database: Database
) -> None:
    """Each server connection is held by a request whose client leaves."""
    app = BouncedApp(bouncer.url(app_database, driver))

    def all_taken() -> bool:
        return bouncer.busy(app_database) == SERVER_CONNECTIONS

    async def leave(port: int) -> None:
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(Client(HOST, port))
                for _ in range(SERVER_CONNECTIONS)
            ]
            for client in clients:
                client.send("/hang")
            await asyncio.to_thread(eventually, all_taken, "all are taken")
            for client in clients:
                client.abort()

    with serve(app) as server:
        asyncio.run(leave(server.port))
        nothing_is_left(bouncer, app_database, app.held)
    assert app.complaints.heard == []


# -- it does not, without them -------------------------------------------------------------------


STATEMENT = text("SELECT 1 + :n"), {"n": 1}


def change_places(url: URL, connect_args: dict[str, Any]) -> None:
    """Use a connection on one server connection, and then on the other."""
    mine, other = (create_engine(url, connect_args=connect_args) for _ in range(2))
    try:
        with Session(mine) as session, Session(other) as holding:
            for _ in range(7):  # psycopg prepares what it sees for the sixth time
                session.scalar(*STATEMENT)
                session.commit()
            holding.scalar(text("SELECT 2"))  # on the only server connection there is yet
            session.scalar(*STATEMENT)
    finally:
        mine.dispose()
        other.dispose()


async def achange_places(url: URL, connect_args: dict[str, Any]) -> None:
    mine, other = (create_async_engine(url, connect_args=connect_args) for _ in range(2))
    try:
        async with AsyncSession(mine) as session, AsyncSession(other) as holding:
            for _ in range(7):
                await session.scalar(*STATEMENT)
                await session.commit()
            await holding.scalar(text("SELECT 2"))
            await session.scalar(*STATEMENT)
    finally:
        await mine.dispose()
        await other.dispose()


@pytest.fixture
def two() -> Iterator[PgBouncer]:
    """Two server connections, of which the second is made when it is wanted."""
    with pgbouncer(2) as started:
        yield started


@pytest.mark.parametrize(
    ("driver", "use"),
    [("psycopg", change_places), ("psycopg", achange_places), ("asyncpg", achange_places)],
)
def test_prepared_statements_are_lost_without_the_settings_and_none_is_made_with_them(
    driver: str, use: Callable[..., Any], two: PgBouncer, database: Database
) -> None:
    """A prepared statement is one server connection's; the next transaction may be on another."""
    url = two.url(database, driver)

    def run(connect_args: dict[str, Any]) -> None:
        coroutine = use(url, connect_args)
        if coroutine is not None:
            asyncio.run(coroutine)

    run(SETTINGS[driver])
    assert prepared(two, database) == 0
    assert len(database.backends()) == 2
    database.terminate()
    # PgBouncer hands out a cut connection until it has read of its end.
    eventually(lambda: two.servers(database) == 0, "the cut connections are gone")
    with pytest.raises(DBAPIError, match=r"prepared statement .* does not exist"):
        run({})


def prepared(bouncer: PgBouncer, database: Database) -> int:
    """How many prepared statements the server connection has that was used last."""
    engine = create_engine(
        bouncer.url(database, "psycopg"), poolclass=NullPool, connect_args=SETTINGS["psycopg"]
    )
    with Session(engine) as session:
        return int(session.scalar(text("SELECT count(*) FROM pg_prepared_statements")) or 0)


ONE_PROCESS = """
import asyncio, json, sys
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
async def main(url, connect_args):
    engine = create_async_engine(url, connect_args=connect_args)
    async with AsyncSession(engine) as session:
        for _ in range(2):
            await session.scalar(text("SELECT 1"))
            await session.commit()
    await engine.dispose()
asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
"""


def test_two_processes_give_the_same_names_to_what_asyncpg_prepares(
    narrow: PgBouncer, database: Database
) -> None:
    """It counts its statements; SQLAlchemy's own cache above it is not the one to turn off."""
    url = narrow.url(database, "asyncpg").render_as_string(hide_password=False)
    command = [sys.executable, "-c", ONE_PROCESS, url, '{"prepared_statement_cache_size": 0}']
    for told in ("", "already exists"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert told in done.stderr
        assert bool(told) == bool(done.returncode)


def test_names_of_ones_own_pile_up_unless_the_server_connection_is_reset(
    database: Database,
) -> None:
    """SQLAlchemy's documented way for asyncpg: unique names, NullPool and a reset."""

    async def load(bouncer: PgBouncer) -> None:
        engine = create_async_engine(
            bouncer.url(database, "asyncpg"),
            poolclass=NullPool,
            connect_args={"prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__"},
        )
        for _ in range(10):
            async with AsyncSession(engine) as session:
                await session.scalar(text("SELECT 1"))

    for settings, left in (({}, range(10, 100)), ({"server_reset_query_always": 1}, range(1))):
        with pgbouncer(1, **settings) as bouncer:
            asyncio.run(load(bouncer))
            assert prepared(bouncer, database) in left


# -- what no setting helps against ---------------------------------------------------------------


def test_what_is_set_for_the_session_is_met_by_the_next_client(
    narrow: PgBouncer, database: Database
) -> None:
    """SET and advisory locks of a session stay on the server connection; of a transaction not."""
    url = narrow.url(database, "psycopg")
    ours, theirs = (
        create_engine(url, poolclass=NullPool, connect_args=SETTINGS["psycopg"]) for _ in range(2)
    )
    held = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted")

    def met(*statements: str) -> tuple[Any, Any]:
        with Session(ours) as session:
            for statement in statements:
                session.execute(text(statement))
            session.commit()
        with Session(theirs) as session:
            return session.scalar(text("SHOW statement_timeout")), session.scalar(held)

    assert met("SET LOCAL statement_timeout = '77s'", "SELECT pg_advisory_xact_lock(7)") == ("0", 0)
    assert met("SET statement_timeout = '77s'", "SELECT pg_advisory_lock(7)") == ("77s", 1)
    assert met("DISCARD PLANS", "RESET ALL", "SELECT pg_advisory_unlock_all()") == ("0", 0)
