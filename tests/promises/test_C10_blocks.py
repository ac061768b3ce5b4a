"""C2, C10: `begin()` blocks that the commit before the response's start finds open."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from inspect import isawaitable
from typing import Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from flask import Flask
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import async_scoped_session
from sqlalchemy.orm import scoped_session, sessionmaker
from starlette.responses import StreamingResponse

from rope_middleware import RopeMiddleware, SessionJenny, current_scope
from tests.kit.asgi import ASGIClient
from tests.kit.either import Either
from tests.kit.engines import is_async_driver, rows, small_engine
from tests.kit.models import Row
from tests.kit.stacks import Passing
from tests.kit.wsgi import serve_wsgi

pytestmark = pytest.mark.anyio

POOL = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 5}


def body_of(jenny: Any, begin: str, fails: bool) -> Iterator[bytes]:
    with getattr(jenny.session, begin)():
        jenny.add(Row(n=1))
        jenny.flush()
        yield b"a"
        jenny.add(Row(n=2))
        jenny.flush()
        yield b"b"
        if fails:
            raise LookupError
    yield b"c"


async def async_body_of(jenny: Any, begin: str, fails: bool) -> AsyncIterator[bytes]:
    async with getattr(jenny.session, begin)():
        jenny.add(Row(n=1))
        await jenny.flush()
        yield b"a"
        jenny.add(Row(n=2))
        await jenny.flush()
        yield b"b"
        if fails:
            raise LookupError
    yield b"c"


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("begin", "status"), [("begin", 200), ("begin", 404), ("begin_nested", 200)]
)
async def test_C10_a_block_of_a_streamed_body_is_the_bodys_own(
    driver_url: URL, begin: str, fails: bool, status: int
) -> None:
    """The commit meets its middle, and leaves it alone: all of its rows are there, or none."""
    is_async = is_async_driver(driver_url)
    async with Either([driver_url], is_async=is_async, engine=POOL) as either:
        app = FastAPI()

        @app.get("/")
        async def view() -> StreamingResponse:
            return StreamingResponse(
                (async_body_of if is_async else body_of)(either.jenny, begin, fails), status
            )

        app.add_middleware(Passing)
        client, error = ASGIClient(), None
        try:
            await client(RopeMiddleware(app, commit_on_success=True), "/")
        except LookupError as raised:
            error = raised
        assert (client.body, error is None) == ((b"ab", False) if fails else (b"abc", True))
        assert await either.rows() == ([] if fails else [1, 2])


class Wrapped:
    """A body of the application's own, and no generator."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self.chunks)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("wrap", [iter, Wrapped])
def test_C10_a_block_of_a_wsgi_body_is_the_bodys_own(tmp_path: Any, wrap: Any, fails: bool) -> None:
    """Its first chunk is made before the commit."""
    engine = small_engine(tmp_path / "x.db")
    jenny = SessionJenny(sessionmaker(engine))
    app = Flask(__name__)

    @app.get("/")
    def view() -> Any:
        return app.response_class(wrap(body_of(jenny, "begin", fails)))

    if fails:
        with pytest.raises(LookupError):
            serve_wsgi(app.wsgi_app, commit_on_success=True)
    else:
        assert b"".join(serve_wsgi(app.wsgi_app, commit_on_success=True)) == b"abc"
    assert rows(engine) == (0 if fails else 2)
    engine.dispose()


def app_with_block(either: Either, way: str, status: int = 200, jenny: Any = None) -> FastAPI:
    """Make an application whose dependency has a block around all that the view does."""
    scoped = jenny or either.jenny

    async def in_block() -> AsyncIterator[Any]:
        session = scoped()
        async with session.begin():
            yield session

    def in_sync_block() -> Iterator[Any]:
        session = scoped()
        with session.begin():
            yield session

    async def later(session: Any) -> None:
        session.add(Row(n=2))
        flushed = session.flush()
        if isawaitable(flushed):
            await flushed

    async def body(session: Any) -> AsyncIterator[bytes]:
        await later(session)
        yield b"x"

    app = FastAPI()

    @app.get("/", status_code=status)
    async def view(
        tasks: BackgroundTasks,
        session: Any = Depends(in_block if either.is_async else in_sync_block),
    ) -> Any:
        session.add(Row(n=1))
        if way == "stream":
            return StreamingResponse(body(session), status)
        tasks.add_task(later, session)
        return None

    return app


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("way", ["stream", "background"])
async def test_C2_a_block_around_the_response_goes_on_after_the_commit(
    driver_url: URL, way: str, between: bool
) -> None:
    """``with session.begin(): yield session``, a dependency: what comes later is committed, too."""
    async with Either([driver_url], is_async=is_async_driver(driver_url), engine=POOL) as either:
        at_start: list[int] = []
        app = app_with_block(either, way)
        if between:
            app.add_middleware(Passing)

        async def outermost(scope: Any, receive: Any, send: Any) -> None:
            async def looking(message: Any) -> None:
                if message["type"] == "http.response.start":
                    at_start.extend(await either.rows())
                await send(message)

            await RopeMiddleware(app, commit_on_success=True)(scope, receive, looking)

        client = ASGIClient()
        await client(outermost, "/")
        assert client.status == 200
        assert 1 in at_start
        assert await either.rows() == [1, 2]


def plain_of(either: Either) -> Any:
    """Return a plain (async_)scoped_session, as `registries=` takes them."""
    kind: Any = async_scoped_session if either.is_async else scoped_session
    return kind(either.jenny.session_factory, scopefunc=current_scope)


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("way", ["stream", "background"])
async def test_C2_a_block_around_a_refused_response_goes_on_and_commits_nothing(
    driver_url: URL, way: str, is_plain: bool
) -> None:
    """A 404: the response is as without us, and no row is there; of `registries=`, too."""
    async with Either([driver_url], is_async=is_async_driver(driver_url), engine=POOL) as either:
        client = ASGIClient()
        plain = [plain_of(either)] if is_plain else []
        app = app_with_block(either, way, 404, *plain)
        await client(RopeMiddleware(app, plain, commit_on_success=True), "/")
        assert client.status == 404
        assert client.body == (b"x" if way == "stream" else b"null")
        assert await either.rows() == []


async def test_C10_a_plain_session_that_a_body_is_flushing(driver_url: URL) -> None:
    """The body has made it (`registries=`), and its flush waits for a connection meanwhile."""
    async with Either([driver_url], is_async=is_async_driver(driver_url), engine=POOL) as either:
        plain = plain_of(either)

        async def body() -> AsyncIterator[bytes]:
            plain().add(Row(n=1))
            flushed = plain().flush()
            if isawaitable(flushed):
                await flushed
            yield b"x"

        app, client = FastAPI(), ASGIClient()

        @app.get("/")
        async def view() -> StreamingResponse:
            return StreamingResponse(body())

        app.add_middleware(Passing)
        await client(RopeMiddleware(app, [plain], commit_on_success=True), "/")
        assert (client.status, client.body) == (200, b"x")
        assert await either.rows() == [1]
