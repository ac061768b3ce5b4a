"""rope_middleware: as it comes, and with commit_on_success."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import Any

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
from rope_middleware import AsyncSessionJenny, RopeMiddleware, SessionJenny


def _handlers(database: Database, stack: AsyncExitStack, commit: bool) -> sites.Handlers:
    engine = database.engine()
    stack.callback(engine.dispose)
    jenny = SessionJenny(sessionmaker(engine))
    return sites.from_context(lambda: jenny.session, commit=not commit)


def _async_handlers(database: Database, stack: AsyncExitStack, commit: bool) -> sites.AsyncHandlers:
    engine = database.async_engine()
    stack.push_async_callback(engine.dispose)
    jenny = AsyncSessionJenny(async_sessionmaker(engine))
    return sites.async_from_context(lambda: jenny.session, commit=not commit)


def _wrapped(app: Any, commit: bool) -> Site:
    return Site(RopeMiddleware(app, commit_on_success=commit))


def _wsgi(database: Database, stack: AsyncExitStack, *, commit: bool) -> Site:
    return _wrapped(sites.wsgi(_handlers(database, stack, commit)), commit)


def _flask(database: Database, stack: AsyncExitStack, *, commit: bool) -> Site:
    app = sites.flask(_handlers(database, stack, commit))
    app.wsgi_app = RopeMiddleware(app.wsgi_app, commit_on_success=commit)
    return Site(app)


def _pyramid(database: Database, stack: AsyncExitStack, *, commit: bool) -> Site:
    views = sites.pyramid_views(_handlers(database, stack, commit))
    return _wrapped(sites.pyramid(views).make_wsgi_app(), commit)


def _asgi_threads(database: Database, stack: AsyncExitStack, *, commit: bool) -> Site:
    return _wrapped(sites.asgi_threads(_handlers(database, stack, commit)), commit)


def _asgi(database: Database, stack: AsyncExitStack, *, commit: bool) -> Site:
    return _wrapped(sites.asgi(_async_handlers(database, stack, commit)), commit)


def _fastapi_threads(database: Database, stack: AsyncExitStack, *, commit: bool) -> Site:
    app = sites.fastapi(_handlers(database, stack, commit))
    app.add_middleware(RopeMiddleware, commit_on_success=commit)
    return Site(app)


def _fastapi(database: Database, stack: AsyncExitStack, *, commit: bool) -> Site:
    app = sites.fastapi(_async_handlers(database, stack, commit))
    app.add_middleware(RopeMiddleware, commit_on_success=commit)
    return Site(app)


def _scoped_session_for_flask(database: Database, stack: AsyncExitStack) -> Site:
    from rope_middleware.flask import flask_scoped_session

    engine = database.engine()
    stack.callback(engine.dispose)
    session = flask_scoped_session(sessionmaker(engine))
    app = sites.flask(sites.from_context(lambda: session))
    session.init_app(app)
    return Site(app)


CONTESTANTS = [
    Contestant(
        "rope_middleware" + (", commit_on_success" if commit else ""),
        setting,
        partial(build, commit=commit),
        ("rope-middleware",),
        ours=True,
    )
    for setting, build in (
        (WSGI, _wsgi),
        (FLASK, _flask),
        (PYRAMID, _pyramid),
        (ASGI_THREADS, _asgi_threads),
        (ASGI_ASYNC, _asgi),
        (FASTAPI_THREADS, _fastapi_threads),
        (FASTAPI_ASYNC, _fastapi),
    )
    for commit in (False, True)
] + [
    Contestant(
        "rope_middleware.flask",
        FLASK,
        _scoped_session_for_flask,
        ("rope-middleware", "Flask"),
        ours=True,
    )
]
