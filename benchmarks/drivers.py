"""Servers without a socket: they call the application as a server would, many times over."""

import io
from collections.abc import Awaitable, Callable
from itertools import repeat
from time import perf_counter
from typing import Any
from wsgiref.util import setup_testing_defaults

Clock = Callable[[], float]
Lane = Callable[[int], Awaitable[float]]

# As servers make them; each request gets a copy.
SCOPE: dict[str, Any] = {
    "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
    "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 50000), "scheme": "http",
    "method": "GET", "root_path": "", "path": "/", "raw_path": b"/", "query_string": b"",
    "headers": [(b"host", b"127.0.0.1:8000"), (b"accept", b"*/*")],
}  # fmt: skip
ENVIRON: dict[str, Any] = {"QUERY_STRING": "", "HTTP_ACCEPT": "*/*"}
setup_testing_defaults(ENVIRON)


async def receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(message: dict[str, Any]) -> None:
    """Take a message from the app and drop it."""


def start_response(status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], Any]:
    """Take the status and drop it."""
    return io.BytesIO().write


def wsgi_lane(app: Any, path: str = "/", clock: Clock = perf_counter) -> Lane:
    environ = ENVIRON | {"PATH_INFO": path}

    async def lane(requests: int) -> float:
        started = clock()
        for _ in repeat(None, requests):
            body = app(environ.copy(), start_response)
            try:
                for _ in body:
                    pass
            finally:
                close = getattr(body, "close", None)
                if close is not None:
                    close()
        return clock() - started

    return lane


def asgi_lane(app: Any, path: str = "/", clock: Clock = perf_counter) -> Lane:
    scope = SCOPE | {"path": path, "raw_path": path.encode()}

    async def lane(requests: int) -> float:
        started = clock()
        for _ in repeat(None, requests):
            await app(scope.copy(), receive, send)
        return clock() - started

    return lane


async def answer(app: Any, path: str, *, is_asgi: bool) -> tuple[int, bytes]:
    """Serve one request; return its status and body."""
    told: list[Any] = []
    if not is_asgi:
        body = app(ENVIRON | {"PATH_INFO": path}, lambda *args: told.append(args[0]))
        text = b"".join(body)
        getattr(body, "close", lambda: None)()
        return int(told[-1][:3]), text

    async def look(message: dict[str, Any]) -> None:
        told.append(message)

    await app(SCOPE | {"path": path, "raw_path": path.encode()}, receive, look)
    return told[0]["status"], b"".join(message.get("body", b"") for message in told)
