"""context-async-sqlalchemy: commits by itself; a pure ASGI middleware, and one for FastAPI."""

from __future__ import annotations

from contextlib import AsyncExitStack

from context_async_sqlalchemy import DBConnect, db_session
from context_async_sqlalchemy.asgi_utils import ASGIHTTPDBSessionMiddleware
from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware
from sqlalchemy.ext.asyncio import async_sessionmaker

from benchmarks import sites
from benchmarks.contestants import ASGI_ASYNC, FASTAPI_ASYNC, Contestant, Site
from benchmarks.database import Database


def _handlers(database: Database, stack: AsyncExitStack) -> sites.AsyncHandlers:
    connect = DBConnect(
        engine_creator=lambda host: database.async_engine(),
        session_maker_creator=async_sessionmaker,
        host="127.0.0.1",
    )
    stack.push_async_callback(connect.close)
    return sites.async_from_awaitable(lambda: db_session(connect), commit=False)


def _asgi(database: Database, stack: AsyncExitStack) -> Site:
    return Site(ASGIHTTPDBSessionMiddleware(sites.asgi(_handlers(database, stack))))


def _fastapi(database: Database, stack: AsyncExitStack) -> Site:
    app = sites.fastapi(_handlers(database, stack))
    add_fastapi_http_db_session_middleware(app)
    return Site(app)


CONTESTANTS = [
    Contestant("context-async-sqlalchemy", ASGI_ASYNC, _asgi, ("context-async-sqlalchemy",)),
    Contestant(
        "context-async-sqlalchemy",
        FASTAPI_ASYNC,
        _fastapi,
        ("context-async-sqlalchemy", "fastapi"),
    ),
]
