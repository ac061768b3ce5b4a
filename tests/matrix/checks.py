"""The check list that every row of the table has to pass.

A module of rows subclasses `Checks` and names its rows; each row's database and server are
started once for all its checks.
"""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from tests.kit.frameworks import FRAMEWORKS
from tests.kit.waiting import PATIENCE, eventually
from tests.matrix.app import CHUNKS
from tests.matrix.databases import Database, a_database
from tests.matrix.rows import Row
from tests.matrix.servers import SERVERS, serve
from tests.servers.asgi import HOST
from tests.servers.wsgi import WSGIServer

CLIENTS = 8
REQUESTS = 40


@dataclass
class Running:
    """A row that is up."""

    row: Row
    server: WSGIServer
    database: Database
    tokens: Iterator[int] = field(default_factory=itertools.count)

    def token(self) -> str:
        return f"token-{next(self.tokens)}"

    def ask(self, route: str) -> tuple[int, str]:
        """Send one request with a token of its own; status and text of the answer."""
        status, body = self.server.get(f"/{route}?token={self.token()}")
        return status, body.decode()

    def number(self, route: str) -> int:
        status, text = self.ask(route)
        assert status == 200, (status, text, self.server.output[-3000:])
        return int(text)

    def at_rest(self) -> dict[str, Any]:
        """Wait until nothing is held; what the process says of itself then.

        Nothing is out of the pool, no scope is open, no connection is idle in a transaction.
        """
        state: dict[str, Any] = {}
        idle: list[str] = []

        def rests() -> bool:
            state.update(self.server.state())
            idle[:] = self.database.idle()
            return state["checked_out"] == 0 and state["open"] == [] and idle == []

        eventually(
            rests, lambda: f"{self.row} at rest: {state}, {idle}\n{self.server.output[-3000:]}"
        )
        assert state["mixed_up"] == []
        assert state["complaints"] == [], state["complaints"]
        assert "garbage collector is trying to clean up" not in self.server.output
        return state

    @contextmanager
    def client_that_leaves(self, route: str) -> Iterator[None]:
        """A client that has got the token back, and is killed at the end of the block."""
        token = self.token()
        with socket.create_connection((HOST, self.server.port), timeout=PATIENCE) as sock:
            sock.sendall(f"GET /{route}?token={token} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
            got = b""
            while token.encode() not in got:
                chunk = sock.recv(65536)
                assert chunk, (got, self.server.output[-3000:])
                got += chunk
            yield
            # With this option close() resets the connection, as the end of a process does.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextmanager
def running(row: Row, folders: pytest.TempPathFactory) -> Iterator[Running]:
    """Start the row's database and server, or skip."""
    if row.missing:
        pytest.skip(row.missing)
    folder = folders.mktemp("matrix")
    with ExitStack() as stack:
        database = stack.enter_context(a_database(row.driver, folder))
        server = serve(row.server, row.framework, database.url, folder)
        yield Running(row, stack.enter_context(server), database)


class Checks:
    """One test for each thing that a row has to do."""

    rows: ClassVar[tuple[Row, ...]]

    def test_S1_each_request_has_a_session_of_its_own(self, it: Running) -> None:
        """Ten requests, one after the other, have ten new sessions, and give each back."""
        before = it.at_rest()["seen"]
        count = it.database.count()
        assert [it.number("read") for _ in range(10)] == [count] * 10
        assert it.at_rest()["seen"] == before + 10

    def test_C1_what_is_committed_stays(self, it: Running) -> None:
        """A write that was answered is there for the next request, and for the database itself."""
        count = it.database.count()
        assert it.number("write") == count + 1
        assert it.number("read") == count + 1
        assert it.database.count() == count + 1
        it.at_rest()

    def test_S3_C1_what_raises_is_rolled_back(self, it: Running) -> None:
        """A request that has written and raises is answered with a 500, and its write is gone."""
        count = it.database.count()
        for _ in range(3):
            assert it.ask("raise")[0] == 500
        it.at_rest()
        assert it.database.count() == count
        assert it.number("write") == count + 1

    def test_A4_W2_a_stream_is_whole_and_has_its_session(self, it: Running) -> None:
        """Each chunk of a stream is made with the session of its request, in its scope."""
        status, text = it.ask("stream")
        assert status == 200
        token = text[: len(text) // CHUNKS]
        assert token.startswith("token-")
        assert text == token * CHUNKS
        it.at_rest()

    def test_S3_a_client_that_leaves_leaves_nothing_behind(self, it: Running) -> None:
        """A client that goes away in a stream that has written ends it, and the write is gone."""
        count = it.database.count()
        with it.client_that_leaves("slow"):
            # The look from the side does see what is there to be seen.
            eventually(it.database.idle, "the transaction of the stream is seen")
        if not FRAMEWORKS[it.row.framework].tells_of_leaving:
            it.server.get("/release")
        it.at_rest()
        assert it.database.count() == count
        assert it.number("write") == count + 1

    def test_S1_C1_concurrent_requests_keep_to_themselves_and_count_exactly(
        self, it: Running
    ) -> None:
        """Forty requests of eight clients, on a pool of five connections, count exactly."""
        before = it.at_rest()["seen"]
        count = it.database.count()
        with ThreadPoolExecutor(CLIENTS) as clients:
            numbers = list(clients.map(it.number, ["concurrent"] * REQUESTS))
        state = it.at_rest()
        assert sorted(numbers) == list(range(count + 1, count + REQUESTS + 1))
        assert it.database.count() == count + REQUESTS
        assert state["seen"] == before + REQUESTS
        # It was tried: they did run at the same time, where the server has that.
        assert (state["most_at_once"] > 1) == SERVERS[it.row.server].overlaps
