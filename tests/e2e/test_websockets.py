"""WebSockets on real servers: a thousand idle ones hold no connection of the database."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, func, make_url, select
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from rope_middleware import Scope, current_scope, open_scope
from tests.e2e.async_app import POOL_SIZE, App, create_tables
from tests.kit.leaks import open_scopes
from tests.kit.models import Row
from tests.kit.waiting import eventually
from tests.servers.asgi import ASYNCIO_SERVERS, serve
from tests.servers.postgres import postgres_server

SOCKETS = 200
LIMIT = 60.0


class SocketApp(App):
    """Two WebSocket endpoints: one scope per message, and one for the whole connection."""

    def __init__(self, url: Any, **options: Any) -> None:
        super().__init__(url, **options)
        self.scopes: list[Scope] = []
        self.failed: list[str] = []

    async def route(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["rope_middleware.scope"] is current_scope()
        assert (await receive())["type"] == "websocket.connect"
        self.scopes.append(current_scope())
        await send({"type": "websocket.accept"})
        answer = self.one_message if scope["path"] == "/messages" else self.in_the_connection
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": await answer(message["text"])})

    @open_scope("message", commit_on_success=True)
    async def one_message(self, told: str) -> str:
        """The documented pattern: each message is a transaction of its own."""
        self.jenny.add(Row(n=int(told)))
        await self.jenny.flush()
        if told.endswith("13"):
            current_scope().doom()
            return f"{told} is doomed"
        return f"{told} of {await self.jenny.scalar(select(func.count()).select_from(Row))}"

    async def in_the_connection(self, told: str) -> str:
        """The connection's own scope, from the first message to the last."""
        if told == "fail":
            raise LookupError("told to raise")
        session = self.jenny.session
        if told == "id":
            return str(id(session))
        session.add(Row(n=int(told)))
        if self.commits:
            await session.flush()
        else:
            await session.commit()
        return told

    commits = False

    def all_is_back(self) -> None:
        eventually(lambda: self.held() == 0, lambda: f"{self.engine.pool.status()}")
        eventually(lambda: not open_scopes(), lambda: f"no scope is open: {open_scopes()}")


@contextmanager
def socket_app(database: str, folder: Path, **options: Any) -> Iterator[SocketApp]:
    if database == "aiosqlite":
        url = make_url(f"sqlite+aiosqlite:///{folder / 'sockets.db'}")
        create_tables(url)
        yield SocketApp(url, **options)
    else:
        with postgres_server().new_database() as fresh:
            url = fresh.url(database)
            create_tables(url)
            yield SocketApp(url, **options)
            assert fresh.backends("idle in transaction") == []


def count_rows(app: SocketApp) -> set[int]:
    """What a client of its own reads."""
    names = {"asyncpg": "postgresql+psycopg", "aiosqlite": "sqlite"}
    url = app.url.set(drivername=names.get(app.url.get_driver_name(), app.url.drivername))
    engine = create_engine(url)
    with engine.connect() as connection:
        found = set(connection.execute(select(Row.n)).scalars())
    engine.dispose()
    return found


@pytest.mark.parametrize(
    ("server", "database"),
    [("uvicorn", "asyncpg"), ("hypercorn", "asyncpg"), ("uvicorn", "aiosqlite")],
)
def test_A1_200_sockets_on_a_pool_of_5_with_a_scope_for_each_message(
    server: str, database: str, tmp_path: Path
) -> None:
    """All of them are answered; while they idle, not one connection is checked out."""

    async def talk(app: SocketApp, url: str) -> None:
        async with AsyncExitStack() as stack:
            sockets: list[ClientConnection] = []
            for _ in range(SOCKETS):
                sockets.append(await stack.enter_async_context(connect(f"{url}/messages")))
            assert app.held() == 0
            for turn in range(2):

                async def say(n: int, socket: ClientConnection) -> None:
                    await socket.send(str(n))
                    answered = await asyncio.wait_for(socket.recv(), LIMIT)
                    assert str(answered).split()[0] == str(n)

                await asyncio.gather(
                    *(say(turn * 1000 + n, socket) for n, socket in enumerate(sockets))
                )
                await asyncio.to_thread(
                    eventually, lambda: app.held() == 0, "idle sockets hold no connection"
                )
                assert len([scope for scope in app.scopes if not scope.closed]) == SOCKETS

    with socket_app(database, tmp_path) as app, serve(app, server) as running:
        asyncio.run(talk(app, running.ws_url))
        app.all_is_back()
        said = {turn * 1000 + n for turn in range(2) for n in range(SOCKETS)}
        assert count_rows(app) == {n for n in said if not str(n).endswith("13")}
        assert app.complaints.heard == []
    assert app.engine.pool.size() == POOL_SIZE  # type: ignore[attr-defined]


@pytest.mark.parametrize("server", ASYNCIO_SERVERS)
def test_A4_the_scope_of_a_connection_lives_as_long_as_the_connection(
    server: str, tmp_path: Path
) -> None:
    """One session from the first message to the last, closed when the client says goodbye."""

    async def talk(app: SocketApp, url: str) -> None:
        async with connect(f"{url}/connection") as socket:
            seen = set()
            for n in range(3):
                await socket.send("id")
                seen.add(await socket.recv())
                await socket.send(str(n))
                assert await socket.recv() == str(n)
            assert len(seen) == 1
            assert not app.scopes[0].closed

    with socket_app("asyncpg", tmp_path) as app, serve(app, server) as running:
        asyncio.run(talk(app, running.ws_url))
        app.all_is_back()
        assert app.scopes[0].name == "WEBSOCKET /connection"
        assert count_rows(app) == {0, 1, 2}


@pytest.mark.parametrize("server", ASYNCIO_SERVERS)
def test_C2_a_connection_commits_when_it_ends_without_an_error(
    server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With `commit_on_success` the connection is one transaction; an error undoes all of it."""
    caplog.set_level(logging.CRITICAL, "uvicorn.error")

    async def talk(url: str) -> None:
        async with connect(f"{url}/connection") as socket:
            await socket.send("1")
            assert await socket.recv() == "1"
        async with connect(f"{url}/connection") as socket:
            await socket.send("2")
            assert await socket.recv() == "2"
            await socket.send("fail")
            with pytest.raises(ConnectionClosed):
                await asyncio.wait_for(socket.recv(), LIMIT)

    with socket_app("psycopg", tmp_path, commit_on_success=True) as app:
        app.commits = True
        with serve(app, server) as running:
            asyncio.run(talk(running.ws_url))
            app.all_is_back()
            assert count_rows(app) == {1}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("server", ASYNCIO_SERVERS)
def test_S3_sockets_that_vanish_give_their_connections_back(
    server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients that are killed in the middle of a transaction of their connection's scope."""
    caplog.set_level(logging.CRITICAL, "uvicorn.error")

    async def talk(app: SocketApp, url: str) -> None:
        for turn in range(3):
            sockets = [await connect(f"{url}/connection") for _ in range(POOL_SIZE)]
            for n, socket in enumerate(sockets):
                await socket.send(str(turn * 10 + n))
                assert await socket.recv() == str(turn * 10 + n)
            assert app.held() == POOL_SIZE
            for socket in sockets:
                socket.transport.abort()
            await asyncio.to_thread(app.all_is_back)

    with socket_app("asyncpg", tmp_path, commit_on_success=True) as app:
        app.commits = True
        with serve(app, server) as running:
            asyncio.run(talk(app, running.ws_url))
            assert app.complaints.heard == []
