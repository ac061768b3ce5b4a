"""The Responder example, as a person starts it."""

from __future__ import annotations

import http.client
import signal
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.kit.waiting import PATIENCE, eventually
from tests.servers.asgi import HOST, Command, free_port, run_command

EXAMPLE = Path(__file__).parents[2] / "examples" / "responder_app.py"
CLIENTS, REQUESTS = 32, 2000


@contextmanager
def counter(folder: Path, **env: str) -> Iterator[tuple[Command, str]]:
    """Start the example in `folder`; give it and its address once it answers."""
    port = free_port()
    with run_command([sys.executable, str(EXAMPLE)], cwd=folder, PORT=str(port), **env) as command:
        command.wait_for_port(port)
        yield command, f"http://{HOST}:{port}/"


def visit(url: str) -> int:
    response = httpx.get(url, timeout=PATIENCE, verify=False)
    assert response.status_code == 200, response.text
    return int(response.text)


def test_C1_the_example_counts_and_survives_a_restart(tmp_path: Path) -> None:
    """Each visit counts one more, also after the process was ended and started again."""
    for first in (1, 4):
        with counter(tmp_path) as (command, url):
            assert [visit(url) for _ in range(3)] == [first, first + 1, first + 2]
            assert command.interrupt() == 0
    assert (tmp_path / "counter.sqlite").exists()


def test_the_example_prints_one_line_and_ends_cleanly(tmp_path: Path) -> None:
    """One line says what to open; Ctrl-C adds nothing to it and ends with 0."""
    with counter(tmp_path) as (command, url):
        visit(url)
        command.wait_for_output(url)
        assert command.interrupt(signal.SIGINT) == 0
    (line,) = command.output.splitlines()
    assert line.startswith(f"Open {url} ")
    assert not list(tmp_path.glob("*-journal"))


def test_the_example_survives_being_killed(tmp_path: Path) -> None:
    """SIGKILL in the middle loses no number that somebody has been told."""
    with counter(tmp_path) as (command, url):
        assert [visit(url) for _ in range(3)] == [1, 2, 3]
        command.kill()
    with counter(tmp_path) as (command, url):
        assert visit(url) == 4


def test_the_example_reads_its_database_from_the_environment(tmp_path: Path) -> None:
    """DATABASE_URL says where it counts."""
    database = tmp_path / "elsewhere.db"
    with counter(tmp_path, DATABASE_URL=f"sqlite:///{database}") as (command, url):
        assert visit(url) == 1
        assert command.interrupt() == 0
    assert [path.name for path in tmp_path.iterdir()] == [database.name]
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT count FROM data").fetchall() == [(1,)]


def test_the_example_leaves_the_database_to_others(tmp_path: Path) -> None:
    """No transaction is held between requests: another process writes at any time."""
    with counter(tmp_path) as (_, url):
        for number in (1, 102, 203):
            assert visit(url) == number
            with closing(sqlite3.connect(tmp_path / "counter.sqlite", timeout=0)) as connection:
                connection.execute("UPDATE data SET count = count + 100")
                connection.commit()


@pytest.mark.parametrize("clients", [CLIENTS])
def test_C1_the_example_counts_exactly_under_load(tmp_path: Path, clients: int) -> None:
    """2,000 requests from 32 clients get each number from 1 to 2,000 once."""
    answers: list[tuple[int, str]] = []
    errors: list[BaseException] = []
    turns = iter(range(REQUESTS))
    lock = threading.Lock()

    def client(port: int) -> None:
        try:
            with closing(http.client.HTTPConnection(HOST, port, timeout=2 * PATIENCE)) as http_:
                while True:
                    with lock:
                        if next(turns, None) is None:
                            return
                    http_.request("GET", "/")
                    response = http_.getresponse()
                    answers.append((response.status, response.read().decode()))
        except BaseException as error:
            errors.append(error)

    with counter(tmp_path) as (command, url):
        port = httpx.URL(url).port
        assert port is not None
        threads = [threading.Thread(target=client, args=(port,)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        eventually(lambda: not any(t.is_alive() for t in threads), lambda: command.output, 120)
        assert not errors
        wrong = [answer for answer in answers if answer[0] != 200]
        assert not wrong, command.output[-3000:]
        assert sorted(int(text) for _, text in answers) == list(range(1, REQUESTS + 1))
        assert visit(url) == REQUESTS + 1
        assert command.interrupt() == 0
