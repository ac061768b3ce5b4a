"""C10: the commit has the session for itself, while the application goes on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import trio
from sqlalchemy import Engine, event, func, insert, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import ORMExecuteState, Session, sessionmaker
from sqlalchemy.util import await_only
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route

from rope_middleware import AsyncSessionJenny, RopeMiddleware, SessionJenny, current_scope
from rope_middleware.scope import ending, settling
from tests.kit.asgi import http_scope, into_nothing
from tests.kit.engines import hold_up, rows
from tests.kit.leaks import checked_out
from tests.kit.models import Base, Row
from tests.kit.sessions import Jenny
from tests.kit.stacks import stack, twenty
from tests.kit.waiting import PATIENCE, never
from tests.kit.wsgi import serve_wsgi

pytestmark = pytest.mark.anyio

COUNT = select(func.count()).select_from(Row)


@pytest.fixture
def jenny(engine: Engine) -> Jenny:
    return SessionJenny(sessionmaker(engine, expire_on_commit=False))


@pytest.fixture
async def async_engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/async.db")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()


async def test_C10_a_sync_stream_behind_base_http_middleware(jenny: Jenny, engine: Engine) -> None:
    """Its chunks read, and write, while the commit is under way: 200, whole, every row."""

    def view(request: Request) -> Response:
        jenny.session.add(Row(name="view"))
        jenny.session.flush()

        def chunks() -> Iterator[str]:
            for number in range(3):
                jenny.session.add(Row(name=f"chunk {number}"))
                jenny.session.flush()
                yield f"{jenny.session.scalar(COUNT)} "

        return StreamingResponse(chunks())

    answers = await twenty(stack(Route("/", view)))
    expected = [(200, f"{4 * n + 2} {4 * n + 3} {4 * n + 4} ") for n in range(20)]
    assert answers == expected
    assert rows(engine) == 80
    assert checked_out(engine) == 0


async def test_C10_an_async_stream_behind_base_http_middleware(async_engine: AsyncEngine) -> None:
    """The twin, by AsyncSession."""
    jenny = AsyncSessionJenny(async_sessionmaker(async_engine, expire_on_commit=False))

    async def view(request: Request) -> Response:
        jenny.session.add(Row(name="view"))
        await jenny.session.flush()

        async def chunks() -> AsyncIterator[str]:
            for number in range(3):
                jenny.session.add(Row(name=f"chunk {number}"))
                await jenny.session.flush()
                yield f"{await jenny.session.scalar(COUNT)} "

        return StreamingResponse(chunks())

    answers = await twenty(stack(Route("/", view)))
    assert answers == [(200, f"{4 * n + 2} {4 * n + 3} {4 * n + 4} ") for n in range(20)]
    async with async_engine.connect() as connection:
        assert await connection.scalar(COUNT) == 80


async def test_C10_a_wsgi_app_that_is_mounted_inside(jenny: Jenny, engine: Engine) -> None:
    """A bridge sends the start while the app's thread goes on."""
    from a2wsgi import WSGIMiddleware

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        jenny.session.add(Row(name="view"))
        jenny.session.flush()
        start_response("200 OK", [("Content-Type", "text/plain")])
        for number in range(3):
            jenny.session.add(Row(name=f"chunk {number}"))
            jenny.session.flush()
            yield f"{jenny.session.scalar(COUNT)} ".encode()

    answers = await twenty(stack(Mount("/", WSGIMiddleware(app))))
    assert [status for status, _ in answers] == [200] * 20
    assert rows(engine) == 80
    assert checked_out(engine) == 0


def test_C10_who_asks_meanwhile_gets_a_session_that_begins_after_the_commit(
    jenny: Jenny, engine: Engine
) -> None:
    """Another one of the same scope; what it writes is committed at the scope's end."""
    began, may_go = hold_up(engine)
    seen: dict[str, Any] = {}

    def beside() -> None:
        assert began.wait(PATIENCE)
        seen["other"] = jenny.session
        threading.Timer(0.2, may_go.set).start()
        seen["count"] = jenny.session.scalar(COUNT)  # waits until the commit stands
        jenny.session.add(Row(name="beside"))
        jenny.session.flush()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        jenny.session.add(Row(name="first"))
        seen["first"] = jenny.session
        other = asyncio.create_task(asyncio.to_thread(beside))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await other
        await send({"type": "http.response.body", "body": b""})

    app = RopeMiddleware(app, commit_on_success=True)
    asyncio.run(app(http_scope(), never, into_nothing))
    assert seen["other"] is not seen["first"]
    assert seen["count"] == 1
    assert rows(engine) == 2
    assert checked_out(engine) == 0


