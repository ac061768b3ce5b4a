"""R1 on a real MariaDB, by both drivers: reads without a transaction, and writes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import create_engine, text, update
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from rope_middleware import AsyncSessionJenny, ReadOnlyError, SessionJenny, open_scope
from tests.kit.leaks import checked_out
from tests.kit.models import Row
from tests.servers.mariadb import MariaDatabase, NoMariaDBError, mariadb_server

AUTOCOMMIT = text("SELECT @@autocommit")
WRITES = [
    update(Row).values(name="x"),
    text("DELETE FROM `row`"),
    text("REPLACE INTO `row` (n, name) VALUES (1, 'x')"),
    text("CREATE TABLE other (n INTEGER)"),
    text("SELECT n FROM `row` FOR UPDATE"),
    text("SELECT n FROM `row` LOCK IN SHARE MODE"),
]
Do = Callable[..., Awaitable[Any]]


@pytest.fixture(scope="module")
def database() -> Iterator[MariaDatabase]:
    """A database with a few rows."""
    try:
        server = mariadb_server()
    except NoMariaDBError as error:
        pytest.skip(str(error))
    with server.new_database() as found:
        found.query(
            "CREATE TABLE `row` (n INTEGER PRIMARY KEY, name VARCHAR(9) NOT NULL DEFAULT '')"
        )
        found.query("INSERT INTO `row` (n) VALUES (0), (1), (2), (7)")
        yield found


def run(database: MariaDatabase, driver: str, body: Callable[[Any, Any, Do], Any]) -> None:
    """Run `body` with a jenny, a function that opens a scope, and one that calls its session."""
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
    url, is_async = database.url(driver), driver == "mariadb+asyncmy"
    made: Any = create_async_engine(url, **options) if is_async else create_engine(url, **options)
    jenny: Any = (
        AsyncSessionJenny(async_sessionmaker(made))
        if is_async
        else SessionJenny(sessionmaker(made))
    )

    @asynccontextmanager
    async def scope(**told: Any) -> Any:
        if is_async:
            async with open_scope(**told):
                yield
        else:
            with open_scope(**told):
                yield

    async def do(name: str, *arguments: Any) -> Any:
        found = getattr(jenny.session, name)(*arguments)
        return await found if is_async and name != "add" else found

    async def main() -> None:
        try:
            await body(jenny, scope, do)
            assert checked_out(getattr(made, "sync_engine", made)) == 0
        finally:
            if is_async:
                await made.dispose()
            else:
                made.dispose()

    asyncio.run(main())


DRIVERS = pytest.mark.parametrize("driver", ["mariadb+pymysql", "mariadb+asyncmy"])


@DRIVERS
def test_R1_it_reads_without_a_transaction(database: MariaDatabase, driver: str) -> None:
    """Autocommit is on for the scope alone, and no transaction stands beside the statement."""

    async def body(jenny: Any, scope: Any, do: Do) -> None:
        for _ in range(2):
            async with scope(read_only=True):
                assert (await do("get", Row, 7)).n == 7
                assert await do("scalar", AUTOCOMMIT) == 1
                assert not database.in_transaction("`row`")
                await do("commit")
            async with scope():
                assert (await do("get", Row, 7)).n == 7
                assert await do("scalar", AUTOCOMMIT) == 0
                assert database.in_transaction("`row`")
        assert not database.in_transaction("`row`")

    run(database, driver, body)


@DRIVERS
def test_R1_nothing_is_written(database: MariaDatabase, driver: str) -> None:
    """A flush and statements that write or lock raise ReadOnlyError, each with nothing written."""
    before = database.query("SELECT n, name FROM `row` ORDER BY n")

    async def body(jenny: Any, scope: Any, do: Do) -> None:
        for statement in WRITES:
            async with scope(read_only=True):
                with pytest.raises(ReadOnlyError, match="open_scope"):
                    await do("execute", statement)
        async with scope(read_only=True):
            await do("add", Row(n=100))
            with pytest.raises(ReadOnlyError, match=r"test_R1_mariadb\.py:\d+"):
                await do("flush")
            await do("rollback")
        async with scope():
            await do("add", Row(n=101))
            await do("flush")
            await do("rollback")

    run(database, driver, body)
    assert database.query("SELECT n, name FROM `row` ORDER BY n") == before
    assert database.query("SHOW TABLES LIKE 'other'") == []
