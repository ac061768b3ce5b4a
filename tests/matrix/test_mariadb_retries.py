"""MariaDB refuses a transaction, and the request is run again: lock wait timeout and deadlock.

The views are Flask's with a Session and Starlette's with an AsyncSession. Both turn the error
into a 500 before the middleware sees it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flask
import httpx
import pymysql
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from werkzeug.test import Client

from rope_middleware import AsyncSessionJenny, RopeMiddleware, SessionJenny
from tests.kit.waiting import PATIENCE, eventually
from tests.servers.mariadb import LOCK_WAIT_TIMEOUT, MariaDatabase, mariadb_server

DEADLOCK = 1213
# An open transaction of the application waits this long for a row, in seconds.
OPTIONS: dict[str, Any] = {
    "connect_args": {"init_command": "SET SESSION innodb_lock_wait_timeout = 1"}
}

Statement = tuple[str, dict[str, object]]
Script = Callable[[int], Iterator[Statement]]
"""What one try does: yields statements, given how many tries there were before."""


@pytest.fixture
def database() -> Iterator[MariaDatabase]:
    """Two counters at 0, and a table for what each try writes."""
    with mariadb_server().new_database(
        "CREATE TABLE data (name VARCHAR(20) PRIMARY KEY, count INTEGER NOT NULL)",
        "INSERT INTO data VALUES ('a', 0), ('b', 0)",
        "CREATE TABLE tries (n INTEGER PRIMARY KEY)",
    ) as database:
        yield database


def add(name: str, number: int = 1) -> Statement:
    change = "UPDATE data SET count = count + :number WHERE name = :name"
    return change, {"number": number, "name": name}


def wrote(n: int) -> Statement:
    return "INSERT INTO tries VALUES (:n)", {"n": n}


def counters(database: MariaDatabase) -> dict[str, int]:
    return dict(database.query("SELECT name, count FROM data"))  # type: ignore[arg-type]


def code_of(error: DBAPIError) -> int:
    return int(error.orig.args[0]) if error.orig is not None else 0


def sync_request(database: MariaDatabase, script: Script, retries: int) -> tuple[int, list[int]]:
    """Send one request to Flask; the status of its answer, and the codes of the refusals."""
    engine = create_engine(database.url("mariadb+pymysql"), **OPTIONS)
    jenny = SessionJenny(sessionmaker(engine))
    app = flask.Flask("refused")
    refused: list[int] = []

    @app.post("/")
    def view() -> str:
        assert flask.request.get_data() == b"body"
        try:
            for statement, values in script(len(refused)):
                jenny.session.execute(text(statement), values)
        except DBAPIError as error:
            refused.append(code_of(error))
            raise
        return "done"

    client = Client(RopeMiddleware(app, commit_on_success=True, retries=retries))
    try:
        return client.post("/", data=b"body").status_code, refused
    finally:
        engine.dispose()


def async_request(database: MariaDatabase, script: Script, retries: int) -> tuple[int, list[int]]:
    """Send one request to Starlette; the status of its answer, and the codes of the refusals."""
    refused: list[int] = []

    async def main() -> int:
        engine = create_async_engine(database.url("mariadb+asyncmy"), **OPTIONS)
        jenny = AsyncSessionJenny(async_sessionmaker(engine))

        async def view(request: Any) -> PlainTextResponse:
            assert await request.body() == b"body"
            steps = script(len(refused))
            try:
                while (step := await asyncio.to_thread(next, steps, None)) is not None:
                    await jenny.session.execute(text(step[0]), step[1])
            except DBAPIError as error:
                refused.append(code_of(error))
                raise
            return PlainTextResponse("done")

        app = RopeMiddleware(
            Starlette(routes=[Route("/", view, methods=["POST"])]),
            commit_on_success=True,
            retries=retries,
        )
        # Starlette answers with a 500 and raises all the same, for the server's log.
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            status = (await client.post("/", content=b"body")).status_code
        await engine.dispose()
        return status

    return asyncio.run(main()), refused


@contextmanager
def another_client(database: MariaDatabase) -> Iterator[Any]:
    """A cursor in a transaction that nobody commits but the test."""
    url = database.url("mysql+pymysql")
    told = url.translate_connect_args(username="user") | dict(url.query)
    connection: Any = pymysql.connect(**told)
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


both = pytest.mark.parametrize("request_", [sync_request, async_request])


@both
def test_C6_a_lock_wait_timeout_of_mariadb_is_tried_again(
    request_: Any, database: MariaDatabase
) -> None:
    """1205: MariaDB undoes one statement only, so the rest of that try must be undone here."""
    with another_client(database) as other:
        other.execute("UPDATE data SET count = 10 WHERE name = 'a'")

        def script(tries: int) -> Iterator[Statement]:
            if tries:
                other.connection.commit()
            yield wrote(tries)
            yield add("a")

        assert request_(database, script, 2) == (200, [LOCK_WAIT_TIMEOUT])
    assert counters(database) == {"a": 11, "b": 0}
    assert database.query("SELECT n FROM tries") == [(1,)]
    assert database.in_transaction("data") == []


@both
def test_C6_a_deadlock_of_mariadb_is_tried_again(request_: Any, database: MariaDatabase) -> None:
    """1213: two transactions want each other's row, and the one that changed less is refused."""
    with another_client(database) as other:
        other.execute("UPDATE data SET count = 10 WHERE name = 'b'")
        other.executemany("INSERT INTO tries VALUES (%s)", [(n,) for n in range(100, 150)])

        def wants_the_other_row() -> None:
            other.execute("UPDATE data SET count = count + 10 WHERE name = 'a'")
            other.connection.commit()

        crossing = threading.Thread(target=wants_the_other_row, daemon=True)

        def script(tries: int) -> Iterator[Statement]:
            yield wrote(tries)
            yield add("a")
            if not tries:
                crossing.start()
                eventually(database.waiting, "the other transaction waits for this one")
            yield add("b")

        assert request_(database, script, 2) == (200, [DEADLOCK])
        crossing.join(PATIENCE)
    assert counters(database) == {"a": 11, "b": 11}
    assert database.query("SELECT n FROM tries WHERE n < 100") == [(1,)]
    assert database.in_transaction("data") == []
