"""The Flask example, as a person starts it."""

from __future__ import annotations

import http.client
import signal
import sqlite3
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.kit.waiting import PATIENCE
from tests.servers.asgi import HOST, Command, free_port, run_command

pytest.importorskip("flask")

EXAMPLE = Path(__file__).parents[2] / "examples" / "flask_app.py"
CLIENTS, REQUESTS = 32, 600


@contextmanager
def counter(folder: Path, **env: str) -> Iterator[tuple[Command, int]]:
    """Start the example in `folder`; give it and its port once it answers."""
    port = free_port()
    with run_command([sys.executable, str(EXAMPLE)], cwd=folder, PORT=str(port), **env) as command:
        command.wait_for_port(port)
        yield command, port


def get(port: int, path: str = "/") -> tuple[int, str]:
    with closing(http.client.HTTPConnection(HOST, port, timeout=2 * PATIENCE)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def visit(port: int) -> int:
    status, text = get(port)
    assert status == 200, text
    return int(text)


def test_C1_the_flask_example_counts_and_survives_a_restart(tmp_path: Path) -> None:
    """Each visit counts one more, also after the process was ended and started again."""
    for first in (1, 4):
        with counter(tmp_path) as (command, port):
            assert [visit(port) for _ in range(3)] == [first, first + 1, first + 2]
            assert get(port, "/elsewhere")[0] == 404
            assert command.interrupt() == 0


def test_C1_the_flask_example_prints_one_line_and_ends_cleanly(tmp_path: Path) -> None:
    """One line says what to open; Ctrl-C adds nothing to it and ends with 0."""
    with counter(tmp_path) as (command, port):
        visit(port)
        command.wait_for_output(f"http://{HOST}:{port}/")
        assert command.interrupt(signal.SIGINT) == 0
    (line,) = command.output.splitlines()
    assert line.startswith(f"Open http://{HOST}:{port}/ ")
    assert not list(tmp_path.glob("*-journal"))


def test_C1_the_flask_example_reads_its_database_from_the_environment(tmp_path: Path) -> None:
    """DATABASE_URL says where it counts."""
    database = tmp_path / "elsewhere.db"
    with counter(tmp_path, DATABASE_URL=f"sqlite:///{database}") as (command, port):
        assert visit(port) == 1
        assert command.interrupt() == 0
    assert [path.name for path in tmp_path.iterdir()] == [database.name]
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT count FROM data").fetchall() == [(1,)]


def test_C1_the_flask_example_leaves_the_database_to_others(tmp_path: Path) -> None:
    """No transaction is held between requests: another process writes at any time."""
    with counter(tmp_path) as (_, port):
        for number in (1, 102, 203):
            assert visit(port) == number
            with closing(sqlite3.connect(tmp_path / "counter.sqlite", timeout=5)) as connection:
                connection.execute("UPDATE data SET count = count + 100")
                connection.commit()


def test_C1_the_flask_example_counts_exactly_under_load(tmp_path: Path) -> None:
    """600 requests from 32 clients get each number from 1 to 600 once."""
    with counter(tmp_path) as (command, port):
        with ThreadPoolExecutor(CLIENTS) as clients:
            answers = list(clients.map(lambda _: get(port), range(REQUESTS)))
        wrong = [answer for answer in answers if answer[0] != 200]
        assert not wrong, (wrong[:3], command.output[-3000:])
        assert sorted(int(text) for _, text in answers) == list(range(1, REQUESTS + 1))
        assert visit(port) == REQUESTS + 1
        assert command.interrupt() == 0
