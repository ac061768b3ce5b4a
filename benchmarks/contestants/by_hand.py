"""By hand: each handler opens a session and closes it. The practical limit."""

from __future__ import annotations

from contextlib import AsyncExitStack

from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker

from benchmarks import sites
from benchmarks.contestants import (
    ASGI_ASYNC,
    ASGI_THREADS,
    FASTAPI_ASYNC,
    FASTAPI_THREADS,
    FLASK,
    PYRAMID,
    WSGI,
    Contestant,
    Site,
)
from benchmarks.database import Database


def _handlers(database: Database, stack: AsyncExitStack) -> sites.Handlers:
    engine = database.engine()
    stack.callback(engine.dispose)
    return sites.by_hand(sessionmaker(engine))


def _async_handlers(database: Database, stack: AsyncExitStack) -> sites.AsyncHandlers:
    engine = database.async_engine()
    stack.push_async_callback(engine.dispose)
    return sites.async_by_hand(async_sessionmaker(engine))


def _wsgi(database: Database, stack: AsyncExitStack) -> Site:
    return Site(sites.wsgi(_handlers(database, stack)))


def _flask(database: Database, stack: AsyncExitStack) -> Site:
    return Site(sites.flask(_handlers(database, stack)))


def _pyramid(database: Database, stack: AsyncExitStack) -> Site:
    views = sites.pyramid_views(_handlers(database, stack))
    return Site(sites.pyramid(views).make_wsgi_app())


def _asgi_threads(database: Database, stack: AsyncExitStack) -> Site:
    return Site(sites.asgi_threads(_handlers(database, stack)))


def _asgi(database: Database, stack: AsyncExitStack) -> Site:
    return Site(sites.asgi(_async_handlers(database, stack)))


def _fastapi_threads(database: Database, stack: AsyncExitStack) -> Site:
    return Site(sites.fastapi(_handlers(database, stack)))


def _fastapi(database: Database, stack: AsyncExitStack) -> Site:
    return Site(sites.fastapi(_async_handlers(database, stack)))


CONTESTANTS = [
    Contestant("by hand", WSGI, _wsgi, by_hand=True),
    Contestant("by hand", FLASK, _flask, ("Flask",), by_hand=True),
    Contestant("by hand", PYRAMID, _pyramid, ("pyramid",), by_hand=True),
    Contestant("by hand", ASGI_THREADS, _asgi_threads, ("anyio",), by_hand=True),
    Contestant("by hand", ASGI_ASYNC, _asgi, by_hand=True),
    Contestant("by hand", FASTAPI_THREADS, _fastapi_threads, ("fastapi",), by_hand=True),
    Contestant("by hand", FASTAPI_ASYNC, _fastapi, ("fastapi",), by_hand=True),
]
