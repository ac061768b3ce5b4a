"""R3 with two worker processes of a real server: the position travels by the client's cookie alone.

Each number is written by one worker and read at once from the other one. `REQUESTS` of the
environment says how many.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle

import httpx
import pytest

from tests.kit.engines import fill
from tests.kit.programs import ROOT
from tests.kit.waiting import PATIENCE
from tests.servers.asgi import HOST, free_port, run_command
from tests.servers.postgres import Database
from tests.servers.replicas import Cluster, Delays, watching

MODULE = "tests.e2e.reading_app"
REQUESTS = int(os.environ.get("REQUESTS", "300"))
COMMANDS = {
    "psycopg": (
        *("gunicorn", f"{MODULE}:wsgi()", "-b", f"{HOST}:{{port}}", "-w", "2", "-k", "gthread"),
        *("--threads", "4", "--keep-alive", "60", "--graceful-timeout", "1"),
        "--no-control-socket",
    ),
    "asyncpg": (
        *("uvicorn", f"{MODULE}:asgi", "--factory", "--port", "{port}", "--workers", "2"),
        *("--timeout-keep-alive", "60", "--log-level", "warning", "--no-access-log"),
    ),
}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


@pytest.fixture(scope="module")
def database(servers: Cluster) -> Iterator[Database]:
    """A database on all of them, with one number."""
    with servers.primary.running.new_database() as found:
        fill(found.url("psycopg"), 1, "INSERT INTO data (id, count) VALUES (1, 0)")
        servers.catch_up()
        yield found


@contextmanager
def served(driver: str, servers: Cluster, database: Database) -> Iterator[list[httpx.Client]]:
    """Run the application; a client of each worker, with a connection that it keeps."""
    primary, *replicas = (
        server.database(database).text_url(driver)
        for server in (servers.primary, *servers.replicas)
    )
    port = free_port()
    command = [sys.executable, "-m", *(part.format(port=port) for part in COMMANDS[driver])]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    given = {"PRIMARY": primary, "REPLICAS": " ".join(replicas), "PYTHONPATH": path}
    with run_command(command, cwd=ROOT, **given) as server, ExitStack() as stack:
        server.wait_for_port(port, 2 * PATIENCE)
        found: dict[str, httpx.Client] = {}
        limit = time.monotonic() + PATIENCE
        while len(found) < 2:
            assert time.monotonic() < limit, f"two workers: {server.output}"
            client = httpx.Client(base_url=f"http://{HOST}:{port}", timeout=PATIENCE, verify=False)
            stack.enter_context(client)
            process = client.get("/").raise_for_status().text.split()[2]
            found.setdefault(process, client)
        yield [*found.values()]


@pytest.mark.parametrize("driver", COMMANDS)
def test_R3_one_worker_reads_at_once_what_another_one_has_written(
    driver: str, servers: Cluster, database: Database
) -> None:
    """No read is stale, and those that a replica could serve are served by one."""
    stale = could = did = wanted = 0
    with served(driver, servers, database) as clients, watching(servers.replicas) as has_replayed:

        def write(client: httpx.Client, number: int) -> str:
            response = client.post(f"/{number}", headers=cookie).raise_for_status()
            return response.cookies["Rope-Position"]

        def read(client: httpx.Client) -> tuple[int, bool]:
            number, server, process = client.get("/", headers=cookie).text.split()
            processes.add((client, process))
            return int(number), server.startswith("replica")

        processes: set[tuple[httpx.Client, str]] = set()
        cookie: dict[str, str] = {}
        turns = cycle([clients, clients[::-1]])
        with Delays(servers.replicas, 0.3):
            for number in range(1, REQUESTS // len(COMMANDS) + 1):
                writer, reader = next(turns)
                position = write(writer, number)
                for client in clients:
                    client.cookies.clear()  # ours is the only one
                cookie["Cookie"] = f"Rope-Position={position}"
                wanted = int(position.split("-")[2], 16)
                has_it = has_replayed(wanted)
                seen, from_replica = read(reader)
                stale += seen != number
                could += has_it
                did += has_it and from_replica
        servers.catch_up()
        for client in clients:
            assert read(client) == (number, True), "both replicas have it all"
        assert len({process for _, process in processes}) == len(processes) == 2
    print(f"{driver}, {number} writes: {stale} stale, {did} of {could} from a replica that had it")
    assert stale == 0
    assert did >= 0.95 * could
