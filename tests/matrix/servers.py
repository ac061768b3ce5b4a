"""The servers of the table, each a process of its own that serves `app`.

    with serve("uvicorn", "starlette", url, folder) as server:
        server.get("/read?token=1")
        server.state()["checked_out"]

The listening socket is made here and handed to the server, so that no port is guessed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL

from tests.servers import wsgi as wsgi_servers
from tests.servers.asgi import HOST, free_port
from tests.servers.wsgi import WSGIServer, serving

APP = "tests.matrix.app:application"

WAITRESS = """
import socket, sys
import waitress
from tests.matrix.app import application
waitress.serve(application, sockets=[socket.socket(fileno=int(sys.argv[1]))], threads=8)
"""

Command = Callable[[int], list[str]]


@dataclass(frozen=True)
class Kind:
    """One entry of the table.

    Args:
        protocol: ``asgi`` or ``wsgi``.
        distribution: what it is installed as.
        command: makes the command line from the number of the listening socket.
        overlaps: does it serve several requests at once?
        takes_port: it takes no socket, so it gets a number.
    """

    protocol: str
    distribution: str
    command: Command
    overlaps: bool = True
    takes_port: bool = False

    @property
    def missing(self) -> str:
        """Why it cannot be run here; empty where it can."""
        if os.name != "posix" and not self.takes_port:
            return "sockets are handed to the servers as files"
        return ""


def module(*arguments: str) -> Command:
    return lambda fd: [sys.executable, "-m", *(part.format(fd=fd) for part in arguments)]


def elsewhere(name: str) -> Command:
    """As `wsgi_servers` starts it."""
    command = wsgi_servers.SERVERS[name].command
    return lambda fd: [APP if part == wsgi_servers.APP else part for part in command(fd)]


def hypercorn(worker_class: str) -> Command:
    return module(
        *("hypercorn", "--bind", "fd://{fd}", "--workers", "0", "--worker-class", worker_class),
        *("--graceful-timeout", "5", APP),
    )


def granian(interface: str, *options: str) -> Command:
    return module(
        *("granian", "--interface", interface, "--host", HOST, "--port", "{fd}"),
        *("--log-level", "warning", "--workers-kill-timeout", "10", *options, APP),
    )


SERVERS: dict[str, Kind] = {
    "uvicorn": Kind(
        "asgi", "uvicorn", module("uvicorn", "--fd", "{fd}", "--log-level", "warning", APP)
    ),
    "hypercorn": Kind("asgi", "hypercorn", hypercorn("asyncio")),
    "hypercorn-trio": Kind("asgi", "hypercorn", hypercorn("trio")),
    "granian": Kind("asgi", "granian", granian("asgi"), takes_port=True),
    "daphne": Kind(
        "asgi", "daphne", module("daphne", "--fd", "{fd}", "--application-close-timeout", "10", APP)
    ),
    # Its worker of its own: it cancels the task of a request whose client has gone.
    "gunicorn-asgi": Kind(
        "asgi",
        "gunicorn",
        module(
            *("gunicorn", "--bind", "fd://{fd}", "--worker-class", "asgi", "--workers", "1"),
            *("--graceful-timeout", "5", "--log-level", "warning", "--no-control-socket", APP),
        ),
    ),
    "gunicorn-sync": Kind("wsgi", "gunicorn", elsewhere("gunicorn-sync"), overlaps=False),
    "gunicorn-gthread": Kind("wsgi", "gunicorn", elsewhere("gunicorn-gthread")),
    "gunicorn-gevent": Kind("wsgi", "gunicorn", elsewhere("gunicorn-gevent")),
    "waitress": Kind("wsgi", "waitress", lambda fd: [sys.executable, "-c", WAITRESS, str(fd)]),
    "uwsgi": Kind("wsgi", "pyuwsgi", elsewhere("uwsgi")),
    "granian-wsgi": Kind(
        "wsgi", "granian", granian("wsgi", "--blocking-threads", "8"), takes_port=True
    ),
}


@contextmanager
def serve(name: str, framework: str, url: URL, folder: Path) -> Iterator[WSGIServer]:
    """Run `app` under the server `name` (one of `SERVERS`) for the length of the block.

    Args:
        name: which server.
        framework: one of `frameworks.FRAMEWORKS`.
        url: the database.
        folder: an empty folder for its output.
    """
    kind = SERVERS[name]
    port = free_port() if kind.takes_port else 0
    env = {
        "MATRIX_FRAMEWORK": framework,
        "MATRIX_DATABASE_URL": url.render_as_string(hide_password=False),
    }
    with serving(f"{framework} on {name}", kind.command, folder, port=port, **env) as server:
        yield server
