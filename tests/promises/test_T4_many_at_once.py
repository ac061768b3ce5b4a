"""T4: 500 tests by 8 at a time, against one server and one database."""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from rope_middleware import open_scope
from rope_middleware.testing import Sandbox, SandboxMiddleware
from tests.kit.programs import ROOT
from tests.kit.sandboxes import COUNT, Place, Row
from tests.promises.test_T2_middleware import starlette_app
from tests.servers.asgi import HOST, free_port, run_command, serve

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("place", ["postgresql"], indirect=True)]


def by_eight(one: Callable[[httpx.Client, int], None], url: str, tests: int) -> None:
    """Run a test so many times, 8 at a time, each thread with a connection of its own."""
    here = threading.local()
    clients: list[httpx.Client] = []

    def run(n: int) -> None:
        if not hasattr(here, "client"):
            here.client = httpx.Client(base_url=url, timeout=60)
            clients.append(here.client)
        one(here.client, n)

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(run, range(1, tests + 1)))
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize(("server", "tests"), [("uvicorn", 500), ("hypercorn", 60)])
def test_T4_each_sees_its_own_rows_and_leaves_none(place: Place, server: str, tests: int) -> None:
    """Half of them by sync sessions, half by async ones; the block and its requests together."""

    def one(client: httpx.Client, n: int) -> None:
        kind = "sync" if n % 2 else "async"
        with Sandbox(place.jenny, place.ajenny) as sandbox:
            if kind == "sync":
                place.jenny.session.add(Row(n=n))
                place.jenny.session.commit()
            for m in (1, 2):
                added = client.post(f"/{kind}/{m * 10000 + n}", headers=sandbox.headers)
                assert added.status_code == 201, added.text
            seen = client.get(f"/{kind}", headers=sandbox.headers).json()
            assert seen == (3 if kind == "sync" else 2)

    app = SandboxMiddleware(starlette_app(place), place.jenny, place.ajenny)
    with serve(app, server) as running:
        by_eight(one, running.url, tests)
    assert place.rows() == 0


def _gunicorn(port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "gunicorn", "tests.kit.sandbox_app:application"),
        *("--bind", f"{HOST}:{port}", "--worker-class", "gthread", "--threads", "8"),
        "--no-control-socket",
    ]


def _waitress(port: int) -> list[str]:
    return [sys.executable, "-m", "tests.kit.sandbox_app", "waitress", str(port)]


@pytest.mark.parametrize("command", [_gunicorn, _waitress])
def test_T4_wsgi_servers_in_a_process_of_their_own(
    place: Place, command: Callable[[int], list[str]]
) -> None:
    """Each test opens its sandbox by POST, and ends it by DELETE."""

    def one(client: httpx.Client, n: int) -> None:
        headers = client.post(f"/rope-sandbox?name={n}").json()["headers"]
        client.cookies.clear()
        for m in (1, 2):
            assert client.post(f"/{m * 1000 + n}", headers=headers).status_code == 201
        assert client.get("/", headers=headers).text == "2"
        assert client.delete("/rope-sandbox", headers=headers).status_code == 204

    port = free_port()
    url = place.engine.url.render_as_string(hide_password=False)
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    with run_command(command(port), cwd=ROOT, DATABASE_URL=url, PYTHONPATH=path) as running:
        running.wait_for_port(port)
        by_eight(one, f"http://{HOST}:{port}", 60)
        assert "production" in running.output
    assert place.rows() == 0


def test_T4_a_sandbox_costs_at_most_2_ms_beyond_its_statements(place: Place) -> None:
    """CPU of this thread, beyond that of a scope with as many round trips."""
    jenny = place.jenny

    def work() -> None:
        jenny.session.execute(text("SELECT 1"))
        jenny.session.rollback()

    def in_sandbox() -> None:
        with Sandbox(jenny):
            work()

    def in_scope() -> None:
        with open_scope():
            work()

    rounds: dict[Any, list[float]] = {in_sandbox: [], in_scope: []}
    for _ in range(100):
        for way, times in rounds.items():
            before = time.thread_time()
            way()
            times.append(time.thread_time() - before)
    # The lowest quarter: a busy machine makes the same work dearer, never cheaper.
    quarter = {way: statistics.quantiles(times, n=4)[0] for way, times in rounds.items()}
    beyond = quarter[in_sandbox] - quarter[in_scope]
    assert beyond <= 0.002
    assert place.rows() == 0
    assert not jenny.session.scalar(COUNT)
    jenny.remove()
