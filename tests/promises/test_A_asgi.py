"""A1-A4: ASGI, in process; real servers are in `tests/e2e`."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import sessionmaker
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from rope_middleware import (
    ASGIRopeMiddleware,
    NoScopeError,
    Scope,
    SessionJenny,
    current_scope,
    open_scope,
)
from tests.kit.asgi import asgi_app, ask, client, http_scope, into_nothing, serve
from tests.kit.engines import MakeEngine
from tests.kit.leaks import checked_out
from tests.kit.models import Row
from tests.kit.sessions import workers
from tests.kit.stores import Store
from tests.kit.waiting import PATIENCE, never, poll

pytestmark = pytest.mark.anyio


def test_A3_one_thread_ends_one_request_after_the_other(jenny: SessionJenny[Any]) -> None:
    """A thread for each request would cost more than what it is there for."""
    ended: set[int] = set()

    @event.listens_for(jenny.session_factory.kw["bind"], "rollback")
    def note(connection: Any) -> None:
        ended.add(threading.get_ident())

    app = ASGIRopeMiddleware(asgi_app(lambda: jenny.execute(text("SELECT 1"))))

    async def main() -> None:
        for _ in range(50):
            await ask(app)

    asyncio.run(main())
    assert len(ended) == 1
    assert threading.get_ident() not in ended


def test_A3_a_burst_of_endings_takes_at_most_40_threads(make_engine: MakeEngine) -> None:
    """60 rollbacks at once, none of which needs a token of the shared limiter: all end."""
    engine = make_engine(60)
    jenny = SessionJenny(sessionmaker(engine))
    before = set(workers())
    seen: set[threading.Thread] = set()
    ended: list[None] = []

    @event.listens_for(engine, "rollback")
    def slowly(connection: Any) -> None:
        seen.update(workers())
        time.sleep(0.02)
        ended.append(None)

    app = ASGIRopeMiddleware(asgi_app(lambda: jenny.execute(text("SELECT 1"))))

    async def main() -> None:
        await asyncio.gather(*(ask(app) for _ in range(60)))

    asyncio.run(main())
    assert len(ended) == 60
    assert len(seen - before) <= 40
    assert checked_out(engine) == 0


@pytest.mark.parametrize("changes", [False, True])
def test_A3_a_commit_with_a_connection_never_waits_for_those_that_need_one(
    changes: bool, make_engine: MakeEngine
) -> None:
    """30 commits wait for the only connection, and the one that has it finds a thread."""
    maker = sessionmaker(make_engine(1, pool_timeout=2))
    jenny, flushes = SessionJenny(maker), list[object]()
    event.listen(maker, "before_flush", lambda *told: flushes.append(told[0]))

    async def main() -> None:
        everybody_waits, statuses = asyncio.Event(), list[int]()

        async def hold() -> None:
            jenny.add(Row(name="x"))
            jenny.flush()
            if changes:
                jenny.add(Row(name="x"))
            await everybody_waits.wait()

        holder = asyncio.create_task(
            ask(ASGIRopeMiddleware(asgi_app(hold), commit_on_success=True), statuses)
        )
        await asyncio.sleep(0)
        app = ASGIRopeMiddleware(asgi_app(lambda: jenny.add(Row(name="x"))), commit_on_success=True)
        others = [asyncio.create_task(ask(app, statuses)) for _ in range(30)]
        await poll(lambda: len(flushes) >= 13)  # the holder's own, and as many as have a thread
        everybody_waits.set()
        await asyncio.gather(holder, *others)
        assert statuses == [200] * 31

    asyncio.run(main())


def test_A3_a_commit_without_changes_never_waits_for_those_that_flush(
    make_engine: MakeEngine,
) -> None:
    """They may wait for a row that is locked by the one that commits."""
    engine, committed = make_engine(40), threading.Event()
    maker = sessionmaker(engine)
    jenny = SessionJenny(maker)

    waiting: list[int] = []

    @event.listens_for(maker, "before_flush")
    def wait(*_: object) -> None:
        waiting.append(threading.get_ident())
        assert committed.wait(PATIENCE)

    async def main() -> None:
        everybody_waits, statuses = asyncio.Event(), list[int]()

        async def hold() -> None:
            jenny.execute(text("SELECT 1"))
            event.listen(jenny.session, "after_commit", lambda _: committed.set())
            await everybody_waits.wait()

        def change() -> None:
            jenny.execute(text("SELECT 1"))
            jenny.add(Row(name="x"))

        holder = asyncio.create_task(
            ask(ASGIRopeMiddleware(asgi_app(hold), commit_on_success=True), statuses)
        )
        app = ASGIRopeMiddleware(asgi_app(change), commit_on_success=True)
        others = [asyncio.create_task(ask(app, statuses)) for _ in range(30)]
        await poll(lambda: len(waiting) >= 15)
        everybody_waits.set()
        await asyncio.gather(holder, *others)
        assert statuses == [200] * 31

    asyncio.run(main())


async def ask_view(view: Any, path: str = "/", **options: Any) -> Any:
    """Serve a view by Starlette inside of ours; return the answer to one request."""
    app = Starlette(routes=[Route("/", view)])
    app.add_middleware(ASGIRopeMiddleware, **options)
    async with client(app) as browser:
        return await browser.get(path)


async def test_A1_lifespan_and_unknown_types_pass_untouched() -> None:
    """The same objects go through, and no scope is open."""
    told: list[Any] = []

    async def app(*call: Any) -> None:
        told.append(call)
        with pytest.raises(NoScopeError):
            current_scope()

    wrapped = ASGIRopeMiddleware(app)
    for kind in ("lifespan", "quic.future"):
        call = ({"type": kind}, never, into_nothing)
        before = dict(call[0])
        await wrapped(*call)
        assert all(given is got for given, got in zip(call, told[-1], strict=True))
        assert call[0] == before


async def test_A1_a_lifespan_uses_open_scope_by_hand(store: Store) -> None:
    """Start-up code makes its first row in a scope of its own; requests then have theirs."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with open_scope("start", commit_on_success=True):
            store.jenny.add(Row(n=1))
        yield
        async with open_scope("stop", commit_on_success=True):
            store.jenny.add(Row(n=2))

    async def view(request: Any) -> PlainTextResponse:
        return PlainTextResponse(str(len((await store.jenny.scalars(select(Row))).all())))

    app = Starlette(routes=[Route("/", view)], lifespan=lifespan)
    app.add_middleware(ASGIRopeMiddleware)
    messages: list[str] = []
    done = asyncio.Event()
    started = asyncio.Event()
    asked = iter(("lifespan.startup", "lifespan.shutdown"))

    async def receive() -> dict[str, Any]:
        kind = next(asked)
        if kind == "lifespan.shutdown":
            await done.wait()
        return {"type": kind}

    async def send(message: Any) -> None:
        messages.append(message["type"])
        started.set()

    running = asyncio.create_task(app({"type": "lifespan", "state": {}}, receive, send))
    await started.wait()
    async with client(app) as browser:
        assert (await browser.get("/")).text == "1"
    done.set()
    await running
    assert messages == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert store.rows() == [1, 2]
    assert store.held() == 0


