"""The application that every server runs: one framework with six routes, and what it tells.

A framework's part is in `frameworks`; here is what its view does. Every request brings a
``token``. It is written into its session and its scope and looked for at each step, so that a
request that gets another's session is noticed.

- ``read`` answers with the counter,
- ``write`` counts, commits, and answers with the number,
- ``raise`` counts, does not commit, and raises,
- ``stream`` answers in several chunks, each of which uses the session,
- ``slow`` counts, does not commit, and streams until its client goes away,
- ``concurrent`` uses its session over and over while others do, then counts.

``/state`` stands outside of the middleware: what is out of the pool, which scopes are open, what
was mixed up, and what was complained of. ``/release`` ends what is still slow.

The environment says what to run: ``MATRIX_FRAMEWORK`` and ``MATRIX_DATABASE_URL``.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anyio
from sqlalchemy import URL, column, create_engine, literal, make_url, select, table, update
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from rope_middleware import AsyncSessionJenny, SessionJenny, current_scope
from tests.e2e.async_app import Complaints
from tests.kit.either import now
from tests.kit.frameworks import FRAMEWORKS
from tests.kit.leaks import open_scopes

POOL_SIZE = 5
CHUNKS = 5
SLOW_SECONDS = 10 * float(os.environ.get("ROPE_PATIENCE", "30"))
"""An end for streams that nobody ends, far beyond the patience of any test."""

DATA = table("data", column("name"), column("count"))


class Complained(Complaints):
    """As its base, and of the package's own log everything."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("rope_middleware"):
            self.heard.append(f"{record.name}: {record.getMessage()} {record.exc_info}")
        else:
            super().emit(record)

    def install(self) -> None:
        super().install()
        logging.getLogger("rope_middleware").addHandler(self)


class State:
    """What the process has seen."""

    def __init__(self) -> None:
        self.mixed_up: list[str] = []
        self.seen = 0
        self.busy = 0
        self.most_at_once = 0
        self.released = threading.Event()
        self.complaints = Complained()
        self.lock = threading.Lock()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Count how many requests are in the block at the same time."""
        with self.lock:
            self.busy += 1
            self.most_at_once = max(self.most_at_once, self.busy)
        try:
            yield
        finally:
            with self.lock:
                self.busy -= 1


class Claim:
    """The token's claim on the session and the scope of its request."""

    def __init__(self, views: Views, token: str) -> None:
        self.state = views.state
        self.jenny: Any = views.jenny
        self.token = token
        self.scope = current_scope()
        self.session = self.jenny.session
        with self.state.lock:
            self.state.seen += 1
        if self.session.info or self.scope.info:
            self.state.mixed_up.append(f"{token} got the session of {self.session.info}")
        self.session.info["token"] = self.scope.info["token"] = token

    def check(self, found: object) -> None:
        mine = (
            self.jenny.session is self.session
            and current_scope() is self.scope
            and self.session.info == self.scope.info == {"token": self.token}
            and found == self.token
        )
        if not mine:
            self.state.mixed_up.append(
                f"{self.token} sees {found} and the session of {self.jenny.session.info}"
            )


def chunks_now(chunks: AsyncIterator[bytes]) -> Iterator[bytes]:
    """Do the same with a stream."""
    try:
        while True:
            yield now(anext(chunks))
    except StopAsyncIteration:
        return
    finally:
        now(chunks.aclose())  # type: ignore[attr-defined]


