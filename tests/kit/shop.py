"""One service on PostgreSQL, served in four ways: what it does is written once, for a `Session`.

An `AsyncSession` runs it by ``run_sync``::

    shop = Shop("asgi-asyncpg", url, commit_on_success=True, retries=5)
    answer = await shop.ask(7)          # adds row 7
    assert answer.status == 201
    await shop.close()
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

from sqlalchemy import URL, create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from rope_middleware import ASGIRopeMiddleware, AsyncSessionJenny, SessionJenny, WSGIRopeMiddleware
from tests.kit.asgi import ASGIClient, answer
from tests.kit.models import Row
from tests.kit.wsgi import Server, make_environ

SHOPS = {
    "asgi-asyncpg": "asyncpg",
    "asgi-psycopg": "psycopg",
    "asgi-threads": "psycopg",
    "wsgi": "psycopg",
}
"""The ways, each with its driver."""

MARIA = {
    "asgi-asyncmy": "mariadb+asyncmy",
    "asgi-threads": "mariadb+pymysql",
    "wsgi": "mariadb+pymysql",
}
"""The ways on MariaDB."""

_ASYNC = {"asgi-asyncpg", "asgi-psycopg", "asgi-asyncmy"}

Work = Callable[[Session, int], int]
OURS = b"of the app"


def add(session: Session, n: int) -> int:
    """Add row `n`; answer 201."""
    session.add(Row(n=n))
    session.flush()
    return 201


def add_and_commit(session: Session, n: int) -> int:
    """Do as `add`, and commit."""
    session.add(Row(n=n))
    session.commit()
    return 201


@dataclass
class Answer:
    """What came of one request."""

    status: int
    """500 for an error that came out of the middleware, as servers have it."""
    error: BaseException | None = None
    body: bytes = b""


class Shop:
    """A service.

    Args:
        kind: one of SHOPS, or of MARIA.
        url: of its database.
        work: what a request does; it returns the status.
        engine: options of the engine.
        options: of the middleware.
    """

    def __init__(
        self, kind: str, url: URL, work: Work = add, engine: Any = None, **options: Any
    ) -> None:
        self.kind = kind
        self.work = work
        told = {"pool_size": 5, "max_overflow": 15, **(engine or {})}
        if kind in _ASYNC:
            self.async_engine = create_async_engine(url, **told)
            self.engine = self.async_engine.sync_engine
            self.async_jenny = AsyncSessionJenny(
                async_sessionmaker(self.async_engine, expire_on_commit=False)
            )
            self.app: Any = ASGIRopeMiddleware(self._in_loop, **options)
        else:
            self.engine = create_engine(url, **told)
            self.jenny = SessionJenny(sessionmaker(self.engine, expire_on_commit=False))
            app: Any = ASGIRopeMiddleware if kind == "asgi-threads" else WSGIRopeMiddleware
            self.app = app(self._in_threads if kind == "asgi-threads" else self._wsgi, **options)

    def held(self) -> int:
        """Return how many connections are out."""
        return int(self.engine.pool.checkedout())  # type: ignore[attr-defined]

    async def close(self) -> None:
        """Close the pool."""
        if hasattr(self, "async_engine"):
            await self.async_engine.dispose()
        else:
            self.engine.dispose()

    async def ask(self, n: int) -> Answer:
        """Send one request."""
        if self.kind == "wsgi":
            return await asyncio.to_thread(self._ask_wsgi, n)
        client, error = ASGIClient(), None
        try:
            await client(self.app, f"/{n}", "POST")
        except Exception as raised:
            error = raised
        return Answer(client.status if client.messages else 500, error, client.body)

    def _ask_wsgi(self, n: int) -> Answer:
        seen = Server()(self.app, make_environ(f"/{n}", REQUEST_METHOD="POST", CONTENT_LENGTH="0"))
        return Answer(int(seen.starts[-1][0][:3]) if seen.starts else 500, seen.raised, seen.body)

    async def _in_loop(self, scope: Any, receive: Any, send: Any) -> None:
        n = int(scope["path"][1:])
        await answer(send, await self.async_jenny.session.run_sync(self.work, n), OURS)

    async def _in_threads(self, scope: Any, receive: Any, send: Any) -> None:
        n = int(scope["path"][1:])
        await answer(send, await asyncio.to_thread(lambda: self.work(self.jenny.session, n)), OURS)

    def _wsgi(self, environ: Any, start_response: Any) -> list[bytes]:
        status = self.work(self.jenny.session, int(environ["PATH_INFO"][1:]))
        start_response(f"{status} Told", [("Content-Type", "text/plain")])
        return [OURS]


def ask_once(kind: str, url: URL, work: Work = add, **options: object) -> Answer:
    """Send one request to a shop of its own; nothing may stay out."""

    async def main() -> Answer:
        return await send(Shop(kind, url, work, **options))

    return asyncio.run(main())


async def send(shop: Shop) -> Answer:
    """Send one request to the shop, and close it; nothing may stay out."""
    answer = await shop.ask(1)
    assert shop.held() == 0
    await shop.close()
    return answer


async def load_over_a_restart(
    shop: Shop, restart: Callable[[], object], clients: int = 16
) -> dict[int, Answer]:
    """Have clients write until the database has ended, come again and served; their answers."""
    # Each client has a thread, and the restart need not wait for one.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(clients + 2))
    answers: dict[int, Answer] = {}
    numbers, is_over = count(1), asyncio.Event()

    async def client() -> None:
        while not is_over.is_set():
            n = next(numbers)
            answers[n] = await shop.ask(n)

    async def more(number: int) -> None:
        enough = len(answers) + number
        while len(answers) < enough:
            await asyncio.sleep(0.01)

    async def meanwhile() -> None:
        await more(50)
        await asyncio.to_thread(restart)
        await more(50)
        is_over.set()

    await asyncio.gather(meanwhile(), *(client() for _ in range(clients)))
    assert shop.held() == 0
    await shop.close()
    return answers


def insert(session: Session, n: int) -> int:
    """Write `n` into a table that would show it twice; answer 201."""
    session.execute(text("INSERT INTO written (n) VALUES (:n)"), {"n": n})
    return 201