@pytest.mark.parametrize("commits", [False, True])
async def test_A4_a_background_task_still_has_the_scope(store: Store, commits: bool) -> None:
    """The scope lives until the app's call returns, background work included."""

    seen: list[bool] = []

    async def later(scope: Scope) -> None:
        seen.append(current_scope() is scope and not scope.closed)
        store.jenny.add(Row(n=2))
        await store.jenny.flush()
        if not commits:
            await store.jenny.commit()

    async def view(request: Any) -> PlainTextResponse:
        store.jenny.add(Row(n=1))
        if not commits:
            await store.jenny.commit()
        return PlainTextResponse("x", background=BackgroundTask(later, current_scope()))

    assert (await ask_view(view, commit_on_success=commits)).status_code == 200
    assert seen == [True]
    assert store.rows() == [1, 2]
    assert store.held() == 0


async def test_A4_a_background_task_that_fails_is_rolled_back(store: Store) -> None:
    """Its transaction is the second one; the request's own row stays."""

    async def later() -> None:
        store.jenny.add(Row(n=2))
        await store.jenny.flush()
        raise LookupError

    async def view(request: Any) -> PlainTextResponse:
        store.jenny.add(Row(n=1))
        return PlainTextResponse("x", background=BackgroundTask(later))

    assert (await ask_view(view, commit_on_success=True)).status_code == 200
    assert store.rows() == [1]


async def test_A4_server_sent_events_use_the_scope_chunk_by_chunk(store: Store) -> None:
    """Each event may query; with `commit_on_success` and short scopes none is held between."""

    held: list[int] = []

    async def events() -> AsyncIterator[str]:
        for _ in range(3):
            async with open_scope():
                found = (await store.jenny.scalars(select(Row))).all()
            held.append(store.held())
            yield f"data: {len(found)}\n\n"

    async def view(request: Any) -> StreamingResponse:
        store.jenny.add(Row(n=1))
        return StreamingResponse(events(), media_type="text/event-stream")

    assert (await ask_view(view, commit_on_success=True)).text == "data: 1\n\n" * 3
    assert held == [0, 0, 0]
    assert store.held() == 0


