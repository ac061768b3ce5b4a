"""A counter for servers with several worker processes: ``asgi`` (asyncpg) and ``wsgi`` (psycopg).

Each answer tells which process gave it and which connection of PostgreSQL it used. The variables
of the environment:

- ``DATABASE_URL_ASYNC``, ``DATABASE_URL_SYNC``: the database.
- ``CONNECT``: connect as soon as the module is loaded, and put the connection into the pool; what
  an application does that reads its settings from the database.
- ``FORKED``: ``dispose`` to have a forked process make a pool of its own; ``uwsgi`` to have uWSGI
  tell it to.

As a module of gunicorn's configuration (``-c python:tests.e2e.workers_app``) it disposes of the
pool in ``post_fork``.
"""

from __future__ import annotations

import json
import os
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from rope_middleware import AsyncSessionJenny, RopeMiddleware, SessionJenny, current_scope

POOL: dict[str, Any] = {"pool_size": 3, "max_overflow": 0, "pool_timeout": 60}

engine = create_engine(os.environ["DATABASE_URL_SYNC"], **POOL)
async_engine = create_async_engine(os.environ["DATABASE_URL_ASYNC"], **POOL)
jenny = SessionJenny(sessionmaker(engine))
async_jenny = AsyncSessionJenny(async_sessionmaker(async_engine))

COUNT = text("UPDATE data SET count = count + 1 RETURNING count, pg_backend_pid()")
PAUSE = text("SELECT pg_sleep(0.003)")

if os.environ.get("CONNECT"):
    with engine.connect():
        pass


def dispose() -> None:
    """Leave the connections to the parent process, and make a new pool."""
    engine.dispose(close=False)


def post_fork(server: Any, worker: Any) -> None:
    """gunicorn's hook."""
    dispose()


if os.environ.get("FORKED") == "dispose":
    os.register_at_fork(after_in_child=dispose)
elif os.environ.get("FORKED") == "uwsgi":
    from uwsgidecorators import postfork

    postfork(dispose)


def report(row: Any) -> bytes:
    scope = current_scope()
    fresh = not scope.info
    scope.info["seen"] = True
    told = {"count": row[0], "backend": row[1], "process": os.getpid(), "fresh": fresh}
    return json.dumps(told).encode()


def count(environ: Any, start_response: Any) -> list[bytes]:
    session = jenny.session
    session.execute(PAUSE)
    row = session.execute(COUNT).one()
    session.commit()
    body = report(row)
    start_response("200 OK", [("Content-Type", "application/json")])
    return [body]


async def acount(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    session = async_jenny.session
    await session.execute(PAUSE)
    row = (await session.execute(COUNT)).one()
    await session.commit()
    body = report(row)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


wsgi = RopeMiddleware(count)
asgi = RopeMiddleware(acount)
