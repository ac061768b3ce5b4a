"""One handler, served in three ways.

A handler is written once, as a coroutine function, and is served under ASGI with an `AsyncSession`,
under ASGI with a `Session`, and under WSGI with a `Session`. The client's side of each protocol is
played here to the letter, so that a test can look at the database at the very moment when a status
becomes visible.
"""

from __future__ import annotations

import asyncio
import gc
import io
import threading
import types
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rope_middleware import ASGIRopeMiddleware, WSGIRopeMiddleware
from tests.kit.asgi import http_scope
from tests.kit.stores import Store, connections_at_work
from tests.kit.waiting import PATIENCE, never, poll
from tests.kit.wsgi import make_environ

KINDS = ["asgi-async", "asgi-sync", "wsgi"]


@types.coroutine
def _hand_out(chunk: bytes) -> Generator[bytes, None, None]:
    yield chunk


@dataclass
class Exchange:
    """What a handler gets: the request's body, and the way to answer."""

    _start: Callable[[int, list[tuple[str, str]]], Awaitable[None]]
    _chunk: Callable[[bytes], Awaitable[None]]
    _body: Callable[[], Awaitable[bytes]]
    carrier: dict[str, Any]

    async def start(self, status: int, *headers: tuple[str, str]) -> None:
        await self._start(status, [("content-type", "text/plain"), *headers])

    async def chunk(self, data: bytes) -> None:
        await self._chunk(data)

    async def answer(self, status: int, data: bytes = b"x", *headers: tuple[str, str]) -> None:
        await self.start(status, *headers)
        await self.chunk(data)

    async def body(self) -> bytes:
        return await self._body()


@dataclass
class Answer:
    """What the client sees, as far as the server can tell from what the application did."""

    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    complete: bool = False
    error: BaseException | None = None

    @property
    def seen(self) -> int:
        """The status on the wire: a server answers 500 for an app that raises before it starts."""
        return self.status or (500 if self.error is not None else 0)

    @property
    def whole(self) -> bool:
        """Is it one complete response? The server's own always is."""
        return self.complete or (not self.status and self.error is not None)


Handler = Any  # async def handler(exchange: Exchange) -> None


