"""Commit on success and retries on PostgreSQL, over real servers.

What is promised to a client is counted in the database afterwards: a 2xx has its row, a 4xx or 5xx
has none, whatever became of connections, clients and processes meanwhile. ``ROPE_TEST_SEED``
repeats a load.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from sqlalchemy import URL, Engine, create_engine, event, select, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from starlette.responses import PlainTextResponse

from rope_middleware import (
    ASGIRopeMiddleware,
    AsyncSessionJenny,
    SessionJenny,
    WSGIRopeMiddleware,
    current_scope,
    open_scope,
)
from tests.e2e.async_app import Client, answer, seed
from tests.e2e.commit_app import (
    POOL,
    WRITERS,
    AsyncWriter,
    Child,
    Data,
    Row,
    bodies_are_collected,
    create_tables,
    serve_any,
)
from tests.kit.either import now
from tests.kit.frameworks import FRAMEWORKS, View
from tests.kit.leaks import open_scopes
from tests.kit.programs import ROOT
from tests.kit.sessions import run_threads
from tests.kit.waiting import eventually
from tests.servers.asgi import HOST, free_port, run_command, serve
from tests.servers.postgres import Database, postgres_server

LIMIT = 60.0

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """`create_engine` with a pool of 5; disposed of after the test."""
    made: list[Engine] = []

    def make(url: URL, **options: Any) -> Engine:
        made.append(create_engine(url, **POOL, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.dispose()


def rows(database: Database) -> set[int]:
    return {n for (n,) in database.query("SELECT n FROM row")}


def nothing_is_left(held: Callable[[], int], database: Database) -> None:
    eventually(lambda: held() == 0, lambda: f"{held()} connections are out")
    eventually(lambda: not open_scopes(), lambda: f"no scope is open: {open_scopes()}")
    eventually(
        lambda: not database.backends("idle in transaction"),
        lambda: f"no transaction is idle: {database.backends()}",
    )


# --------------------------------------------------------------------------------------------
# Nothing lost, nothing invented


class Load:
    """Clients that write, and remember what they were told."""

    def __init__(self, number: int, *, first: int = 1) -> None:
        self.dice = random.Random(number)
        self.next = first
        self.told: dict[int, int] = {}
        self.left: set[int] = set()

    async def one(self, port: int) -> None:
        n, self.next = self.next, self.next + 1
        do = self.dice.choices(
            ["good", "orphan", "raise", "refuse", "unavailable"], [70, 10, 5, 5, 5]
        )[0]
        leaves_after = self.dice.uniform(0, 0.03) if self.dice.random() < 0.15 else None
        try:
            async with Client(HOST, port) as client:
                client.send(f"/write?n={n}&do={do}", method="POST", body=b"x" * 100)
                await client.writer.drain()
                if leaves_after is not None:
                    self.left.add(n)
                    await asyncio.sleep(leaves_after)
                    client.abort()
                    return
                head = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), LIMIT)
                self.told[n] = int(head.split()[1])
        except (EOFError, OSError):
            self.left.add(n)
            await asyncio.sleep(0.02)  # the server may be starting again

    async def run(self, port: int, requests: int, clients: int = 16) -> None:
        last = self.next + requests

        async def work() -> None:
            while self.next < last:
                await self.one(port)

        await asyncio.gather(*(work() for _ in range(clients)))

    def check(self, database: Database) -> None:
        """Every 2xx has its row, every 4xx and 5xx has none."""
        found = rows(database)
        good = {n for n, status in self.told.items() if 200 <= status < 300}
        bad = {n for n, status in self.told.items() if status >= 400}
        assert good | bad == set(self.told)
        assert good - found == set(), "lost"
        assert bad & found == set(), "invented"
        assert found - good <= self.left, "from nowhere"
        assert database.query("SELECT count(*) FROM child") == [(0,)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("kind", "requests"),
    [("asgi-asyncpg", 2000), ("asgi-psycopg", 600), ("asgi-threads", 600), ("wsgi", 2000)],
)
def test_C2_C3_nothing_lost_nothing_invented(kind: str, requests: int, database: Database) -> None:
    """2,000 writes while the server cuts connections, commits fail and clients leave."""
    number = seed(20260706)
    make, driver = WRITERS[kind]
    app = make(database.url(driver), commit_on_success=True, retries=1)
    load = Load(number)
    dice = random.Random(number + 1)
    done = threading.Event()
    cut = 0

    def cut_connections() -> None:
        nonlocal cut
        while not done.wait(dice.uniform(0.005, 0.05)):
            backends = database.backends()
            if backends:
                cut += database.terminate(dice.choice(backends).pid)

    cutter = threading.Thread(target=cut_connections)
    with serve_any(app) as port:
        cutter.start()
        try:
            asyncio.run(load.run(port, requests))
        finally:
            done.set()
            cutter.join()
        if kind == "wsgi":
            bodies_are_collected()
        nothing_is_left(app.held, database)
        load.check(database)
    outcomes = [status // 100 for status in load.told.values()]
    print(f"{cut} connections cut, {len(load.left)} clients left, answers: {outcomes.count(2)} 2xx")
    assert cut > 10
    assert outcomes.count(2) > 0.3 * requests
    assert outcomes.count(5) > 0.05 * requests
    assert len(load.left) > 0.05 * requests


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_C2_C3_nothing_lost_when_the_server_is_killed(database: Database) -> None:
    """The same with the server's process killed in the middle, twice."""
    load = Load(seed(20260707))
    port = free_port()

    async def run(kill: Callable[[], None] | None) -> None:
        running = asyncio.create_task(load.run(port, 500))
        if kill is not None:
            while len(load.told) < begun + 200:
                await asyncio.sleep(0.005)
                assert not running.done()
            kill()
        await running

    command = [sys.executable, "-m", "uvicorn", "tests.e2e.commit_app:app"]
    command += ["--host", HOST, "--port", str(port), "--log-level", "critical"]
    for turn in range(3):
        with run_command(command, cwd=ROOT, DATABASE_URL=database.text_url("asyncpg")) as process:
            process.wait_for_port(port)
            begun = len(load.told)
            if turn < 2:
                pid = process.pid
                asyncio.run(run(lambda pid=pid: os.kill(pid, signal.SIGKILL)))  # type: ignore[misc]
                assert process.wait() == -signal.SIGKILL
            else:
                asyncio.run(run(None))
                state = httpx.get(f"http://{HOST}:{port}/state").json()
                assert state == {"held": 0, "scopes": []}
                assert process.interrupt() in (0, -signal.SIGINT), process.output
    eventually(
        lambda: not database.backends(),
        lambda: f"the killed processes' connections are gone: {database.backends()}",
    )
    load.check(database)
    good = [status for status in load.told.values() if status == 201]
    assert len(good) > 300
    assert len(load.left) > 30


