"""SQLAlchemy's scoped_session with a middleware of one's own that removes the session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import Any

import anyio.to_thread
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker
from sqlalchemy.orm import scoped_session, sessionmaker

from benchmarks import sites
from benchmarks.contestants import ASGI_ASYNC, ASGI_THREADS, WSGI, Contestant, Site
from benchmarks.database import Database


class RemovingMiddleware:
    """Removes the thread's session when the body is closed."""

    def __init__(self, app: Any, session: Any) -> None:
        self.app = app
        self.session = session

    def __call__(self, environ: Any, start_response: Any) -> Any:
        try:
            return _Body(self.app(environ, start_response), self.session)
        except BaseException:
            self.session.remove()
            raise


class _Body:
    def __init__(self, body: Any, session: Any) -> None:
        self.body = body
        self.session = session

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.body)

    def close(self) -> None:
        try:
            if hasattr(self.body, "close"):
                self.body.close()
        finally:
            self.session.remove()


def _wsgi(database: Database, stack: AsyncExitStack) -> Site:
    engine = database.engine()
    stack.callback(engine.dispose)
    session = scoped_session(sessionmaker(engine))
    app = sites.wsgi(sites.from_context(lambda: session))
    return Site(RemovingMiddleware(app, session))


request_key: ContextVar[object] = ContextVar("request_key")


def _asgi_threads(database: Database, stack: AsyncExitStack) -> Site:
    engine = database.engine()
    stack.callback(engine.dispose)
    session = scoped_session(sessionmaker(engine), request_key.get)
    inner = sites.asgi_threads(sites.from_context(lambda: session))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        token = request_key.set(object())
        try:
            await inner(scope, receive, send)
        finally:
            if session.registry.has():
                await anyio.to_thread.run_sync(session.remove)
            request_key.reset(token)

    return Site(app)


def _asgi(database: Database, stack: AsyncExitStack) -> Site:
    engine = database.async_engine()
    stack.push_async_callback(engine.dispose)
    session = async_scoped_session(async_sessionmaker(engine), request_key.get)
    inner = sites.asgi(sites.async_from_context(lambda: session))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        token = request_key.set(object())
        try:
            await inner(scope, receive, send)
        finally:
            await session.remove()
            request_key.reset(token)

    return Site(app)


CONTESTANTS = [
    Contestant("scoped_session, own middleware", WSGI, _wsgi),
    Contestant("scoped_session, own middleware", ASGI_THREADS, _asgi_threads),
    Contestant("async_scoped_session, own middleware", ASGI_ASYNC, _asgi),
]