class Web:
    """One of the ways to serve a handler."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        self.wsgi = kind == "wsgi"
        self.loop = asyncio.Runner()
        self.before = set(threading.enumerate())
        self.store = Store(path, is_async=kind == "asgi-async", patience=0.05)

    def other_store(self, path: Path) -> Store:
        return Store(path, is_async=self.store.is_async, patience=0.05)

    def close(self) -> None:
        self.loop.run(self.store.dispose())
        if connections_at_work(self.before):
            gc.collect()  # ends those that were cut off
            self.loop.run(poll(lambda: not connections_at_work(self.before)))
        self.loop.close()

    def ask(
        self,
        handler: Handler,
        *,
        method: str = "GET",
        path: str = "/thing",
        body: Iterable[bytes] = (b"",),
        at_start: Callable[[int], object] = lambda status: None,
        lazily: bool = False,
        **options: Any,
    ) -> Answer:
        """Send one request to `handler` behind the middleware and return what was seen.

        `at_start` is called when the status can go out on the wire; `lazily` makes a WSGI app do
        all of its work in its generator.
        """
        if self.wsgi:
            return self._ask_wsgi(handler, method, path, b"".join(body), at_start, lazily, options)
        return self.loop.run(
            asyncio.wait_for(
                self._ask_asgi(handler, method, path, list(body), at_start, options), PATIENCE
            )
        )

    async def _ask_asgi(
        self,
        handler: Handler,
        method: str,
        path: str,
        body: list[bytes],
        at_start: Callable[[int], object],
        options: dict[str, Any],
    ) -> Answer:
        async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
            async def start(status: int, headers: list[tuple[str, str]]) -> None:
                raw = [(name.encode(), value.encode()) for name, value in headers]
                await send({"type": "http.response.start", "status": status, "headers": raw})

            async def chunk(data: bytes) -> None:
                await send({"type": "http.response.body", "body": data, "more_body": True})

            async def read() -> bytes:
                found, more = b"", True
                while more:
                    message = await receive()
                    assert message["type"] == "http.request", message
                    found += message.get("body", b"")
                    more = message.get("more_body", False)
                return found

            await handler(Exchange(start, chunk, read, scope))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        answer = Answer()
        pieces = [
            {"type": "http.request", "body": piece, "more_body": number < len(body)}
            for number, piece in enumerate(body, 1)
        ]

        async def receive() -> dict[str, Any]:
            if pieces:
                return pieces.pop(0)
            return await never()  # the client stays

        async def send(message: dict[str, Any]) -> None:
            assert not answer.complete, f"after the end of the response: {message}"
            if message["type"] == "http.response.start":
                assert not answer.status, "a second response"
                answer.status = message["status"]
                answer.headers = [
                    (name.decode(), value.decode()) for name, value in message["headers"]
                ]
                at_start(answer.status)
            else:
                assert message["type"] == "http.response.body", message
                assert answer.status, "a body without a start"
                answer.body += message.get("body", b"")
                answer.complete = not message.get("more_body", False)

        wrapped = ASGIRopeMiddleware(app, **options)
        try:
            await wrapped(http_scope(path, method), receive, send)
        except Exception as error:
            answer.error = error
        return answer

    def _ask_wsgi(
        self,
        handler: Handler,
        method: str,
        path: str,
        body: bytes,
        at_start: Callable[[int], object],
        lazily: bool,
        options: dict[str, Any],
    ) -> Answer:
        def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            async def start(status: int, headers: list[tuple[str, str]]) -> None:
                start_response(f"{status} Status", headers)

            async def chunk(data: bytes) -> None:
                await _hand_out(data)

            async def read() -> bytes:
                data: bytes = environ["wsgi.input"].read()
                return data

            running = handler(Exchange(start, chunk, read, environ))

            def rest() -> Iterator[bytes]:
                try:
                    while True:
                        try:
                            piece = running.send(None)
                        except StopIteration:
                            return
                        yield piece
                finally:
                    running.close()

            pieces = rest()
            if lazily:
                return pieces
            first = next(pieces, b"")

            def whole() -> Iterator[bytes]:
                try:
                    yield first
                    yield from pieces
                finally:
                    pieces.close()  # type: ignore[attr-defined]

            return whole()

        answer = Answer()
        told: list[tuple[str, list[tuple[str, str]]]] = []
        sent = False

        def start_response(
            status: str, headers: list[tuple[str, str]], exc_info: Any = None
        ) -> Callable[[bytes], object]:
            if exc_info is not None and sent:
                raise exc_info[1].with_traceback(exc_info[2])
            assert exc_info is not None or not told, "a second response"
            told[:] = [(status, list(headers))]
            return write

        def write(data: bytes) -> None:
            nonlocal sent
            assert told, "a body without a start"
            if data and not sent:
                sent = True
                answer.status, answer.headers = int(told[0][0].split()[0]), told[0][1]
                at_start(answer.status)
            answer.body += data

        wrapped = WSGIRopeMiddleware(app, **options)
        environ = make_environ(
            path,
            REQUEST_METHOD=method,
            QUERY_STRING="secret=1",
            CONTENT_LENGTH=str(len(body)),
            **{"wsgi.input": io.BytesIO(body)},
        )
        pieces: Any = None
        try:
            try:
                pieces = wrapped(environ, start_response)
                for piece in pieces:
                    write(piece)
                if not sent and told:
                    sent = True
                    answer.status, answer.headers = int(told[0][0].split()[0]), told[0][1]
                    at_start(answer.status)
                answer.complete = True
            finally:
                if hasattr(pieces, "close"):
                    pieces.close()
        except Exception as error:
            answer.error = error
        return answer
