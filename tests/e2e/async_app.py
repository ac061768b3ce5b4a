"""The application of the end-to-end tests of async sessions, and its clients.

`make_app(url)` is plain ASGI, so that every server runs the same code. It is also a module for
servers that are started as a command: `tests.e2e.async_app:app` reads ``DATABASE_URL``.

Its ``/state`` stands outside of the middleware: what is checked out, how many scopes are open,
and what was complained of in the log.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import sys
import warnings
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs

import anyio
import anyio.to_thread
from sqlalchemy import URL, create_engine, event, make_url, select, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from rope_middleware import (
    ASGIRopeMiddleware,
    AsyncSessionJenny,
    SessionJenny,
    current_scope,
    open_scope,
)
from tests.kit.leaks import open_scopes
from tests.kit.models import Base, Row

POOL_SIZE = 5


def create_tables(url: URL | str) -> None:
    """Make the tables with the sync twin of the async driver of `url`."""
    url = make_url(url)
    drivername = {"asyncpg": "postgresql+psycopg", "aiosqlite": "sqlite"}
    sync = url.set(drivername=drivername.get(url.get_driver_name(), url.drivername))
    engine = create_engine(sync)
    Base.metadata.create_all(engine)
    engine.dispose()


class Complaints(logging.Handler):
    """What nobody may have to say: the pool of lost connections, asyncio of lost tasks."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        told = record.getMessage()
        if "AsyncAdapt_aiosqlite_connection._terminate_graceful_close" in told:
            # SQLAlchemy closes the connection of a query that is cancelled twice by close() and
            # by stop(); aiosqlite's thread ends at the first, and the other is never answered.
            return
        if record.exc_info:
            told += f" {record.exc_info[0]}: {record.exc_info[1]}"
        if record.name == "asyncio" or "garbage collector" in told:
            self.heard.append(f"{record.name}: {told}")

    def install(self) -> None:
        for name in ("asyncio", "sqlalchemy.pool"):
            logging.getLogger(name).addHandler(self)

    def uninstall(self) -> None:
        for name in ("asyncio", "sqlalchemy.pool"):
            logging.getLogger(name).removeHandler(self)


async def answer(send: Any, status: int, body: bytes, *, more: bool = False) -> None:
    headers = [(b"content-type", b"text/plain")]
    if not more:
        headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def until_gone(receive: Any, work: Callable[[], Awaitable[object]]) -> None:
    """Do `work`, and cancel it when the client goes away, as careful applications do."""
    async with anyio.create_task_group() as group:

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(listen)
        await work()
        group.cancel_scope.cancel()


