"""C4: after the commit before its start a response holds nothing, and what that breaks says why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from anyio import move_on_after
from sqlalchemy import Engine, create_engine, make_url, select, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker

from rope_middleware import ASGIRopeMiddleware, AsyncSessionJenny, SessionJenny, open_scope
from tests.kit.asgi import ask
from tests.kit.either import Either
from tests.kit.engines import fill
from tests.kit.models import Row
from tests.kit.sessions import Jenny
from tests.kit.stores import Store
from tests.kit.wsgi import serve_wsgi
from tests.servers.postgres import postgres_server

pytestmark = pytest.mark.anyio

CUT_ALL = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)
HELD_OPEN = select(Row).order_by(Row.n).execution_options(yield_per=10)


@pytest.fixture
def postgres_engine() -> Iterator[Engine]:
    with postgres_server().new_database() as found:
        fill(found.url("psycopg"), 100)
        engine = create_engine(found.url("psycopg"))
        yield engine
        engine.dispose()


def notes_of(error: BaseException) -> str:
    return " ".join(getattr(error, "__notes__", ()))


async def test_C4_a_result_that_the_commit_has_closed_says_so(postgres_engine: Engine) -> None:
    """The error of a stream names the cause and two cures; in both protocols."""
    jenny: Jenny = SessionJenny(sessionmaker(postgres_engine))

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        rows = jenny.session.scalars(HELD_OPEN)
        assert next(rows).n == 0
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for row in rows:
            await send({"type": "http.response.body", "body": b"%d" % row.n, "more_body": True})

    with pytest.raises(Exception, match="does not exist") as caught:
        await ask(ASGIRopeMiddleware(asgi, commit_on_success=True))
    assert "commit_on_success has committed before" in notes_of(caught.value)
    assert "all()" in notes_of(caught.value)

    def wsgi(environ: Any, start_response: Any) -> Iterator[bytes]:
        rows = jenny.session.scalars(HELD_OPEN)
        assert next(rows).n == 0
        start_response("200 OK", [])
        return (b"%d" % row.n for row in rows)

    with pytest.raises(Exception, match="does not exist") as caught:
        serve_wsgi(wsgi, commit_on_success=True)
    assert "commit_on_success has committed before" in notes_of(caught.value)


async def test_C4_another_error_of_a_stream_has_no_such_note(postgres_engine: Engine) -> None:
    """Where every result was read, the commit has closed none."""
    jenny: Jenny = SessionJenny(sessionmaker(postgres_engine))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        rows = jenny.session.scalars(HELD_OPEN).all()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError(f"{len(rows)} rows")

    with pytest.raises(RuntimeError, match="100 rows") as caught:
        await ask(ASGIRopeMiddleware(app, commit_on_success=True))
    assert notes_of(caught.value) == ""


# What SQLAlchemy leaves behind where it finds that nothing can be awaited.
@pytest.mark.filterwarnings("ignore:coroutine .Connection.cursor. was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*coroutine object Connection.cursor:pytest.PytestWarning")
async def test_C4_an_object_that_the_commit_has_expired_says_so(store: Store) -> None:
    """An AsyncSession cannot load it again: MissingGreenlet names expire_on_commit."""
    jenny = AsyncSessionJenny(async_sessionmaker(store.async_engine))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        row = await jenny.session.get_one(Row, 1)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": row.name.encode()})  # read afterwards

    async with open_scope():
        await store.add(1)
        await store.commit()
    with pytest.raises(Exception, match="greenlet_spawn") as caught:
        await ask(ASGIRopeMiddleware(app, commit_on_success=True))
    assert "expire_on_commit=False" in notes_of(caught.value)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("writes", ["", "text", "flush", "pending", "swallowed"])
async def test_C2_of_a_cut_off_read_there_is_nothing_to_commit(
    writes: str, is_async: bool, tmp_path: Path
) -> None:
    """A client that hangs up cuts a stream's SELECT off, and its connection: no failed commit.

    Where anything was written in that transaction, it is one; also what the application tried to
    flush when the connection had gone, and swallowed the error.
    """
    url = make_url(f"sqlite:///{tmp_path / 'rows.sqlite'}")
    fill(url, 3)
    urls = [url.set(drivername="sqlite+aiosqlite")] if is_async else [url]
    async with Either(urls, is_async=is_async) as either:

        async def work() -> None:
            await either.do("execute", select(Row.n))
            if writes == "text":
                await either.do("execute", text("DELETE FROM row"))
            if writes in ("flush", "pending"):
                either.jenny.session.add(Row(n=7))
            if writes == "flush":
                await either.do("flush")
            connection = await either.do("connection")
            done = connection.invalidate()
            if is_async:
                await done
            if writes == "swallowed":
                either.jenny.session.add(Row(n=7))
                with suppress(PendingRollbackError):
                    await either.do("flush")

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await work()

        served = ask(ASGIRopeMiddleware(app, commit_on_success=True))
        if writes:
            with pytest.raises(PendingRollbackError):
                await served
        else:
            await served
        with pytest.raises(PendingRollbackError):  # no hang-up: nobody knows what is lost
            async with either.scope(commit_on_success=True):
                await work()
        async with either.scope():
            assert len((await either.do("scalars", select(Row))).all()) == 3


@pytest.mark.parametrize("how", ["lost", "cut off"])
@pytest.mark.parametrize("driver", ["psycopg", "psycopg_async", "asyncpg"])
async def test_C2_a_lost_read_that_is_swallowed_is_no_success(driver: str, how: str) -> None:
    """What the driver's own connection has written before (COPY) nobody has seen: it is lost."""
    is_async = driver != "psycopg"

    async def copy(connection: Any) -> None:
        if driver == "asyncpg":
            await connection.copy_records_to_table("row", records=[(7, "")], columns=["n", "name"])
        elif is_async:
            async with connection.cursor() as cursor, cursor.copy("COPY row FROM STDIN") as copied:
                await copied.write_row((7, ""))
        else:
            with connection.cursor() as cursor, cursor.copy("COPY row FROM STDIN") as copied:
                copied.write_row((7, ""))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await either.do("execute", select(Row.n))
        found = await either.do("connection")
        raw = await found.get_raw_connection() if is_async else found.connection
        await copy(raw.driver_connection)
        if how == "cut off" and is_async:
            with move_on_after(0.1):
                await either.do("execute", text("SELECT pg_sleep(10)"))
        elif how == "cut off":
            found.invalidate()  # as SQLAlchemy does at a KeyboardInterrupt, and gevent's Timeout
        else:
            database.query(CUT_ALL)
            with suppress(DBAPIError):
                await either.do("execute", select(Row.n))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    with postgres_server().new_database() as database:
        database.query("CREATE TABLE row (n int PRIMARY KEY, name text NOT NULL)")
        async with Either([database.url(driver)], is_async=is_async) as either:
            statuses: list[int] = []
            with pytest.raises(PendingRollbackError) as caught:
                await ask(ASGIRopeMiddleware(app, commit_on_success=True), statuses)
            assert "jenny.rollback()" in notes_of(caught.value)
        assert statuses == database.query("SELECT n FROM row") == []