# --------------------------------------------------------------------------------------------
# C3: a commit that fails, on the wire


class Failing:
    """Handlers whose commit fails for one of three reasons, one framework around each."""

    def __init__(self, database: Database, cause: str, make_engine: Callable[..., Engine]) -> None:
        self.database = database
        self.cause = cause
        level = {"isolation_level": "SERIALIZABLE"} if cause == "serialization" else {}
        self.engine = make_engine(database.url("psycopg"), **level)
        self.jenny = SessionJenny(sessionmaker(self.engine, expire_on_commit=False))

    def held(self) -> int:
        return int(self.engine.pool.checkedout())  # type: ignore[attr-defined]

    def work(self, n: int) -> None:
        """Write row `n`; an odd one cannot be committed."""
        session = self.jenny.session
        session.execute(select(Row)).all()
        session.add(Row(n=n))
        session.flush()
        if n % 2 == 0:
            return
        if self.cause == "constraint":
            session.add(Child(n=n, parent=-n))
            session.flush()
        elif self.cause == "serialization":
            with self.engine.connect() as other:  # the other half of a write skew
                other.execute(select(Row)).all()
                other.execute(Row.__table__.insert().values(n=-n))  # type: ignore[attr-defined]
                other.commit()
        else:
            ((pid,),) = session.execute(text("SELECT pg_backend_pid()"))
            assert self.database.terminate(pid) == 1
            eventually(
                lambda: pid not in {found.pid for found in self.database.backends()},
                "the connection is gone",
            )

    def app(self, which: str) -> Any:
        make = getattr(self, which.replace("-", "_"), None)
        return self.site(which) if make is None else make()

    def plain(self, answers: Callable[[Any], Awaitable[None]]) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "lifespan":
                self.work(int(scope["path"].strip("/")))
                await answers(send)

        return ASGIRopeMiddleware(app, commit_on_success=True)

    def outermost(self) -> Any:
        return self.plain(lambda send: answer(send, 200, b"done"))

    def swallowing(self) -> Any:
        """Goes on with its body after the start was refused."""

        async def answers(send: Any) -> None:
            for message in (
                {"type": "http.response.start", "status": 200, "headers": []},
                {"type": "http.response.body", "body": b"do", "more_body": True},
                {"type": "http.response.body", "body": b"ne"},
            ):
                with suppress(Exception):
                    await send(message)

        return self.plain(answers)

    def answering_else(self) -> Any:
        """Answers 422 instead, by itself."""

        async def answers(send: Any) -> None:
            try:
                await answer(send, 200, b"done")
            except Exception:
                await answer(send, 422, b"sorry")

        return self.plain(answers)

    def site(self, name: str, chunks: Iterable[bytes] | None = None) -> Any:
        """In a framework; with `chunks` its answer is a stream."""

        def view(route: str) -> Any:
            self.work(int(route))
            return "done" if chunks is None else iter(chunks)

        return FRAMEWORKS[name].make(View(view), commit_on_success=True)

    def starlette(self) -> Any:
        async def page(request: Any, error: Exception) -> PlainTextResponse:
            return PlainTextResponse("the page of the app", 500)

        app = self.site("starlette")
        app.add_exception_handler(500, page)
        return app

    def flask_stream(self) -> Any:
        return self.site("flask", [b"do", b"ne"])


