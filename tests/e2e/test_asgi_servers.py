"""uvicorn and hypercorn (asyncio, trio) with real clients: whatever happens, nothing is left."""

from __future__ import annotations

import contextlib
import math
import os
import random
import threading
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx
import pytest
from sqlalchemy import Engine, event
from sqlalchemy.orm import sessionmaker
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from rope_middleware import RopeMiddleware, SessionJenny, current_scope
from tests.kit.engines import MakeEngine
from tests.kit.leaks import no_scope_open, nothing_checked_out
from tests.kit.models import Data
from tests.kit.sessions import Jenny, run_threads
from tests.kit.waiting import PATIENCE, eventually
from tests.servers.asgi import SERVERS, ASGIApp, Server, serve, stream_and_leave

SECONDS = 10 * PATIENCE
SEED = int(os.environ.get("ROPE_SEED", "0")) or random.randrange(1, 2**31)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def jenny_of(engine: Engine) -> Jenny:
    return SessionJenny(sessionmaker(engine, expire_on_commit=False))


def app_of(*routes: Route, middleware: Any = ()) -> Starlette:
    return Starlette(routes=list(routes), middleware=[Middleware(RopeMiddleware), *middleware])


def touch(jenny: Jenny) -> int:
    """Begin a transaction and leave it open, as a view does that only reads."""
    data = jenny.session.query(Data).first()
    assert data is not None
    return data.count


def all_at_once(server: Server, path: str, clients: int) -> list[int]:
    """Ask for `path` from as many clients at the same time; return the statuses."""
    statuses: list[int] = []

    async def load() -> None:
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(limits=limits, timeout=SECONDS) as client:

            async def one() -> None:
                statuses.append((await client.get(server.url + path)).status_code)

            async with anyio.create_task_group() as group:
                for _ in range(clients):
                    group.start_soon(one)

    anyio.run(load)
    return statuses


# -- the pool under load (A3) ------------------------------------------------------------------


@pytest.mark.parametrize(("pool_size", "clients"), [(5, 200), (1, 60)])
def test_A3_every_sync_handler_gets_its_turn_at_a_small_pool(
    make_engine: MakeEngine, server: str, pool_size: int, clients: int
) -> None:
    """200 of 200 on a pool of 5 and 60 of 60 on a pool of 1: sessions are left open by handlers.

    Each waiting handler sits in a thread of the shared limiter, so the end of a session must not
    wait for one.
    """
    engine = make_engine(pool_size)
    jenny = jenny_of(engine)

    def view(request: Request) -> Response:
        touch(jenny)
        time.sleep(0.005)
        return PlainTextResponse("done")

    with serve(app_of(Route("/", view)), server) as running:
        statuses = all_at_once(running, "/", clients)
        assert statuses.count(200) == clients
        nothing_checked_out(engine)