def test_C10_who_asks_meanwhile_in_a_wsgi_app_gets_such_a_session_too(
    jenny: Jenny, engine: Engine
) -> None:
    """The twin: a thread of the application's own, while the first chunk lets the commit begin."""
    began, may_go = hold_up(engine)
    seen: dict[str, Any] = {}

    def beside() -> None:
        assert began.wait(PATIENCE)
        seen["other"] = jenny.session
        threading.Timer(0.2, may_go.set).start()
        seen["count"] = jenny.session.scalar(COUNT)
        jenny.session.add(Row(name="beside"))
        jenny.session.flush()

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        jenny.session.add(Row(name="first"))
        seen["first"] = jenny.session
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(copy_context().run, beside)
            start_response("200 OK", [])
            yield b"a"
            other.result(PATIENCE)
        yield b"b"

    assert serve_wsgi(app, commit_on_success=True) == [b"a", b"b"]
    assert seen["other"] is not seen["first"]
    assert seen["count"] == 1
    assert rows(engine) == 2
    assert checked_out(engine) == 0


@pytest.mark.told
@pytest.mark.parametrize("protocol", ["asgi", "wsgi"])
def test_C10_a_session_that_another_thread_removes_as_the_commit_begins(
    jenny: Jenny, engine: Engine, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    """There is nothing left to commit: a success, at once, and no commit stays under way."""
    removed: list[None] = []

    class Late(settling.Aside):
        __slots__ = ()

        def __init__(self) -> None:
            if not removed:
                removed.append(None)
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(copy_context().run, jenny.remove).result(PATIENCE)

    monkeypatch.setattr(settling, "Aside", Late)
    monkeypatch.setattr(ending, "Aside", Late)
    seen: list[Any] = []

    def use() -> None:
        jenny.session.add(Row(name="removed"))
        jenny.session.flush()

    def check() -> None:
        assert removed
        assert settling.may_begin(current_scope())
        jenny.session.add(Row(name="later"))
        seen.append(None)

    def in_wsgi(environ: Any, start_response: Any) -> Iterator[bytes]:
        use()
        start_response("200 OK", [])
        yield b"a"
        check()
        yield b"b"

    async def in_asgi(scope: Any, receive: Any, send: Any) -> None:
        use()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        check()

    if protocol == "wsgi":
        assert serve_wsgi(in_wsgi, commit_on_success=True) == [b"a", b"b"]
    else:
        app = RopeMiddleware(in_asgi, commit_on_success=True)
        asyncio.run(app(http_scope(), never, into_nothing))
    assert seen
    assert rows(engine) == 1
    assert checked_out(engine) == 0


def test_C10_a_listener_of_the_commit_has_the_commits_own_session(
    jenny: Jenny, engine: Engine
) -> None:
    """What it writes by jenny.session belongs to the commit."""
    same: list[bool] = []

    @event.listens_for(jenny.session_factory, "before_commit")
    def audit(session: Session) -> None:
        if not same:
            same.append(jenny.session is session)
            jenny.session.add(Row(name="audit"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        jenny.session.add(Row(name="x"))
        before = jenny.session
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert rows(engine) == 2
        assert jenny.session is before
        await send({"type": "http.response.body", "body": b""})

    asyncio.run(RopeMiddleware(app, commit_on_success=True)(http_scope(), never, into_nothing))
    assert same == [True]


def test_C10_the_commit_waits_for_a_statement_under_way(jenny: Jenny, engine: Engine) -> None:
    """Its writes belong to the commit."""
    executing, may_go = threading.Event(), threading.Event()

    @event.listens_for(engine, "before_cursor_execute")
    def slowly(conn: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "INSERT" in statement:
            executing.set()
            assert may_go.wait(PATIENCE)

    def writes() -> None:
        jenny.session.add(Row(name="slow"))
        jenny.session.flush()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        jenny.session.execute(COUNT)
        other = asyncio.create_task(asyncio.to_thread(writes))
        await asyncio.to_thread(executing.wait, PATIENCE)
        threading.Timer(0.2, may_go.set).start()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert rows(engine) == 1
        await other
        await send({"type": "http.response.body", "body": b""})

    asyncio.run(RopeMiddleware(app, commit_on_success=True)(http_scope(), never, into_nothing))
    assert checked_out(engine) == 0


def test_C10_the_commit_waits_for_a_flush_under_way_in_a_session_that_a_thread_has_kept(
    jenny: Jenny, engine: Engine
) -> None:
    """And the flush does not wait for the commit meanwhile."""
    flushing, may_go = threading.Event(), threading.Event()

    def app(_: Any, start_response: Any) -> list[bytes]:
        session = jenny.session
        session.execute(COUNT)

        @event.listens_for(session, "before_flush")
        def slowly(*_: Any) -> None:
            flushing.set()
            assert may_go.wait(PATIENCE)

        session.add(Row(name="slow"))
        thread = threading.Thread(target=session.flush)
        thread.start()
        assert flushing.wait(PATIENCE)
        threading.Timer(0.2, may_go.set).start()
        start_response("200 OK", [])
        return [b"ok"]

    assert serve_wsgi(app, commit_on_success=True) == [b"ok"]
    assert rows(engine) == 1 and checked_out(engine) == 0


@pytest.mark.parametrize("has_begun", [True, False], ids=["begun before", "begun at the start"])
async def test_C10_the_commit_waits_for_a_call_of_another_task(
    async_engine: AsyncEngine, has_begun: bool
) -> None:
    """The twin, by AsyncSession: a call that has come to no statement yet."""

    class OwnSession(Session):
        pass

    jenny = AsyncSessionJenny(async_sessionmaker(async_engine, sync_session_class=OwnSession))
    inside, may_go = asyncio.Event(), asyncio.Event()

    @event.listens_for(OwnSession, "do_orm_execute")
    def slowly(state: ORMExecuteState) -> None:
        if state.is_insert:
            inside.set()
            await_only(may_go.wait())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await jenny.session.execute(COUNT)
        other = asyncio.create_task(jenny.session.execute(insert(Row).values(name="slow")))
        if has_begun:
            await inside.wait()
        asyncio.get_running_loop().call_later(0.1, may_go.set)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert may_go.is_set()
        async with async_engine.connect() as connection:
            assert await connection.scalar(COUNT) == 1
        await other

    await RopeMiddleware(app, commit_on_success=True)(http_scope(), never, into_nothing)
    assert checked_out(async_engine.sync_engine) == 0


@pytest.mark.parametrize("how", ["returns", "is cancelled"])
def test_C10_the_end_waits_for_a_commit_under_way(
    jenny: Jenny, engine: Engine, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The app's call is over while another task of it sends the start: the commit is whole."""
    began, may_go = hold_up(engine)
    tasks: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        jenny.session.add(Row(name="x"))
        start = send({"type": "http.response.start", "status": 200, "headers": []})
        tasks.append(asyncio.create_task(start))
        await asyncio.to_thread(began.wait, PATIENCE)
        threading.Timer(0.2, may_go.set).start()
        if how == "is cancelled":
            await never()

    async def main() -> None:
        call = asyncio.create_task(
            RopeMiddleware(app, commit_on_success=True)(http_scope(), never, into_nothing)
        )
        await asyncio.to_thread(began.wait, PATIENCE)
        if how == "is cancelled":
            await asyncio.sleep(0.05)
            call.cancel()
        await asyncio.wait({call})
        assert rows(engine) == 1
        assert checked_out(engine) == 0
        await asyncio.wait_for(tasks[0], PATIENCE)

    asyncio.run(main())
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


@pytest.mark.told
def test_C10_the_event_loop_of_trio_does_not_wait_for_a_commit(
    jenny: Jenny, engine: Engine
) -> None:
    """A sync session that is used on the loop cannot wait there: the commit needs the loop."""
    began, may_go = hold_up(engine)
    seconds: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = jenny.session
        session.add(Row(name="x"))

        async def beside() -> None:
            await trio.to_thread.run_sync(began.wait, PATIENCE)
            before = time.monotonic()
            with suppress(SQLAlchemyError):  # two at once
                session.flush()
            seconds.append(time.monotonic() - before)
            may_go.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(beside)
            await send({"type": "http.response.start", "status": 200, "headers": []})

    trio.run(
        RopeMiddleware(app, commit_on_success=True), http_scope(), trio.sleep_forever, into_nothing
    )
    assert seconds[0] < 2
    assert rows(engine) == 1
