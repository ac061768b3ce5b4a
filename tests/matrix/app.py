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
from typing import Any, TypeAlias

import anyio
from sqlalchemy import URL, column, create_engine, literal, make_url, select, table, update
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from rope_middleware import AsyncSessionJenny, SessionJenny, current_scope
from tests.e2e.async_app import Complaints
from tests.kit.leaks import open_scopes
from tests.matrix.frameworks import FRAMEWORKS

POOL_SIZE = 5
CHUNKS = 5
LOOKS = 4
PAUSE = 0.01
"""Seconds in which others run."""
SLOW_SECONDS = 10 * float(os.environ.get("ROPE_PATIENCE", "30"))
"""An end for streams that nobody ends, far beyond the patience of any test."""

DATA = table("data", column("name"), column("count"))
READ = select(DATA.c.count).where(DATA.c.name == "count")
ADD = update(DATA).where(DATA.c.name == "count").values(count=DATA.c.count + 1)

Answer: TypeAlias = "str | Iterator[bytes] | AsyncIterator[bytes]"


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


class Views:
    """What the views do, whatever the framework.

    Called with a route and a token, or awaited where `is_async`, it returns a text, or an
    iterator of bytes to stream.
    """

    is_async: bool
    jenny: SessionJenny[Any] | AsyncSessionJenny[Any]
    pool: Any

    def __init__(self) -> None:
        self.state = State()
        self.routes: dict[str, Callable[[str], Any]] = {
            "read": self.read,
            "write": self.write,
            "raise": self.raises,
            "stream": self.stream,
            "slow": self.slow,
            "concurrent": self.concurrent,
        }

    def __call__(self, route: str, token: str) -> Any:
        return self.routes[route](token)

    def read(self, token: str) -> Any: ...

    def write(self, token: str) -> Any: ...

    def raises(self, token: str) -> Any: ...

    def stream(self, token: str) -> Any: ...

    def slow(self, token: str) -> Any: ...

    def concurrent(self, token: str) -> Any: ...

    def slow_goes_on(self) -> Callable[[], bool]:
        end = time.monotonic() + SLOW_SECONDS
        return lambda: not self.state.released.is_set() and time.monotonic() < end

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


class SyncViews(Views):
    """With a `Session`."""

    is_async = False

    def __init__(self, url: URL, options: Mapping[str, Any]) -> None:
        super().__init__()
        engine = create_engine(url, **options)
        self.pool = engine.pool
        self.jenny = self.session = SessionJenny(sessionmaker(engine))

    def look(self, claim: Claim) -> None:
        found = self.session.scalar(select(literal(claim.token)))
        time.sleep(PAUSE)
        claim.check(found)

    def add(self) -> int:
        self.session.execute(ADD)
        return int(self.session.scalar(READ))

    def read(self, token: str) -> str:
        self.look(Claim(self, token))
        return str(self.session.scalar(READ))

    def write(self, token: str) -> str:
        claim = Claim(self, token)
        number = self.add()
        self.session.commit()
        self.look(claim)
        return str(number)

    def raises(self, token: str) -> str:
        Claim(self, token)
        self.add()
        raise RuntimeError("raised as it should")

    def stream(self, token: str) -> Iterator[bytes]:
        claim = Claim(self, token)
        self.look(claim)

        def chunks() -> Iterator[bytes]:
            for _ in range(CHUNKS):
                self.look(claim)
                yield token.encode()

        return chunks()

    def slow(self, token: str) -> Iterator[bytes]:
        claim = Claim(self, token)
        self.add()
        goes_on = self.slow_goes_on()

        def chunks() -> Iterator[bytes]:
            yield token.encode()
            while goes_on():
                self.look(claim)
                yield b"." * 4096

        return chunks()

    def concurrent(self, token: str) -> str:
        claim = Claim(self, token)
        with self.state.together():
            for _ in range(LOOKS):
                self.look(claim)
        self.session.rollback()  # the counter is read after its lock is held, and not before
        number = self.add()
        self.session.commit()
        self.look(claim)
        return str(number)


class AsyncViews(Views):
    """With an `AsyncSession`."""

    is_async = True

    def __init__(self, url: URL, options: Mapping[str, Any]) -> None:
        super().__init__()
        engine = create_async_engine(url, **options)
        self.pool = engine.pool
        self.jenny = self.session = AsyncSessionJenny(async_sessionmaker(engine))

    async def look(self, claim: Claim) -> None:
        found = await self.session.scalar(select(literal(claim.token)))
        await anyio.sleep(PAUSE)
        claim.check(found)

    async def add(self) -> int:
        await self.session.execute(ADD)
        return int(await self.session.scalar(READ))

    async def read(self, token: str) -> str:
        await self.look(Claim(self, token))
        return str(await self.session.scalar(READ))

    async def write(self, token: str) -> str:
        claim = Claim(self, token)
        number = await self.add()
        await self.session.commit()
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
        goes_on = self.slow_goes_on()

        async def chunks() -> AsyncIterator[bytes]:
            yield token.encode()
            while goes_on():
                await self.look(claim)
                yield b"." * 4096

        return chunks()

    async def concurrent(self, token: str) -> str:
        claim = Claim(self, token)
        with self.state.together():
            for _ in range(LOOKS):
                await self.look(claim)
        await self.session.rollback()
        number = await self.add()
        await self.session.commit()
        await self.look(claim)
        return str(number)


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
    views_of = AsyncViews if url.get_dialect().is_async else SyncViews
    views = views_of(url, options)
    views.state.complaints.install()
    app = framework.make(views)
    return wsgi(app, views) if framework.protocol == "wsgi" else asgi(app, views)


if "MATRIX_FRAMEWORK" in os.environ:
    application = make()
