"""Several worker processes: they share no scope and no connection, and count exactly.

What `docs/howto/workers.md` says of forked processes is tested here, also what goes wrong.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import sys
from collections import defaultdict
from typing import Any

import httpx
import pytest

from tests.kit.programs import ROOT, run_python
from tests.kit.waiting import PATIENCE, eventually
from tests.servers.asgi import HOST, Command, free_port, run_command
from tests.servers.postgres import Database
from tests.servers.wsgi import SERVERS as WSGI_SERVERS

MODULE = "tests.e2e.workers_app"
CLIENTS = 12

GUNICORN = (
    *("gunicorn", f"{MODULE}:wsgi", "-b", f"{HOST}:0", "-w", "4"),
    *("--timeout", "60", "--graceful-timeout", "5", "--no-control-socket"),
)
UWSGI = (
    *("uwsgi", "--http-socket", f"{HOST}:{{port}}", "--module", f"{MODULE}:wsgi"),
    *("--home", sys.prefix, "--master", "--workers", "2", "--enable-threads"),
    *("--need-app", "--die-on-term", "--disable-logging"),
)
POST_FORK = ("-c", f"python:{MODULE}")
SERVERS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "uvicorn": (("uvicorn", f"{MODULE}:asgi", "--port", "0", "--workers", "4"), {}),
    "granian": (
        (
            *("granian", f"{MODULE}:asgi", "--interface", "asgi", "--workers", "2"),
            *("--port", "{port}", "--workers-kill-timeout", "10"),
        ),
        {},
    ),
    "hypercorn": (
        ("hypercorn", f"{MODULE}:asgi", "--bind", f"{HOST}:{{port}}", "--workers", "2"),
        {},
    ),
    "gunicorn": (GUNICORN, {}),
    # Loaded once, and forked then. Nothing to do as long as nobody has connected.
    "gunicorn preload": ((*GUNICORN, "--preload"), {}),
    "gunicorn preload, connected, post_fork": (
        (*GUNICORN, "--preload", *POST_FORK),
        {"CONNECT": "1"},
    ),
    "gunicorn gthread preload, connected, at fork": (
        (*GUNICORN, "--preload", "-k", "gthread", "--threads", "3"),
        {"CONNECT": "1", "FORKED": "dispose"},
    ),
    "uwsgi lazy-apps, connected": ((*UWSGI, "--lazy-apps"), {"CONNECT": "1"}),
    "uwsgi, connected, postfork": (UWSGI, {"CONNECT": "1", "FORKED": "uwsgi"}),
}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


def environment(database: Database) -> dict[str, str]:
    return {
        "DATABASE_URL_SYNC": database.text_url("psycopg"),
        "DATABASE_URL_ASYNC": database.text_url("asyncpg"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def command_of(name: str, port: int) -> list[str]:
    program, *arguments = (part.format(port=port) for part in SERVERS[name][0])
    if program == "uwsgi":
        if missing := WSGI_SERVERS["uwsgi"].missing:
            pytest.skip(missing)
        return [WSGI_SERVERS["uwsgi"].command(0)[0], *arguments]
    if importlib.util.find_spec(program) is None:
        pytest.skip(f"{program} is not installed on this Python")
    return [sys.executable, "-m", program, *arguments]


def port_of(server: Command) -> int:
    """Wait for the port that the server has chosen, and says."""

    def told() -> re.Match[str] | None:
        assert server.returncode is None, server.output
        return re.search(rf"http://{re.escape(HOST)}:(\d+)", server.output)

    eventually(told, lambda: f"it says where it listens: {server.output}")
    found = told()
    assert found is not None
    return int(found[1])


async def load(port: int, requests: int) -> list[dict[str, Any]]:
    """Send `requests`, each on a connection of its own, which any worker may take."""
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=4 * PATIENCE, verify=False) as client:
        asked = (client.get(f"http://{HOST}:{port}/") for _ in range(requests))
        return [answer.raise_for_status().json() for answer in await asyncio.gather(*asked)]


@pytest.mark.parametrize("name", SERVERS)
def test_S7_C1_worker_processes_share_nothing_and_count_exactly(
    name: str, database: Database
) -> None:
    """Every worker serves; no connection of PostgreSQL is used by two of them."""
    chooses = "{port}" not in " ".join(SERVERS[name][0])
    port = 0 if chooses else free_port()
    workers = 4 if chooses else 2
    given = environment(database) | SERVERS[name][1]
    answers: list[dict[str, Any]] = []
    with run_command(command_of(name, port), cwd=ROOT, **given) as server:
        port = port or port_of(server)
        server.wait_for_port(port, 2 * PATIENCE)

        def all_have_served() -> bool:
            answers.extend(asyncio.run(load(port, 100)))
            return len({told["process"] for told in answers}) == workers

        eventually(all_have_served, lambda: f"{workers} workers: {server.output}", 2 * PATIENCE)
        processes: dict[int, set[int]] = defaultdict(set)
        for told in answers:
            processes[told["backend"]].add(told["process"])
        assert {len(found) for found in processes.values()} == {1}, processes
        assert all(told["fresh"] for told in answers)
        assert sorted(told["count"] for told in answers) == [*range(1, len(answers) + 1)]
        assert database.query("SELECT count FROM data") == [(len(answers),)]
        eventually(
            lambda: not database.backends("idle in transaction"),
            lambda: f"no transaction is idle: {database.backends()}",
        )
    assert "Traceback" not in server.output, server.output


# -- os.fork() in the middle of something --------------------------------------------------------

FORK = """
import json, os, sys
from contextlib import nullcontext
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, sessionmaker
from rope_middleware import SessionJenny, SessionRope, open_scope

