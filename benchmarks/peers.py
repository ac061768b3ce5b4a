"""Ways to have one session for each request, side by side: a small site built in each of them.

A *kind* of app is a framework and a kind of session. The site of each way answers three paths:

=========  ==========================================
none       answers, and touches no database
select     reads one row by its ORM class
insert     adds one row, and has it committed
=========  ==========================================

A way is a function that returns the app. By hand, the handlers open a session and close it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from contextvars import ContextVar
from functools import partial
from typing import Annotated, Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from benchmarks.database import POOL, Database, Item, Note, tune
from benchmarks.drivers import (
    asgi_answer,
    asgi_lane,
    asgi_scope,
    wsgi_answer,
    wsgi_environ,
    wsgi_lane,
)
from benchmarks.lanes import Lanes

NOTE = f"by {os.getpid()}"  # other ways write at the same time
PATHS = ("none", "select", "insert")
FLASK, SYNC, ASYNC = "Flask", "FastAPI, sync handlers", "FastAPI, AsyncSession"


# -- what a handler does with its session ------------------------------------------------------


def _none() -> str:
    return "none"


def _select(session: Any, commit: bool) -> str:
    session.scalars(select(Item).where(Item.id == 1)).one()
    return "select"


def _insert(session: Any, commit: bool) -> str:
    session.add(Note(text=NOTE))
    if commit:
        session.commit()
    return "insert"


async def _async_none() -> str:
    return "none"


async def _async_select(session: Any, commit: bool) -> str:
    (await session.scalars(select(Item).where(Item.id == 1))).one()
    return "select"


async def _async_insert(session: Any, commit: bool) -> str:
    session.add(Note(text=NOTE))
    if commit:
        await session.commit()
    return "insert"


def _handlers(run: Callable[[Any], str]) -> dict[str, Any]:
    """Return sync handlers; `run` calls what it is given with a session."""
    return {"none": _none, "select": lambda: run(_select), "insert": lambda: run(_insert)}


def _async_handlers(run: Callable[[Any], Awaitable[str]]) -> dict[str, Any]:
    async def handle_select() -> str:
        return await run(_async_select)

    async def handle_insert() -> str:
        return await run(_async_insert)

    return {"none": _async_none, "select": handle_select, "insert": handle_insert}


# -- frameworks and engines --------------------------------------------------------------------


def _factory(where: Database, stack: AsyncExitStack) -> Any:
    engine = where.engine()
    stack.callback(engine.dispose)
    return sessionmaker(engine)


def _async_factory(where: Database, stack: AsyncExitStack) -> Any:
    engine = where.async_engine()
    stack.push_async_callback(engine.dispose)
    return async_sessionmaker(engine)


def _flask(handlers: dict[str, Any], app: Any = None) -> Any:
    from flask import Flask

    app = Flask("bench") if app is None else app
    app.config["PROPAGATE_EXCEPTIONS"] = True  # an error page would hide what is wrong
    for path, handler in handlers.items():
        app.add_url_rule(f"/{path}", path, handler)
    return app


def _fastapi(handlers: dict[str, Any]) -> Any:
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse

    app = FastAPI(openapi_url=None)
    for path, handler in handlers.items():
        app.get(f"/{path}", response_class=PlainTextResponse)(handler)
    return app


def _injected(dependency: Any, commit: bool = True, *, is_async: bool) -> Any:
    """Return a FastAPI app whose handlers get the session as a parameter."""
    from fastapi import Depends

    # FastAPI evaluates annotations: a name that only this function knows would not be found.
    injected = Annotated[Any, Depends(dependency)]

    def handler(work: Any) -> Any:
        def handle(session: Any) -> str:
            return str(work(session, commit))

        async def async_handle(session: Any) -> str:
            return str(await work(session, commit))

        made = async_handle if is_async else handle
        made.__annotations__["session"] = injected
        return made

    if is_async:
        none, work = _async_none, {"select": _async_select, "insert": _async_insert}
    else:
        none, work = _none, {"select": _select, "insert": _insert}  # type: ignore[assignment]
    return _fastapi({"none": none} | {path: handler(one) for path, one in work.items()})


# -- by hand, and with rope_middleware ---------------------------------------------------------


def by_hand(where: Database, stack: AsyncExitStack, framework: Any) -> Any:
    """``with Session() as session:``."""
    factory = _factory(where, stack)

    def run(work: Any) -> str:
        with factory() as session:
            return str(work(session, True))

    return framework(_handlers(run))


def async_by_hand(where: Database, stack: AsyncExitStack) -> Any:
    """``async with AsyncSession() as session:``."""
    factory = _async_factory(where, stack)

    async def run(work: Any) -> str:
        async with factory() as session:
            return str(await work(session, True))

    return _fastapi(_async_handlers(run))


def flask_ours(where: Database, stack: AsyncExitStack, commit: bool = False) -> Any:
    """``app.wsgi_app = RopeMiddleware(app.wsgi_app)``."""
    from rope_middleware import RopeMiddleware, SessionJenny

    jenny = SessionJenny(_factory(where, stack))
    app = _flask(_handlers(lambda work: work(jenny.session, not commit)))
    app.wsgi_app = RopeMiddleware(app.wsgi_app, commit_on_success=commit)
    return app


def sync_ours(where: Database, stack: AsyncExitStack, commit: bool = False) -> Any:
    """``app.add_middleware(RopeMiddleware)``."""
    from rope_middleware import RopeMiddleware, SessionJenny

    jenny = SessionJenny(_factory(where, stack))
    app = _fastapi(_handlers(lambda work: work(jenny.session, not commit)))
    app.add_middleware(RopeMiddleware, commit_on_success=commit)
    return app


def async_ours(where: Database, stack: AsyncExitStack, commit: bool = False) -> Any:
    """``app.add_middleware(RopeMiddleware)``."""
    from rope_middleware import AsyncSessionJenny, RopeMiddleware

    jenny = AsyncSessionJenny(_async_factory(where, stack))
    app = _fastapi(_async_handlers(lambda work: work(jenny.session, not commit)))
    app.add_middleware(RopeMiddleware, commit_on_success=commit)
    return app


# -- Flask's others ----------------------------------------------------------------------------


def flask_ours_scoped(where: Database, stack: AsyncExitStack) -> Any:
    """``rope_middleware.flask``."""
    from rope_middleware.flask import flask_scoped_session

    session = flask_scoped_session(_factory(where, stack))
    app = _flask(_handlers(lambda work: work(session, True)))
    session.init_app(app)
    return app


def flask_teardown(where: Database, stack: AsyncExitStack) -> Any:
    """SQLAlchemy's scoped_session, removed by ``teardown_appcontext``, as Flask's docs have it."""
    session = scoped_session(_factory(where, stack))
    app = _flask(_handlers(lambda work: work(session, True)))
    app.teardown_appcontext(lambda error: session.remove())
    return app


def flask_extension(where: Database, stack: AsyncExitStack, module: str) -> Any:
    """Flask-SQLAlchemy, and its light sister."""
    from flask import Flask

    app = Flask("bench")
    app.config["SQLALCHEMY_DATABASE_URI"] = where.url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = dict(POOL)
    app.config["SQLALCHEMY_ENGINES"] = {"default": {"url": where.url} | POOL}
    db = importlib.import_module(module).SQLAlchemy(app)
    with app.app_context():
        tune(db.engine)
        stack.callback(db.engine.dispose)
    return _flask(_handlers(lambda work: work(db.session, True)), app)


# -- FastAPI's others --------------------------------------------------------------------------


def sync_depends(where: Database, stack: AsyncExitStack) -> Any:
    """A dependency with ``yield``, as FastAPI's documentation has it."""
    factory = _factory(where, stack)

    def get_session() -> Iterator[Any]:
        with factory() as session:
            yield session

    return _injected(get_session, is_async=False)


