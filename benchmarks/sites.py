"""Ways to have one session for each request, side by side: a small site built in each of them.

A *kind* of app is a framework (or none) and a kind of session; a *way* is a function that returns
the app. It answers these paths: ``none`` touches no database, ``touch`` asks for the session,
``select`` reads one row by its ORM class, ``closed`` commits after that, ``insert`` adds one row
and has it committed. By hand, the handlers open a session and close it.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from contextvars import ContextVar
from functools import partial
from time import perf_counter, thread_time
from typing import Annotated, Any

import anyio.to_thread
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from benchmarks import least
from benchmarks.database import POOL, Database, Item, Note, tune
from benchmarks.drivers import answer, asgi_lane, wsgi_lane
from benchmarks.lanes import Lanes

WSGI, THREADS, COROUTINES = "WSGI", "sync handler", "AsyncSession"
FLASK, SYNC, ASYNC = "Flask", "FastAPI, sync handlers", "FastAPI, AsyncSession"
IS_WSGI, IS_ASYNC = (WSGI, FLASK), (COROUTINES, ASYNC)

NOTE = f"by {os.getpid()}"  # other ways write at the same time


def _select(session: Any, commit: bool = False) -> str:
    session.scalars(select(Item).where(Item.id == 1)).one()
    if commit:
        session.commit()
    return "closed" if commit else "select"


def _insert(session: Any, commit: bool = True) -> str:
    session.add(Note(text=NOTE))
    if commit:
        session.commit()
    return "insert"


async def _async_select(session: Any, commit: bool = False) -> str:
    (await session.scalars(select(Item).where(Item.id == 1))).one()
    if commit:
        await session.commit()
    return "closed" if commit else "select"


async def _async_insert(session: Any, commit: bool = True) -> str:
    session.add(Note(text=NOTE))
    if commit:
        await session.commit()
    return "insert"


async def _async(text: str) -> str:
    return text


def _handlers(kind: str, run: Callable[[Any], Any], commit: bool = True) -> dict[str, Any]:
    """Return a handler for each path; `run` makes one of what is done with a session."""
    none: Any = partial(_async, "none") if kind in IS_ASYNC else lambda: "none"
    touch: Any = (lambda session: _async("touch")) if kind in IS_ASYNC else lambda session: "touch"
    read: Any = _async_select if kind in IS_ASYNC else _select
    insert: Any = _async_insert if kind in IS_ASYNC else _insert
    works = {
        "touch": touch,
        "select": read,
        "closed": partial(read, commit=True),
        "insert": partial(insert, commit=commit),
    }
    return {"none": none} | {path: run(work) for path, work in works.items()}


def _from(kind: str, get: Callable[[], Any], commit: bool = True) -> dict[str, Any]:
    """Return handlers that find the session of their request by `get`."""

    def run(work: Any) -> Any:
        return work(get())

    async def async_run(work: Any) -> Any:
        return await work(get())

    return _handlers(kind, partial(partial, async_run if kind in IS_ASYNC else run), commit)


HEADERS = [("content-type", "text/plain")]
RAW_HEADERS = [(b"content-type", b"text/plain")]
START = {"type": "http.response.start", "status": 200, "headers": RAW_HEADERS}


def _wsgi(handlers: dict[str, Any]) -> Any:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        body = handlers[environ["PATH_INFO"][1:]]().encode()
        start_response("200 OK", HEADERS)
        return [body]

    return app


def _asgi(handlers: dict[str, Any]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await handlers[scope["path"][1:]]()).encode()
        await send(START)
        await send({"type": "http.response.body", "body": body})

    return app


def _threads(handlers: dict[str, Any]) -> Any:
    """As frameworks do it."""
    return _asgi({path: partial(anyio.to_thread.run_sync, one) for path, one in handlers.items()})


def _flask(handlers: dict[str, Any], app: Any = None) -> Any:
    from flask import Flask

    app = app or Flask("bench")
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


APPS = {WSGI: _wsgi, THREADS: _threads, COROUTINES: _asgi, FLASK: _flask, SYNC: _fastapi,
        ASYNC: _fastapi}  # fmt: skip


def _factory(kind: str, where: Database, stack: AsyncExitStack, autocommit: bool = False) -> Any:
    engine: Any = where.async_engine() if kind in IS_ASYNC else where.engine()
    (stack.push_async_callback if kind in IS_ASYNC else stack.callback)(engine.dispose)
    if autocommit:  # as fast as SQLAlchemy can: without a rollback of nothing either
        engine.dialect.skip_autocommit_rollback = True
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    return (async_sessionmaker if kind in IS_ASYNC else sessionmaker)(engine)


def by_hand(
    kind: str, where: Database, stack: AsyncExitStack, begin: bool = False, autocommit: bool = False
) -> Any:
    factory = _factory(kind, where, stack, autocommit)
    opened = factory.begin if begin else factory

    def run(work: Any) -> Any:
        with opened() as session:
            return work(session)

    async def async_run(work: Any) -> Any:
        async with opened() as session:
            return await work(session)

    run_each = partial(partial, async_run if kind in IS_ASYNC else run)
    return APPS[kind](_handlers(kind, run_each, not begin))


def ours(kind: str, where: Database, stack: AsyncExitStack, **options: Any) -> Any:
    from rope_middleware import AsyncSessionJenny, RopeMiddleware, SessionJenny

    made: Any = AsyncSessionJenny if kind in IS_ASYNC else SessionJenny
    jenny = made(_factory(kind, where, stack))
    app = APPS[kind](_from(kind, lambda: jenny.session, not options.get("commit_on_success")))
    if kind == FLASK:
        app.wsgi_app = RopeMiddleware(app.wsgi_app, **options)
    elif kind in (SYNC, ASYNC):
        app.add_middleware(RopeMiddleware, **options)
    else:
        app = RopeMiddleware(app, **options)
    return app


def flask_scoped(kind: str, where: Database, stack: AsyncExitStack, own: bool = False) -> Any:
    """As Flask's documentation has it; with `own`, by rope_middleware.flask."""
    from rope_middleware.flask import flask_scoped_session

    session: Any = (flask_scoped_session if own else scoped_session)(_factory(kind, where, stack))
    app = _flask(_from(kind, lambda: session))
    if own:
        session.init_app(app)
    else:
        app.teardown_appcontext(lambda error: session.remove())
    return app


