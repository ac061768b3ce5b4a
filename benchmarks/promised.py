"""The apps of the promises: by hand, minimal, and with the middleware."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from contextvars import ContextVar
from functools import partial
from itertools import repeat
from time import perf_counter, thread_time
from typing import Any

import anyio.to_thread
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from benchmarks.database import Database, aread, read
from benchmarks.drivers import (
    asgi_answer,
    asgi_lane,
    asgi_scope,
    wsgi_answer,
    wsgi_environ,
    wsgi_lane,
)
from benchmarks.lanes import Lanes, timed

HEADERS: list[tuple[str, str]] = [("content-type", "text/plain")]
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/plain")],
}
BODY = {"type": "http.response.body", "body": b"ok"}


# -- P1: no database is touched ----------------------------------------------------------------


async def bare_asgi(scope: Any, receive: Any, send: Any) -> None:
    """The least that answers."""
    await send(START)
    await send(BODY)


def bare_wsgi(environ: Any, start_response: Any) -> list[bytes]:
    """The least that answers."""
    start_response("200 OK", HEADERS)
    return [b"ok"]


def bare_wsgi_generator(environ: Any, start_response: Any) -> Iterator[bytes]:
    """The least that answers with a generator: one chunk."""
    start_response("200 OK", HEADERS)
    yield b"ok"


minimal: ContextVar[object] = ContextVar("minimal")


class MinimalASGI:
    """By hand: sets and resets a ContextVar, no more."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        token = minimal.set(object())
        try:
            await self.app(scope, receive, send)
        finally:
            minimal.reset(token)


