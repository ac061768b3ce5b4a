"""The databases of the table, each fresh for its row, with an eye on it from the side.

`a_database` is all that the tests need of one: where it is, what is in it, and which of its
connections are idle in a transaction, as the database itself sees it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, make_url

from tests.servers.mariadb import mariadb_server
from tests.servers.postgres import postgres_server

DRIVERS = {
    "sqlite+pysqlite": "",  # it is Python's own
    "sqlite+aiosqlite": "aiosqlite",
    "postgresql+psycopg": "psycopg",
    "postgresql+psycopg_async": "psycopg",
    "postgresql+asyncpg": "asyncpg",
    "mariadb+pymysql": "PyMySQL",
    "mariadb+asyncmy": "asyncmy",
}
"""SQLAlchemy's name of each driver, and the distribution that it comes with."""


@dataclass(frozen=True)
class Database:
    """One database.

    Args:
        url: its address, for the driver of the row.
        version: what it says of itself.
        query: runs one statement on a connection of its own.
        idle: tells which connections are in a transaction and do nothing.
    """

    url: URL
    version: str
    query: Callable[[str], list[tuple[Any, ...]]]
    idle: Callable[[], list[str]]

    def count(self) -> int:
        """The counter, as it is committed."""
        return int(self.query("SELECT count FROM data")[0][0])


@contextmanager
def a_database(drivername: str, folder: Path) -> Iterator[Database]:
    """A fresh database with the counter at 0.

    Args:
        drivername: one of `DRIVERS`.
        folder: where SQLite has its file.
    """
    make = {"sqlite": _sqlite, "postgresql": _postgresql, "mariadb": _mariadb}
    with make[drivername.partition("+")[0]](drivername, folder) as database:
        database.query("CREATE TABLE data (name VARCHAR(20) PRIMARY KEY, count INTEGER NOT NULL)")
        database.query("INSERT INTO data VALUES ('count', 0)")
        yield database


@contextmanager
def _sqlite(drivername: str, folder: Path) -> Iterator[Database]:
    file = folder / "database.sqlite"

    def query(statement: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(file, timeout=30, isolation_level=None)) as connection:
            return connection.execute(statement).fetchall()

    def idle() -> list[str]:
        # Nobody may read or write while another is given the whole file.
        with closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                return [str(error)]
            return []

    url = make_url(f"{drivername}:///{file}")
    yield Database(url, f"SQLite {sqlite3.sqlite_version}", query, idle)


@contextmanager
def _postgresql(drivername: str, folder: Path) -> Iterator[Database]:
    with postgres_server().new_database() as database:
        version = database.query("SHOW server_version")[0][0]

        def idle() -> list[str]:
            return [str(found) for found in database.backends("idle in transaction")]

        url = database.url(drivername.partition("+")[2])
        yield Database(url, f"PostgreSQL {version}", database.query, idle)


@contextmanager
def _mariadb(drivername: str, folder: Path) -> Iterator[Database]:
    with mariadb_server().new_database() as database:
        version = database.query("SELECT version()")[0][0]

        def idle() -> list[str]:
            return database.in_transaction("data")

        url = database.url(drivername)
        yield Database(url, f"MariaDB {version.partition('-')[0]}", database.query, idle)