def test_A3_every_sync_handler_gets_its_turn_behind_base_http_middleware(
    make_engine: MakeEngine, server: str
) -> None:
    """The same 60 of 60 where Starlette's own middleware runs the app in a task of its own."""
    engine = make_engine(1)
    jenny = jenny_of(engine)

    async def dispatch(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response

    def view(request: Request) -> Response:
        touch(jenny)
        return PlainTextResponse("done")

    wrapped = [Middleware(BaseHTTPMiddleware, dispatch=dispatch)] * 2
    with serve(app_of(Route("/", view), middleware=wrapped), server) as running:
        assert all_at_once(running, "/", 60).count(200) == 60
        nothing_checked_out(engine)


def test_A3_the_event_loop_never_waits_for_the_database(engine: Engine, server: str) -> None:
    """A transaction left open is ended in another thread than the event loop's."""
    jenny = jenny_of(engine)
    loops: set[int] = set()
    ends: list[int] = []

    @event.listens_for(engine, "rollback")
    def _(connection: Any) -> None:
        ends.append(threading.get_ident())

    def view(request: Request) -> Response:
        touch(jenny)
        return PlainTextResponse("done")

    async def async_view(request: Request) -> Response:
        loops.add(threading.get_ident())
        touch(jenny)
        return PlainTextResponse("done")

    app = app_of(Route("/sync", view), Route("/async", async_view))
    with serve(app, server) as running:
        for path in ("/sync", "/async") * 3:
            assert running.get(path).status_code == 200
        eventually(lambda: len(ends) == 6, f"{len(ends)} of 6 transactions have ended")
    assert len(loops) == 1
    assert not loops & set(ends)


# -- clients that go away ----------------------------------------------------------------------


class Endless:
    """A body that never ends, and reads the database for each chunk.

    Not an async generator: Starlette leaves a cancelled one to the garbage collector, which trio
    warns of.
    """

    def __init__(self, jenny: Jenny) -> None:
        self.jenny = jenny
        self.scopes: list[str] = []

    def __aiter__(self) -> Endless:
        return self

    async def __anext__(self) -> bytes:
        if self.scopes:
            # Five at a time have the pool; the others get their turn here.
            await anyio.to_thread.run_sync(self.jenny.session.rollback)
            await anyio.sleep(0.005)
        await anyio.to_thread.run_sync(touch, self.jenny)
        self.scopes.append(current_scope().name)
        return b"chunk " * 50


def test_S3_a_hundred_requests_cancelled_by_their_clients(
    make_engine: MakeEngine, server: str
) -> None:
    """A hundred streams at a time, each left by its client at a moment of its own."""
    engine = make_engine(5)
    jenny = jenny_of(engine)
    rnd = random.Random(SEED)
    print(f"ROPE_SEED={SEED}")

    def client(pause: float, reset: bool, after: bytes) -> None:
        stream_and_leave(running.port, "/", after=after, reset=reset, pause=pause)

    async def view(request: Request) -> Response:
        return StreamingResponse(Endless(jenny))

    with serve(app_of(Route("/", view)), server) as running:
        words = [b"", b"200", b"chunk"]
        told = [(rnd.random() / 5, rnd.random() < 0.5, rnd.choice(words)) for _ in range(100)]
        run_threads([partial(client, *one) for one in told])
        nothing_checked_out(engine)
        no_scope_open()


class TimeLimit:
    """Cancels the app's call at a random moment, before its response or after it.

    Before the response it answers 503. In the middle of it there is no right answer, so nothing
    is cancelled there; after it, it is the end of the scope that is met.
    """

    def __init__(self, app: ASGIApp, rnd: random.Random, at_most: float) -> None:
        self.app, self.rnd, self.at_most = app, rnd, at_most
        self.cancelled = {False: 0, True: 0}  # before, and after the response

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answered = False

        async def watch(message: Any) -> None:
            nonlocal answered
            if not answered:
                await anyio.lowlevel.checkpoint()  # a sync view is not cancelled in its thread
                answered = True
                limit.deadline = math.inf
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                limit.deadline = anyio.current_time() + self.rnd.random() * 0.005

        with anyio.move_on_after(self.rnd.random() * self.at_most) as limit:
            await self.app(scope, receive, watch)
        if limit.cancel_called:
            self.cancelled[answered] += 1
            if not answered:
                await PlainTextResponse("too late", 503)(scope, receive, send)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_S3_a_hundred_requests_cancelled_by_a_time_limit(
    make_engine: MakeEngine, server: str, kind: str
) -> None:
    """The app's call is cancelled at a random moment, also while the scope is ending."""
    engine = make_engine(5)
    jenny = jenny_of(engine)
    print(f"ROPE_SEED={SEED}")

    @event.listens_for(engine, "rollback")
    def _(connection: Any) -> None:
        time.sleep(0.002)  # the end of a session takes a moment: some are cancelled in it

    def view(request: Request) -> Response:
        touch(jenny)
        time.sleep(0.002)
        return PlainTextResponse("done")

    async def async_view(request: Request) -> Response:
        await anyio.to_thread.run_sync(touch, jenny)
        await anyio.sleep(0.002)
        return PlainTextResponse("done")

    app = app_of(Route("/", view if kind == "sync" else async_view))
    limited = TimeLimit(app, random.Random(SEED), at_most=0.1)
    with serve(limited, server) as running:
        statuses: list[int] = []
        for _ in range(50):
            statuses += all_at_once(running, "/", 20)
            if sum(limited.cancelled.values()) >= 100 and min(limited.cancelled.values()) >= 10:
                break
        nothing_checked_out(engine)
        no_scope_open()
        assert sum(limited.cancelled.values()) >= 100, limited.cancelled
        assert min(limited.cancelled.values()) >= 10, limited.cancelled
        assert set(statuses) <= {200, 503}
        limited.at_most = 1e9  # whatever was cancelled, the pool is whole
        assert all_at_once(running, "/", 20) == [200] * 20


# hypercorn's asyncio worker is left out: since Python 3.12 its `server.wait_closed()` waits for
# open connections without any limit.
@pytest.mark.parametrize("server", ["uvicorn", "hypercorn-trio"])
def test_S3_a_server_that_stops_ends_its_streams(engine: Engine, server: str) -> None:
    """Stopping the server under an open stream cancels it and leaves nothing."""
    jenny = jenny_of(engine)
    body = Endless(jenny)

    async def view(request: Request) -> Response:
        return StreamingResponse(body)

    with contextlib.ExitStack() as stack:
        running = stack.enter_context(serve(app_of(Route("/", view)), server, grace=1))
        client = stack.enter_context(httpx.Client(timeout=SECONDS))
        response = stack.enter_context(client.stream("GET", running.url))
        assert response.status_code == 200
        eventually(lambda: body.scopes, "the stream has begun")
        assert set(body.scopes) == {"GET /"}
        running.stop()
        nothing_checked_out(engine)
        no_scope_open()


# -- handlers that raise -----------------------------------------------------------------------


def test_S3_handlers_that_raise_before_and_after_the_response_started(
    engine: Engine, server: str
) -> None:
    """Twenty errors of each kind, mixed with requests that succeed, leave a pool of 5 whole."""
    jenny = jenny_of(engine)

    def before(request: Request) -> Response:
        touch(jenny)
        raise ValueError("before the response")

    async def broken() -> AsyncIterator[bytes]:
        touch(jenny)
        yield b"chunk"
        raise ValueError("after the response started")

    async def after(request: Request) -> Response:
        return StreamingResponse(broken())

    def background(request: Request) -> Response:
        from starlette.background import BackgroundTask

        def task() -> None:
            touch(jenny)
            raise ValueError("after the response")

        return PlainTextResponse("done", background=BackgroundTask(task))

    def fine(request: Request) -> Response:
        return PlainTextResponse(str(touch(jenny)))

    app = app_of(
        Route("/before", before),
        Route("/after", after),
        Route("/background", background),
        Route("/fine", fine),
    )
    with serve(app, server) as running:
        for _ in range(20):
            assert running.get("/before").status_code == 500
            with pytest.raises(httpx.RemoteProtocolError):
                running.get("/after")
            # What the task raises goes to the server, which may drop the connection.
            with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
                assert running.get("/background").status_code == 200
            assert running.get("/fine").text == "0"
        nothing_checked_out(engine)
        no_scope_open()


# -- what is no request ------------------------------------------------------------------------


def test_A1_lifespan_passes_through_untouched(engine: Engine, server: str) -> None:
    """Startup and shutdown run, without a scope; their state reaches the requests."""
    seen: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, str]]:
        try:
            current_scope()
        except LookupError as error:
            seen.append(type(error).__name__)
        yield {"greeting": "hello"}
        seen.append("shutdown")

    async def view(request: Request) -> Response:
        return PlainTextResponse(request.state.greeting)

    app = RopeMiddleware(Starlette(routes=[Route("/", view)], lifespan=lifespan))
    with serve(app, server) as running:
        assert running.get().text == "hello"
    assert seen == ["NoScopeError", "shutdown"]


def test_A1_an_app_without_lifespan_is_served(engine: Engine, server: str) -> None:
    """A bare ASGI function that refuses lifespan works, recognised as ASGI 3 by the server."""
    jenny = jenny_of(engine)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        await anyio.to_thread.run_sync(touch, jenny)
        await PlainTextResponse(current_scope().name)(scope, receive, send)

    with serve(RopeMiddleware(app), server) as running:
        assert running.get("/a/b?c=d").text == "GET /a/b"
        nothing_checked_out(engine)


# -- scopes side by side -----------------------------------------------------------------------