where, url = sys.argv[1:]
engine = create_engine(url, pool_size=5, max_overflow=0)
jenny = SessionJenny(sessionmaker(engine))
parent = os.getpid()
ROW = text("INSERT INTO row (n) VALUES (7)")
BACKEND = text("SELECT pg_backend_pid()")
told = {}

def in_child(work):
    receives, sends = os.pipe()
    if os.fork() == 0:
        try:
            answer = work()
        except Exception as error:
            answer = type(error).__name__
        os.write(sends, json.dumps(answer).encode())
        sys.exit()  # everything that is open is left, and collected
    os.close(sends)
    with open(receives) as pipe:
        told["child"] = json.load(pipe)
    os.wait()

def use(session):
    return lambda: session().scalar(BACKEND)

def own_scope():
    with open_scope():
        return jenny.session.scalar(BACKEND)

if where in ("pool", "disposed"):
    if where == "disposed":
        os.register_at_fork(after_in_child=lambda: engine.dispose(close=False))
    with Session(engine) as session:
        told["parent"] = session.scalar(BACKEND)
    in_child(use(lambda: Session(engine)))
    with Session(engine) as session:
        told["goes on"] = session.scalar(BACKEND) == told["parent"]
else:
    by_hand = SessionRope(jenny.registry.outside) if where == "SessionRope" else None
    with open_scope() if "scope" in where else nullcontext():
        with open_scope() if where == "nested scopes" else nullcontext():
            session = by_hand.session if by_hand else jenny.session
            session.execute(ROW)
            told["parent"] = session.scalar(BACKEND)
            if where == "own scope":
                in_child(own_scope)
            elif where.startswith("captured"):
                in_child(use(lambda: session))
            else:
                in_child(use(lambda: by_hand.session if by_hand else jenny.session))
            told["goes on"] = session.scalar(BACKEND) == told["parent"]
            session.commit()
print(json.dumps(told))
"""


def fork(where: str, database: Database) -> dict[str, Any]:
    """Fork at `where`; what both processes told, and whether the parent's row is there."""
    done = run_python("-c", FORK, where, database.text_url("psycopg"))
    told: dict[str, Any] = json.loads(done.stdout)
    return told | {"rows": database.query("SELECT n FROM row"), "errors": done.stderr}


def test_a_pool_that_is_not_disposed_of_hands_the_parents_connection_to_the_child(
    database: Database,
) -> None:
    """Why something has to be done: both processes use one connection of PostgreSQL."""
    told = fork("pool", database)
    assert told["child"] == told["parent"]


def test_a_pool_that_is_disposed_of_at_the_fork_leaves_the_parent_its_connections(
    database: Database,
) -> None:
    """The child connects anew, and the parent goes on with what it has."""
    told = fork("disposed", database)
    assert isinstance(told["child"], int) and told["child"] != told["parent"]
    assert told["goes on"]


@pytest.mark.parametrize("where", ["scope", "nested scopes", "captured session in a scope"])
def test_S4_a_scope_that_is_open_at_a_fork_stays_the_parents(
    where: str, database: Database
) -> None:
    """The child gets ScopeClosedError, and its end leaves the parent's transaction alone."""
    told = fork(where, database)
    assert told["child"] == "ScopeClosedError"
    assert told["goes on"]
    assert told["rows"] == [(7,)]
    assert told["errors"] == ""


@pytest.mark.parametrize("where", ["rope", "SessionRope", "own scope"])
def test_J5_a_rope_that_is_there_at_a_fork_stays_the_parents(
    where: str, database: Database
) -> None:
    """The child has a session of its own, and its end leaves the parent's transaction alone."""
    told = fork(where, database)
    assert isinstance(told["child"], int) and told["child"] != told["parent"]
    assert told["goes on"]
    assert told["rows"] == [(7,)]
    assert told["errors"] == ""
