"""C2, C10: is a `begin()` block in a generator a body's or a dependency's? In each framework."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from inspect import isawaitable
from pathlib import Path
from typing import Any

import litestar
import pytest
from litestar.di import NamedDependency, Provide
from sqlalchemy import make_url
from starlette.middleware.base import BaseHTTPMiddleware

from rope_middleware import RopeMiddleware
from tests.kit import django
from tests.kit.asgi import ASGIClient
from tests.kit.either import Either
from tests.kit.engines import create_tables, is_async_driver
from tests.kit.frameworks import FRAMEWORKS, View
from tests.kit.models import Row
from tests.kit.waiting import poll

pytestmark = pytest.mark.anyio

POOL = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 5}
DRIVERS = ["sqlite", "sqlite+aiosqlite"]


@asynccontextmanager
async def either_of(folder: Path, driver: str) -> AsyncIterator[Either]:
    create_tables(folder / "x.db")
    url = make_url(f"{driver}:///{folder / 'x.db'}")
    async with Either([url], is_async=is_async_driver(url), engine=POOL) as either:
        yield either


async def add(session: Any) -> None:
    session.add(Row(n=1))
    flushed = session.flush()
    if isawaitable(flushed):
        await flushed


async def seen_by_a_client(app: Any, either: Either) -> list[int]:
    """Send a request to `app`; return the rows that are there when its response starts."""
    seen: list[int] = []

    async def looking(scope: Any, receive: Any, send: Any) -> None:
        async def look_and_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                seen.extend(await either.rows())
            await send(message)

        await RopeMiddleware(app, commit_on_success=True)(scope, receive, look_and_send)

    client = await ASGIClient()(looking, "/view")
    assert client.status == 200
    return seen


# -- bodies ----------------------------------------------------------------------------------------


def a_django(view: View) -> Any:
    from django.core.handlers.asgi import ASGIHandler
    from django.http import StreamingHttpResponse

    async def stream(_: Any, route: str) -> Any:
        return StreamingHttpResponse(await view(route, ""))

    django.serve("<route>", stream)
    return ASGIHandler()


def late(app: Any, has_begun: Callable[[], bool]) -> Any:
    """Hand the response's start on only when its body has begun."""

    async def dispatch(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        await poll(has_begun)
        return response

    return BaseHTTPMiddleware(app, dispatch)


@pytest.mark.parametrize(
    ("name", "driver"),
    [
        ("django", "sqlite+aiosqlite"),  # it reads a sync body to its end before the start
        *((name, "sqlite+aiosqlite") for name, it in FRAMEWORKS.items() if it.protocol == "asgi"),
        *((name, "sqlite") for name in ("fastapi", "litestar", "quart", "starlette")),
    ],
)
async def test_C10_a_block_of_a_streamed_body_is_the_bodys_own_in_each_framework(
    tmp_path: Path, name: str, driver: str
) -> None:
    """The commit meets its middle, and leaves it alone: none of its rows is there yet."""
    began: list[bool] = []

    def body() -> Iterator[bytes]:
        with either.jenny.session.begin():
            either.jenny.add(Row(n=1))
            either.jenny.flush()
            began.append(True)
            yield b"a"
            either.jenny.add(Row(n=2))
        yield b"b"

    async def async_body() -> AsyncIterator[bytes]:
        async with either.jenny.session.begin():
            either.jenny.add(Row(n=1))
            await either.jenny.flush()
            began.append(True)
            yield b"a"
            either.jenny.add(Row(n=2))
        yield b"b"

    async def view(route: str) -> Any:
        return async_body() if either.is_async else body()

    async with either_of(tmp_path, driver) as either:
        app = a_django(View(view)) if name == "django" else FRAMEWORKS[name].bare(View(view))
        app = late(app, lambda: bool(began))
        assert await seen_by_a_client(app, either) == []
        assert await either.rows() == [1, 2]


def fastapis_endpoint(body: Callable[[], AsyncIterator[str]]) -> Any:
    from fastapi import FastAPI

    app = FastAPI()
    app.get("/view")(body)
    return app


def responders_events(body: Callable[[], AsyncIterator[str]]) -> Any:
    import responder

    api = responder.API(secret_key="of this test's own")

    @api.route("/view")
    async def view(req: Any, resp: Any) -> None:
        resp.sse(body)

    return api


@pytest.mark.parametrize("make", [fastapis_endpoint, responders_events])
async def test_C10_a_block_of_a_generator_that_the_framework_reads_itself(
    tmp_path: Path, make: Callable[..., Any]
) -> None:
    """FastAPI's endpoints that yield, and Responder's server-sent events."""
    began: list[bool] = []

    async def body() -> AsyncIterator[str]:
        async with either.jenny.session.begin():
            either.jenny.add(Row(n=1))
            await either.jenny.flush()
            began.append(True)
            yield "a"
            either.jenny.add(Row(n=2))
        yield "b"

    async with either_of(tmp_path, "sqlite+aiosqlite") as either:
        assert await seen_by_a_client(late(make(body), lambda: bool(began)), either) == []
        assert await either.rows() == [1, 2]


# -- dependencies ----------------------------------------------------------------------------------


def of_fastapi(dependency: Any) -> Any:
    from fastapi import Depends, FastAPI

    app = FastAPI()

    @app.get("/view")
    async def view(session: Any = Depends(dependency)) -> None:
        await add(session)

    return app


def of_litestar(dependency: Any) -> Any:
    @litestar.get("/view", dependencies={"session": Provide(dependency)})
    async def view(session: NamedDependency[Any]) -> None:
        await add(session)

    return litestar.Litestar([view], openapi_config=None)


def of_responder(dependency: Any) -> Any:
    import responder

    api = responder.API(secret_key="of this test's own")

    given = responder.Depends(dependency)

    @api.route("/view")
    async def view(req: Any, resp: Any, *, session: Any = given) -> None:
        await add(session)

    return api


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("make", [of_fastapi, of_litestar, of_responder])
async def test_C2_a_block_of_a_dependency_is_committed_before_the_start_in_each_framework(
    tmp_path: Path, make: Callable[[Any], Any], driver: str
) -> None:
    """Nobody sees a success without its row."""

    def dependency() -> Iterator[Any]:
        session = either.jenny()
        with session.begin():
            yield session

    async def async_dependency() -> AsyncIterator[Any]:
        session = either.jenny()
        async with session.begin():
            yield session

    async with either_of(tmp_path, driver) as either:
        app = make(async_dependency if either.is_async else dependency)
        assert await seen_by_a_client(app, either) == [1]
        assert await either.rows() == [1]