class Views:
    """What the views do, whatever the framework, with a `Session` or an `AsyncSession`.

    Called with a route and a token, or awaited where `is_async`, it returns a text, or an
    iterator of bytes to stream.
    """

    pause = 0.01
    """Seconds in which others run."""
    looks = 4

    def __init__(self, url: URL, options: Mapping[str, Any], name: str = "count") -> None:
        self.is_async = bool(url.get_dialect().is_async)
        self.jenny: Any
        if self.is_async:
            engine: Any = create_async_engine(url, **options)
            self.jenny = AsyncSessionJenny(async_sessionmaker(engine))
        else:
            engine = create_engine(url, **options)
            self.jenny = SessionJenny(sessionmaker(engine))
        self.pool = engine.pool
        self.state = State()
        mine = DATA.c.name == name
        self.read_it = select(DATA.c.count).where(mine)
        self.add_one = update(DATA).where(mine).values(count=DATA.c.count + 1)
        self.routes: dict[str, Callable[[str], Any]] = {
            "read": self.read,
            "write": self.write,
            "raise": self.raises,
            "stream": self.stream,
            "slow": self.slow,
            "concurrent": self.concurrent,
        }

    def __call__(self, route: str, token: str) -> Any:
        answer = self.routes[route](token)
        if self.is_async:
            return answer
        found = now(answer)
        return chunks_now(found) if hasattr(found, "aclose") else found

    async def do(self, name: str, *arguments: Any) -> Any:
        found = getattr(self.jenny, name)(*arguments)
        return await found if self.is_async else found

    async def look(self, claim: Claim) -> None:
        found = await self.do("scalar", select(literal(claim.token)))
        if self.is_async:
            await anyio.sleep(self.pause)
        else:
            time.sleep(self.pause)  # noqa: ASYNC251 - it is no coroutine of a loop
        claim.check(found)

    async def add(self) -> int:
        await self.do("execute", self.add_one)
        return int(await self.do("scalar", self.read_it))

    async def read(self, token: str) -> str:
        await self.look(Claim(self, token))
        return str(await self.do("scalar", self.read_it))

    async def write(self, token: str) -> str:
        claim = Claim(self, token)
        number = await self.add()
        await self.do("commit")
        await self.look(claim)
        return str(number)

    async def raises(self, token: str) -> str:
        Claim(self, token)
        await self.add()
        raise RuntimeError("raised as it should")

    async def stream(self, token: str) -> AsyncIterator[bytes]:
        claim = Claim(self, token)
        await self.look(claim)

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(CHUNKS):
                await self.look(claim)
                yield token.encode()

        return chunks()

    async def slow(self, token: str) -> AsyncIterator[bytes]:
        claim = Claim(self, token)
        await self.add()
        end = time.monotonic() + SLOW_SECONDS

        async def chunks() -> AsyncIterator[bytes]:
            yield token.encode()
            while not self.state.released.is_set() and time.monotonic() < end:
                await self.look(claim)
                yield b"." * 4096

        return chunks()

    async def concurrent(self, token: str) -> str:
        claim = Claim(self, token)
        with self.state.together():
            for _ in range(self.looks):
                await self.look(claim)
        await self.do("rollback")  # the counter is read after its lock is held, and not before
        number = await self.add()
        await self.do("commit")
        await self.look(claim)
        return str(number)

    def report(self) -> dict[str, Any]:
        # With aiosqlite a query that was cut off may keep SQLite's lock until then: see the
        # guide, "What outlives its request".
        gc.collect()
        return {
            "checked_out": self.pool.checkedout(),
            "open": [repr(scope) for scope in open_scopes()],
            "mixed_up": self.state.mixed_up,
            "seen": self.state.seen,
            "most_at_once": self.state.most_at_once,
            "complaints": self.state.complaints.heard,
        }


# -- outside of the middleware -----------------------------------------------------------------


def tells(views: Views, path: str) -> bytes | None:
    """What the process itself answers; None where the framework does."""
    if path == "/release":
        views.state.released.set()
    if path in ("/release", "/state"):
        return json.dumps(views.report()).encode()
    return None


def asgi(app: Any, views: Views) -> Callable[[Any, Any, Any], Awaitable[None]]:
    async def outermost(scope: Any, receive: Any, send: Any) -> None:
        body = tells(views, scope["path"]) if scope["type"] == "http" else None
        if body is None:
            await app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return outermost


def wsgi(app: Any, views: Views) -> Callable[[Any, Any], Any]:
    def outermost(environ: Any, start_response: Any) -> Any:
        body = tells(views, environ["PATH_INFO"])
        if body is None:
            return app(environ, start_response)
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        start_response("200 OK", headers)
        return [body]

    return outermost


def make() -> Any:
    framework = FRAMEWORKS[os.environ["MATRIX_FRAMEWORK"]]
    url = make_url(os.environ["MATRIX_DATABASE_URL"])
    options: dict[str, Any] = {"pool_size": POOL_SIZE, "max_overflow": 0, "pool_timeout": 30}
    if url.get_backend_name() == "sqlite":
        options["connect_args"] = {"timeout": 30}
    views = Views(url, options)
    views.state.complaints.install()
    app = framework.make(views)
    return wsgi(app, views) if framework.protocol == "wsgi" else asgi(app, views)


if "MATRIX_FRAMEWORK" in os.environ:
    application = make()
