"""What `make run` tells a person whose PORT or DATABASE_URL is wrong: one line, before "Open"."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.waiting import PATIENCE
from tests.servers.asgi import HOST, free_port, run_command
from tests.servers.postgres import postgres_server

START = Path(__file__).parents[2] / "examples"
SYNC = ("responder_app", "flask_app")
ASYNC = "fastapi_async_app"
# What looks first asks an example whether it is async, and nothing else.
EXAMPLES = ("flask_app", ASYNC)


def refusal(name: str, cwd: Path, **env: str) -> str:
    """Start the example, which has to end with one line; return that line."""
    own = {k: v for k, v in os.environ.items() if k not in {"PORT", "DATABASE_URL"}}
    done = subprocess.run(
        [sys.executable, START, name],
        cwd=cwd,
        env=own | {"PORT": str(free_port())} | env,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        sock.listen()
        yield sock.getsockname()[1]


@pytest.mark.parametrize(
    ("name", "port"),
    [
        *((name, "70000") for name in EXAMPLES),
        *(("flask_app", port) for port in ("abc", "", "0", "-1", "5042.0", "٣")),
    ],
)
def test_a_port_that_is_none_is_told(name: str, port: str, tmp_path: Path) -> None:
    """No number, or none that a server can listen on."""
    line = refusal(name, tmp_path, PORT=port)
    assert line == f"PORT={port} is no port. Take a number from 1024 to 65535: PORT=5043"


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_busy_port_is_told(name: str, busy_port: int, tmp_path: Path) -> None:
    """With one that may be free."""
    line = refusal(name, tmp_path, PORT=str(busy_port))
    assert line.startswith(f"PORT={busy_port} cannot be used: Address already in use. Take another")


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("url", ["garbage", "", "postgresql://host:port/x"])
def test_a_url_that_is_none_is_told(name: str, url: str, tmp_path: Path) -> None:
    """With one that is."""
    line = refusal(name, tmp_path, DATABASE_URL=url)
    assert line.startswith(f"DATABASE_URL={url} is no address of a database. One is, for instance,")
    assert line.endswith(":///counter.sqlite")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_unsupported_database_is_told(name: str, tmp_path: Path) -> None:
    """With those that are supported."""
    line = refusal(name, tmp_path, DATABASE_URL="mongodb://localhost/x")
    assert line.startswith("DATABASE_URL=mongodb://localhost/x is not supported")
    assert "postgresql+" in line


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_missing_driver_is_told(name: str, tmp_path: Path) -> None:
    """With the command that installs it."""
    line = refusal(name, tmp_path, DATABASE_URL="oracle+oracledb://u:secret@localhost/x")
    assert "DATABASE_URL=oracle+oracledb://u:***@localhost/x needs the driver oracledb" in line
    assert line.endswith(f"{sys.executable} -m pip install oracledb")


@pytest.mark.parametrize(
    ("name", "url", "other"),
    [
        ("flask_app", "sqlite+aiosqlite:///x.sqlite", "sqlite://..."),
        (ASYNC, "sqlite:///x.sqlite", "sqlite+aiosqlite://..."),
        (ASYNC, "mysql+pymysql://localhost/x", "mysql+asyncmy://..."),
    ],
)
def test_a_driver_of_the_other_kind_is_told(
    name: str, url: str, other: str, tmp_path: Path
) -> None:
    """With the one that fits."""
    line = refusal(name, tmp_path, DATABASE_URL=url)
    assert line.startswith(f"DATABASE_URL={url} does not name a")
    assert line.endswith(other)


@pytest.mark.parametrize(
    ("name", "driver"),
    [
        *(("flask_app", driver) for driver in ("postgresql+psycopg", "mysql+pymysql")),
        *((ASYNC, driver) for driver in ("postgresql+asyncpg", "mysql+asyncmy")),
    ],
)
def test_a_database_that_does_not_answer_is_told(name: str, driver: str, tmp_path: Path) -> None:
    """With the driver's own reason, and without the password."""
    port = free_port()
    line = refusal(name, tmp_path, DATABASE_URL=f"{driver}://me:secret@{HOST}:{port}/x")
    assert line.startswith(f"DATABASE_URL={driver}://me:***@{HOST}:{port}/x cannot be used: ")
    assert str(port) in line or "refused" in line
    assert "Is the server running" in line
    assert "secret" not in line


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_database_in_memory_is_told(name: str, tmp_path: Path) -> None:
    """Each connection would have one of its own."""
    driver = "sqlite+aiosqlite" if name == ASYNC else "sqlite"
    line = refusal(name, tmp_path, DATABASE_URL=f"{driver}://")
    assert line.endswith(f"Name a file: DATABASE_URL={driver}:///counter.sqlite")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder to try it in")
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_folder_that_cannot_be_written_is_told(name: str) -> None:
    """The default is a file in the current folder: its whole path is named."""
    line = refusal(name, Path("/proc"))
    assert "counter.sqlite cannot be used: unable to open database file (/proc/counter" in line
    assert "Name a file that you may write: DATABASE_URL=" in line


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_database_that_can_only_be_read_is_told(name: str, tmp_path: Path) -> None:
    """Also where table and row are there, so that nothing has to be written at the start."""
    driver = "sqlite+aiosqlite" if name == ASYNC else "sqlite"
    with run_command(
        [sys.executable, str(START / f"{name}.py")], cwd=tmp_path, PORT=str(free_port())
    ) as served:
        served.wait_for_output("Open")
    url = f"{driver}:///file:{tmp_path / 'counter.sqlite'}?mode=ro&uri=true"
    line = refusal(name, tmp_path, DATABASE_URL=url)
    assert "cannot be used: attempt to write a readonly database" in line


@pytest.mark.parametrize("has_table", [False, True])
@pytest.mark.parametrize("name", SYNC)
def test_a_server_that_can_only_be_read_is_told(name: str, has_table: bool, tmp_path: Path) -> None:
    """The example itself makes the table; what fails there is one line as well."""
    with postgres_server().new_database() as database:
        if has_table:
            database.query("CREATE TABLE data (id int PRIMARY KEY, count int)")
            database.query("INSERT INTO data VALUES (1, 0)")
        readonly = "-c default_transaction_read_only=on"
        url = database.url("psycopg").update_query_dict({"options": readonly})
        line = refusal(name, tmp_path, DATABASE_URL=url.render_as_string(hide_password=False))
        assert "in a read-only transaction" in line
        assert line.startswith("DATABASE_URL=postgresql+psycopg://")
