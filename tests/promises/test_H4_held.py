"""H4: a connection that is held while its code waits for something else is told of.

The watch is made quick: it looks each 20 ms for what was idle for 0.5 s. Where nothing may be told,
a second connection is held by somebody who waits; once that is told, the watch has looked.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

import anyio
import anyio.to_thread
import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from rope_middleware import AsyncSessionJenny, RopeMiddleware, SessionJenny, holders, open_scope
from rope_middleware.session.code import telling
from rope_middleware.session.holding import held
from tests.kit.asgi import http_scope, into_nothing
from tests.kit.engines import MakeEngine, small_async_engine
from tests.kit.models import Row
from tests.kit.planted import Async, Sync, cancelled, line_of
from tests.kit.said import Said
from tests.kit.sessions import SELECT, Jenny, beside, run_threads, touch
from tests.kit.waiting import eventually, never, poll
from tests.servers.postgres import Database, postgres_server

pytestmark = [pytest.mark.anyio, pytest.mark.told]

FILE = Path(__file__).name


@pytest.fixture(scope="module", autouse=True)
def quick_watch() -> Iterator[None]:
    """Look often, and tell early."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held, "EVERY", 0.02)
        patch.setattr(held, "LIMIT", 0.5)
        yield


def line_with(mark: str) -> str:
    """Return the line of this file that ends with a comment of that name."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if line.endswith(f"  # {mark}"))
    return f"{FILE}:{number}"


def told_of(said: Said, name: str) -> list[str]:
    return [text for text in said.held if text.startswith(f"{name!r} ")]


@contextmanager
def somebody_waits(engine: Engine, said: Said) -> Iterator[Any]:
    """Hold a connection and wait; what is yielded returns when that is told."""
    jenny, ready, leave = SessionJenny(sessionmaker(engine)), threading.Event(), threading.Event()

    def wait() -> None:
        with open_scope("somebody"):
            touch(jenny)
            ready.set()
            assert leave.wait(60)

    with beside(wait, until=leave):
        assert ready.wait(60)
        yield lambda: bool(told_of(said, "somebody"))


# -- what is told ----------------------------------------------------------------------------------


def test_H4_it_is_told_once_with_both_lines_and_the_cure(jenny: Jenny, said: Said) -> None:
    """Request, seconds, where its transaction began, where it waits, `release()`; and not again."""
    waits = threading.Event()
    with open_scope("GET /chat"):
        jenny.session.execute(SELECT)  # begins
        while not told_of(said, "GET /chat"):
            waits.wait(0.1)  # waits
        assert not waits.wait(0.5)
    (told,) = said.held
    assert f"begun at {line_with('begins')}, its code is at {line_with('waits')}" in told
    assert "for 0." in told or "for 1." in told, told
    assert "Call release() before the wait" in told


def test_H4_the_limit_is_five_seconds() -> None:
    """As it is shipped; the tests are more impatient."""
    source = Path(held.__file__).read_text()
    assert "\nLIMIT = 5.0 " in source and "\nEVERY = 0.5 " in source


def test_H4_once_for_each_pair_of_lines_and_hour(
    make_engine: MakeEngine, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same lines in other requests are not told again, another line is; after an hour all."""
    jenny = SessionJenny(sessionmaker(make_engine(4)))
    leave = threading.Event()

    def wait(name: str) -> None:
        with open_scope(name):
            touch(jenny)
            if name == "c":
                leave.wait(60)
            leave.wait(60)

    with beside(*(partial(wait, name) for name in "aabc"), until=leave):
        eventually(lambda: len(said.held) == 2, lambda: f"both lines: {said.held}")
        assert told_of(said, "c")
        for module in (telling, held):
            monkeypatch.setattr(module, "monotonic", lambda: time.monotonic() + 3600)
        eventually(lambda: len(said.held) == 4, lambda: f"both again: {said.held}")
        assert "for 3600." in said.held[-1]