class App:
    """The application: ``/work``, ``/stream``, ``/tasks``, ``/raise``, ``/hang``, ``/state``."""

    def __init__(self, url: URL | str, **options: Any) -> None:
        self.url = make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.sweeps = self.is_sqlite
        self.next = 0
        self.begun = 0
        self.hanging = 0
        self.complaints = Complaints()
        self.serve = ASGIRopeMiddleware(self.route, **options)
        self.pause = text("SELECT 1" if self.is_sqlite else "SELECT pg_sleep(0.002)")
        self.connect()

    def pool(self) -> dict[str, Any]:
        """The options of the engine."""
        waits: dict[str, Any] = {"connect_args": {"timeout": 60}} if self.is_sqlite else {}
        return {"pool_size": POOL_SIZE, "max_overflow": 0, "pool_timeout": 60} | waits

    def connect(self) -> None:
        self.engine: Any = create_async_engine(self.url, **self.pool())
        if self.is_sqlite:
            begin_as_writer(self.engine.sync_engine)
        self.jenny: Any = AsyncSessionJenny(async_sessionmaker(self.engine, expire_on_commit=False))

    async def do(self, name: str, *arguments: object) -> Any:
        """Call a method of the session, and wait for it."""
        return await getattr(self.jenny, name)(*arguments)

    def held(self) -> int:
        return int(self.engine.pool.checkedout())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.lifespan(receive, send)
        elif scope["path"] == "/state":
            state = {
                "held": self.held(),
                "scopes": [repr(found) for found in open_scopes()],
                "complaints": self.complaints.heard,
                "begun": self.begun,
            }
            await answer(send, 200, json.dumps(state).encode())
        else:
            self.begun += 1
            await self.serve(scope, receive, send)

    async def lifespan(self, receive: Any, send: Any) -> None:
        sweeping = None
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.complaints.install()
                sweeping = asyncio.create_task(self.sweep()) if self.sweeps else None
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.all_back()
                if sweeping is not None:
                    sweeping.cancel()
                self.complaints.uninstall()
                await self.dispose()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def sweep(self) -> None:
        """Collect garbage now and then.

        The frames of a query that is cancelled are a reference cycle within SQLAlchemy
        (`_handle_dbapi_exception`). They hold the cursor, the cursor holds SQLite's connection
        open though it has been closed (`sqlite3_close_v2`), and that holds the write lock. Where
        everybody waits for the lock, nobody allocates, and the collector does not come by itself.
        A leak would still be told of: by the pool, in the log.
        """
        while True:
            await asyncio.sleep(0.2)
            gc.collect()

    async def dispose(self) -> None:
        await self.engine.dispose()

    async def all_back(self) -> None:
        """Wait for requests that the server has just cancelled: `dispose()` would forget them."""
        with anyio.move_on_after(20):
            while self.held():
                await anyio.sleep(0.01)

    async def route(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["rope_middleware.scope"] is current_scope()
        asked = parse_qs(scope["query_string"].decode())
        name = scope["path"].strip("/")
        await getattr(self, name)(receive, send, asked)

    def number(self) -> int:
        self.next += 1
        return self.next

    async def work(self, receive: Any, send: Any, asked: Any) -> None:
        """Several transactions, one of them rolled back at the end."""

        async def transactions() -> None:
            await self.do("execute", self.pause)
            self.jenny.add(Row(n=self.number()))
            await self.do("commit")
            await self.do("execute", select(Row).limit(3))
            self.jenny.add(Row(n=self.number()))
            await self.do("flush")
            await answer(send, 200, b"done")

        await until_gone(receive, transactions)

    async def tasks(self, receive: Any, send: Any, asked: Any) -> None:
        """Concurrent tasks with a scope each."""

        @open_scope()
        async def one() -> None:
            await self.do("execute", self.pause)
            self.jenny.add(Row(n=self.number()))
            await self.do("commit")

        async def both() -> None:
            async with anyio.create_task_group() as group:
                group.start_soon(one)
                group.start_soon(one)
            await answer(send, 200, b"done")

        await until_gone(receive, both)

    async def stream(self, receive: Any, send: Any, asked: Any) -> None:
        """A query for each chunk, and a transaction that is open in between."""

        async def chunks() -> None:
            await answer(send, 200, b"0\n", more=True)
            for n in range(1, 10):
                await self.do("execute", self.pause)
                await send({"type": "http.response.body", "body": b"%d\n" % n, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        await until_gone(receive, chunks)

    async def fail(self, receive: Any, send: Any, asked: Any) -> None:
        """Raise in the middle of a transaction, before the response or after its start."""
        self.jenny.add(Row(n=self.number()))
        await self.do("flush")
        if "late" in asked:
            await answer(send, 200, b"0\n", more=True)
            await self.do("execute", self.pause)
        raise LookupError("told to raise")

    async def hang(self, receive: Any, send: Any, asked: Any) -> None:
        """Hold a connection until the client goes away, or for ever."""
        await self.do("execute", self.pause)
        self.hanging += 1
        if "deaf" in asked:
            await anyio.sleep(3600)
        await until_gone(receive, lambda: anyio.sleep(3600))


class SyncApp(App):
    """The same with a `Session` in worker threads: for trio, which SQLAlchemy cannot await."""

    def connect(self) -> None:
        self.engine = create_engine(self.url, **self.pool())
        if self.is_sqlite:
            begin_as_writer(self.engine)
        self.jenny = SessionJenny(sessionmaker(self.engine, expire_on_commit=False))
        self.sweeps = False
        # A handler that keeps its transaction between two calls in threads needs a thread for
        # the second one, and the shared limiter's may all be waiting for the pool.
        self.threads = anyio.CapacityLimiter(200)

    async def do(self, name: str, *arguments: object) -> Any:
        method = getattr(self.jenny, name)
        return await anyio.to_thread.run_sync(method, *arguments, limiter=self.threads)

    async def dispose(self) -> None:
        self.engine.dispose()


def begin_as_writer(engine: Any) -> None:
    """Have SQLite take its write lock where a transaction begins, see the examples."""

    @event.listens_for(engine, "connect")
    def leave_begin_to_us(connection: Any, record: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA synchronous=OFF")  # nobody pulls the plug in a test
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def __getattr__(name: str) -> Any:
    """Make `app` when a server asks for it: its address is in the environment."""
    if name != "app":
        raise AttributeError(name)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    found = App(os.environ["DATABASE_URL"])
    sys.unraisablehook = lambda told: found.complaints.heard.append(
        f"unraisable: {told.exc_value!r} in {told.object!r}"
    )
    globals()["app"] = found
    return found


# --------------------------------------------------------------------------------------------
# Clients


def seed(default: int) -> int:
    """The seed of a random load: `ROPE_TEST_SEED`, or the test's own; it is printed."""
    found = int(os.environ.get("ROPE_TEST_SEED", default))
    print(f"ROPE_TEST_SEED={found}")
    return found


class Client:
    """One TCP connection to an HTTP/1.1 server, for requests that are sent and cut by hand."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter
        self.ends = False

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    async def again(self) -> None:
        """Open another connection in place of the first one."""
        await self.__aexit__()
        await self.__aenter__()
        self.ends = False

    async def ask(self, path: str, seconds: float = 60) -> tuple[int, dict[str, str], bytes]:
        """Send a GET and read its response; a connection that has ended is an EOFError.

        After a response with ``Connection: close`` there must be nothing more, and the next
        request goes over a new connection.
        """
        if self.ends:
            assert await self.rest() == b"", "more than one response"
            await self.again()
        try:
            self.send(path)
            await self.writer.drain()
            answered = await asyncio.wait_for(self.read(), seconds)
        except ConnectionError as error:
            raise EOFError("the server has closed the connection") from error
        self.ends = answered[1].get("connection", "").lower() == "close"
        return answered

    async def rest(self, seconds: float = 60) -> bytes:
        """Say that nothing more will be asked, and read to the end of the connection."""
        with suppress(OSError):
            self.writer.write_eof()
        try:
            return await asyncio.wait_for(self.reader.read(), seconds)
        except ConnectionError:
            return b""

    def abort(self) -> None:
        """Go away as a killed client does: with a reset."""
        self.writer.transport.abort()

    def send(self, path: str, *, method: str = "GET", body: bytes = b"", **headers: str) -> None:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body or method != "GET":
            lines.append(f"Content-Length: {len(body)}")
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def read(self) -> tuple[int, dict[str, str], bytes]:
        """Read one response, whole.

        Raises:
            EOFError: the connection ended within it.
        """
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(head[0].split()[1])
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        if "content-length" in headers:
            return status, headers, await self.reader.readexactly(int(headers["content-length"]))
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                body += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            await self.reader.readexactly(2)
            return status, headers, body
        if status in (204, 304):
            return status, headers, b""
        return status, headers, await self.reader.read()


async def mixed_load(
    host: str, port: int, *, requests: int, clients: int, seed: int
) -> dict[str, int]:
    """Send `requests`: a third is cut off at a random moment, a third raises, a third is well.

    Returns:
        How many of each kind there were, and how many of the good ones were answered.
    """
    dice = random.Random(seed)
    plan = ["good", "cut", "raise"] * (requests // 3 + 1)
    del plan[requests:]
    dice.shuffle(plan)
    work = iter([(kind, dice.random(), dice.random(), dice.random()) for kind in plan])
    counts = {"good": 0, "cut": 0, "raise": 0, "answered": 0, "failed": 0}

    async def one(kind: str, a: float, b: float, c: float) -> None:
        counts[kind] += 1
        path = ("/work", "/stream", "/tasks")[int(a * 3)]
        async with Client(host, port) as client:
            if kind == "cut":
                client.send(path if b < 0.9 else "/hang")
                await client.writer.drain()
                if c < 0.1 and b < 0.9:  # until the response has begun
                    await client.reader.read(20)
                else:
                    await asyncio.sleep(a * 0.04)
                if c < 0.6:
                    client.abort()
                return
            client.send(path if kind == "good" else ("/fail?late=1" if b < 0.5 else "/fail"))
            try:
                status, _, body = await asyncio.wait_for(client.read(), 120)
            except (EOFError, ConnectionError):
                assert kind == "raise", path  # a stream that broke
                counts["failed"] += 1
                return
            if kind == "good":
                assert status == 200, (path, status, body)
                counts["answered"] += 1
            else:
                assert status == 500 or b < 0.5, (path, status)
                counts["failed"] += 1

    async def run() -> None:
        for told in work:
            await one(*told)

    await asyncio.gather(*(run() for _ in range(clients)))
    return counts
