"""The same small site in each way: as its documentation shows it, with a session for each request.

Each answers these addresses:

- ``POST /orders/7`` adds an order that the database refuses at the commit, ``POST /orders/1`` one
  that it takes;
- ``GET /quiet`` reads one row, then streams without the database until `Site.go_on` is set;
- ``GET /rows`` streams, and reads a row for each line;
- ``GET /work`` reads one row, and works for 50 milliseconds; in FastAPI a dependency has read
  before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from threading import Event
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from flask import Flask, stream_with_context
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import scoped_session, sessionmaker

from rope_middleware import AsyncSessionJenny, RopeMiddleware, SessionJenny
from tests.peers.models import POOL, Customer, Order, async_engine, sync_engine, tune

WORK = 0.05
"""Seconds that a request works with its transaction open."""
FIRST = select(Customer.id)


@dataclass
class Site:
    """One way, ready to be served."""

    app: Any
    engine: Engine
    go_on: Event = field(default_factory=Event)


def flask_site(app: Flask, get: Callable[[], Any], engine: Engine, commits: bool) -> Site:
    """Build the site on Flask; `commits` where the view has to do so."""
    site = Site(app, engine)

    @app.post("/orders/<int:number>")
    def order(number: int) -> tuple[str, int]:
        get().add(Order(customer_id=number))
        get().flush()
        if commits:
            get().commit()
        return "", 201

    @app.get("/quiet")
    def quiet() -> Any:
        get().scalar(FIRST)

        def lines() -> Iterator[str]:
            while not site.go_on.is_set():
                yield "waiting\n"
                time.sleep(0.02)

        return stream_with_context(lines()), {"Content-Type": "text/plain"}

    @app.get("/rows")
    def rows() -> Any:
        def lines() -> Iterator[str]:
            while not site.go_on.is_set():
                time.sleep(0.02)
                yield f"row {get().scalar(FIRST)}\n"

        return stream_with_context(lines()), {"Content-Type": "text/plain"}

    @app.get("/work")
    def work() -> str:
        get().scalar(FIRST)
        time.sleep(WORK)
        return "1"

    return site


def fastapi_site(app: FastAPI, get: Callable[..., Any], engine: Engine, commits: bool) -> Site:
    """Build the site on FastAPI, with plain `def`; `get` is a dependency."""
    site = Site(app, engine)
    given = Depends(get)

    def known(session: Any = given) -> int:
        return int(session.scalar(FIRST))

    def order(number: int, session: Any = given) -> None:
        session.add(Order(customer_id=number))
        session.flush()
        if commits:
            session.commit()

    def quiet(session: Any = given) -> StreamingResponse:
        session.scalar(FIRST)

        def lines() -> Iterator[str]:
            while not site.go_on.is_set():
                yield "waiting\n"
                time.sleep(0.02)

        return StreamingResponse(lines())

    def rows(session: Any = given) -> StreamingResponse:
        def lines() -> Iterator[str]:
            while not site.go_on.is_set():
                time.sleep(0.02)
                yield f"row {session.scalar(FIRST)}\n"

        return StreamingResponse(lines())

    def work(session: Any = given, customer: int = Depends(known)) -> int:
        time.sleep(WORK)
        return int(session.scalar(FIRST))

    return _routed(site, order, quiet, rows, work)


def async_site(app: FastAPI, get: Callable[[], Any], engine: Engine) -> Site:
    """Build the site on FastAPI, with `async def`."""
    site = Site(app, engine)

    async def order(number: int) -> None:
        get().add(Order(customer_id=number))
        await get().flush()

    async def quiet() -> StreamingResponse:
        await get().scalar(FIRST)

        async def lines() -> AsyncIterator[str]:
            while not site.go_on.is_set():
                yield "waiting\n"
                await asyncio.sleep(0.02)

        return StreamingResponse(lines())

    async def rows() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            while not site.go_on.is_set():
                await asyncio.sleep(0.02)
                yield f"row {await get().scalar(FIRST)}\n"

        return StreamingResponse(lines())

    async def work() -> int:
        await asyncio.sleep(WORK)
        return int(await get().scalar(FIRST))

    return _routed(site, order, quiet, rows, work)


def _routed(site: Site, order: Any, quiet: Any, rows: Any, work: Any) -> Site:
    site.app.post("/orders/{number}", status_code=201, response_model=None)(order)
    site.app.get("/quiet", response_model=None)(quiet)
    site.app.get("/rows", response_model=None)(rows)
    site.app.get("/work", response_model=int)(work)
    return site


# -- the ways ----------------------------------------------------------------------------------


def ours_on_flask(file: str) -> Site:
    engine = sync_engine(file)
    jenny = SessionJenny(sessionmaker(engine), strict=True)
    app = Flask("ours")
    app.wsgi_app = RopeMiddleware(app.wsgi_app, commit_on_success=True)  # type: ignore[method-assign]
    return flask_site(app, lambda: jenny.session, engine, commits=False)


def ours_on_fastapi(file: str) -> Site:
    engine = sync_engine(file)
    jenny = SessionJenny(sessionmaker(engine), strict=True)
    app = FastAPI()
    app.add_middleware(RopeMiddleware, commit_on_success=True, max_active=15)
    return fastapi_site(app, jenny, engine, commits=False)


def ours_async(file: str) -> Site:
    engine = async_engine(file)
    jenny = AsyncSessionJenny(async_sessionmaker(engine, expire_on_commit=False))
    app = FastAPI()
    app.add_middleware(RopeMiddleware, commit_on_success=True)
    return async_site(app, lambda: jenny.session, engine.sync_engine)


def scoped(file: str) -> Site:
    """As Flask's documentation has it."""
    engine = sync_engine(file)
    db_session = scoped_session(sessionmaker(engine))
    app = Flask("scoped")

    @app.teardown_appcontext
    def shutdown_session(error: BaseException | None = None) -> None:
        db_session.remove()

    return flask_site(app, db_session, engine, commits=True)