def test_H4_every_way_to_hold_is_told(make_engine: MakeEngine, said: Said) -> None:
    """Requests, streams, threads, ropes: each by the line that has begun it."""
    jenny = SessionJenny(sessionmaker(make_engine(20)))
    ready, leave = threading.Semaphore(0), threading.Event()
    kinds = Sync(jenny, ready.release, leave).kinds()
    with beside(*kinds.values(), until=leave):
        eventually(lambda: len(said.held) == len(kinds), lambda: f"each of them: {said.held}")
    for kind in kinds:
        assert any(f"begun at {line_of(kind)}, its code is at planted.py:" in t for t in said.held)
    assert any(text.startswith("a session outside of scopes has held") for text in said.held)


async def test_H4_every_async_way_to_hold_is_told(tmp_path: Path, said: Said) -> None:
    """The twin: requests, streams, WebSockets, background tasks, tasks."""
    engine = small_async_engine(tmp_path / "a.sqlite", pool_size=20)
    jenny = AsyncSessionJenny(async_sessionmaker(engine))
    kinds = Async(jenny, int).kinds()
    tasks = [asyncio.create_task(way()) for way in kinds.values()]
    await poll(lambda: len(said.held) == len(kinds))
    await cancelled(tasks)
    for kind in kinds:
        assert any(f"begun at {line_of(kind)}," in told for told in said.held)
    await engine.dispose()


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_H4_a_sync_handler_of_an_async_app(jenny: Jenny, said: Said) -> None:
    """It waits in a thread of the framework's, under asyncio and trio."""
    leave = threading.Event()

    def handler(request: Any) -> PlainTextResponse:
        jenny.session.execute(SELECT)  # handler begins
        leave.wait(60)
        return PlainTextResponse("done")

    app = RopeMiddleware(Starlette(routes=[Route("/sync", handler)]))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app, http_scope("/sync"), never, into_nothing)
        await poll(lambda: bool(told_of(said, "GET /sync")))
        leave.set()
    (told,) = said.held
    assert line_with("handler begins") in told


async def test_H4_a_stream_whose_client_is_slow(jenny: Jenny, said: Said) -> None:
    """Nothing of the application runs while the server waits to send: the line is the last one."""

    def body() -> Iterator[bytes]:
        jenny.session.execute(SELECT)  # stream begins
        yield b"first"
        yield b"second"

    async def handler(request: Any) -> StreamingResponse:
        return StreamingResponse(body())

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        while message.get("body") == b"first" and not said.held:
            await anyio.sleep(0.01)

    app = RopeMiddleware(Starlette(routes=[Route("/stream", handler)]))
    await app(http_scope("/stream"), never, send)
    (told,) = said.held
    assert f"begun at {line_with('stream begins')}" in told and "'GET /stream'" in told
    assert b"second" in [message.get("body") for message in sent]


def test_H4_waiting_for_another_connection_is_a_wait(make_engine: MakeEngine, said: Said) -> None:
    """An inner scope waits for the pool, while the outer one has written and does nothing."""
    engine = make_engine(2)
    jenny = SessionJenny(sessionmaker(engine))
    with engine.connect() as taken:

        def wait() -> None:
            with open_scope("outer"):
                jenny.session.add(Row(n=1))
                jenny.session.flush()
                with open_scope("inner"):
                    jenny.session.connection()
                jenny.session.rollback()

        with beside(wait):
            eventually(lambda: bool(told_of(said, "outer")), "it is told")
            taken.close()
    assert not told_of(said, "inner")


def test_H4_a_result_that_nobody_reads_on_is_no_excuse(jenny: Jenny, said: Said) -> None:
    """All of it has come from the database, unless it was asked for bit by bit."""
    with open_scope("kept"):
        result = jenny.session.execute(text("SELECT 1 UNION SELECT 2"))
        eventually(lambda: bool(told_of(said, "kept")), "it is told")
        result.close()


# -- what is not -----------------------------------------------------------------------------------


def test_H4_use_in_between_is_no_wait(make_engine: MakeEngine, said: Said) -> None:
    """Many short waits, each with a statement after it, in one transaction or in many."""
    jenny = SessionJenny(sessionmaker(engine := make_engine()))
    with open_scope("busy"):
        touch(jenny)
        with somebody_waits(engine, said) as is_told:
            while not is_told():
                touch(jenny)
                time.sleep(0.05)
    assert not told_of(said, "busy")


