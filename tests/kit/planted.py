"""Holders of connections, planted on lines that are known: one for each way to hold one.

Each function opens what it opens, begins a transaction on the line with its own name in a comment,
calls `ready` and holds the connection until `leave` is set. Its kind is its name.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from rope_middleware import RopeMiddleware, open_scope
from tests.kit.asgi import http_scope, into_nothing
from tests.kit.sessions import SELECT
from tests.kit.waiting import never
from tests.kit.wsgi import make_environ

FILE = Path(__file__)
_LINES = {
    line.rpartition("# begun by ")[2]: f"{FILE.name}:{number}"
    for number, line in enumerate(FILE.read_text().splitlines(), 1)
    if "# begun by " in line and "rpartition" not in line and " in line" not in line
}


def line_of(kind: str) -> str:
    """Return the line where a holder of that kind begins its transaction."""
    return _LINES[kind]


class Sync:
    """Holds connections of a `SessionJenny`; each method blocks until `leave` is set."""

    def __init__(self, jenny: Any, ready: Callable[[], object], leave: threading.Event) -> None:
        self.jenny = jenny
        self.ready = ready
        self.leave = leave

    def kinds(self) -> dict[str, Callable[[], None]]:
        return {name: getattr(self, name) for name in _LINES if not name.startswith("async")}

    def _hold(self) -> None:
        self.ready()
        assert self.leave.wait(60)

    def block(self) -> None:
        with open_scope("block"):
            self.jenny.session.execute(SELECT)  # begun by block
            self._hold()

    def rope(self) -> None:
        self.jenny.session.execute(SELECT)  # begun by rope
        self._hold()

    def proxied(self) -> None:
        with open_scope("proxied"):
            self.jenny.execute(SELECT)  # begun by proxied
            self._hold()

    def connection(self) -> None:
        with open_scope("connection"):
            self.jenny.connection()  # begun by connection
            self._hold()

    def by_begin(self) -> None:
        with open_scope("by_begin"), self.jenny.begin():  # begun by by_begin
            self.jenny.session.connection()
            self._hold()

    def wsgi(self) -> None:
        def app(environ: Any, start_response: Any) -> list[bytes]:
            self.jenny.session.execute(SELECT)  # begun by wsgi
            self._hold()
            start_response("200 OK", [])
            return [b""]

        list(RopeMiddleware(app)(make_environ("/wsgi"), lambda *_: print))

    def wsgi_stream(self) -> None:
        def app(environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("200 OK", [])
            self.jenny.session.execute(SELECT)  # begun by wsgi_stream
            yield b"first"
            self._hold()

        body: Any = RopeMiddleware(app)(make_environ("/wsgi_stream"), lambda *_: print)
        try:
            list(body)
        finally:
            body.close()

    def handler_in_thread(self) -> None:
        def handler() -> None:
            self.jenny.session.execute(SELECT)  # begun by handler_in_thread
            self._hold()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await anyio.to_thread.run_sync(handler)

        asyncio.run(RopeMiddleware(app)(http_scope("/handler"), never, into_nothing))

    def thread_of_request(self) -> None:
        def work() -> None:
            with open_scope("thread_of_request"):
                self.jenny.session.execute(SELECT)  # begun by thread_of_request
                self._hold()

        thread = threading.Thread(target=work)
        with open_scope("starts a thread"):
            thread.start()
            thread.join()

    def job(self) -> None:
        @open_scope()
        def work() -> None:
            self.jenny.session.execute(SELECT)  # begun by job
            self._hold()

        work()

    def background_in_thread(self) -> None:
        def work() -> None:
            self.jenny.session.execute(SELECT)  # begun by background_in_thread
            self._hold()

        async def handler(request: Any) -> PlainTextResponse:
            return PlainTextResponse("done", background=BackgroundTask(work))

        app = RopeMiddleware(Starlette(routes=[Route("/background", handler)]))
        asyncio.run(app(http_scope("/background"), never, into_nothing))


class Async:
    """Holds connections of an `AsyncSessionJenny`; each method goes on until it is cancelled."""

    def __init__(self, jenny: Any, ready: Callable[[], object]) -> None:
        self.jenny = jenny
        self.ready = ready
        self.app = RopeMiddleware(
            Starlette(
                routes=[
                    Route("/handler", self._handler),
                    Route("/stream", self._stream),
                    Route("/background", self._background),
                    WebSocketRoute("/socket", self._socket),
                ]
            )
        )

    def kinds(self) -> dict[str, Callable[[], Any]]:
        return {name: getattr(self, name) for name in _LINES if name.startswith("async")}

    async def _hold(self) -> None:
        self.ready()
        await never()

    async def async_block(self) -> None:
        async with open_scope("async block"):
            await self.jenny.session.execute(SELECT)  # begun by async_block
            await self._hold()

    async def async_proxied(self) -> None:
        async with open_scope("async proxied"):
            await self.jenny.scalar(SELECT)  # begun by async_proxied
            await self._hold()

    async def async_task(self) -> None:
        @open_scope()
        async def work() -> None:
            await self.jenny.session.execute(SELECT)  # begun by async_task
            await self._hold()

        await asyncio.gather(work())

    async def _handler(self, request: Any) -> PlainTextResponse:
        await self.jenny.session.execute(SELECT)  # begun by async_handler
        await self._hold()
        return PlainTextResponse("never")

    async def async_handler(self) -> None:
        await self.app(http_scope("/handler"), never, into_nothing)

    async def _stream(self, request: Any) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            await self.jenny.session.execute(SELECT)  # begun by async_stream
            yield b"first"
            await self._hold()

        return StreamingResponse(body())

    async def async_stream(self) -> None:
        await self.app(http_scope("/stream"), never, into_nothing)

    async def _background(self, request: Any) -> PlainTextResponse:
        async def work() -> None:
            await self.jenny.session.execute(SELECT)  # begun by async_background
            await self._hold()

        return PlainTextResponse("done", background=BackgroundTask(work))

    async def async_background(self) -> None:
        await self.app(http_scope("/background"), never, into_nothing)

    async def _socket(self, socket: WebSocket) -> None:
        await socket.accept()
        await self.jenny.session.execute(SELECT)  # begun by async_socket
        await self._hold()

    async def async_socket(self) -> None:
        scope = {
            "type": "websocket",
            "asgi": {"version": "3.0"},
            "path": "/socket",
            "query_string": b"",
            "headers": [],
            "subprotocols": [],
        }
        told = [{"type": "websocket.connect"}]

        async def receive() -> Any:
            return told.pop() if told else await never()

        await self.app(scope, receive, into_nothing)


async def cancelled(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel the tasks and wait until they are done."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task
