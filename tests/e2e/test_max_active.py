"""A5 on real servers: 100 clients at once, as FastAPI's documentation writes its applications."""

from __future__ import annotations

import collections
import threading
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

from rope_middleware import RopeMiddleware, SessionJenny
from tests.kit.leaks import nothing_checked_out
from tests.servers.asgi import serve
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

            clients = [threading.Thread(target=ask) for _ in range(100)]
            for one in clients:
                one.start()
            for one in clients:
                one.join(180)
            assert collections.Counter(map(str, statuses)) == {"200": 100}
        assert database.query("SELECT count(*) FROM item") == [(100,)]
        nothing_checked_out(engine)
        engine.dispose()