class MinimalWSGI:
    """By hand: sets a ContextVar, and wraps the body to reset it in its ``close()``."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, environ: Any, start_response: Any) -> Any:
        token = minimal.set(object())
        try:
            return MinimalBody(self.app(environ, start_response), token)
        except BaseException:
            minimal.reset(token)
            raise


class MinimalBody:
    """A body with a ``close()``."""

    def __init__(self, body: Any, token: Any) -> None:
        self.body = body
        self.token = token

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.body)

    def close(self) -> None:
        try:
            close = getattr(self.body, "close", None)
            if close is not None:
                close()
        finally:
            minimal.reset(self.token)


async def untouched_asgi(where: None, stack: AsyncExitStack) -> Lanes:
    """Side by side: nothing, a minimal middleware, ours, and ours with commit_on_success."""
    from rope_middleware import ASGIRopeMiddleware

    apps = {
        "bare": bare_asgi,
        "minimal": MinimalASGI(bare_asgi),
        "ours": ASGIRopeMiddleware(bare_asgi),
        "commit": ASGIRopeMiddleware(bare_asgi, commit_on_success=True),
    }
    for app in apps.values():
        assert await asgi_answer(app, asgi_scope()) == (200, b"ok")
    return {name: asgi_lane(app, clock=thread_time) for name, app in apps.items()}


def untouched_wsgi(where: None, stack: AsyncExitStack, body: str) -> Lanes:
    """`untouched_asgi` in WSGI."""
    bare = bare_wsgi_generator if body == "generator" else bare_wsgi
    return _untouched_wsgi(bare)


def _untouched_wsgi(bare: Any, **more: Any) -> Lanes:
    from rope_middleware import WSGIRopeMiddleware

    apps = {
        "bare": bare,
        "minimal": MinimalWSGI(bare),
        "ours": WSGIRopeMiddleware(bare),
        "commit": WSGIRopeMiddleware(bare, commit_on_success=True),
    } | more
    for app in apps.values():
        assert wsgi_answer(app, wsgi_environ()) == (200, b"ok")
    return {name: wsgi_lane(app, clock=thread_time) for name, app in apps.items()}


def untouched_flask(where: None, stack: AsyncExitStack) -> Lanes:
    """`untouched_wsgi` around Flask, beside Flask-SQLAlchemy."""
    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy

    def site() -> Flask:
        app = Flask("bench")
        app.add_url_rule("/", "index", lambda: "ok")
        return app

    theirs = site()
    theirs.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    SQLAlchemy(theirs)
    return _untouched_wsgi(site().wsgi_app, **{"Flask-SQLAlchemy": theirs.wsgi_app})


# -- P2, P5: one SELECT ------------------------------------------------------------------------

# How a handler ends: it leaves its transaction open, commits it, leaves it to commit_on_success, or
# has only read.
OPTIONS: dict[str, dict[str, Any]] = {
    "open": {},
    "closed": {},
    "commit": {"commit_on_success": True},
    "read_only": {"read_only": ("GET", "HEAD")},
}


def _work(
    where: Database, stack: AsyncExitStack, by: str, end: str
) -> tuple[Callable[[], bytes], Callable[[Any], Any]]:
    """Return the handler, and what is to be wrapped around the app."""
    engine = where.engine()
    stack.callback(engine.dispose)
    factory = sessionmaker(engine)
    if by == "ours":
        from rope_middleware import RopeMiddleware, SessionJenny

        jenny = SessionJenny(factory)

        def handler() -> bytes:
            name = read(jenny.session)
            if end == "closed":
                jenny.session.commit()
            return name

        return handler, partial(RopeMiddleware, **OPTIONS[end])

    opened = factory.begin if end == "commit" else factory

    def by_hand() -> bytes:
        with opened() as session:
            name = read(session)
            if end == "closed":
                session.commit()
            return name

    return by_hand, lambda app: app


def select_wsgi(where: Database, stack: AsyncExitStack, by: str, end: str) -> Lanes:
    """A WSGI app whose handler reads one row."""
    handler, wrap = _work(where, stack, by, end)

    def app(environ: Any, start_response: Any) -> list[bytes]:
        body = handler()
        start_response("200 OK", HEADERS)
        return [body]

    wrapped = wrap(app)
    assert wsgi_answer(wrapped, wsgi_environ()) == (200, b"rope")
    # SQLite works in this thread and waits for nothing; PostgreSQL works elsewhere.
    clock = thread_time if where.name == "SQLite" else perf_counter
    return {by: wsgi_lane(wrapped, clock=clock)}


async def select_threads(where: Database, stack: AsyncExitStack, by: str, end: str) -> Lanes:
    """An ASGI app whose sync handler reads one row in a thread, as frameworks do it."""
    handler, wrap = _work(where, stack, by, end)
    return await _select(partial(anyio.to_thread.run_sync, handler), wrap, by)


async def select_async(where: Database, stack: AsyncExitStack, by: str, end: str) -> Lanes:
    """An ASGI app whose handler reads one row by an AsyncSession."""
    engine = where.async_engine()
    stack.push_async_callback(engine.dispose)
    factory = async_sessionmaker(engine)
    if by == "ours":
        from rope_middleware import AsyncSessionJenny, RopeMiddleware

        jenny = AsyncSessionJenny(factory)

        async def handler() -> bytes:
            name = await aread(jenny.session)
            if end == "closed":
                await jenny.session.commit()
            return name

        return await _select(handler, partial(RopeMiddleware, **OPTIONS[end]), by)

    opened: Any = factory.begin if end == "commit" else factory

    async def by_hand() -> bytes:
        async with opened() as session:
            name = await aread(session)
            if end == "closed":
                await session.commit()
            return name

    return await _select(by_hand, lambda app: app, by)


async def _select(handler: Callable[[], Awaitable[bytes]], wrap: Any, by: str) -> Lanes:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = await handler()
        await send(START)
        await send({"type": "http.response.body", "body": body})

    wrapped = wrap(app)
    assert await asgi_answer(wrapped, asgi_scope()) == (200, b"rope")
    return {by: asgi_lane(wrapped)}


# -- P3, H1 ------------------------------------------------------------------------------------


def lookup(where: None, stack: AsyncExitStack) -> Lanes:
    """``jenny.session`` in a scope, and ``scoped_session.registry()``."""
    from rope_middleware import SessionJenny, open_scope

    jenny, scoped = SessionJenny(sessionmaker()), scoped_session(sessionmaker())
    stack.enter_context(open_scope("P3"))
    assert jenny.session is jenny.session
    assert scoped.registry() is scoped.registry()

    # Not by `timed`: its call would take longer than what is measured.
    def ours(lookups: int) -> float:
        started = thread_time()
        for _ in repeat(None, lookups):
            jenny.session  # noqa: B018
        return thread_time() - started

    def theirs(lookups: int) -> float:
        started = thread_time()
        for _ in repeat(None, lookups):
            scoped.registry()
        return thread_time() - started

    return {"ours": ours, "theirs": theirs}


def transaction(where: None, stack: AsyncExitStack, by: str) -> Lanes:
    """A transaction after the other in one session, with no statement."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    factory = sessionmaker(engine)
    session: Session = factory()
    if by == "ours":
        from rope_middleware import SessionJenny, open_scope

        stack.enter_context(open_scope("H1"))
        session = SessionJenny(factory).session

    def begin_and_end() -> None:
        session.connection()
        session.rollback()

    return {by: timed(begin_and_end, thread_time)}
