"""C10: the commit has the session for itself, also from an application that has kept it."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from rope_middleware import AsyncSessionJenny, RopeMiddleware, SessionJenny
from tests.kit.asgi import http_scope, into_nothing
from tests.kit.engines import MakeEngine, hold_up, rows
from tests.kit.leaks import checked_out
from tests.kit.models import Row
from tests.kit.said import Said
from tests.kit.stacks import stack, twenty
from tests.kit.waiting import PATIENCE, never
from tests.servers.postgres import Database

COUNT = select(func.count()).select_from(Row)


def test_C10_a_stream_that_keeps_the_views_session(make_engine: MakeEngine) -> None:
    """Its chunks wait for the commit, and go on in the same session: 200, whole, every row."""
    engine = make_engine(connect_args={"timeout": 20})
    jenny = SessionJenny(sessionmaker(engine, expire_on_commit=False))

    def view(request: Request) -> Response:
        session = jenny.session
        session.add(Row(name="view"))
        session.flush()

        def chunks() -> Iterator[str]:
            for number in range(3):
                session.add(Row(name=f"chunk {number}"))
                session.flush()
                yield str(session.scalar(text("SELECT 7")))

        return StreamingResponse(chunks())

    assert asyncio.run(twenty(stack(Route("/", view)), at_once=4)) == [(200, "777")] * 20
    assert rows(engine) == 80
    assert checked_out(engine) == 0


def change_during_commit(
    engine: Engine,
    kind: str,
    change: Callable[[Any, Row], None],
    *,
    expires: bool = False,
    then: str = "",
) -> None:
    """Serve a request that adds a row; another task calls `change` while its commit is under way.

    Args:
        engine: of SQLite.
        kind: of the request's session: "sync" or "async".
        change: called with the session and the row.
        expires: `expire_on_commit`.
        then: what the other task calls on the session afterwards.
    """
    jenny: Any = SessionJenny(sessionmaker(engine, expire_on_commit=expires))
    if kind == "async":
        async_engine = create_async_engine(engine.url.set(drivername="sqlite+aiosqlite"))
        jenny = AsyncSessionJenny(async_sessionmaker(async_engine, expire_on_commit=expires))
    commits, may_go = hold_up(async_engine.sync_engine if kind == "async" else engine)
    if kind == "async":
        may_go.set()  # its COMMIT is awaited

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session, row = jenny.session, Row(name="view")

        async def beside() -> None:
            while not commits.is_set():
                await asyncio.sleep(0)
            change(session, row)
            may_go.set()
            if then:
                call = getattr(session, then)
                await (call() if kind == "async" else asyncio.to_thread(call))

        await asyncio.to_thread(session.add, row)
        other = asyncio.create_task(beside())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await other
        await send({"type": "http.response.body", "body": b""})
        if kind == "async":
            scope["rope_middleware.scope"].on_close(async_engine.dispose)

    asyncio.run(RopeMiddleware(app, commit_on_success=True)(http_scope(), never, into_nothing))


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("then", ["", "rollback"])
def test_C10_what_is_added_while_the_commit_is_under_way(
    make_engine: MakeEngine, kind: str, then: str
) -> None:
    """It is written at the end, where the application does not roll it back."""
    engine = make_engine()
    change_during_commit(engine, kind, lambda session, _: session.add(Row(name="late")), then=then)
    assert rows(engine) == (1 if then else 2)


@pytest.mark.told
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("expires", [True, False])
def test_C10_what_is_changed_while_the_commit_is_under_way(
    make_engine: MakeEngine, kind: str, expires: bool, said: Said
) -> None:
    """SQLAlchemy's expire_on_commit drops it, and that is told; else the end writes it."""
    engine = make_engine()
    change_during_commit(engine, kind, lambda _, row: setattr(row, "name", "late"), expires=expires)
    with Session(engine) as session:
        assert session.scalar(select(Row.name)) == ("view" if expires else "late")
    assert [
        ("expire_on_commit=True has dropped that: 1 Row changed" in w) for w in said.warnings
    ] == ([True] if expires else [])


def test_C10_who_is_on_the_way_to_a_statement_is_waited_for(make_engine: MakeEngine) -> None:
    """Another thread that is inside of a call, before its statement begins: the commit is later."""
    engine = make_engine()
    jenny = SessionJenny(sessionmaker(engine))
    inside, may_go = hold_up(jenny.session_factory, "do_orm_execute")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        jenny.session.add(Row(name="view"))
        jenny.session.flush()
        other = asyncio.create_task(asyncio.to_thread(lambda: jenny.session.scalar(COUNT)))
        await asyncio.to_thread(inside.wait, PATIENCE)
        threading.Timer(0.2, may_go.set).start()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert may_go.is_set()
        assert await other == 1
        await send({"type": "http.response.body", "body": b""})

    asyncio.run(RopeMiddleware(app, commit_on_success=True)(http_scope(), never, into_nothing))
    assert rows(engine) == 1


