"""Async sessions on real servers and real databases, with rude clients.

Each load sends requests of which a third is cut off by the client at a random moment and a third
raises. Afterwards nothing may be out of the pool, open in the database, open in the package, or
complained of. ``ROPE_TEST_SEED`` repeats a load.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import URL, make_url, text

from rope_middleware import open_scope
from tests.e2e.async_app import App, Client, SyncApp, create_tables, mixed_load, seed
from tests.kit.leaks import open_scopes
from tests.kit.programs import ROOT
from tests.kit.waiting import eventually
from tests.servers.asgi import HOST, free_port, run_command, serve
from tests.servers.postgres import Database, postgres_server

DRIVERS = ("asyncpg", "psycopg", "aiosqlite")
SERVERS = ("uvicorn", "hypercorn", "granian")
REQUESTS = 1000
CLIENTS = 24


@contextmanager
def a_database(driver: str, folder: Path) -> Iterator[tuple[URL, Database | None]]:
    """The address of a fresh database for `driver`, and an eye on it where it is PostgreSQL."""
    if driver in ("aiosqlite", "pysqlite"):
        url = make_url(f"sqlite+{driver}:///{folder / 'load.db'}")
        create_tables(url)
        yield url, None
        return
    with postgres_server().new_database() as database:
        url = database.url(driver)
        create_tables(url)
        yield url, database


@contextmanager
def running(url: URL, server: str) -> Iterator[int]:
    """The application on `server`; the port it answers on."""
    if server == "granian":
        port = free_port()
        command = [sys.executable, "-m", "granian", "--interface", "asgi", "--host", HOST]
        command += ["--port", str(port), "--log-level", "warning"]
        command += ["--workers-kill-timeout", "10", "tests.e2e.async_app:app"]
        with run_command(
            command, cwd=ROOT, DATABASE_URL=url.render_as_string(hide_password=False)
        ) as process:
            process.wait_for_port(port)
            yield port
            process.interrupt()
    else:
        app = SyncApp(url) if server == "hypercorn-trio" else App(url)
        with serve(app, server) as started:
            yield started.port
        assert app.complaints.heard == []
        assert open_scopes() == []


def everything_is_back(port: int, database: Database | None) -> None:
    """Nothing checked out, no transaction idle, no scope open, nothing complained of."""
    state: dict[str, Any] = {}
    with httpx.Client(base_url=f"http://{HOST}:{port}", timeout=60) as client:

        def quiet() -> bool:
            state.update(client.get("/state").json())
            return state["held"] == 0 and state["scopes"] == []

        eventually(quiet, lambda: f"nothing is held: {state}")
    assert state["complaints"] == []
    if database is not None:
        eventually(
            lambda: not database.backends("idle in transaction"),
            lambda: f"no transaction is idle: {database.backends()}",
        )


@pytest.mark.told
@pytest.mark.filterwarnings(
    # Servers close the sockets of clients that have gone when they are collected.
    "ignore::ResourceWarning"
)
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_Y2_S3_a_thousand_rude_requests_leave_nothing_behind(
    driver: str, server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A third is cut off at a random moment, a third raises, and all of the others succeed."""
    caplog.set_level(logging.CRITICAL, "uvicorn.error")
    number = seed(20260704)
    with a_database(driver, tmp_path) as (url, database), running(url, server) as port:
        counts = asyncio.run(
            mixed_load(HOST, port, requests=REQUESTS, clients=CLIENTS, seed=number)
        )
        assert counts["good"] + counts["cut"] + counts["raise"] == REQUESTS
        assert counts["answered"] == counts["good"] > REQUESTS / 4
        assert counts["failed"] == counts["raise"] > REQUESTS / 4
        everything_is_back(port, database)


