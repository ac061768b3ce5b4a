"""The apps of P4: memory over many requests, and many open scopes."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import repeat
from time import thread_time
from typing import Any

from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker

from benchmarks.database import Database, aread, read
from benchmarks.drivers import (
    asgi_batch,
    asgi_scope,
    receive,
    send,
    wsgi_batch,
    wsgi_call,
    wsgi_environ,
    wsgi_lane,
)
from benchmarks.lanes import Lanes
from benchmarks.measure import resident_bytes
from benchmarks.promised import HEADERS, START, bare_wsgi

READS_EVERY = 100
"""Each so many'th request reads a row; the others only ask for the session."""

# Serves so many requests, of which one in so many reads a row.
Serve = Callable[[int, int], Awaitable[None]]


def memory_wsgi(where: Database, stack: AsyncExitStack) -> Lanes:
    """Count what requests leave behind."""
    from rope_middleware import SessionJenny, WSGIRopeMiddleware

    engine = where.engine()
    stack.callback(engine.dispose)
    jenny = SessionJenny(sessionmaker(engine))

    def handler(environ: Any, start_response: Any) -> list[bytes]:
        session = jenny.session
        start_response("200 OK", HEADERS)
        return [read(session) if environ["PATH_INFO"] == "/read" else b"ok"]

    app = WSGIRopeMiddleware(handler)
    touch, reading = wsgi_environ("/touch"), wsgi_environ("/read")

    async def serve(requests: int, reads_every: int) -> None:
        for _ in repeat(None, requests // reads_every):
            wsgi_call(app, reading.copy())
            wsgi_batch(app, touch, reads_every - 1)

    return _counted(serve)


def memory_asgi(where: Database, stack: AsyncExitStack) -> Lanes:
    """`memory_wsgi` with an AsyncSession."""
    from rope_middleware import ASGIRopeMiddleware, AsyncSessionJenny

    engine = where.async_engine()
    stack.push_async_callback(engine.dispose)
    jenny = AsyncSessionJenny(async_sessionmaker(engine))

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        session = jenny.session
        body = await aread(session) if scope["path"] == "/read" else b"ok"
        await send(START)
        await send({"type": "http.response.body", "body": body})

    app = ASGIRopeMiddleware(handler)
    touch, reading = asgi_scope("/touch"), asgi_scope("/read")

    async def serve(requests: int, reads_every: int) -> None:
        for _ in repeat(None, requests // reads_every):
            own = reading.copy()
            await app(own, receive, send)
            await asgi_batch(app, touch, reads_every - 1)

    return _counted(serve)


def _counted(serve: Serve) -> Lanes:
    """Return lanes that return no seconds, but what they have counted per 1,000 requests."""

    async def grown(requests: int, count: Callable[[], int]) -> float:
        await serve(max(2_000, requests // 20), READS_EVERY)  # caches and free lists fill up
        gc.collect()
        before = count()
        await serve(requests, READS_EVERY)
        gc.collect()
        return (count() - before) / requests * 1000

    async def garbage(requests: int) -> float:
        """Only selects; counts what only the cyclic collector can free."""
        requests = min(requests, 2_000)
        await serve(requests, 1)
        gc.collect()
        gc.disable()
        await serve(requests, 1)
        return gc.collect() / requests * 1000

    return {
        "objects for the garbage collector": garbage,
        "memory blocks": lambda requests: grown(requests, sys.getallocatedblocks),
        "bytes of memory": lambda requests: grown(requests, resident_bytes),
    }


def open_wsgi(where: None, stack: AsyncExitStack, count: int) -> Lanes:
    """So many scopes are open, each with a session: bodies that nobody has closed yet."""
    from rope_middleware import SessionJenny, WSGIRopeMiddleware

    jenny = SessionJenny(sessionmaker())

    def handler(environ: Any, start_response: Any) -> list[bytes]:
        jenny.session  # noqa: B018
        return bare_wsgi(environ, start_response)

    app = WSGIRopeMiddleware(handler)
    for _ in repeat(None, count):
        stack.callback(app(wsgi_environ(), lambda *args: None).close)
    return {f"{count:,}": wsgi_lane(app, clock=thread_time)}


async def open_asgi(where: None, stack: AsyncExitStack, count: int) -> Lanes:
    """So many scopes are open, each with a session: apps that wait for something."""
    from rope_middleware import ASGIRopeMiddleware, SessionJenny

    jenny = SessionJenny(sessionmaker())
    go_on = asyncio.Event()

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        jenny.session  # noqa: B018
        if scope["path"] == "/wait":
            await go_on.wait()
        await send(START)

    app = ASGIRopeMiddleware(handler)
    held = [asyncio.ensure_future(app(asgi_scope("/wait"), receive, send)) for _ in range(count)]
    await asyncio.sleep(0)

    async def let_go() -> None:
        go_on.set()
        await asyncio.gather(*held)

    stack.push_async_callback(let_go)
    scope = asgi_scope()
    return {f"{count:,}": lambda requests: asgi_batch(app, scope, requests, thread_time)}


def crowded(where: Database, stack: AsyncExitStack, objects: int) -> Lanes:
    """A request with one SELECT in a process with so many objects for the collector to look at."""
    from rope_middleware import SessionJenny, WSGIRopeMiddleware

    engine = where.engine()
    stack.callback(engine.dispose)
    jenny = SessionJenny(sessionmaker(engine))

    def handler(environ: Any, start_response: Any) -> list[bytes]:
        body = read(jenny.session)
        start_response("200 OK", HEADERS)
        return [body]

    gc.disable()  # it would look at them again and again while they are made
    crowd: list[list[int]] = [[] for _ in range(objects)]
    gc.enable()
    stack.callback(crowd.clear)
    serve = wsgi_lane(WSGIRopeMiddleware(handler), clock=thread_time)

    def lane(requests: int) -> float:
        gc.unfreeze()  # frozen, they would not be looked at
        return serve(requests)

    return {f"{objects:,}": lane}
