"""R1 on a real MariaDB, by both drivers: reads without a transaction, and writes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import text, update

from rope_middleware import ReadOnlyError
from tests.kit.either import Either
from tests.kit.models import Row
from tests.servers.mariadb import MariaDatabase, mariadb_server

AUTOCOMMIT = text("SELECT @@autocommit")
WRITES = [
    update(Row).values(name="x"),
    text("DELETE FROM `row`"),
    text("REPLACE INTO `row` (n, name) VALUES (1, 'x')"),
    text("CREATE TABLE other (n INTEGER)"),
    text("SELECT n FROM `row` FOR UPDATE"),
    text("SELECT n FROM `row` LOCK IN SHARE MODE"),
]


@pytest.fixture(scope="module")
def database() -> Iterator[MariaDatabase]:
    """A database with a few rows."""
    with mariadb_server().new_database(
        "CREATE TABLE `row` (n INTEGER PRIMARY KEY, name VARCHAR(9) NOT NULL DEFAULT '')",
        "INSERT INTO `row` (n) VALUES (0), (1), (2), (7)",
    ) as found:
        yield found


def run(database: MariaDatabase, driver: str, body: Callable[[Either], Any]) -> None:
    """Run `body` with a jenny of the driver's kind, with one connection."""

    async def main() -> None:
        async with Either([database.url(driver)], is_async=driver == "mariadb+asyncmy") as either:
            await body(either)

    asyncio.run(main())


DRIVERS = pytest.mark.parametrize("driver", ["mariadb+pymysql", "mariadb+asyncmy"])


@DRIVERS
def test_R1_it_reads_without_a_transaction(database: MariaDatabase, driver: str) -> None:
    """Autocommit is on for the scope alone, and no transaction stands beside the statement."""

    async def body(either: Either) -> None:
        for _ in range(2):
            async with either.scope(read_only=True):
                assert (await either.do("get", Row, 7)).n == 7
                assert await either.do("scalar", AUTOCOMMIT) == 1
                assert not database.in_transaction("`row`")
                await either.do("commit")
            async with either.scope():
                assert (await either.do("get", Row, 7)).n == 7
                assert await either.do("scalar", AUTOCOMMIT) == 0
                assert database.in_transaction("`row`")
        assert not database.in_transaction("`row`")

    run(database, driver, body)


@DRIVERS
def test_R1_nothing_is_written(database: MariaDatabase, driver: str) -> None:
    """A flush and statements that write or lock raise ReadOnlyError, each with nothing written."""
    before = database.query("SELECT n, name FROM `row` ORDER BY n")

    async def body(either: Either) -> None:
        for statement in WRITES:
            async with either.scope(read_only=True):
                with pytest.raises(ReadOnlyError, match="open_scope"):
                    await either.do("execute", statement)
        async with either.scope(read_only=True):
            either.jenny.session.add(Row(n=100))
            with pytest.raises(ReadOnlyError, match=r"test_R1_mariadb\.py:\d+"):
                await either.do("flush")
            await either.do("rollback")
        async with either.scope():
            either.jenny.session.add(Row(n=101))
            await either.do("flush")
            await either.do("rollback")

    run(database, driver, body)
    assert database.query("SELECT n, name FROM `row` ORDER BY n") == before
    assert database.query("SHOW TABLES LIKE 'other'") == []
