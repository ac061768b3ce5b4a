"""Real WSGI servers, each a process of its own that serves `wsgi_apps`.

`serve_wsgi` starts one, waits until it answers, and stops it as Ctrl-C does::

    with serve_wsgi("waitress", folder) as server:
        server.get("/flask/count?token=1")
        server.state()["checked_out"]

The listening socket is made here and handed to the server, so that no port is guessed.
Run as a script this module is the server's side, for those that are started by a call.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kit.programs import ROOT

HOST = "127.0.0.1"
APP = "tests.e2e.wsgi_apps:application"
PATIENCE = 30.0


def gunicorn(*options: str) -> Callable[[int], list[str]]:
    def command(fd: int) -> list[str]:
        return [
            *(sys.executable, "-m", "gunicorn", APP, "--bind", f"fd://{fd}", "--workers", "1"),
            *("--timeout", "60", "--graceful-timeout", "5", "--no-control-socket", *options),
        ]

    return command


def script(name: str) -> Callable[[int], list[str]]:
    return lambda fd: [sys.executable, "-m", "tests.servers.wsgi", name, str(fd)]


def uwsgi(fd: int) -> list[str]:
    program = shutil.which("uwsgi", path=str(Path(sys.executable).parent)) or "uwsgi"
    return [
        *(program, "--http-socket", f"fd://{fd}", "--module", APP, "--home", sys.prefix),
        *("--master", "--workers", "1", "--threads", "8", "--enable-threads"),
        # Its own protection against clients that are gone: as an error of the write.
        *("--disable-logging", "--disable-write-exception", "--need-app", "--die-on-term"),
    ]


@dataclass(frozen=True)
class Kind:
    """A server that can be asked for.

    Args:
        command: makes the command line from the number of the listening socket.
        needs: the packages that have to be there.
    """

    command: Callable[[int], list[str]]
    needs: tuple[str, ...]

    @property
    def missing(self) -> str:
        """Why the server cannot be run here; empty where it can."""
        for package in self.needs:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed on this Python"
        if self.command is uwsgi and not shutil.which(self.command(0)[0]):
            return "the uwsgi program is not installed"
        return ""


SERVERS: dict[str, Kind] = {
    "gunicorn-sync": Kind(gunicorn("--worker-class", "sync"), ("gunicorn",)),
    "gunicorn-gthread": Kind(
        gunicorn("--worker-class", "gthread", "--threads", "8"), ("gunicorn",)
    ),
    "gunicorn-gevent": Kind(gunicorn("--worker-class", "gevent"), ("gunicorn", "gevent")),
    "waitress": Kind(script("waitress"), ("waitress",)),
    "werkzeug": Kind(script("werkzeug"), ("werkzeug",)),
    "eventlet": Kind(script("eventlet"), ("eventlet",)),
    "uwsgi": Kind(uwsgi, ("pyuwsgi",)),
}


class WSGIServer:
    """A server that is answering."""

    def __init__(self, name: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.port = port
        self.process = process
        self._log = log

    @property
    def output(self) -> str:
        """All that the process has printed."""
        return self._log.read_text(errors="replace")

    def get(self, path: str, seconds: float = PATIENCE) -> tuple[int, bytes]:
        """Return status and body; what came of the body where the server breaks off."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=seconds)
        try:
            connection.request("GET", path, headers={"Connection": "close"})
            response = connection.getresponse()
            try:
                return response.status, response.read()
            except http.client.IncompleteRead as error:
                return response.status, error.partial
        finally:
            connection.close()

    def state(self) -> dict[str, Any]:
        """Return what the process tells of itself, see `wsgi_apps`."""
        status, body = self.get("/state")
        assert status == 200, body
        state: dict[str, Any] = json.loads(body)
        return state

    def wait(self) -> None:
        """Wait until the application answers."""
        end = time.monotonic() + PATIENCE
        while True:
            if self.process.poll() is not None:
                raise AssertionError(f"{self.name} ended at its start\n{self.output}")
            try:
                # The socket listens before the server does: ask again, should one get lost.
                if self.get("/state", seconds=3)[0] == 200:
                    return
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() > end:
                    raise AssertionError(f"{self.name} does not answer\n{self.output}") from error
            time.sleep(0.05)

    def stop(self) -> None:
        """Press Ctrl-C and see that the process ends."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end\n{self.output}") from None

    def kill(self) -> None:
        """End whatever is left of the process and its children."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(PATIENCE)


@contextmanager
def serving(
    name: str, command: Callable[[int], list[str]], folder: Path, *, port: int = 0, **env: str
) -> Iterator[WSGIServer]:
    """Run a server's command for the length of the block.

    Args:
        name: what an error calls it.
        command: makes the command line from the number of the listening socket, or of the port.
        folder: an empty folder for its output.
        port: for a server that takes no socket.
        env: variables added to the test's own environment.
    """
    log = folder / "output"
    with socket.socket() as listener:
        if not port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, 0))
            listener.listen(128)
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(port or listener.fileno()),
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                    "PYTHONUNBUFFERED": "1",
                    **env,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[] if port else [listener.fileno()],
                start_new_session=True,  # so that `kill` reaches its children
            )
        port = port or listener.getsockname()[1]
    server = WSGIServer(name, port, process, log)
    try:
        server.wait()
        yield server
        server.stop()
    finally:
        server.kill()


@contextmanager
def serve_wsgi(name: str, folder: Path) -> Iterator[WSGIServer]:
    """Run `wsgi_apps` under the server `name` (one of `SERVERS`) for the length of the block.

    Args:
        name: which server.
        folder: an empty folder for its database and its output.
    """
    file = folder / "file.txt"
    file.write_bytes(os.urandom(1 << 17).hex().encode())
    env = {"WSGI_APPS_DATABASE": str(folder / "database.sqlite"), "WSGI_APPS_FILE": str(file)}
    with serving(name, SERVERS[name].command, folder, **env) as server:
        yield server


# -- the server's side ------------------------------------------------------------------------


def run_waitress(fd: int) -> None:
    import waitress

    from tests.e2e.wsgi_apps import application

    waitress.serve(application, sockets=[socket.socket(fileno=fd)], threads=8)


def run_werkzeug(fd: int) -> None:
    from werkzeug.serving import make_server

    from tests.e2e.wsgi_apps import application

    make_server(HOST, 0, application, threaded=True, fd=fd).serve_forever()


def run_eventlet(fd: int) -> None:
    import warnings

    # Its own DNS would load dnspython, and with it an HTTP client that its patch breaks.
    os.environ["EVENTLET_NO_GREENDNS"] = "yes"
    with warnings.catch_warnings():
        # It says at import that new projects should not use it; old ones do.
        warnings.simplefilter("ignore")
        import eventlet

        eventlet.monkey_patch()
        import eventlet.wsgi

    # After the patch: SQLAlchemy's pool takes its locks from what it finds.
    from tests.e2e.wsgi_apps import application

    listener = eventlet.greenio.GreenSocket(socket.socket(fileno=fd))
    try:
        eventlet.wsgi.server(listener, application, log_output=False, minimum_chunk_size=1)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    globals()[f"run_{sys.argv[1]}"](int(sys.argv[2]))