def async_depends(where: Database, stack: AsyncExitStack) -> Any:
    """`sync_depends`, async."""
    factory = _async_factory(where, stack)

    async def get_session() -> AsyncIterator[Any]:
        async with factory() as session:
            yield session

    return _injected(get_session, is_async=True)


def advanced_alchemy(where: Database, stack: AsyncExitStack, is_async: bool) -> Any:
    """advanced-alchemy's FastAPI extension."""
    from advanced_alchemy.extensions import fastapi

    factory = (_async_factory if is_async else _factory)(where, stack)
    config: Any = fastapi.SQLAlchemyAsyncConfig if is_async else fastapi.SQLAlchemySyncConfig
    alchemy = fastapi.AdvancedAlchemy(config(engine_instance=factory.kw["bind"]))
    provide = alchemy.provide_async_session if is_async else alchemy.provide_sync_session
    app = _injected(provide(), is_async=is_async)
    alchemy.init_app(app)
    return app


def fastapi_sqlalchemy(where: Database, stack: AsyncExitStack) -> Any:
    """FastAPI-SQLAlchemy."""
    from fastapi_sqlalchemy import DBSessionMiddleware, db

    app = _fastapi(_handlers(lambda work: work(db.session, True)))
    app.add_middleware(DBSessionMiddleware, custom_engine=_factory(where, stack).kw["bind"])
    return app


