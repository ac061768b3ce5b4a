"""Real ASGI servers in threads of the test process, real commands, and rude clients.

`serve` runs an ASGI application under uvicorn or hypercorn in a thread, so that a test can look
at the pool and the scopes of the application it is talking to::

    with serve(app, "hypercorn-trio") as server:
        assert server.get("/").status_code == 200

`run_command` starts a command and gathers what it prints::

    with run_command([sys.executable, "examples/responder_app.py"], PORT="5043") as command:
        command.wait_for_port(5043)

`stream_and_leave` is a client that goes away in the middle of a response.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import hypercorn.asyncio
import hypercorn.trio
import trio
import uvicorn
from hypercorn.config import Config as HypercornConfig

from tests.kit.waiting import PATIENCE, eventually

ASGIApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[MutableMapping[str, Any]]],
        Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ],
    Awaitable[None],
]

HOST = "127.0.0.1"
SERVERS = ("uvicorn", "hypercorn", "hypercorn-trio")
ASYNCIO_SERVERS = ("uvicorn", "hypercorn")


def answers(port: int) -> bool:
    """Tell whether something accepts connections on `port`."""
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    """Return a port that nobody listens on; for commands, which take a number."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


# -- servers in threads ------------------------------------------------------------------------


@dataclass
class Server:
    """A server that is answering."""

    port: int
    _stop: Callable[[], None]
    _thread: threading.Thread
    _failed: list[BaseException] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://{HOST}:{self.port}"

    def get(self, path: str = "") -> httpx.Response:
        """Ask for `path` over a connection of its own."""
        # Without verify=False httpx reads all certificates each time, longer than the rest takes.
        return httpx.get(self.url + path, timeout=10 * PATIENCE, verify=False)

    def stop(self) -> None:
        """Shut the server down as Ctrl-C does, and raise what it died of. Twice is once."""
        self._stop()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            raise AssertionError(f"the server has not ended within {PATIENCE} s")
        if self._failed:
            raise self._failed.pop()