def flask_extension(kind: str, where: Database, stack: AsyncExitStack) -> Any:
    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy

    app = Flask("bench")
    app.config["SQLALCHEMY_DATABASE_URI"] = where.url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = dict(POOL)
    db = SQLAlchemy(app)
    with app.app_context():
        tune(db.engine)
        stack.callback(db.engine.dispose)
    return _flask(_from(kind, lambda: db.session), app)


def _injected(kind: str, dependency: Any) -> Any:
    """Return a FastAPI app whose handlers get the session as a parameter."""
    from fastapi import Depends

    injected = Annotated[Any, Depends(dependency)]

    def handler(work: Any) -> Any:
        def handle(session: injected) -> Any:  # type: ignore[valid-type]
            return work(session)

        async def async_handle(session: injected) -> Any:  # type: ignore[valid-type]
            return await work(session)

        return async_handle if kind in IS_ASYNC else handle

    return _fastapi(_handlers(kind, handler))


def depends(kind: str, where: Database, stack: AsyncExitStack) -> Any:
    factory = _factory(kind, where, stack)

    def get_session() -> Iterator[Any]:
        with factory() as session:
            yield session

    async def get_async_session() -> AsyncIterator[Any]:
        async with factory() as session:
            yield session

    return _injected(kind, get_async_session if kind in IS_ASYNC else get_session)


def advanced_alchemy(kind: str, where: Database, stack: AsyncExitStack) -> Any:
    from advanced_alchemy.extensions import fastapi

    name = "Async" if kind in IS_ASYNC else "Sync"
    engine = _factory(kind, where, stack).kw["bind"]
    config = getattr(fastapi, f"SQLAlchemy{name}Config")(engine_instance=engine)
    alchemy = fastapi.AdvancedAlchemy(config)
    app = _injected(kind, getattr(alchemy, f"provide_{name.lower()}_session")())
    alchemy.init_app(app)
    return app


def fastapi_async_sqlalchemy(kind: str, where: Database, stack: AsyncExitStack) -> Any:
    from fastapi_async_sqlalchemy import create_middleware_and_session_proxy

    middleware, db = create_middleware_and_session_proxy()
    app = _fastapi(_from(kind, lambda: db.session))
    app.add_middleware(middleware, custom_engine=_factory(kind, where, stack).kw["bind"])
    return app