PAGES = {
    "outermost": b"",
    "swallowing": b"",
    "answering-else": b"sorry",
    "starlette": b"the page of the app",
    "fastapi": b"Internal Server Error",
    "responder": b"problem",
    "flask": b"",
    "flask-stream": b"",
}


@pytest.mark.parametrize("cause", ["constraint", "serialization", "gone"])
@pytest.mark.parametrize("which", PAGES)
def test_C3_exactly_one_complete_error_response_and_no_row(
    which: str, cause: str, database: Database, make_engine: Callable[..., Engine]
) -> None:
    """Good and bad requests take turns on one connection; HTTP/1.1 stays in step."""
    failing = Failing(database, cause, make_engine)

    async def talk(port: int) -> None:
        async with Client(HOST, port) as client:
            status = 0
            for n in range(2, 8):
                try:
                    status, headers, body = await client.ask(f"/{n}")
                except EOFError as ended:
                    # A server may end the connection after an error that it has seen.
                    assert status == 500, f"request {n} got no complete response"
                    rest = getattr(ended, "partial", b"")
                    assert rest == b"", "more than the error response"
                    await client.again()
                    status, headers, body = await client.ask(f"/{n}")
                if n % 2 == 0:
                    assert (status, body.strip(b'"')) == (200, b"done"), n
                else:
                    assert status == (422 if which == "answering-else" else 500), n
                    assert b"done" not in body
                    assert PAGES[which] in body + headers.get("content-type", "").encode()
            assert await client.rest() == b"", "more than one response"

    with serve_any(failing.app(which)) as port:
        asyncio.run(talk(port))
        nothing_is_left(failing.held, database)
    assert {n for n in rows(database) if n > 0} == {2, 4, 6}
    assert database.query("SELECT count(*) FROM child") == [(0,)]


# --------------------------------------------------------------------------------------------
# C2, C4: after the start


def test_C4_twenty_streams_on_a_pool_of_five_and_request_21_is_answered(database: Database) -> None:
    """Open streams hold no connection; what they write at the end is committed."""
    go = threading.Event()

    class Streams(AsyncWriter):
        async def route(self, scope: Any, receive: Any, send: Any) -> None:
            n = int(scope["path"].strip("/"))
            self.jenny.add(Row(n=n))
            await answer(send, 200, b"first\n", more=n < 100)
            if n >= 100:
                return
            while not go.is_set():
                await asyncio.sleep(0.01)
            self.jenny.add(Row(n=n + 1000))
            if n % 5 == 0:
                await self.jenny.flush()
                raise LookupError("told to raise")
            await send({"type": "http.response.body", "body": b"last\n"})

    app = Streams(database.url("asyncpg"), commit_on_success=True)

    async def talk(port: int) -> None:
        clients = [Client(HOST, port) for _ in range(20)]
        for n, client in enumerate(clients, 1):
            await client.__aenter__()
            client.send(f"/{n}")
        for client in clients:
            await asyncio.wait_for(client.reader.readuntil(b"first\n"), LIMIT)
        assert app.held() == 0
        assert rows(database) == set(range(1, 21))
        async with Client(HOST, port) as other:
            other.send("/100")
            assert (await asyncio.wait_for(other.read(), LIMIT))[0] == 200
        go.set()
        for client in clients:
            await asyncio.wait_for(client.reader.read(10), LIMIT)
            await client.__aexit__()

    with serve(app) as running:
        asyncio.run(talk(running.port))
        nothing_is_left(app.held, database)
    first = set(range(1, 21)) | {100}
    assert rows(database) == first | {1000 + n for n in range(1, 21) if n % 5}


# --------------------------------------------------------------------------------------------
# C6: the counter, and deadlocks


