"""A5 on real servers: 100 clients at once, as FastAPI's documentation writes its applications."""

from __future__ import annotations

import collections
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import httpx
import pytest
from fastapi import Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

from rope_middleware import ASGIRopeMiddleware, RopeMiddleware, SessionJenny
from tests.kit.leaks import nothing_checked_out
from tests.kit.sessions import run_threads
from tests.kit.waiting import eventually
from tests.servers.asgi import HOST, SERVERS, serve
from tests.servers.postgres import postgres_server


class Item(BaseModel):
    """What the endpoint returns: FastAPI checks it in a hop to a thread of its own."""

    number: int


@pytest.mark.parametrize(
    "options", [{}, {"commit_on_success": True}], ids=["app commits", "commit"]
)
def test_A5_100_clients_at_once_are_answered(options: dict[str, Any]) -> None:
    """`def` dependency, `def` endpoint, response model, SQLAlchemy's default pool: 100 of 100."""
    with postgres_server().new_database() as database:
        database.query("CREATE TABLE item (n int)")
        engine = create_engine(database.url("psycopg"), pool_timeout=5)
        jenny = SessionJenny(sessionmaker(engine))
        app = FastAPI()
        app.add_middleware(RopeMiddleware, max_active=15, **options)

        def user() -> int:
            return int(jenny.session.scalar(text("SELECT 1")))

        @app.post("/items")
        def add(user: int = Depends(user)) -> Item:
            jenny.session.execute(
                text("INSERT INTO item SELECT :n FROM pg_sleep(0.01)"), {"n": user}
            )
            if not options:
                jenny.session.commit()
            return Item(number=user)

        with serve(app) as server:
            statuses: list[object] = []

            def ask() -> None:
                try:
                    answer = httpx.post(server.url + "/items", timeout=120, verify=False)
                    statuses.append(answer.status_code)
                except httpx.HTTPError as error:
                    statuses.append(error)

            run_threads([ask] * 100)
            assert collections.Counter(map(str, statuses)) == {"200": 100}
        assert database.query("SELECT count(*) FROM item") == [(100,)]
        nothing_checked_out(engine)
        engine.dispose()


@pytest.mark.parametrize("server", SERVERS)
def test_A5_a_client_that_hangs_up_in_line_is_not_served(server: str) -> None:
    """On every server: the one behind it moves up, and the first body is read to its end."""
    came: list[str] = []
    may_end = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"  # no lifespan
        came.append(scope["path"])
        body = (await receive())["body"]
        while scope["path"] == "/first" and not may_end.is_set():
            await anyio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    wrapped = ASGIRopeMiddleware(app, max_active=1)
    line: Any = wrapped._line
    with serve(wrapped, server) as running, ThreadPoolExecutor(2) as pool:

        def ask(path: str) -> bytes:
            answer = httpx.post(running.url + path, content=path, timeout=60, verify=False)
            return answer.content

        first = pool.submit(ask, "/first")
        eventually(lambda: came == ["/first"], "the first one is served")
        gone = socket.create_connection((HOST, running.port))
        gone.sendall(b"GET /gone HTTP/1.1\r\nHost: test\r\n\r\n")
        eventually(lambda: len(line._waiting) == 1, "one waits in line")
        last = pool.submit(ask, "/last")
        eventually(lambda: len(line._waiting) == 2, "two wait in line")
        gone.close()
        eventually(lambda: len(line._waiting) == 1, "it has left the line")
        may_end.set()
        assert first.result(60) == b"/first"
        assert last.result(60) == b"/last"
    assert came == ["/first", "/last"]
    assert not line._served