def test_H4_nothing_held_is_nothing_told(make_engine: MakeEngine, said: Said) -> None:
    """Added objects without a flush, a session that has committed or was released."""
    jenny = SessionJenny(sessionmaker(engine := make_engine(4)))
    with open_scope("released"):
        touch(jenny)
        jenny.release()
        with open_scope("committed"):
            touch(jenny).commit()
            with open_scope("adds"):
                jenny.session.add(Row(n=1))
                with somebody_waits(engine, said) as is_told:
                    eventually(is_told, "somebody is told of")
                    assert len(holders()) == 2
                jenny.session.rollback()
    assert len(said.held) == 1


def test_H4_a_thread_that_computes_does_not_wait(make_engine: MakeEngine, said: Said) -> None:
    """Python code that takes its time with what it has read."""
    jenny = SessionJenny(sessionmaker(engine := make_engine()))
    with open_scope("computes"):
        touch(jenny)
        with somebody_waits(engine, said) as is_told:
            n = 1
            while n % 100_000 or not is_told():
                n += 1
    assert not told_of(said, "computes")


def test_H4_rows_that_the_database_computes_one_by_one(make_engine: MakeEngine, said: Said) -> None:
    """SQLite does so while they are fetched, after the statement was executed."""
    jenny = SessionJenny(sessionmaker(engine := make_engine()))
    rows = text(
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 1000000) "
        "SELECT x FROM c WHERE x % 250000 = 1"
    )
    with open_scope("fetches"):
        touch(jenny)
        with somebody_waits(engine, said) as is_told:
            while not is_told():
                assert len(jenny.session.execute(rows).all()) == 4
    assert not told_of(said, "fetches")


# -- on a server -----------------------------------------------------------------------------------

SLOWLY = """
CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$;
CREATE TABLE slow (n int);
CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION slowly()"""


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    with postgres_server().new_database(SLOWLY) as found:
        yield found


@pytest.fixture
def postgres(database: Database) -> Iterator[Engine]:
    engine = create_engine(database.url("psycopg"), pool_size=10)
    yield engine
    engine.dispose()


def test_H4_postgres_a_statement_is_no_wait(postgres: Engine, said: Said) -> None:
    """A slow SELECT, a lock that somebody else has, a COPY by the driver, a slow COMMIT."""
    jenny = SessionJenny(sessionmaker(postgres))

    def sleeps() -> None:
        with open_scope("sleeps"):
            jenny.session.execute(text("SELECT pg_sleep(1.2)"))

    def locks() -> None:
        with open_scope("locks"):
            jenny.session.execute(text("SELECT pg_advisory_xact_lock(1)"))

    def copies() -> None:
        with open_scope("copies"):
            driver: Any = jenny.session.connection().connection.driver_connection
            with (
                driver.cursor() as cursor,
                cursor.copy("COPY (SELECT pg_sleep(1.2)) TO STDOUT") as c,
            ):
                list(c)

    def commits() -> None:
        with open_scope("commits"):
            jenny.session.execute(text("INSERT INTO slow VALUES (1)"))
            jenny.session.commit()

    with somebody_waits(postgres, said) as is_told, postgres.connect() as other:
        other.execute(text("SELECT pg_advisory_lock(1)"))
        with beside(locks):
            with beside(sleeps, copies, commits):
                eventually(is_told, "somebody is told of")
            other.execute(text("SELECT pg_advisory_unlock(1)"))
    assert len(said.held) == 1


async def test_H4_postgres_a_statement_of_a_task_is_no_wait(
    database: Database, postgres: Engine, said: Said
) -> None:
    """The twin, by asyncpg; a result is streamed to somebody slow; and the wait that is one."""
    engine = create_async_engine(database.url("asyncpg"))
    jenny = AsyncSessionJenny(async_sessionmaker(engine))

    async def sleeps() -> None:
        async with open_scope("sleeps"):
            await jenny.session.execute(text("SELECT pg_sleep(1.2)"))

    async def streams() -> None:
        async with open_scope("streams"):
            result = await jenny.session.stream(text("SELECT generate_series(1, 5)"))
            async for _ in result:
                await asyncio.sleep(0.3)

    async def commits() -> None:
        async with open_scope("commits"):
            await jenny.session.execute(text("INSERT INTO slow VALUES (1)"))
            await jenny.session.commit()

    async def waits() -> None:
        async with open_scope("waits"):
            await jenny.session.execute(SELECT)
            await asyncio.sleep(1.2)

    await asyncio.gather(sleeps(), streams(), commits(), waits())
    assert [told.split()[0] for told in said.held] == ["'waits'"]
    await engine.dispose()


