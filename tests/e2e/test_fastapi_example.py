"""The FastAPI example with its AsyncSession, as a person starts it."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.async_app import Client
from tests.kit.waiting import PATIENCE
from tests.servers.asgi import HOST, Command, free_port, run_command
from tests.servers.postgres import postgres_server

EXAMPLE = Path(__file__).parents[2] / "examples" / "fastapi_async_app.py"
CLIENTS, EACH = 32, 32


@contextmanager
def counter(folder: Path, **env: str) -> Iterator[tuple[Command, int]]:
    """Start the example in `folder`; give it and its port once it answers."""
    port = free_port()
    with run_command([sys.executable, str(EXAMPLE)], cwd=folder, PORT=str(port), **env) as command:
        command.wait_for_port(port)
        yield command, port


def visit(port: int) -> int:
    response = httpx.get(f"http://{HOST}:{port}/", timeout=PATIENCE)
    assert response.status_code == 200, response.text
    return int(response.text)


def count_from_many_clients(port: int) -> list[int]:
    async def client(found: list[int]) -> None:
        async with Client(HOST, port) as connection:
            for _ in range(EACH):
                status, _, body = await connection.ask("/", 4 * PATIENCE)
                assert status == 200, body
                found.append(int(body))

    async def run() -> list[int]:
        found: list[int] = []
        await asyncio.gather(*(client(found) for _ in range(CLIENTS)))
        return found

    return asyncio.run(run())


def test_C1_the_fastapi_example_counts_and_survives_a_restart(tmp_path: Path) -> None:
    """Each visit counts one more, also after the process was ended and started again."""
    for first in (1, 4):
        with counter(tmp_path) as (command, port):
            assert [visit(port) for _ in range(3)] == [first, first + 1, first + 2]
            assert command.interrupt() == 0
    assert (tmp_path / "counter.sqlite").exists()


def test_C1_the_fastapi_example_prints_one_line_and_ends_cleanly(tmp_path: Path) -> None:
    """One line says what to open; Ctrl-C adds nothing to it and ends with 0."""
    with counter(tmp_path) as (command, port):
        visit(port)
        command.wait_for_output(f"http://{HOST}:{port}/")
        assert command.interrupt(signal.SIGINT) == 0
    (line,) = command.output.splitlines()
    assert line.startswith(f"Open http://{HOST}:{port}/ ")


def test_C1_the_fastapi_example_leaves_the_database_to_others(tmp_path: Path) -> None:
    """No transaction is held between requests: another process writes at any time."""
    with counter(tmp_path) as (_, port):
        for number in (1, 102, 203):
            assert visit(port) == number
            with closing(sqlite3.connect(tmp_path / "counter.sqlite", timeout=0)) as connection:
                connection.execute("UPDATE data SET count = count + 100")
                connection.commit()


@pytest.mark.parametrize("database", ["aiosqlite", "asyncpg"])
def test_C1_C6_the_fastapi_example_counts_exactly_under_load(database: str, tmp_path: Path) -> None:
    """1,024 requests from 32 clients get each number from 1 to 1,024 once."""
    if database == "aiosqlite":
        with counter(tmp_path) as (command, port):
            assert sorted(count_from_many_clients(port)) == list(range(1, CLIENTS * EACH + 1))
            assert command.interrupt() == 0, command.output
        return
    with postgres_server().new_database() as fresh:
        with counter(tmp_path, DATABASE_URL=fresh.text_url("asyncpg")) as (command, port):
            assert sorted(count_from_many_clients(port)) == list(range(1, CLIENTS * EACH + 1))
            assert fresh.backends("idle in transaction") == []
            assert command.interrupt() == 0, command.output
