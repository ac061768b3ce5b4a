"""Servers without a socket: they call the application as a server would, many times over.

Each request gets a scope (environ) of its own, and a copy of the lifespan's state in it, as
uvicorn does it.
"""

from __future__ import annotations

import io
from collections.abc import Awaitable, Callable
from itertools import repeat
from time import perf_counter
from typing import Any

Clock = Callable[[], float]


def asgi_scope(path: str = "/", state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return an HTTP scope as uvicorn makes it; `state` is the lifespan's."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50000),
        "scheme": "http",
        "method": "GET",
        "root_path": "",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1:8000"), (b"accept", b"*/*")],
        "state": state or {},
    }


def wsgi_environ(path: str = "/") -> dict[str, Any]:
    """Return an environ as gunicorn makes it."""
    return {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "127.0.0.1:8000",
        "HTTP_ACCEPT": "*/*",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": False,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }


_REQUEST = {"type": "http.request", "body": b"", "more_body": False}


async def receive() -> dict[str, Any]:
    """Give the app an empty body."""
    return _REQUEST


async def send(message: dict[str, Any]) -> None:
    """Take a message from the app and drop it."""


def start_response(status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], Any]:
    """Take the status and drop it."""
    return _write


def _write(data: bytes) -> None:
    """Take a chunk and drop it."""


def wsgi_call(app: Any, environ: dict[str, Any]) -> None:
    """Serve one request as PEP 3333 asks a server to."""
    body = app(environ, start_response)
    try:
        for _ in body:
            pass
    finally:
        close = getattr(body, "close", None)
        if close is not None:
            close()


def wsgi_batch(
    app: Any, environ: dict[str, Any], requests: int, clock: Clock = perf_counter
) -> float:
    """Serve so many requests and return the seconds that took."""
    started = clock()
    for _ in repeat(None, requests):
        wsgi_call(app, environ.copy())
    return clock() - started


async def asgi_batch(
    app: Any, scope: dict[str, Any], requests: int, clock: Clock = perf_counter
) -> float:
    """Serve so many requests, one after the other, and return the seconds that took."""
    started = clock()
    for _ in repeat(None, requests):
        own = scope.copy()
        own["state"] = own["state"].copy()
        await app(own, receive, send)
    return clock() - started


def wsgi_lane(app: Any, path: str = "/", clock: Clock = perf_counter) -> Callable[[int], float]:
    """Return the lane of a WSGI app."""
    environ = wsgi_environ(path)
    return lambda requests: wsgi_batch(app, environ, requests, clock)


def asgi_lane(
    app: Any, path: str = "/", clock: Clock = perf_counter, state: dict[str, Any] | None = None
) -> Callable[[int], Awaitable[float]]:
    """Return the lane of an ASGI app."""
    scope = asgi_scope(path, state)
    return lambda requests: asgi_batch(app, scope, requests, clock)


# -- one request, looked at --------------------------------------------------------------------


def wsgi_answer(app: Any, environ: dict[str, Any]) -> tuple[int, bytes]:
    """Serve one request; return its status and body."""
    seen: list[str] = []

    def start(status: str, headers: Any, exc_info: Any = None) -> Callable[[bytes], Any]:
        seen.append(status)
        return _write

    body = app(environ, start)
    try:
        text = b"".join(body)
    finally:
        close: Callable[[], Any] | None = getattr(body, "close", None)
        if close is not None:
            close()
    return int(seen[-1].split()[0]), text


async def asgi_answer(app: Any, scope: dict[str, Any]) -> tuple[int, bytes]:
    """Serve one request; return its status and body."""
    status = 0
    body = b""

    async def look(message: dict[str, Any]) -> None:
        nonlocal status, body
        status = message.get("status", status)
        body += message.get("body", b"")

    await app(scope | {"state": scope["state"].copy()}, receive, look)
    return status, body
