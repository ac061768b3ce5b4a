"""A stack as applications have it, and clients that hang up: is anything lost, left or mixed up?

    python -m tests.soak.stack                      10,000 requests; about three minutes
    python -m tests.soak.stack --requests 400       a short one
    python -m tests.soak.stack --seed 7             the same plan again

A `BaseHTTPMiddleware` stands around `RopeMiddleware(commit_on_success=True)`, another one inside of
it, then Starlette's routes and a Flask app that is mounted twice: by a2wsgi and by Starlette's own
bridge. Both libraries send the start of a response while the application goes on. The work is sync
(psycopg) and async (asyncpg), on one PostgreSQL. Of the clients a third hangs up: while nothing is
sent yet, after the start, or between two chunks.

After the run no connection is out; nobody has read a success whose rows are not there (lost), nor
an error whose rows are (invented); no request has met a session or a row of another one (crossed).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import a2wsgi
from flask import Flask
from flask import Response as FlaskResponse
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from rope_middleware import AsyncSessionJenny, RopeMiddleware, SessionJenny
from tests.kit.asgi import http_scope
from tests.kit.leaks import checked_out
from tests.kit.stacks import Passing
from tests.kit.waiting import poll
from tests.servers.postgres import Database, postgres_server

with contextlib.suppress(ImportError):  # Starlette calls it old; many applications have it
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from starlette.middleware.wsgi import WSGIMiddleware as OwnBridge

ASKERS = 12  # at a time
HANGING = 1 / 3  # share of the clients that hang up
CHUNKS = 3
INSERT = text("INSERT INTO written (n, part) VALUES (:n, :part)")
COUNT = text("SELECT count(*) FROM written WHERE n = :n")


@dataclass
class Outcome:
    """What came of a run."""

    out: int = 0
    lost: list[str] = field(default_factory=list)
    invented: list[str] = field(default_factory=list)
    crossed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    @property
    def is_clean(self) -> bool:
        """Whether all is as it has to be."""
        return not (self.out or self.lost or self.invented or self.crossed or self.wrong)

    def told(self) -> str:
        """Return the figures in a few lines."""
        seen = ", ".join(f"{what} {number}" for what, number in sorted(self.seen.items()))
        return (
            f"{seen}\n{self.out} out / {len(self.lost)} lost / {len(self.invented)} invented / "
            f"{len(self.crossed)} crossed / {len(self.wrong)} other"
        )


class Site:
    """The application, its engines, and what its requests have noticed."""

    def __init__(self, database: Database, outcome: Outcome) -> None:
        self._outcome = outcome
        self.engine = create_engine(database.url("psycopg"), pool_size=ASKERS, max_overflow=ASKERS)
        self.async_engine = create_async_engine(
            database.url("asyncpg"), pool_size=ASKERS, max_overflow=ASKERS
        )
        self.jenny = SessionJenny(sessionmaker(self.engine))
        self.async_jenny = AsyncSessionJenny(async_sessionmaker(self.async_engine))
        flask = self._flask()
        bridge = a2wsgi.WSGIMiddleware(flask, workers=ASKERS)
        mounts = [Mount("/a2wsgi", bridge), Mount("/own", OwnBridge(flask))]
        routes = [
            Route(f"/{name}/{{n:int}}", getattr(self, f"_{name}"))
            for name in ("plain", "stream", "later", "refused", "breaks")
        ]
        rope = Middleware(RopeMiddleware, commit_on_success=True)  # type: ignore[arg-type]
        around = [Middleware(Passing), rope, Middleware(Passing)]
        self.app = Starlette(routes=[*routes, *mounts], middleware=around)

    async def close(self) -> None:
        """Wait for the end of what is under way, then leave nothing open."""
        pools = self.engine, self.async_engine.sync_engine
        with contextlib.suppress(AssertionError):
            await poll(lambda: not sum(map(checked_out, pools)))
        self._outcome.out = sum(map(checked_out, pools))
        self.engine.dispose()
        await self.async_engine.dispose()

    def _owns(self, session: Any, n: int) -> None:
        if session.info.setdefault("request", n) != n:
            self._outcome.crossed.append(f"request {n}: a session of {session.info['request']}")

    def _write(self, n: int, part: str, session: Any = None) -> int:
        session = session or self.jenny.session
        self._owns(session, n)
        session.execute(INSERT, {"n": n, "part": part})
        return int(session.scalar(COUNT, {"n": n}))

    async def _awrite(self, n: int, part: str) -> int:
        session = self.async_jenny.session
        self._owns(session, n)
        await session.execute(INSERT, {"n": n, "part": part})
        return int(await session.scalar(COUNT, {"n": n}))

    def _plain(self, request: Request) -> Response:
        n = request.path_params["n"]
        return PlainTextResponse(f"{n}:{self._write(n, 'view')}")

    def _stream(self, request: Request) -> Response:
        n, session = request.path_params["n"], self.jenny.session  # the body has kept it
        self._write(n, "view", session)
        return StreamingResponse(
            f"{n}:{self._write(n, f'chunk {number}', session)} " for number in range(CHUNKS)
        )

    async def _later(self, request: Request) -> Response:
        n = request.path_params["n"]
        await self._awrite(n, "view")

        async def chunks() -> AsyncIterator[str]:
            for number in range(CHUNKS):
                yield f"{n}:{await self._awrite(n, f'chunk {number}')} "

        return StreamingResponse(chunks())

    def _refused(self, request: Request) -> Response:
        n = request.path_params["n"]
        return PlainTextResponse(f"{n}:{self._write(n, 'view')}", 409)

    async def _breaks(self, request: Request) -> Response:
        await self._awrite(request.path_params["n"], "view")
        raise ZeroDivisionError

    def _flask(self) -> Flask:
        flask = Flask(__name__)

        @flask.get("/plain/<int:n>")
        def plain(n: int) -> str:
            return f"{n}:{self._write(n, 'view')}"

        @flask.get("/refused/<int:n>")
        def refused(n: int) -> tuple[str, int]:
            return f"{n}:{self._write(n, 'view')}", 409

        @flask.get("/stream/<int:n>")
        def stream(n: int) -> FlaskResponse:
            self._write(n, "view")

            def chunks() -> Iterator[str]:
                for number in range(CHUNKS):
                    yield f"{n}:{self._write(n, f'chunk {number}')} "

            return FlaskResponse(chunks())

        return flask


# What is asked for: the status, the numbers in the body, and the rows.
_VIEW = [1], ["view"]
_ALL = [2, 3, 4], ["view", *(f"chunk {number}" for number in range(CHUNKS))]
PATHS: dict[str, tuple[int, tuple[list[int], list[str]]]] = {
    "/plain": (200, _VIEW),
    "/stream": (200, _ALL),
    "/later": (200, _ALL),
    "/refused": (409, _VIEW),
    "/breaks": (500, ([], [])),
    "/a2wsgi/plain": (200, _VIEW),
    "/a2wsgi/stream": (200, _ALL),
    "/a2wsgi/refused": (409, _VIEW),
    "/own/plain": (200, _VIEW),
    "/own/stream": (200, _ALL),
    "/own/refused": (409, _VIEW),
}


@dataclass
class Client:
    """One request, and what its client has read before it hung up."""

    n: int
    path: str
    patience: int | None  # messages that it reads; None: all
    status: int = 0
    body: bytes = b""
    is_whole: bool = False

    async def ask(self, app: Any) -> None:
        """Send the request; like a server, hear of no error."""
        gone, first = asyncio.Event(), [{"type": "http.request", "body": b"", "more_body": False}]
        if self.patience == 0:
            gone.set()

        async def receive() -> Any:
            if first:
                return first.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        read = 0

        async def send(message: Any) -> None:
            nonlocal read
            if gone.is_set():
                raise OSError("the client has gone")  # ASGI 2.4
            await asyncio.sleep(0)
            self.status = message.get("status", self.status)
            self.body += message.get("body", b"")
            self.is_whole = message["type"].endswith("body") and not message.get("more_body")
            read += 1
            if self.patience is not None and read >= self.patience:
                gone.set()

        asgi = {"version": "3.0", "spec_version": "2.4"}
        with contextlib.suppress(Exception):
            await app(http_scope(f"{self.path}/{self.n}", asgi=asgi), receive, send)
        gone.set()


async def run(database: Database, requests: int, seed: int) -> Outcome:
    """Send the requests; look at what is there."""
    database.query("CREATE TABLE written (id serial PRIMARY KEY, n int NOT NULL, part text)")
    database.query("CREATE INDEX ON written (n)")
    outcome, numbers, plan = Outcome(), count(1), random.Random(seed)
    site = Site(database, outcome)
    clients: list[Client] = []

    async def ask() -> None:
        while (n := next(numbers)) <= requests:
            hangs = plan.random() < HANGING
            path = plan.choice(list(PATHS))
            client = Client(n, path, plan.choice([0, 1, 2, 3]) if hangs else None)
            clients.append(client)
            await client.ask(site.app)

    await asyncio.gather(*(ask() for _ in range(ASKERS)))
    await site.close()
    rows: dict[int, list[str]] = {}
    for n, part in database.query("SELECT n, part FROM written ORDER BY id"):
        rows.setdefault(n, []).append(part)
    for client in clients:
        _judge(client, rows.get(client.n, []), outcome)
    return outcome


def _judge(client: Client, rows: list[str], outcome: Outcome) -> None:
    status, (numbers, expected) = PATHS[client.path]
    what = f"request {client.n} {client.path}: {client.status} {client.body!r}, rows {rows}"
    outcome.seen["whole" if client.is_whole else "hung up or broken"] += 1
    if client.status and client.status < 400:
        missing = set(expected if client.is_whole else ["view"]) - set(rows)
        if missing:
            outcome.lost.append(what)
    elif client.status and rows:
        outcome.invented.append(what)
    if len(set(rows)) < len(rows):
        outcome.invented.append(what)
    told = [part.split(":") for part in client.body.decode().split()]
    if client.path != "/breaks":
        if any(n != str(client.n) for n, _ in told[: len(told) if client.is_whole else -1]):
            outcome.crossed.append(what)
        if client.patience is None and not (
            client.is_whole and client.status == status and [int(n) for _, n in told] == numbers
        ):
            outcome.wrong.append(what)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    told = parser.parse_args()
    for name in ("rope_middleware", "sqlalchemy.pool", "asyncio"):
        logging.getLogger(name).addHandler(logging.NullHandler())
        logging.getLogger(name).propagate = False
    print(f"--requests {told.requests} --seed {told.seed}", flush=True)
    began = time.monotonic()
    with postgres_server().new_database() as database:
        outcome = asyncio.run(run(database, told.requests, told.seed))
    print(f"{outcome.told()}\n{time.monotonic() - began:.0f} s")
    for line in [*outcome.lost, *outcome.invented, *outcome.crossed, *outcome.wrong][:20]:
        print(line)
    return 0 if outcome.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
