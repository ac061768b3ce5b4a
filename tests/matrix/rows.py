"""The table: which framework is run on which server with which database.

Not every combination, but each framework on a server, with each kind of session that it can
have; each server with a framework; each database and driver with both protocols where it can.
`test_rows` sees to that.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from sqlalchemy import make_url

from tests.kit.frameworks import FRAMEWORKS
from tests.matrix.databases import DRIVERS
from tests.matrix.servers import SERVERS


def version_of(distribution: str) -> str:
    """The version that is installed; empty where none is."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class Row:
    """One combination.

    Args:
        framework: one of `FRAMEWORKS`.
        server: one of `SERVERS`.
        driver: one of `databases.DRIVERS`.
    """

    framework: str
    server: str
    driver: str

    def __str__(self) -> str:
        return f"{self.framework}-{self.server}-{self.driver}"

    @property
    def is_async(self) -> bool:
        return bool(make_url(f"{self.driver}://").get_dialect().is_async)

    @property
    def missing(self) -> str:
        """Why it cannot be run here; empty where it can. MariaDB is asked for when it is used."""
        needs = (
            FRAMEWORKS[self.framework].distribution,
            SERVERS[self.server].distribution,
            DRIVERS[self.driver],
        )
        for name in filter(None, needs):
            if not version_of(name):
                return f"{name} is not installed on this Python"
        return SERVERS[self.server].missing


ASGI_SYNC = (
    Row("responder", "uvicorn", "sqlite+pysqlite"),
    Row("starlette", "hypercorn-trio", "postgresql+psycopg"),
    Row("fastapi", "granian", "mariadb+pymysql"),
    Row("litestar", "uvicorn", "postgresql+psycopg"),
    Row("quart", "hypercorn", "mariadb+pymysql"),
    Row("falcon-asgi", "daphne", "sqlite+pysqlite"),
)

ASGI_ASYNC = (
    Row("responder", "hypercorn", "sqlite+aiosqlite"),
    Row("starlette", "uvicorn", "postgresql+asyncpg"),
    Row("starlette", "daphne", "sqlite+aiosqlite"),
    Row("fastapi", "uvicorn", "mariadb+asyncmy"),
    Row("litestar", "granian", "postgresql+psycopg_async"),
    Row("quart", "hypercorn", "postgresql+asyncpg"),
    Row("falcon-asgi", "uvicorn", "mariadb+asyncmy"),
    Row("fastapi", "gunicorn-asgi", "postgresql+asyncpg"),
)

WSGI = (
    Row("flask", "gunicorn-gthread", "sqlite+pysqlite"),
    Row("flask", "granian-wsgi", "mariadb+pymysql"),
    Row("django", "gunicorn-sync", "postgresql+psycopg"),
    Row("django", "gunicorn-gthread", "mariadb+pymysql"),
    Row("pyramid", "waitress", "postgresql+psycopg"),
    Row("bottle", "gunicorn-gevent", "mariadb+pymysql"),
    Row("bottle", "gunicorn-gevent", "postgresql+psycopg"),
    Row("falcon", "uwsgi", "sqlite+pysqlite"),
)

ROWS = ASGI_SYNC + ASGI_ASYNC + WSGI
