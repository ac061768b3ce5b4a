"""What is tried with each site, on a real server, and what is said of it in the table."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from flask import Flask
from waitress.server import create_server
from waitress.wasyncore import close_all

from tests.kit.waiting import PATIENCE
from tests.peers.models import make_database
from tests.peers.sites import Site
from tests.servers.asgi import HOST, serve, stream_and_leave

STREAMS = 5
CROWD = 100
LATER = "the next good request fails, too"


@contextmanager
def served(app: Any) -> Iterator[int]:
    """Run the site; give its port."""
    if not isinstance(app, Flask):
        with serve(app) as asgi_server:
            yield asgi_server.port
        return
    # Its threads are kept, as those of every server in production.
    sockets: dict[int, Any] = {}
    options = {"threads": 16, "send_bytes": 1, "connection_limit": 2 * CROWD}
    server = create_server(app, map=sockets, host=HOST, port=0, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield int(server.effective_port)
    finally:
        # Its threads write to the server's trigger. Once that is closed, with the server, they
        # would write to the descriptor of whatever was opened since: another way's response.
        trigger, kept = server.trigger, (server, server.trigger)

        def close_others() -> None:
            close_all({fd: one for fd, one in sockets.items() if one not in kept})

        trigger.pull_trigger(close_others)
        server.task_dispatcher.shutdown()
        trigger.pull_trigger(lambda: close_all(sockets))
        thread.join(PATIENCE)


def ask(port: int, method: str, path: str) -> int:
    with closing(HTTPConnection(HOST, port, timeout=PATIENCE)) as connection:
        connection.request(method, path)
        return connection.getresponse().status


def out(site: Site, seconds: float = 0.5) -> int:
    """Return how many connections are out, when they have had that time to come back."""
    pool: Any = site.engine.pool
    end = time.monotonic() + seconds
    while pool.checkedout() and time.monotonic() < end:
        time.sleep(0.01)
    return int(pool.checkedout())


def commit_fails(site: Site, port: int) -> str:
    status = ask(port, "POST", "/orders/7")
    refused = rows(site)
    then = ask(port, "POST", "/orders/1")
    told = f"{status}, {'a row' if refused else 'no row'}"
    return told if (then, rows(site)) == (201, refused + 1) else f"{told}, and {LATER}"


def rows(site: Site) -> int:
    with closing(sqlite3.connect(str(site.engine.url.database))) as connection:
        return int(connection.execute('SELECT count(*) FROM "order"').fetchone()[0])


def client_leaves(site: Site, port: int) -> str:
    for _ in range(STREAMS):
        stream_and_leave(port, "/rows", after=b"row 1")
    return "connections left behind" if out(site) else "nothing left behind"


def stream_runs(site: Site, port: int) -> str:
    with ExitStack() as stack:
        for _ in range(STREAMS):
            connection = stack.enter_context(closing(HTTPConnection(HOST, port, timeout=PATIENCE)))
            connection.request("GET", "/quiet")
            assert connection.getresponse().read(8) == b"waiting\n"
        return f"{STREAMS} streams hold {out(site) or 'no'} connections"


def crowd_comes(site: Site, port: int) -> str:
    with ExitStack() as stack:
        all_ready = [
            stack.enter_context(closing(HTTPConnection(HOST, port, timeout=PATIENCE)))
            for _ in range(CROWD)
        ]
        for connection in all_ready:
            connection.connect()
        for connection in all_ready:
            connection.request("GET", "/work")
        statuses = [connection.getresponse().status for connection in all_ready]
    return f"{CROWD} answered" if statuses.count(200) == CROWD else "some fail: `QueuePool limit`"


TRIALS: dict[str, Callable[[Site, int], str]] = {
    "the commit fails": commit_fails,
    "a stream runs": stream_runs,
    "the client leaves": client_leaves,
    "100 come at once": crowd_comes,
}


def try_out(build: Callable[[str], Site]) -> list[str]:
    """Return the cells of a row: each trial has a site, a server and a database of its own."""
    return [_one(trial, build) for trial in TRIALS.values()]


def _one(trial: Callable[[Site, int], str], build: Callable[[str], Site]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        site = build(make_database(Path(folder)))
        try:
            with served(site.app) as port:
                try:
                    return trial(site, port)
                finally:
                    site.go_on.set()
        finally:
            site.engine.dispose()
