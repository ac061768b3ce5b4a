"""The examples that count, as a person starts them: one text for all three."""

from __future__ import annotations

import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.kit.waiting import PATIENCE
from tests.servers.asgi import HOST, Command, free_port, run_command
from tests.servers.postgres import postgres_server

EXAMPLES = Path(__file__).parents[2] / "examples"
CLIENTS = 32

Counter = Callable[..., AbstractContextManager[tuple[Command, str]]]


@contextmanager
def running(name: str, folder: Path, **env: str) -> Iterator[tuple[Command, str]]:
    """Start the example in `folder`; give it and its address once it answers."""
    port, file = free_port(), str(EXAMPLES / f"{name}.py")
    with run_command([sys.executable, file], cwd=folder, PORT=str(port), **env) as command:
        command.wait_for_port(port)
        yield command, f"http://{HOST}:{port}/"


@pytest.fixture(params=["responder_app", "flask_app", "fastapi_async_app"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def counter(name: str) -> Counter:
    return partial(running, name)


def visit(url: str, client: httpx.Client | None = None) -> int:
    if client is None:
        with httpx.Client(verify=False) as client:  # to read the certificates takes long
            return visit(url, client)
    response = client.get(url, timeout=4 * PATIENCE)
    assert response.status_code == 200, response.text
    return int(response.text)


def visit_often(url: str, visits: int) -> list[int]:
    """Ask from 32 clients at once, each over a connection of its own that it keeps."""

    def client(times: int) -> list[int]:
        with httpx.Client(verify=False, trust_env=False) as one:
            return [visit(url, one) for _ in range(times)]

    with ThreadPoolExecutor(CLIENTS) as clients:
        found = clients.map(client, [visits // CLIENTS] * CLIENTS)
        return sorted(number for numbers in found for number in numbers)


def test_C1_an_example_counts_and_survives_a_restart_and_being_killed(
    counter: Counter, tmp_path: Path
) -> None:
    """Each visit counts one more; neither an end nor SIGKILL loses a number that was told."""
    with counter(tmp_path) as (command, url):
        assert [visit(url) for _ in range(3)] == [1, 2, 3]
        assert httpx.get(f"{url}elsewhere").status_code == 404
        assert command.interrupt() == 0
    assert (tmp_path / "counter.sqlite").exists()
    with counter(tmp_path) as (command, url):
        assert [visit(url) for _ in range(3)] == [4, 5, 6]
        command.kill()
    with counter(tmp_path) as (_, url):
        assert visit(url) == 7


def test_C1_an_example_prints_one_line_and_counts_where_the_environment_says(
    name: str, counter: Counter, tmp_path: Path
) -> None:
    """The line says what to open; Ctrl-C adds nothing to it, ends with 0, and leaves no journal."""
    database = tmp_path / "elsewhere.db"
    driver = "sqlite+aiosqlite" if "async" in name else "sqlite"
    with counter(tmp_path, DATABASE_URL=f"{driver}:///{database}") as (command, url):
        assert visit(url) == 1
        command.wait_for_output(url)
        assert command.interrupt(signal.SIGINT) == 0
    (line,) = command.output.splitlines()
    assert line.startswith(f"Open {url} ")
    assert [path.name for path in tmp_path.iterdir()] == [database.name]
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT count FROM data").fetchall() == [(1,)]


def test_C1_an_example_leaves_the_database_to_others(counter: Counter, tmp_path: Path) -> None:
    """No transaction is held between requests: another process writes at any time."""
    with counter(tmp_path) as (_, url):
        for number in (1, 102, 203):
            assert visit(url) == number
            with closing(sqlite3.connect(tmp_path / "counter.sqlite", timeout=5)) as connection:
                connection.execute("UPDATE data SET count = count + 100")
                connection.commit()


def test_C1_C6_an_example_counts_exactly_under_load(counter: Counter, tmp_path: Path) -> None:
    """320 requests from 32 clients get each number from 1 to 320 once."""
    with counter(tmp_path) as (command, url):
        assert visit_often(url, 320) == list(range(1, 321)), command.output[-3000:]
        assert visit(url) == 321
        assert command.interrupt() == 0, command.output


def test_C1_C6_an_example_counts_exactly_under_load_on_postgresql(tmp_path: Path) -> None:
    """As on SQLite, and nothing is left idle in a transaction."""
    with postgres_server().new_database() as fresh:
        url = fresh.text_url("asyncpg")
        with running("fastapi_async_app", tmp_path, DATABASE_URL=url) as (command, address):
            assert visit_often(address, 320) == list(range(1, 321))
            assert fresh.backends("idle in transaction") == []
            assert command.interrupt() == 0, command.output