def fastapi_async_sqlalchemy(where: Database, stack: AsyncExitStack) -> Any:
    """fastapi-async-sqlalchemy."""
    from fastapi_async_sqlalchemy import create_middleware_and_session_proxy

    middleware, db = create_middleware_and_session_proxy()
    app = _fastapi(_async_handlers(lambda work: work(db.session, True)))
    app.add_middleware(middleware, custom_engine=_async_factory(where, stack).kw["bind"])
    return app


def context_async_sqlalchemy(where: Database, stack: AsyncExitStack) -> Any:
    """context-async-sqlalchemy; commits by itself."""
    from context_async_sqlalchemy import DBConnect, db_session
    from context_async_sqlalchemy.fastapi_utils import add_fastapi_http_db_session_middleware

    connect = DBConnect(
        engine_creator=lambda host: where.async_engine(),
        session_maker_creator=async_sessionmaker,
        host="127.0.0.1",
    )
    stack.push_async_callback(connect.close)

    async def run(work: Any) -> str:
        return str(await work(await db_session(connect), False))

    app = _fastapi(_async_handlers(run))
    add_fastapi_http_db_session_middleware(app)
    return app


request_key: ContextVar[object] = ContextVar("request_key")


class _Removing:
    """A middleware of one's own that gives each request a key, and removes its session."""

    def __init__(self, app: Any, session: Any) -> None:
        self.app = app
        self.session = session

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        token = request_key.set(object())
        try:
            await self.app(scope, receive, send)
        finally:
            await self.session.remove()
            request_key.reset(token)


def async_scoped(where: Database, stack: AsyncExitStack) -> Any:
    """SQLAlchemy's async_scoped_session with a middleware of one's own."""
    session = async_scoped_session(_async_factory(where, stack), request_key.get)
    app = _fastapi(_async_handlers(lambda work: work(session, True)))
    app.add_middleware(_Removing, session=session)
    return app


# -- all of them -------------------------------------------------------------------------------

HAND, OURS, COMMIT = "by hand", "rope_middleware", "rope_middleware, commit_on_success"
DEPENDS = "FastAPI's dependency with yield"

KINDS: dict[str, dict[str, Callable[..., Any]]] = {
    FLASK: {
        HAND: partial(by_hand, framework=_flask),
        OURS: flask_ours,
        COMMIT: partial(flask_ours, commit=True),
        "rope_middleware.flask": flask_ours_scoped,
        "scoped_session, removed at teardown": flask_teardown,
        "Flask-SQLAlchemy": partial(flask_extension, module="flask_sqlalchemy"),
        "Flask-SQLAlchemy-Lite": partial(flask_extension, module="flask_sqlalchemy_lite"),
    },
    SYNC: {
        HAND: partial(by_hand, framework=_fastapi),
        OURS: sync_ours,
        COMMIT: partial(sync_ours, commit=True),
        DEPENDS: sync_depends,
        "advanced-alchemy": partial(advanced_alchemy, is_async=False),
        "FastAPI-SQLAlchemy": fastapi_sqlalchemy,
    },
    ASYNC: {
        HAND: async_by_hand,
        OURS: async_ours,
        COMMIT: partial(async_ours, commit=True),
        DEPENDS: async_depends,
        "async_scoped_session, own middleware": async_scoped,
        "advanced-alchemy": partial(advanced_alchemy, is_async=True),
        "fastapi-async-sqlalchemy": fastapi_async_sqlalchemy,
        "context-async-sqlalchemy": context_async_sqlalchemy,
    },
}


async def site(where: Database, stack: AsyncExitStack, kind: str, way: str) -> Lanes:
    """Build one way, try it out, and return a lane for each path."""
    app = KINDS[kind][way](where, stack)
    for path in PATHS:
        if kind == FLASK:
            answered = wsgi_answer(app, wsgi_environ(f"/{path}"))
        else:
            answered = await asgi_answer(app, asgi_scope(f"/{path}"))
        if answered != (200, path.encode()):
            raise RuntimeError(f"/{path} was answered with {answered}")
    engine = where.engine()
    with Session(engine) as session:
        if session.scalar(select(func.count()).where(Note.text == NOTE)) != 1:
            raise RuntimeError("/insert has not written one row")
    engine.dispose()
    lane: Any = wsgi_lane if kind == FLASK else asgi_lane
    return {f"{way}: {path}": lane(app, f"/{path}") for path in PATHS}