@pytest.mark.told
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("driver", ["psycopg", "pysqlite"])
def test_Y2_S3_the_same_with_sync_sessions_under_trio(
    driver: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLAlchemy's asyncio half cannot run under trio; sessions in worker threads can."""
    caplog.set_level(logging.CRITICAL, "uvicorn.error")
    number = seed(20260705)
    with a_database(driver, tmp_path) as (url, database), running(url, "hypercorn-trio") as port:
        counts = asyncio.run(mixed_load(HOST, port, requests=300, clients=CLIENTS, seed=number))
        assert counts["answered"] == counts["good"]
        assert counts["failed"] == counts["raise"]
        everything_is_back(port, database)


@pytest.mark.parametrize(
    "server",
    [
        "uvicorn",
        pytest.param(
            "hypercorn",
            marks=pytest.mark.skipif(
                sys.version_info >= (3, 12),
                reason="hypercorn waits for open connections before it cancels anything "
                "(asyncio's Server.wait_closed, since Python 3.12), so it never stops",
            ),
        ),
    ],
)
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_Y2_a_server_that_is_stopped_gives_back_what_its_requests_held(
    driver: str, server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests that would hang for ever are cancelled by the server, and end as they should."""
    caplog.set_level(logging.CRITICAL)

    async def hold(port: int) -> None:
        clients = [Client(HOST, port) for _ in range(4)]
        for client in clients:
            await client.__aenter__()
            client.send("/hang?deaf=1")
        await asyncio.to_thread(eventually, lambda: app.hanging == 4, "four requests hold")
        await asyncio.to_thread(started.stop)
        for client in clients:
            await client.__aexit__()

    with a_database(driver, tmp_path) as (url, database):
        app = App(url)
        with serve(app, server, grace=1) as started:
            asyncio.run(hold(started.port))
        assert app.held() == 0
        assert app.complaints.heard == []
        assert open_scopes() == []
        assert database is not None
        eventually(
            lambda: not database.backends("idle in transaction"),
            lambda: f"no transaction is idle: {database.backends()}",
        )


@pytest.mark.told
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_Y2_a_database_that_freezes_holds_no_request_past_close_timeout(
    driver: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A request whose server process is stopped ends; the pool has its place back."""
    with a_database(driver, tmp_path) as (url, database):
        assert database is not None
        if not postgres_server().is_own:
            pytest.skip("the server named in DATABASE_URL_POSTGRESQL is not ours to freeze")
        app = App(url, close_timeout=0.5)
        with serve(app) as started, httpx.Client(base_url=started.url, timeout=60) as client:
            caplog.clear()

            async def cut() -> None:
                async with Client(HOST, started.port) as rude:
                    rude.send("/hang")
                    await asyncio.to_thread(
                        eventually,
                        lambda: app.hanging and database.backends("idle in transaction"),
                        "the request holds its transaction",
                    )
                    with database.frozen():
                        rude.abort()
                        await asyncio.to_thread(
                            eventually, lambda: app.held() == 0, "the request has ended"
                        )

            asyncio.run(cut())
            assert "GET /hang" in caplog.text
            for _ in range(10):
                assert client.get("/work").status_code == 200
        assert app.complaints.heard == []


@pytest.mark.told
@pytest.mark.parametrize(
    ("driver", "when"),
    # psycopg has the second of two tasks wait where the first one is executing
    [("asyncpg", "connecting"), ("psycopg", "connecting"), ("asyncpg", "executing")],
)
def test_Y3_a_session_that_two_tasks_share_gets_its_note_on_postgresql(
    driver: str, when: str, tmp_path: Path
) -> None:
    """Whatever SQLAlchemy or the driver says to two tasks at once: the note names `open_scope`."""

    async def main(url: URL) -> BaseException:
        app = App(url)

        async def query() -> None:
            await app.jenny.execute(text("SELECT pg_sleep(0.1)"))

        async def end() -> None:
            await asyncio.sleep(0.02)
            await app.jenny.commit()

        try:
            async with open_scope():
                if when == "connecting":
                    await asyncio.gather(query(), query())
                else:
                    await app.jenny.execute(text("SELECT 1"))
                    await asyncio.gather(query(), end())
        except Exception as error:
            return error
        finally:
            await app.all_back()
            assert app.held() == 0
            await app.engine.dispose()
        raise AssertionError("nothing was raised")

    with a_database(driver, tmp_path) as (url, _):
        error = asyncio.run(main(url))
    notes = getattr(error, "__notes__", [])
    assert any("open_scope" in note for note in notes), (error, notes)


def test_the_seed_can_be_set(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A load that failed can be repeated."""
    monkeypatch.setenv("ROPE_TEST_SEED", "7")
    assert seed(1) == 7
    assert json.loads(capsys.readouterr().out.split("=")[1]) == 7