@contextmanager
def serve(app: ASGIApp, server: str = "uvicorn", *, grace: float = 5.0) -> Iterator[Server]:
    """Run `app` under `server` (one of `SERVERS`) for the length of the block.

    Args:
        app: an ASGI application.
        server: its name.
        grace: seconds that requests under way have left when the server is stopped.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((HOST, 0))
    port = sock.getsockname()[1]
    run, stop = (_uvicorn if server == "uvicorn" else _hypercorn)(app, server, sock, grace)
    failed: list[BaseException] = []

    def body() -> None:
        try:
            run()
        except BaseException as error:  # handed to the test by stop()
            failed.append(error)

    thread = threading.Thread(target=body, name=f"{server}:{port}", daemon=True)
    running = Server(port, stop, thread, failed)
    thread.start()
    try:
        eventually(lambda: failed or answers(port), f"{server} answers")
        if failed:
            raise failed.pop()
        yield running
    finally:
        try:
            running.stop()
        finally:
            sock.close()


def _uvicorn(
    app: ASGIApp, server: str, sock: socket.socket, grace: float
) -> tuple[Callable[[], None], Callable[[], None]]:
    # log_config=None: the test's own logging stays as it is.
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=int(grace) or 1
    )
    instance = uvicorn.Server(config)

    def stop() -> None:
        instance.should_exit = True

    return partial(instance.run, sockets=[sock]), stop


def _hypercorn(
    app: ASGIApp, server: str, sock: socket.socket, grace: float
) -> tuple[Callable[[], None], Callable[[], None]]:
    sock.listen(128)
    config = HypercornConfig()
    config.bind = [f"fd://{os.dup(sock.fileno())}"]  # hypercorn closes what it is given
    config.graceful_timeout = config.shutdown_timeout = grace
    config.errorlog = None
    config.backlog = 128
    ended = threading.Event()

    async def wait_asyncio() -> None:
        while not ended.is_set():
            await asyncio.sleep(0.02)

    async def wait_trio() -> None:
        while not ended.is_set():
            await trio.sleep(0.02)

    def run() -> None:
        if server == "hypercorn-trio":
            trio.run(
                partial(hypercorn.trio.serve, app, config, shutdown_trigger=wait_trio)  # type: ignore[arg-type]
            )
        else:
            asyncio.run(
                hypercorn.asyncio.serve(app, config, shutdown_trigger=wait_asyncio)  # type: ignore[arg-type]
            )

    return run, ended.set


# -- commands ----------------------------------------------------------------------------------


class Command:
    """A process in a group of its own; everything it prints is in `output`."""

    def __init__(
        self, args: Sequence[str], cwd: str | os.PathLike[str] | None, env: dict[str, str]
    ):
        self.args = list(args)
        self._process = subprocess.Popen(
            self.args,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that `interrupt` reaches children, as a terminal does
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            self._lines.extend(iter(stdout.readline, ""))

    @property
    def output(self) -> str:
        return "".join(self._lines)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def _eventually(self, condition: Callable[[], Any], what: str, seconds: float) -> None:
        def ready() -> bool:
            if condition():
                return True
            if self.returncode is not None:
                raise AssertionError(
                    f"{self.args} ended with {self.returncode} before: {what}\n{self.output}"
                )
            return False

        eventually(ready, lambda: f"{self.args}: {what}\n{self.output}", seconds)

    def wait_for_port(self, port: int, seconds: float = PATIENCE) -> None:
        """Wait until the command accepts connections on `port`."""
        self._eventually(lambda: answers(port), f"answers on port {port}", seconds)

    def wait_for_output(self, text: str, seconds: float = PATIENCE) -> None:
        """Wait until the command has printed `text`."""
        self._eventually(lambda: text in self.output, f"prints {text!r}", seconds)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for the end of the command and of its output; return the exit code."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.args} has not ended within {seconds} s\n{self.output}"
            ) from None
        self._reader.join(seconds)
        return code

    def interrupt(self, signum: int = signal.SIGINT, seconds: float = PATIENCE) -> int:
        """Press Ctrl-C: send `signum` to the whole group; return the exit code."""
        os.killpg(self.pid, signum)
        return self.wait(seconds)

    def kill(self) -> None:
        """End the whole group, whatever it does."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.wait()


@contextmanager
def run_command(
    args: Sequence[str], *, cwd: str | os.PathLike[str] | None = None, **env: str
) -> Iterator[Command]:
    """Run a command for the length of the block; what is left of it then is killed.

    Args:
        args: the program and its arguments.
        cwd: the folder it is started in.
        env: variables added to the test's own environment.
    """
    command = Command(args, cwd, os.environ | {"PYTHONUNBUFFERED": "1"} | env)
    try:
        yield command
    finally:
        command.kill()


# -- rude clients ------------------------------------------------------------------------------


def _connect(port: int, path: str, seconds: float) -> socket.socket:
    sock = socket.create_connection((HOST, port), timeout=seconds)
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
    return sock


def stream_and_leave(
    port: int,
    path: str,
    *,
    after: bytes,
    pause: float = 0,
    reset: bool = True,
    seconds: float = PATIENCE,
) -> bytes:
    """Ask for `path`, read until `after` has come, and go away in the middle of the response.

    Args:
        port: where the server listens.
        path: what to ask for.
        after: bytes that the response is known to hold early; empty to leave at once.
        pause: seconds to stay on without reading.
        reset: leave with a TCP reset, as a killed client does; else close politely.
        seconds: how long to wait for `after`.

    Returns:
        What was read.
    """
    sock = _connect(port, path, seconds)
    got = b""
    try:
        while after not in got:
            chunk = sock.recv(65536)
            if not chunk:
                raise AssertionError(f"the response ended before {after!r}: {got!r}")
            got += chunk
        time.sleep(pause)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    finally:
        sock.close()
    return got