def flask_sqlalchemy(file: str) -> Site:
    from flask_sqlalchemy import SQLAlchemy

    app = Flask("extension")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{file}"
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = dict(POOL)
    db = SQLAlchemy(app)
    with app.app_context():
        engine = tune(db.engine)
    return flask_site(app, lambda: db.session, engine, commits=True)


def depends(file: str, after_yield: bool = False) -> Site:
    """FastAPI's documentation, where the endpoint commits; or the dependency, after its yield."""
    engine = sync_engine(file)
    factory = sessionmaker(engine)

    def get_db() -> Iterator[Any]:
        with factory() as session:
            yield session
            if after_yield:
                session.commit()

    return fastapi_site(FastAPI(), get_db, engine, commits=not after_yield)


def depends_after_yield(file: str) -> Site:
    return depends(file, after_yield=True)


def fastapi_async_sqlalchemy(file: str) -> Site:
    from fastapi_async_sqlalchemy import create_middleware_and_session_proxy

    engine = async_engine(file)
    middleware, db = create_middleware_and_session_proxy()
    app = FastAPI()
    app.add_middleware(middleware, custom_engine=engine, commit_on_exit=True)
    return async_site(app, lambda: db.session, engine.sync_engine)


# Which one there is depends on the Python.
VERSIONED = {
    "0.7": "fastapi-async-sqlalchemy 0.7, for Python 3.11",
    "0.8": "fastapi-async-sqlalchemy 0.8",
}[version("fastapi-async-sqlalchemy")[:3]]

WAYS: dict[str, list[Callable[[str], Site]]] = {
    "rope_middleware": [ours_on_flask, ours_on_fastapi, ours_async],
    "`scoped_session`, Flask": [scoped],
    "Flask-SQLAlchemy": [flask_sqlalchemy],
    "`Depends(get_db)`, the endpoint commits": [depends],
    "`Depends(get_db)`, commit after `yield`": [depends_after_yield],
    VERSIONED: [fastapi_async_sqlalchemy],
}
"""A row of the table; where it is built more than once, each has to do the same."""
