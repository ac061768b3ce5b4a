"""Each way to open a scope around sync code: a function that calls `body` in a new scope.

``way(body, **options of open_scope)`` returns what `body` returns, and raises what it raises. The
sessions of sync code in an async scope are ended in a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread

from rope_middleware import ASGIRopeMiddleware, WSGIRopeMiddleware, open_scope
from tests.kit.asgi import ASGIClient, answer
from tests.kit.wsgi import Server, make_environ

Way = Callable[..., Any]


def by_with(body: Callable[[], Any], **options: Any) -> Any:
    with open_scope(**options):
        return body()


def by_decorator(body: Callable[[], Any], **options: Any) -> Any:
    return open_scope(**options)(lambda: body())()


def by_async_with(body: Callable[[], Any], **options: Any) -> Any:
    async def main() -> Any:
        async with open_scope(**options):
            return body()

    return anyio.run(main)


def by_async_with_on_trio(body: Callable[[], Any], **options: Any) -> Any:
    async def main() -> Any:
        async with open_scope(**options):
            return await anyio.to_thread.run_sync(body)

    return anyio.run(main, backend="trio")


def by_async_decorator(body: Callable[[], Any], **options: Any) -> Any:
    @open_scope(**options)
    async def main() -> Any:
        return body()

    return anyio.run(main)


def by_wsgi_request(body: Callable[[], Any], name: str = "", **options: Any) -> Any:
    found = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        found.append(body())
        start_response("200 OK", [])
        return [b""]

    seen = Server()(WSGIRopeMiddleware(app, **options), make_environ(f"/{name}"))
    if seen.raised is not None:
        raise seen.raised
    assert seen.starts[-1][0] == "200 OK"
    return found[0]


def by_asgi_request(
    body: Callable[[], Any], name: str = "", *, backend: str | None = None, **options: Any
) -> Any:
    found, client = [], ASGIClient()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        # Frameworks run a plain function in a thread.
        found.append(await anyio.to_thread.run_sync(body) if backend else body())
        await answer(send)

    anyio.run(client, ASGIRopeMiddleware(app, **options), f"/{name}", backend=backend or "asyncio")
    assert client.status == 200
    return found[0]


def by_asgi_request_in_thread(body: Callable[[], Any], **options: Any) -> Any:
    return by_asgi_request(body, backend="asyncio", **options)


def by_asgi_request_on_trio(body: Callable[[], Any], **options: Any) -> Any:
    return by_asgi_request(body, backend="trio", **options)


BLOCKS = [by_with, by_decorator, by_async_with, by_async_with_on_trio, by_async_decorator]
WAYS = [*BLOCKS, by_wsgi_request, by_asgi_request]
REQUESTS = [by_wsgi_request, by_asgi_request_in_thread, by_asgi_request_on_trio]