def count_visits(port: int, clients: int = 16, each: int = 25) -> list[tuple[int, int]]:
    """Visit the counter from many clients at once; each status and number."""

    async def visit(found: list[tuple[int, int]]) -> None:
        async with Client(HOST, port) as client:
            for _ in range(each):
                try:
                    status, _, body = await client.ask("/count")
                except EOFError:  # the server has closed it after an error
                    await client.again()
                    status, _, body = await client.ask("/count")
                found.append((status, int(body) if status == 200 else -1))

    async def run() -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        await asyncio.gather(*(visit(found) for _ in range(clients)))
        return found

    return asyncio.run(run())


REPEATABLE = {"isolation_level": "REPEATABLE READ"}


def counter(
    name: str, database: Database, make_engine: Callable[..., Engine], **options: Any
) -> tuple[Any, Callable[[], int]]:
    """The documentation's counter on a framework, and how many connections it holds."""
    engine: Any
    jenny: Any
    if name == "fastapi":
        engine = create_async_engine(database.url("asyncpg"), **POOL, **REPEATABLE)
        jenny = AsyncSessionJenny(async_sessionmaker(engine, expire_on_commit=False))
    else:
        engine = make_engine(database.url("psycopg"), **REPEATABLE)
        jenny = SessionJenny(sessionmaker(engine, expire_on_commit=False))

    async def do(method: str, *arguments: Any) -> Any:
        found = getattr(jenny, method)(*arguments)
        return await found if name == "fastapi" else found

    async def view(route: str) -> str:
        data = (await do("scalars", select(Data))).one()
        data.count += 1
        await do("flush" if options.get("commit_on_success") else "commit")
        return str(data.count)

    view_of_kind = view if name == "fastapi" else lambda route: now(view(route))
    app = FRAMEWORKS[name].make(View(view_of_kind), **options)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await engine.dispose()

    if name == "fastapi":
        app.router.lifespan_context = lifespan
    return app, lambda: int(engine.pool.checkedout())


@pytest.mark.parametrize("kind", ["responder", "fastapi", "fastapi-commit", "flask"])
def test_C6_the_counter_counts_exactly_at_repeatable_read(
    kind: str, database: Database, make_engine: Callable[..., Engine]
) -> None:
    """16 clients x 25 requests: 400 answers of 2xx, each number from 1 to 400 once."""
    options: dict[str, Any] = {"retries": 200}
    if kind == "fastapi-commit":
        options["commit_on_success"] = True
    app, held = counter(kind.removesuffix("-commit"), database, make_engine, **options)
    with serve_any(app) as port:
        found = count_visits(port)
        nothing_is_left(held, database)
    assert [status for status, _ in found] == [200] * 400
    assert sorted(n for _, n in found) == list(range(1, 401))
    assert database.query("SELECT count FROM data") == [(400,)]


def test_C6_without_retries_the_same_load_is_refused_now_and_then(
    database: Database, make_engine: Callable[..., Engine]
) -> None:
    """The load of the test above does collide; what is refused is not counted."""
    app, held = counter("fastapi", database, make_engine)
    with serve(app) as running:
        found = count_visits(running.port)
        nothing_is_left(held, database)
    good = sorted(n for status, n in found if status == 200)
    assert len(good) < 400
    assert good == list(range(1, len(good) + 1))
    assert database.query("SELECT count FROM data") == [(len(good),)]


@pytest.mark.parametrize("kind", ["asyncpg", "psycopg"])
def test_C6_a_deadlock_is_tried_again(kind: str, database: Database) -> None:
    """Two requests lock two rows in opposite order: the one that is refused is run again."""
    tries: list[int] = []
    ready = {1: threading.Event(), 2: threading.Event()}
    has_both = threading.Event()
    database.query("INSERT INTO row VALUES (1), (2)")

    class Locks(AsyncWriter):
        async def route(self, scope: Any, receive: Any, send: Any) -> None:
            first = int(scope["path"].strip("/"))
            second = 3 - first
            tries.append(first)
            # It would be refused again where it comes before the other one takes what is free now.
            while tries.count(first) > 1 and not has_both.is_set():
                await asyncio.sleep(0.005)
            lock = select(Row).with_for_update()
            await self.jenny.execute(lock.where(Row.n == first))
            ready[first].set()
            while not ready[second].is_set():
                await asyncio.sleep(0.005)
            await self.jenny.execute(lock.where(Row.n == second))
            has_both.set()
            self.jenny.add(Row(n=10 * first))
            await answer(send, 200, b"done")

    app = Locks(database.url(kind), commit_on_success=True, retries=3)
    with serve(app) as running, httpx.Client(base_url=running.url, timeout=LIMIT) as client:
        found: list[int] = []
        run_threads([lambda n=n: found.append(client.get(f"/{n}").status_code) for n in (1, 2)])
        nothing_is_left(app.held, database)
    assert found == [200, 200]
    assert len(tries) == 3, tries
    assert rows(database) == {1, 2, 10, 20}


