"""The wire to a PostgreSQL, to be cut: at any byte, between any two messages, around a COMMIT.

A TCP proxy in threads of the test process. A `Plan` says for each connection where it is cut::

    with Wire(database.socket, plan=lambda: Cut(DOWN, COMMIT, 1)) as wire:
        engine = create_engine(wire.url(database, "psycopg"))
        ...                       # the server commits, its answer never comes

`RandomCuts(seed, share)` is the plan of a soak. One that is fixed comes by `wire.cut_next(...)`.
The protocol: https://www.postgresql.org/docs/current/protocol-message-formats.html
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from sqlalchemy import URL

    from tests.servers.postgres import Database

HOST = "127.0.0.1"

UP, DOWN = "up", "down"  # towards the server, towards the client
BYTE, MESSAGE, COMMIT = "byte", "message", "commit"

ANSWER = 18
"""Bytes of the answer to a COMMIT: CommandComplete (12), ReadyForQuery (6)."""


@dataclass(frozen=True)
class Cut:
    """Where a line is cut.

    Args:
        direction: UP: the server does not get what follows; DOWN: the client does not.
        unit: what `number` counts, from the start of the connection.
        number: after how many; with COMMIT: at the how manieth.
        part: with COMMIT, how many bytes of it (UP) or of its answer (DOWN) still go through, at
            most all of them; the line is cut right after.
        rude: by a reset (RST) instead of an end (FIN).
    """

    direction: str
    unit: str
    number: int = 1
    part: int = 0
    rude: bool = False

    @property
    def kind(self) -> str:
        """What it is called in a statistics."""
        if self.unit != COMMIT:
            return f"{self.unit} {self.direction}"
        if self.direction == DOWN:
            return "answer to COMMIT" + (" (in it)" if self.part else "")
        return "COMMIT" + (" (in it)" if self.part else " (before it)")


Plan = Callable[[], Cut | None]


class RandomCuts:
    """Cuts a share of the connections, each somewhere else. The same seed, the same cuts."""

    def __init__(self, seed: int, share: float = 1.0, most: int = 20) -> None:
        self._random = random.Random(seed)
        self._share = share
        self._most = most

    def __call__(self) -> Cut | None:
        rng = self._random
        if rng.random() >= self._share:
            return None
        direction, rude = rng.choice((UP, DOWN)), rng.random() < 0.5
        unit = rng.choice((BYTE, MESSAGE, COMMIT, COMMIT))
        if unit == BYTE:
            return Cut(direction, unit, rng.randrange(self._most * 100), rude=rude)
        if unit == MESSAGE:
            return Cut(direction, unit, rng.randrange(self._most * 4), rude=rude)
        part = rng.choice((0, rng.randrange(ANSWER))) if direction == DOWN else rng.randrange(12)
        return Cut(direction, unit, rng.randrange(1, self._most // 4), part, rude)


class _Line:
    """One connection through the proxy."""

    def __init__(
        self,
        client: socket.socket,
        server: socket.socket,
        cut: Cut | None,
        on_cut: Callable[[], object],
    ) -> None:
        self._on_cut = on_cut
        self._client = client
        self._server = server
        self._cut = cut
        self._left: dict[str, int] = {}  # bytes that still go through, once that is known
        self._seen = {UP: 0, DOWN: 0}  # messages
        self._commits = 0
        self._is_over = threading.Lock()
        self.was_cut = False
        if cut is not None and cut.unit == BYTE:
            self._left[cut.direction] = cut.number

    def pump(self, direction: str) -> None:
        """Hand on what comes until one side ends or the line is cut."""
        source, sink = self._client, self._server
        if direction == DOWN:
            source, sink = sink, source
        by_message = self._cut is not None and self._cut.unit != BYTE
        kept = b""
        with suppress(OSError):
            while data := source.recv(65536):
                if not by_message:
                    if not self._send(sink, data, direction):
                        return
                    continue
                kept += data
                while message := self._take(kept, direction):
                    kept = kept[len(message) :]
                    self._look_at(message, direction)
                    if not self._send(sink, message, direction):
                        return
        self._end(rude=False)

    def _take(self, data: bytes, direction: str) -> bytes:
        """Return the first whole message of `data`, or nothing."""
        # The first message of a client has no type.
        start = 0 if direction == UP and not self._seen[UP] else 1
        if len(data) < start + 4:
            return b""
        (length,) = struct.unpack_from("!I", data, start)
        end = start + length
        if len(data) < end:
            return b""
        self._seen[direction] += 1
        return data[:end]

    def _look_at(self, message: bytes, direction: str) -> None:
        cut = self._cut
        assert cut is not None
        if cut.unit == MESSAGE:
            if direction == cut.direction and self._seen[direction] > cut.number:
                self._left[direction] = 0
        elif direction == UP and message[:1] == b"Q" and message[5:11].upper() == b"COMMIT":
            self._commits += 1
            if self._commits == cut.number:
                most = len(message) if cut.direction == UP else ANSWER
                self._left[cut.direction] = min(cut.part, most)

    def _send(self, sink: socket.socket, data: bytes, direction: str) -> bool:
        left = self._left.get(direction)
        if left is None:
            sink.sendall(data)
            return True
        sink.sendall(data[:left])
        self._left[direction] = left - len(data)
        if left <= len(data):
            assert self._cut is not None
            self.was_cut = True
            self._on_cut()
            self._end(self._cut.rude)
            return False
        return True

    def _end(self, rude: bool) -> None:
        if not self._is_over.acquire(blocking=False):
            return
        for end in (self._client, self._server):
            with suppress(OSError):
                if rude:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    end.shutdown(socket.SHUT_RDWR)
            if rude:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RD)  # wakes the thread that reads from it
            end.close()


class Wire:
    """A proxy in front of a server.

    Args:
        server: the path of its Unix socket, or its host and port.
        plan: asked once for each connection where to cut it; None: not at all.
    """

    def __init__(self, server: Path | tuple[str, int], plan: Plan = lambda: None) -> None:
        self._target = server
        self._plan = plan
        self._next: list[Cut] = []
        self._planning = threading.Lock()
        self._listener = socket.create_server((HOST, 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.cuts: Counter[str] = Counter()
        """How many lines were cut, by kind."""
        self.leaves_after_cut = False
        """Whether the server seems to be away from the first cut on."""
        self._is_away = False
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def url(self, database: Database, driver: str) -> URL:
        """The address of `database` through this wire, for ``psycopg`` or ``asyncpg``."""
        url = database.url(driver).difference_update_query(["host", "port"])
        key = "ssl" if driver == "asyncpg" else "sslmode"
        return url.set(host=HOST, port=self.port).update_query_dict({key: "disable"})

    def cut_next(self, *cuts: Cut) -> None:
        """Cut the next connections that are made so, before the plan is asked again."""
        self._next += cuts

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _note_cut(self) -> None:
        self._is_away = self.leaves_after_cut

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            if self._is_away:
                raise OSError("it is away")
            server = _connect(self._target)
        except OSError:  # it is away
            client.close()
            return
        with self._planning:
            cut = self._next.pop(0) if self._next else self._plan()
        line = _Line(client, server, cut, self._note_cut)
        down = threading.Thread(target=line.pump, args=(DOWN,), daemon=True)
        down.start()
        line.pump(UP)
        down.join()
        if line.was_cut and cut is not None:
            self.cuts[cut.kind] += 1


def socket_of(database: Database) -> Path | tuple[str, int]:
    """Return where the server of `database` listens."""
    url = database.url("psycopg")
    told = url.translate_connect_args() | dict(url.query)
    host, port = str(told.get("host", HOST)), int(told.get("port", 5432))  # type: ignore[arg-type]
    return Path(host) / f".s.PGSQL.{port}" if host.startswith("/") else (host, port)


def _connect(target: Path | tuple[str, int]) -> socket.socket:
    if isinstance(target, tuple):
        return socket.create_connection(target)
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(str(target))
    except OSError:
        server.close()
        raise
    return server