def middleware(kind: str, where: Database, stack: AsyncExitStack, commit: bool = False) -> Any:
    """A middleware by hand: one session for each request, closed, or committed, where nobody waits.

    It does what has to be done at least, and nothing else that rope_middleware promises.
    """
    factory = _factory(kind, where, stack)
    current: ContextVar[list[Any]] = ContextVar("current")

    def session() -> Any:
        kept = current.get()
        if not kept:
            kept.append(factory())
        return kept[0]

    inner = APPS[kind](_from(kind, session, not commit))

    async def do(call: Any) -> None:
        await (asyncio.shield(call()) if kind in IS_ASYNC else anyio.to_thread.run_sync(call))

    async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
        kept: list[Any] = []

        async def send_committed(message: Any) -> None:
            if kept and message["type"] == "http.response.start":
                await do(kept[0].commit)
            await send(message)

        token = current.set(kept)
        try:
            await inner(scope, receive, send_committed if commit else send)
        finally:
            if kept and kept[0].in_transaction():
                await do(kept[0].close)
            current.reset(token)

    def wsgi_app(environ: Any, start_response: Any) -> Any:
        kept: list[Any] = []

        def start_committed(status: str, headers: Any, exc_info: Any = None) -> Any:
            if kept:
                kept[0].commit()
            return start_response(status, headers, exc_info)

        token = current.set(kept)
        body = Closing(inner(environ, start_committed if commit else start_response))
        body.close = partial(end, token)
        return body

    def end(token: Any) -> None:
        if current.get():
            current.get()[0].close()
        current.reset(token)

    return wsgi_app if kind == WSGI else asgi_app


def the_least(kind: str, where: Database, stack: AsyncExitStack, commit: bool = False) -> Any:
    """As `middleware`, and it knows of each transaction what `benchmarks.least` says."""
    is_async = kind in IS_ASYNC
    factory = least.sessions(_factory(kind, where, stack).kw["bind"], is_async)
    inner = APPS[kind](_from(kind, least.opener(factory, is_async), not commit))
    return least.wsgi(inner, commit) if kind == WSGI else least.asgi(inner, commit, is_async)


class Closing(list[bytes]):
    """A body that has a ``close()``."""

    close: Callable[[], object]


HAND, OURS, COMMIT = "by hand", "rope_middleware", "rope_middleware, commit_on_success"
BEGIN, OWN, OWN_COMMIT = "Session.begin()", "own middleware", "own middleware that commits"
LEAST, LEAST_COMMIT = "the least that knows", "the least that knows and commits"
AUTOCOMMIT, READ_ONLY = "by hand, AUTOCOMMIT", "read-only"
WAYS: dict[str, Callable[..., Any]] = {
    HAND: by_hand,
    OURS: ours,
    COMMIT: partial(ours, commit_on_success=True),
    BEGIN: partial(by_hand, begin=True),
    OWN: middleware,
    OWN_COMMIT: partial(middleware, commit=True),
    LEAST: the_least,
    LEAST_COMMIT: partial(the_least, commit=True),
    AUTOCOMMIT: partial(by_hand, autocommit=True),
    READ_ONLY: partial(ours, read_only=("GET", "HEAD")),
    "rope_middleware.flask": partial(flask_scoped, own=True),
    "scoped_session, removed at teardown": flask_scoped,
    "Flask-SQLAlchemy": flask_extension,
    "FastAPI's dependency with yield": depends,
    "advanced-alchemy": advanced_alchemy,
    "fastapi-async-sqlalchemy": fastapi_async_sqlalchemy,
}


async def site(
    where: Database, stack: AsyncExitStack, kind: str, way: str, paths: Sequence[str]
) -> Lanes:
    """Build one way, try it out, and return a lane for each path."""
    app = WAYS[way](kind, where, stack)
    for path in paths:
        answered = await answer(app, f"/{path}", is_asgi=kind not in IS_WSGI)
        if answered != (200, path.encode()):
            raise RuntimeError(f"/{path} was answered with {answered}")
    engine = where.engine()
    with Session(engine) as session:
        if session.scalar(select(func.count()).where(Note.text == NOTE)) != paths.count("insert"):
            raise RuntimeError("/insert has not written one row")
    engine.dispose()
    lane: Any = wsgi_lane if kind in IS_WSGI else asgi_lane
    # SQLite under WSGI works in this thread and waits for nothing; all else works elsewhere, too.
    clock = thread_time if kind in IS_WSGI and where.name == "SQLite" else perf_counter
    return {f"{way}: {path}": lane(app, f"/{path}", clock) for path in paths}
