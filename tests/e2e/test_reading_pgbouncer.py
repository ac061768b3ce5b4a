"""R1 and R3 through PgBouncer in transaction mode, with fewer server connections than clients.

Outside of a transaction each statement may be on another server connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from anyio import sleep_forever, to_thread
from sqlalchemy import text, update

from rope_middleware import ASGIRopeMiddleware, ReadOnlyError
from tests.kit.asgi import http_scope
from tests.kit.either import Either
from tests.kit.engines import fill
from tests.kit.models import Row
from tests.servers.pgbouncer import MISSING, PgBouncer, pgbouncer
from tests.servers.postgres import Database, postgres_server

CLIENTS = 12
SERVER_CONNECTIONS = 2
SETTINGS: dict[str, dict[str, Any]] = {
    "psycopg": {"prepare_threshold": None},
    "psycopg async": {"prepare_threshold": None},
    "asyncpg": {"statement_cache_size": 0},
}
WRITE = text("UPDATE row SET name = :name WHERE n = :n")
END_OF_LOG = text("SELECT pg_current_wal_insert_lsn() - '0/0'")

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def bouncer() -> Iterator[PgBouncer]:
    """One for all tests."""
    with pgbouncer(SERVER_CONNECTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    """A database with a row for each client."""
    with postgres_server().new_database() as found:
        fill(found.url("psycopg"), CLIENTS)
        yield found


class Site(Either):
    """An application whose primary is reached through PgBouncer; its replica is the same one."""

    def __init__(self, bouncer: PgBouncer, database: Database, driver: str) -> None:
        self.loop = asyncio.Runner()
        url = bouncer.url(database, driver.split()[0])
        options: dict[str, Any] = {"pool_size": CLIENTS, "connect_args": SETTINGS[driver]}
        super().__init__([url, url], is_async=driver != "psycopg", engine=options)

    async def run(self, name: str, *arguments: Any) -> Any:
        if self.is_async:
            return await self.do(name, *arguments)
        return await to_thread.run_sync(lambda: getattr(self.jenny.session, name)(*arguments))

    async def ask(self, method: str, handler: Any, position: str = "") -> str:
        """Send one request; return the position that the response tells."""
        sent: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await handler()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"rope-position", position.encode())] if position else []
        told = ASGIRopeMiddleware(app, commit_on_success=True, read_only=("GET",))
        await told(http_scope("/", method, headers=headers), sleep_forever, send)
        return dict(sent[0]["headers"]).get(b"Rope-Position", b"").decode()


class Client:
    """Writes its own row and reads it back.

    Args:
        site: the application.
        n: the row's number.
    """

    def __init__(self, site: Site, n: int) -> None:
        self._site = site
        self._n = n
        self._name = ""
        self._before = 0

    async def write_and_read(self, name: str) -> None:
        """The position that it is told lies behind its own commit."""
        self._name = name
        told = await self._site.ask("POST", self._write)
        system, _, position = (int(part, 16) for part in told.split("-"))
        assert system, "the server has told it"
        assert position > self._before, "the record of the commit is in between"
        await self._site.ask("GET", self.read, told)

    async def _write(self) -> None:
        await self._site.run("execute", WRITE, {"n": self._n, "name": self._name})
        self._before = int(await self._site.run("scalar", END_OF_LOG))

    async def read(self) -> None:
        """What it has written last; nothing can be written."""
        row = await self._site.run("get", Row, self._n)
        assert row.name == self._name
        with pytest.raises(ReadOnlyError):
            await self._site.run("execute", update(Row).values(name="x"))


@pytest.fixture(params=SETTINGS)
def site(request: pytest.FixtureRequest, bouncer: PgBouncer, database: Database) -> Iterator[Site]:
    """The application, with one of the drivers."""
    found = Site(bouncer, database, request.param)
    yield found
    found.loop.run(found.__aexit__(None))
    found.loop.close()
    assert not database.backends("idle in transaction")


def test_R1_a_reader_holds_no_server_connection_between_its_statements(
    site: Site, bouncer: PgBouncer, database: Database
) -> None:
    """It is in no transaction, so that PgBouncer lends the connection to others meanwhile."""
    busy: list[int] = []

    async def handler() -> None:
        assert await site.run("get", Row, 1) is not None
        busy.append(bouncer.busy(database))

    for method in ("GET", "POST"):
        site.loop.run(site.ask(method, handler))
    assert busy == [0, 1]


def test_R3_clients_are_told_positions_behind_their_commits(
    site: Site, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """One by one and side by side, on fewer server connections; each reads its own write."""
    clients = [Client(site, n) for n in range(CLIENTS)]

    async def main() -> None:
        for client in clients:
            await client.write_and_read("alone")

        async def often(client: Client) -> None:
            for turn in range(10):
                await client.write_and_read(str(turn))

        await asyncio.gather(*map(often, clients))

    site.loop.run(main())
    assert not caplog.records
    assert len(database.backends()) <= SERVER_CONNECTIONS