async def test_A4_a_client_that_leaves_a_stream_gives_the_connection_back(store: Store) -> None:
    """Starlette cancels the stream at `http.disconnect`."""

    async def events() -> AsyncIterator[str]:
        while True:
            await store.jenny.execute(text("SELECT 1"))
            yield "data: x\n\n"
            await asyncio.sleep(0)

    async def view(request: Any) -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    app = Starlette()
    app.add_route("/thing", view)
    app.add_middleware(ASGIRopeMiddleware)
    chunks: list[bytes] = []
    enough = asyncio.Event()
    first = True

    async def receive() -> dict[str, Any]:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": b"", "more_body": False}
        await enough.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        chunks.append(message.get("body", b""))
        if len(chunks) > 5:
            enough.set()

    async with asyncio.timeout(PATIENCE):
        with suppress(Exception):
            await app(http_scope(), receive, send)
    assert len(chunks) > 5
    assert store.held() == 0


@pytest.mark.told
@pytest.mark.parametrize("commits", [False, True])
async def test_A4_fastapi_dependencies_share_the_scope(store: Store, commits: bool) -> None:
    """A dependency with `yield`, a sync one in a thread, the view and a background task."""

    scopes: list[Scope] = []

    async def session() -> AsyncIterator[AsyncSession]:
        scopes.append(current_scope())
        yield store.jenny.session
        scopes.append(current_scope())

    def threaded() -> int:
        scopes.append(current_scope())
        return threading.get_ident()

    app = FastAPI()

    @app.get("/{n}")
    async def view(
        n: int, tasks: BackgroundTasks, db: Any = Depends(session), ident: int = Depends(threaded)
    ) -> dict[str, bool]:
        scopes.append(current_scope())
        db.add(Row(n=n))
        await db.flush()
        if n == 13:
            raise HTTPException(418)
        if not commits:
            await db.commit()
        tasks.add_task(lambda: scopes.append(current_scope()))
        return {"same": db is store.jenny.session}

    app.add_middleware(ASGIRopeMiddleware, commit_on_success=commits)
    async with client(app) as browser:
        assert (await browser.get("/1")).json() == {"same": True}
        assert len(scopes) == 5
        assert len({id(scope) for scope in scopes}) == 1
        assert scopes[0].closed
        assert (await browser.get("/13")).status_code == 418
    assert store.rows() == [1]
    assert store.held() == 0


@pytest.mark.parametrize("place", ["above", "below", "both"])
@pytest.mark.parametrize("commits", [False, True])
async def test_A4_base_http_middleware_above_and_below(
    store: Store, place: str, commits: bool
) -> None:
    """Starlette's BaseHTTPMiddleware runs the rest in another task; the scope reaches it."""

    class Header(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            inside = "rope_middleware.scope" in request.scope
            if inside:
                store.jenny.add(Row(n=10 + len(seen)))
            response = await call_next(request)
            response.headers["x-seen"] = "yes"
            if inside:
                assert current_scope() is seen[-1]
            return response

    seen: list[Scope] = []
    below = place != "above"

    async def view(request: Any) -> PlainTextResponse:
        seen.append(current_scope())
        store.jenny.add(Row(n=1))
        await store.jenny.flush()
        if request.url.path == "/error":
            raise LookupError
        if not commits:
            await store.jenny.commit()
        return PlainTextResponse("x")

    ours = Middleware(ASGIRopeMiddleware, commit_on_success=commits)
    theirs = Middleware(Header)
    order = {"above": [theirs, ours], "below": [ours, theirs], "both": [theirs, ours, theirs]}
    app = Starlette(middleware=order[place])
    app.add_route("/", view)
    app.add_route("/error", view)
    async with client(app) as browser:
        answer = await browser.get("/")
        assert (answer.status_code, answer.headers["x-seen"]) == (200, "yes")
        assert store.rows() == ([1, 10] if below else [1])
        assert (await browser.get("/error")).status_code == 500
    assert store.rows() == ([1, 10] if below else [1])
    assert all(scope.closed for scope in seen)
    assert store.held() == 0


async def test_A2_context_variables_of_the_application_are_its_own(store: Store) -> None:
    """What the application sets in its own context is as without the middleware."""
    mine: contextvars.ContextVar[int] = contextvars.ContextVar("mine", default=0)

    async def handler() -> None:
        mine.set(1)
        await store.jenny.execute(text("SELECT 1"))

    await serve(handler)
    assert mine.get() == 1