def test_C6_a_serialization_failure_of_the_commit_itself_is_tried_again(
    database: Database, make_engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    """The refusal comes at the middleware's own commit; the client sees one success."""
    failing = Failing(database, "serialization", make_engine)
    tries: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        tries.append(scope["path"])
        failing.work(1 if len(tries) == 1 else 2)
        current_scope().on_commit(lambda: tries.append("committed"))
        await answer(send, 200, b"done")

    caplog.set_level(logging.DEBUG, "rope_middleware")
    wrapped = ASGIRopeMiddleware(app, commit_on_success=True, retries=2)
    with serve(wrapped) as running:
        found = httpx.get(f"{running.url}/skew?secret=1", timeout=LIMIT)
        nothing_is_left(failing.held, database)
    assert (found.status_code, found.text) == (200, "done")
    assert tries == ["/skew", "/skew", "committed"]
    assert {n for n in rows(database) if n > 0} == {2}
    ours = [one.getMessage() for one in caplog.records if one.name == "rope_middleware"]
    assert "GET /skew" in "".join(ours)
    assert "SerializationFailure" in "".join(ours)
    assert "secret" not in "".join(ours)


# --------------------------------------------------------------------------------------------
# C7: several databases, two phases


@pytest.mark.parametrize("wsgi", [False, True])
def test_C7_two_phase_sessions_are_all_prepared_before_one_commits(
    wsgi: bool, database: Database, make_engine: Callable[..., Engine]
) -> None:
    """Where the last one cannot be prepared, none is committed and nothing stays prepared."""
    order: list[str] = []
    with postgres_server().new_database() as second:
        create_tables(second.url("psycopg"))
        engines = [make_engine(found.url("psycopg")) for found in (database, second)]
        for name, engine in zip("ab", engines, strict=True):
            event.listen(
                engine, "prepare_twophase", lambda *told, name=name: order.append(f"prepare {name}")
            )
            event.listen(
                engine, "commit_twophase", lambda *told, name=name: order.append(f"commit {name}")
            )
        jennies = [SessionJenny(sessionmaker(engine, twophase=True)) for engine in engines]

        def work(n: int) -> None:
            for jenny in jennies:
                jenny.session.add(Row(n=n))
            if n == 2:
                jennies[1].session.add(Child(n=n, parent=-n))

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                work(int(scope["path"].strip("/")))
                await answer(send, 200, b"done")

        def wsgi_app(environ: Any, start_response: Any) -> list[bytes]:
            work(int(environ["PATH_INFO"].strip("/")))
            start_response("200 OK", [("content-type", "text/plain")])
            return [b"done"]

        wrapped: Any = (
            WSGIRopeMiddleware(wsgi_app, commit_on_success=True)
            if wsgi
            else ASGIRopeMiddleware(app, commit_on_success=True)
        )
        with serve_any(wrapped) as port:
            assert httpx.get(f"http://{HOST}:{port}/1", timeout=LIMIT).status_code == 200
            assert order == ["prepare a", "prepare b", "commit a", "commit b"]
            assert rows(database) == rows(second) == {1}
            assert httpx.get(f"http://{HOST}:{port}/2", timeout=LIMIT).status_code == 500
        assert rows(database) == rows(second) == {1}
        assert database.query("SELECT gid FROM pg_prepared_xacts") == []
        for engine in engines:
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        engines[1].dispose()  # before its database goes


def test_C7_two_phase_in_open_scope(database: Database) -> None:
    """The same by hand, with an async session where the driver can."""

    async def main() -> None:
        engine = create_async_engine(database.url("psycopg"), **POOL)
        jenny = AsyncSessionJenny(async_sessionmaker(engine, twophase=True))
        order: list[str] = []
        event.listen(engine.sync_engine, "prepare_twophase", lambda *told: order.append("prepare"))
        event.listen(engine.sync_engine, "commit_twophase", lambda *told: order.append("commit"))
        async with open_scope(commit_on_success=True):
            jenny.add(Row(n=1))
        assert order == ["prepare", "commit"]
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        await engine.dispose()

    asyncio.run(main())
    assert rows(database) == {1}
    assert database.query("SELECT gid FROM pg_prepared_xacts") == []