def test_H4_postgres_a_result_that_is_read_slowly(postgres: Engine, said: Said) -> None:
    """A server-side cursor needs its transaction: there is nothing to give back."""
    jenny = SessionJenny(sessionmaker(postgres))
    rows = text("SELECT generate_series(1, 5)").execution_options(yield_per=1)
    with open_scope("reads"):
        result = iter(jenny.session.execute(rows))
        next(result)
        with somebody_waits(postgres, said) as is_told:
            eventually(is_told, "somebody is told of")
        assert len(list(result)) == 4
    assert len(said.held) == 1


async def test_H4_postgres_the_wait_counts_from_the_end_of_the_statement(
    database: Database,
    postgres: Engine,
    make_engine: MakeEngine,
    said: Said,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second of work and half a second of waiting are no wait of 1.2 seconds."""
    monkeypatch.setattr(held, "LIMIT", 1.2)
    pg, lite = SessionJenny(sessionmaker(postgres)), SessionJenny(sessionmaker(make_engine()))
    by_asyncpg = create_async_engine(database.url("asyncpg"))
    task = AsyncSessionJenny(async_sessionmaker(by_asyncpg))

    def selects() -> None:
        with open_scope("selects"):
            driver: Any = lite.session.connection().connection.driver_connection
            driver.create_function("pg_sleep", 1, lambda seconds: time.sleep(seconds))
            lite.session.execute(text("SELECT pg_sleep(1)"))
            time.sleep(0.5)

    def copies() -> None:
        with open_scope("copies"):
            driver: Any = pg.session.connection().connection.driver_connection
            with driver.cursor() as cursor, cursor.copy("COPY (SELECT pg_sleep(1)) TO STDOUT") as c:
                list(c)
            time.sleep(0.5)

    async with open_scope("awaits"):
        threads = [asyncio.to_thread(one) for one in (selects, copies)]
        work = asyncio.gather(*threads)
        await task.session.execute(text("SELECT pg_sleep(1)"))
        await asyncio.sleep(0.5)
        await task.session.commit()
        await work
    assert said.held == []
    await by_asyncpg.dispose()


# -- what the watch leaves behind ------------------------------------------------------------------


def test_H4_nothing_is_kept_alive(jenny: Jenny, said: Said) -> None:
    """A session and its scope go when the block ends, however often they were looked at."""

    def held_and_told() -> list[ref[Any]]:
        with open_scope("kept") as scope:
            touch(jenny)
            eventually(lambda: bool(said.held), "it is told")
            return [ref(scope), ref(jenny.session)]

    gone = held_and_told()
    gc.collect()
    eventually(lambda: all(one() is None for one in gone), "both are gone")


def test_H4_a_rope_goes_with_its_function(engine: Engine, said: Said) -> None:
    """The watch has looked at its frame, and does not hold it."""
    jenny = SessionJenny(sessionmaker(engine))

    def use() -> None:
        jenny.session.execute(SELECT)
        eventually(lambda: bool(said.held), "it is told")

    use()
    assert holders() == ()


def test_H4_requests_start_nothing_while_it_looks(make_engine: MakeEngine) -> None:
    """One thread for all of them."""
    jenny = SessionJenny(sessionmaker(make_engine(5)))

    def hold() -> None:
        for _ in range(20):
            with open_scope():
                touch(jenny)

    run_threads([hold] * 5)
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("rope_middleware.ticker") == 1


async def test_H4_to_thread_of_a_block(jenny: Jenny, said: Said) -> None:
    """A scope that was opened by hand, with its work in a thread."""
    leave = threading.Event()

    def work() -> None:
        touch(jenny)
        leave.wait(60)  # in a thread

    async with open_scope("block"), anyio.create_task_group() as tasks:
        tasks.start_soon(partial(anyio.to_thread.run_sync, work))
        await poll(lambda: bool(told_of(said, "block")))
        leave.set()
    assert f"its code is at {line_with('in a thread')}" in said.held[0]
