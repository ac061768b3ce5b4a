"""Look at PORT and DATABASE_URL first, then serve an example: `make run` starts this.

    python examples flask_app

The examples are documentation, so they are short, and each runs by itself. Here stands what a
person can get wrong who only wants to see one run. Each mistake is one line that names the variable
and the cure, and it comes before the example says that it is ready.
"""

from __future__ import annotations

import asyncio
import os
import re
import runpy
import socket
import sys
import threading
from pathlib import Path

from sqlalchemy import URL, Connection, Dialect, create_engine, inspect, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

EXAMPLES = {
    "responder_app": "sqlite:///counter.sqlite",
    "flask_app": "sqlite:///counter.sqlite",
    "fastapi_async_app": "sqlite+aiosqlite:///counter.sqlite",
}
"""Where each example counts if nobody says otherwise."""

PATIENCE = 10
"""Seconds that a database has to answer."""

SYNC = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}
ASYNC = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "mysql": "mysql+asyncmy"}
PACKAGES = {
    "psycopg": "'psycopg[binary]'",
    "psycopg2": "psycopg2-binary",
    "MySQLdb": "mysqlclient",
}
"""Modules that are installed by another name."""


class StartError(Exception):
    """Its text is what the person reads."""


def check_port(port: str) -> None:
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise StartError(f"PORT={port} is no port. Take a number from 1024 to 65535: PORT=5043")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
        try:
            sock.bind(("127.0.0.1", int(port)))
        except OSError as error:
            other = int(port) + 1 if 1024 <= int(port) < 65535 else 5043
            raise StartError(
                f"PORT={port} cannot be used: {error.strerror}. Take another one: PORT={other}"
            ) from None


def without_password(given: str) -> str:
    # It may be no address at all, so it is not read as one.
    return f"DATABASE_URL={re.sub(r':[^:@/]*@', ':***@', given)}"


def check_database(given: str, is_async: bool) -> None:
    shown = without_password(given)
    try:
        url = make_url(given)
        dialect = url.get_dialect()
    except NoSuchModuleError as error:
        known = ", ".join(f"{address}://..." for address in (ASYNC if is_async else SYNC).values())
        raise StartError(f"{shown} is not supported ({error}). Known are {known}") from None
    except (ArgumentError, ValueError):
        raise StartError(
            f"{shown} is no address of a database. One is, for instance, "
            f"DATABASE_URL={ASYNC['sqlite'] if is_async else 'sqlite'}:///counter.sqlite"
        ) from None
    check_driver(shown, url, dialect, is_async)
    check_connection(shown, url, is_async)


def check_driver(shown: str, url: URL, dialect: type[Dialect], is_async: bool) -> None:
    if is_async:
        dialect = dialect.get_async_dialect_cls(url)
    if dialect.is_async is not is_async:
        kind = "an async" if is_async else "a sync"
        known = (ASYNC if is_async else SYNC).get(url.get_backend_name())
        cure = f": DATABASE_URL={known}://..." if known else "."
        raise StartError(f"{shown} does not name {kind} driver, which this example needs{cure}")
    try:
        dialect.import_dbapi()
    except ImportError as error:
        module = (error.name or str(error)).partition(".")[0]
        raise StartError(
            f"{shown} needs the driver {module}, which is not installed: "
            f"{sys.executable} -m pip install {PACKAGES.get(module, module)}"
        ) from None
    if url.get_backend_name() == "sqlite" and url.database in {None, "", ":memory:"}:
        raise StartError(
            f"{shown} lives in the memory of one connection, and each visit may take another. "
            f"Name a file: DATABASE_URL={url.drivername}:///counter.sqlite"
        )


def check_connection(shown: str, url: URL, is_async: bool) -> None:
    failed: list[Exception] = []

    def connect() -> None:
        try:
            if url.get_backend_name() == "sqlite":  # any driver tells the same of a file
                write_sync(url.set(drivername="sqlite"))
            elif is_async:
                asyncio.run(write_async(url))
            else:
                write_sync(url)
        except Exception as error:
            failed.append(error)

    # Not every driver can be told how long to wait. A daemon does not hold up the exit.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        failed.append(TimeoutError(f"no answer within {PATIENCE} seconds"))
    if failed:
        raise StartError(unusable(shown, url, failed[0]))


def write_sync(url: URL) -> None:
    with create_engine(url).connect() as connection:
        write(connection)


async def write_async(url: URL) -> None:
    from sqlalchemy.ext.asyncio import create_async_engine  # needs greenlet, as the driver does

    async with create_async_engine(url).connect() as connection:
        await connection.run_sync(write)


def write(connection: Connection) -> None:
    """Write as the example will, and leave everything as it was."""
    if connection.dialect.name == "sqlite":  # which can undo a CREATE TABLE
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        connection.exec_driver_sql("CREATE TABLE may_be_written (n INTEGER)")
    elif inspect(connection).has_table("data"):  # else the example makes it, or fails there
        connection.exec_driver_sql("UPDATE data SET count = count")
    connection.rollback()


def unusable(shown: str, url: URL, error: Exception) -> str:
    reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0].rstrip(".")
    if url.get_backend_name() == "sqlite":
        file = Path(url.database or "").absolute()
        cure = (
            f"Name a file that you may write: DATABASE_URL={url.drivername}:////tmp/counter.sqlite"
        )
        return f"{shown} cannot be used: {reason} ({file}). {cure}"
    cure = "Is the server running, and do address, user and password fit? Without DATABASE_URL "
    return f"{shown} cannot be used: {reason}. {cure}the example counts in a file"


def main(name: str) -> None:
    given = os.environ.get("DATABASE_URL", EXAMPLES[name])
    try:
        check_port(os.environ.get("PORT", "5042"))
        check_database(given, is_async="async" in name)
        try:
            runpy.run_path(str(Path(__file__).with_name(f"{name}.py")), run_name="__main__")
        except SQLAlchemyError as error:
            raise StartError(unusable(without_password(given), make_url(given), error)) from None
    except StartError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in EXAMPLES:
        sys.exit(f"usage: python examples {{{','.join(EXAMPLES)}}}")
    main(sys.argv[1])