@pytest.mark.parametrize("method", ["scalar", "close", "end of a begin() block"])
def test_C10_a_method_that_a_thread_was_given_waits(make_engine: MakeEngine, method: str) -> None:
    """``run_in_threadpool(jenny.session.scalar, ...)``, begun while the commit is under way."""
    engine = make_engine()
    jenny = SessionJenny(sessionmaker(engine))
    commits, may_go = hold_up(engine)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        transaction = jenny.session.begin()
        jenny.session.add(Row(name="view"))
        given = getattr(jenny.session, method, transaction.commit)
        arguments = [COUNT] if method == "scalar" else []

        async def beside() -> object:
            await asyncio.to_thread(commits.wait, PATIENCE)
            threading.Timer(0.2, may_go.set).start()
            return await asyncio.to_thread(given, *arguments)

        other = asyncio.create_task(beside())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        assert await other == (1 if method == "scalar" else None)
        await send({"type": "http.response.body", "body": b""})

    asyncio.run(RopeMiddleware(app, commit_on_success=True)(http_scope(), never, into_nothing))
    assert checked_out(engine) == 0
    assert rows(engine) == 1


def test_C10_a_release_under_way_is_waited_for(make_engine: MakeEngine) -> None:
    """The commit finds the session as release() leaves it."""
    engine = make_engine()
    jenny = SessionJenny(sessionmaker(engine))
    inside, may_go = hold_up(engine, "rollback")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        jenny.session.scalar(COUNT)
        other = asyncio.create_task(asyncio.to_thread(jenny.release))
        await asyncio.to_thread(inside.wait, PATIENCE)
        threading.Timer(0.2, may_go.set).start()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await other

    asyncio.run(RopeMiddleware(app, commit_on_success=True)(http_scope(), never, into_nothing))
    assert checked_out(engine) == 0


def test_C10_what_guards_a_session_keeps_it_not_alive(make_engine: MakeEngine) -> None:
    """A session goes when its request is over, without the garbage collector."""
    jenny = SessionJenny(sessionmaker(make_engine()))
    seen: list[weakref.ref[Session]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.to_thread(lambda: jenny.session.scalar(COUNT))
        seen.append(weakref.ref(jenny.session))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    gc.disable()
    try:
        asyncio.run(RopeMiddleware(app, commit_on_success=True)(http_scope(), never, into_nothing))
        assert seen[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("where", ["class", "session", "patched"])
def test_C10_a_guarded_session_has_the_applications_own_methods(
    make_engine: MakeEngine, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one of the application's class, and what that or it overrides is what is called."""
    calls: list[str] = []

    class Own(Session):
        def commit(self) -> None:
            calls.append("class")
            super().commit()

    jenny = SessionJenny(sessionmaker(make_engine(), class_=Own))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = jenny.session
        assert isinstance(session, Own)
        await asyncio.to_thread(session.scalar, COUNT)

        def commit(*_: object) -> None:
            calls.append(where)
            Session.commit(session)

        if where != "class":
            monkeypatch.setattr(Own if where == "patched" else session, "commit", commit)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    asyncio.run(RopeMiddleware(app, commit_on_success=True)(http_scope(), never, into_nothing))
    assert calls == [where]


# -- PostgreSQL --------------------------------------------------------------------------------


@pytest.fixture
def database(emptied: Callable[[], Database]) -> Database:
    return emptied()


@pytest.mark.parametrize("keeps", [True, False], ids=["a kept session", "jenny.session"])
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("status", [200, 404])
def test_C10_an_async_stream_on_postgresql(
    database: Database, status: int, driver: str, keeps: bool
) -> None:
    """A driver that allows one operation at a time: every answer is whole, every row is there.

    Or none, where the response is no success: the rollback has the session for itself, too.
    """

    async def main() -> list[tuple[int, str]]:
        engine = create_async_engine(database.url(driver), pool_size=5)
        jenny = AsyncSessionJenny(async_sessionmaker(engine, expire_on_commit=False))

        async def view(request: Request) -> Response:
            kept = jenny.session
            kept.add(Row(name="view"))
            await kept.flush()

            async def chunks() -> AsyncIterator[str]:
                for number in range(3):
                    session: AsyncSession = kept if keeps else jenny.session
                    session.add(Row(name=f"chunk {number}"))
                    await session.flush()
                    yield str(await session.scalar(text("SELECT 7")))

            return StreamingResponse(chunks(), status)

        answers = await twenty(stack(Route("/", view)), at_once=4)
        assert checked_out(engine.sync_engine) == 0
        assert not database.backends("idle in transaction")
        await engine.dispose()
        return answers

    assert asyncio.run(main()) == [(status, "777")] * 20
    assert database.query("SELECT count(*) FROM row") == [(80 if status == 200 else 0,)]


@pytest.mark.told
def test_S3_no_connection_goes_back_within_its_transaction(database: Database) -> None:
    """Two tasks use one session at once on asyncpg, which then refuses to roll back."""

    async def main() -> None:
        engine = create_async_engine(database.url("asyncpg"), pool_size=1, max_overflow=0)
        jenny = AsyncSessionJenny(async_sessionmaker(engine))

        async def two(scope: Any, receive: Any, send: Any) -> None:
            await jenny.session.execute(text("SELECT 1"))
            other = asyncio.ensure_future(jenny.session.execute(text("SELECT pg_sleep(0.2)")))
            await asyncio.sleep(0.05)
            with pytest.raises(Exception, match="another operation"):
                await jenny.session.commit()
            await asyncio.wait({other})
            other.exception()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def one(scope: Any, receive: Any, send: Any) -> None:
            assert await jenny.session.scalar(text("SELECT 1")) == 1

        await RopeMiddleware(two)(http_scope(), never, into_nothing)

        await RopeMiddleware(one)(http_scope(), never, into_nothing)
        await engine.dispose()

    asyncio.run(main())
