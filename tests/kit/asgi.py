"""The server's side of ASGI, played in process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from rope_middleware import ASGIRopeMiddleware
from tests.kit.waiting import never


def http_scope(path: str = "/thing", method: str = "GET", **extra: Any) -> dict[str, Any]:
    """Return the scope of a request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"secret=1",
        "headers": [(b"host", b"testserver")],
        "client": ("127.0.0.1", 5),
        "server": ("testserver", 80),
        **extra,
    }


def websocket_scope() -> dict[str, Any]:
    """Return the scope of a connection."""
    return {
        "type": "websocket",
        "asgi": {"version": "3.0"},
        "path": "/ws",
        "query_string": b"",
        "headers": [],
        "subprotocols": [],
    }


async def into_nothing(message: Any) -> None: ...


async def answer(send: Any, status: int = 200, body: bytes = b"") -> None:
    """Send a whole response."""
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


def asgi_app(handler: Callable[[], Any]) -> Any:
    """Make an application that is nothing but `handler`, a function of either kind."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found = handler()
        if isinstance(found, Awaitable):
            await found
        await answer(send)

    return app


async def ask(app: Any, statuses: list[int] | None = None) -> None:
    """Send one request to `app`; what its responses start with goes to `statuses`."""

    async def send(message: Any) -> None:
        if statuses is not None and "status" in message:
            statuses.append(message["status"])

    await app(http_scope(), never, send)


async def serve(handler: Callable[[], Any], **options: Any) -> None:
    """Send one request to an app that is nothing but `handler` behind the middleware."""
    await ask(ASGIRopeMiddleware(asgi_app(handler), **options))


def client(app: Any) -> httpx.AsyncClient:
    """Return a client of `app` that sees errors as a browser does."""
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test"
    )


class ASGIClient:
    """One request to an ASGI app, without a server.

    Args:
        reads: how many chunks of the body the client reads before it stands still; None for all.
    """

    def __init__(self, reads: int | None = None) -> None:
        self.reads = reads
        self.messages: list[Any] = []

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def headers(self) -> list[tuple[str, str]]:
        return [(name.decode(), value.decode()) for name, value in self.messages[0]["headers"]]

    async def __call__(self, app: Any, path: str, method: str = "GET", **extra: Any) -> ASGIClient:
        first = [{"type": "http.request", "body": b"", "more_body": False}]
        answered = asyncio.Event()

        async def receive() -> Any:
            if first:
                return first.pop()
            # https://asgi.readthedocs.io/en/latest/specs/www.html#disconnect-receive-event
            await answered.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if self.reads is not None and len(self.messages) > self.reads:
                await asyncio.Future()  # as a server waits for a socket that nobody reads
            is_second = "status" in message and any("status" in one for one in self.messages)
            assert not is_second, "a second response"
            self.messages.append(message)
            if "status" not in message and not message.get("more_body"):
                answered.set()

        asgi = {"version": "3.0", "spec_version": "2.4"}
        await app(http_scope(path, method, **{"asgi": asgi, **extra}), receive, send)
        return self
