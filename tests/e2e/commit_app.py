"""The applications of the end-to-end tests of commits: they write, and answer, or fail to.

`AsyncWriter` (ASGI, AsyncSession), `ThreadWriter` (ASGI, Session in threads) and `wsgi_writer`
(Flask) understand the same requests: ``/write?n=7&do=...`` inserts row 7.
``tests.e2e.commit_app:app`` is `AsyncWriter` as a module, for a server that is to be killed.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any, Protocol, cast
from urllib.parse import parse_qsl

import anyio
import anyio.to_thread
import flask
import werkzeug.serving
from sqlalchemy import URL, NullPool, create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from rope_middleware import ASGIRopeMiddleware, AsyncSessionJenny, SessionJenny, WSGIRopeMiddleware
from tests.e2e.async_app import answer
from tests.kit.leaks import open_scopes
from tests.kit.models import Base, Child, Data, Row
from tests.kit.waiting import PATIENCE, eventually
from tests.servers.asgi import HOST, serve

POOL: dict[str, Any] = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 60}


def pooled(options: Any) -> dict[str, Any]:
    """The options of an engine: with a pool of 5, if no other one is asked for."""
    options = options or {}
    return options if "poolclass" in options else POOL | options


def out_of(pool: Any) -> int:
    """How many connections are out; one that keeps none cannot tell."""
    return 0 if isinstance(pool, NullPool) else int(pool.checkedout())


def create_tables(url: URL) -> None:
    """Make the tables, and the counter's row."""
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(Data.__table__.insert().values(id=1, count=0))  # type: ignore[attr-defined]
    engine.dispose()


class Writer(Protocol):
    """What the tests look at."""

    def held(self) -> int: ...
    def dispose(self) -> None: ...


PAUSE = text("SELECT pg_sleep(0.002)")


def bodies_are_collected() -> None:
    """Werkzeug reads what a client has left unread before it closes the body.

    Where the client resets meanwhile, the body is dropped without close(), and W3 holds.
    """
    eventually(lambda: gc.collect() >= 0 and not open_scopes(), "no scope is open")


@contextmanager
def serve_any(app: Any) -> Iterator[int]:
    """Run an ASGI or a WSGI application; the port."""
    if isinstance(app, (FlaskWriter, flask.Flask, WSGIRopeMiddleware)):
        with serve_wsgi(app) as port:
            yield port
        if isinstance(app, FlaskWriter):
            app.dispose()
    else:
        with serve(app) as running:
            yield running.port


def status_of(do: str) -> int:
    """What the handler answers by itself."""
    return {"refuse": 409, "unavailable": 503}.get(do, 201)


class AsyncWriter:
    """ASGI with an AsyncSession."""

    def __init__(self, url: URL | str, engine_options: Any = None, **options: Any) -> None:
        self.engine = create_async_engine(url, **pooled(engine_options))
        self.jenny = AsyncSessionJenny(async_sessionmaker(self.engine, expire_on_commit=False))
        self.serve = ASGIRopeMiddleware(self.route, **options)

    def held(self) -> int:
        return out_of(self.engine.pool)

    def dispose(self) -> None: ...

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            with anyio.move_on_after(PATIENCE):
                while self.held():
                    await anyio.sleep(0.01)
            await self.engine.dispose()
            await send({"type": "lifespan.shutdown.complete"})
        elif scope["path"] == "/state":
            state = {"held": self.held(), "scopes": [repr(found) for found in open_scopes()]}
            await answer(send, 200, json.dumps(state).encode())
        else:
            await self.serve(scope, receive, send)

    async def route(self, scope: Any, receive: Any, send: Any) -> None:
        asked = dict(parse_qsl(scope["query_string"].decode()))
        n, do = int(asked["n"]), asked["do"]
        await self.write(n, do)
        if do == "raise":
            raise LookupError("told to raise")
        await answer(send, status_of(do), str(n).encode())

    async def write(self, n: int, do: str) -> None:
        session = self.jenny.session
        session.add(Row(n=n))
        if do == "orphan":
            session.add(Child(n=n, parent=-n))
        await session.flush()
        await session.execute(PAUSE)


class ThreadWriter(AsyncWriter):
    """ASGI with a Session that is used in worker threads."""

    def __init__(self, url: URL | str, engine_options: Any = None, **options: Any) -> None:
        self.sync_engine = create_engine(url, **pooled(engine_options))
        self.sync_jenny = SessionJenny(sessionmaker(self.sync_engine, expire_on_commit=False))
        self.engine = cast("Any", self)
        self.serve = ASGIRopeMiddleware(self.route, **options)

    def held(self) -> int:
        return out_of(self.sync_engine.pool)

    async def dispose(self) -> None:  # type: ignore[override]
        self.sync_engine.dispose()

    async def write(self, n: int, do: str) -> None:
        await anyio.to_thread.run_sync(write, self.sync_jenny, n, do)


def write(jenny: SessionJenny[Any], n: int, do: str) -> None:
    session = jenny.session
    session.add(Row(n=n))
    if do == "orphan":
        session.add(Child(n=n, parent=-n))
    session.flush()
    session.execute(PAUSE)


class FlaskWriter:
    """WSGI with a Session."""

    def __init__(self, url: URL | str, engine_options: Any = None, **options: Any) -> None:
        self.engine = create_engine(url, **pooled(engine_options))
        self.jenny = SessionJenny(sessionmaker(self.engine, expire_on_commit=False))
        self.app = flask.Flask(__name__)
        self.app.logger.disabled = True
        self.app.add_url_rule("/write", view_func=self.view, methods=["GET", "POST"])
        self.inner = WSGIRopeMiddleware(self.app.wsgi_app, **options)

    def held(self) -> int:
        return out_of(self.engine.pool)

    def dispose(self) -> None:
        self.engine.dispose()

    def view(self) -> tuple[str, int]:
        n, do = int(flask.request.args["n"]), flask.request.args["do"]
        write(self.jenny, n, do)
        if do == "raise":
            raise LookupError("told to raise")
        return str(n), status_of(do)

    def __call__(self, environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/state":
            state = {"held": self.held(), "scopes": [repr(found) for found in open_scopes()]}
            start_response("200 OK", [("content-type", "text/plain")])
            return [json.dumps(state).encode()]
        return self.inner(environ, start_response)


class _Quiet(werkzeug.serving.WSGIRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive
    timeout = PATIENCE

    def log(self, type: str, message: str, *args: Any) -> None: ...  # noqa: A002

    def connection_dropped(self, error: BaseException, environ: Any = None) -> None: ...


@contextmanager
def serve_wsgi(app: Callable[..., Any]) -> Iterator[int]:
    """Run a WSGI application under werkzeug's threaded server; the port."""
    server = werkzeug.serving.make_server(HOST, 0, app, threaded=True, request_handler=_Quiet)
    # Connections that a test has left open would be waited for.
    server.daemon_threads = True  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.port
    finally:
        server.shutdown()
        thread.join(PATIENCE)
        server.server_close()


WRITERS: dict[str, tuple[Any, str]] = {
    "asgi-asyncpg": (AsyncWriter, "asyncpg"),
    "asgi-psycopg": (AsyncWriter, "psycopg"),
    "asgi-threads": (ThreadWriter, "psycopg"),
    "wsgi": (FlaskWriter, "psycopg"),
}


def __getattr__(name: str) -> Any:
    """Make `app` when a server asks for it: its address is in the environment."""
    if name != "app":
        raise AttributeError(name)
    found = globals()["app"] = AsyncWriter(
        os.environ["DATABASE_URL"], commit_on_success=True, retries=1
    )
    return found
