"""A number that a POST writes and a GET reads, for servers with several worker processes.

The variables `PRIMARY` and `REPLICAS` (with spaces between them) of the environment are the
addresses of the databases. Each answer to a GET tells the number, the database server that it was
read from, and the process that has read it.
"""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from rope_middleware import AsyncSessionJenny, RopeMiddleware, SessionJenny

OPTIONS: dict[str, Any] = {"commit_on_success": True, "read_only": ("GET", "HEAD")}
READ = text("SELECT count, current_setting('cluster_name') FROM data")
WRITE = text("UPDATE data SET count = :number")


def wsgi() -> Any:
    """Make the application of sync sessions."""
    primary, *replicas = map(create_engine, urls())
    jenny = SessionJenny(sessionmaker(primary), replicas=replicas)

    def app(environ: Any, start_response: Any) -> list[bytes]:
        body = b""
        if environ["REQUEST_METHOD"] == "POST":
            jenny.session.execute(WRITE, number_of(environ["PATH_INFO"]))
        else:
            body = told(jenny.session.execute(READ).one())
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    return RopeMiddleware(app, **OPTIONS)


def asgi() -> Any:
    """Make the application of async sessions."""
    primary, *replicas = map(create_async_engine, urls())
    jenny = AsyncSessionJenny(async_sessionmaker(primary), replicas=replicas)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        if scope["method"] == "POST":
            await jenny.session.execute(WRITE, number_of(scope["path"]))
        else:
            body = told((await jenny.session.execute(READ)).one())
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return RopeMiddleware(app, **OPTIONS)


def urls() -> list[str]:
    """The primary's address, and the replicas'."""
    return [os.environ["PRIMARY"], *os.environ["REPLICAS"].split()]


def number_of(path: str) -> dict[str, int]:
    """What a POST writes."""
    return {"number": int(path.strip("/"))}


def told(row: Any) -> bytes:
    """What a GET answers."""
    number, server = row
    return f"{number} {server} {os.getpid()}".encode()
