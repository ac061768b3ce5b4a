"""A primary with streaming replicas, all real, on sockets in a folder of their own.

The replicas are made with ``pg_basebackup`` from the same programs as `tests.servers.postgres`.
Their replay can be held up, and each server can be killed, started again or promoted::

    with cluster(replicas=2) as servers:
        with servers.primary.new_database() as database:
            servers.catch_up()
            servers.replicas[0].pause()
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg

from tests.servers.postgres import Database, Home, PostgresServer, _connect, new_home

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy import URL

LIMIT = 30.0
"""Seconds that a replica may take to catch up on a busy machine."""

_SETTINGS = {
    "wal_keep_size": "512MB",  # one that was away for a while finds what it has missed
    "max_wal_senders": "10",
    "wal_receiver_status_interval": "1s",
    "wal_retrieve_retry_interval": "100ms",
    "full_page_writes": "on",  # a base backup needs it
}


@dataclass
class Server:
    """One server of a cluster."""

    name: str
    home: Home
    _running: PostgresServer | None = None

    @property
    def data(self) -> Path:
        """Where its data lie."""
        return self.home.base / f"{self.name}.data"

    @property
    def url(self) -> URL:
        """Its address, also while it is down."""
        return self.running.url

    @property
    def running(self) -> PostgresServer:
        """The server, started at least once."""
        assert self._running is not None
        return self._running

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._running = self.home.serve(
            self.data, self.home.folder(self.name), _SETTINGS | {"cluster_name": self.name}
        )

    def stop(self) -> None:
        """Stop it in an orderly way."""
        if self._running is not None:
            self._running.stop()

    def kill(self) -> None:
        """Kill it and everything it has started, as if the machine had gone."""
        pid = int((self.data / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGQUIT)
        self.stop()

    def database(self, database: Database) -> Database:
        """Return the same database on this server."""
        return Database(self.url, database.name)

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement in the maintenance database."""
        with _connect(self.url, "postgres") as connection:
            cursor = connection.execute(statement)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    def pause(self) -> None:
        """Hold up the replay; what the primary writes still arrives."""
        self.query("SELECT pg_wal_replay_pause()")
        _until(lambda: self.query("SELECT pg_get_wal_replay_pause_state()") == [("paused",)])

    def resume(self) -> None:
        """Go on with the replay."""
        self.query("SELECT pg_wal_replay_resume()")

    def promote(self) -> None:
        """Make a primary of it, on a timeline of its own."""
        self.query("SELECT pg_promote()")

    def follow(self, primary: Server) -> None:
        """Have the replica follow another primary from now on."""
        folder = primary.home.base / primary.name
        self.query(f"ALTER SYSTEM SET primary_conninfo = 'host={folder} user=postgres'")
        self.query("SELECT pg_reload_conf()")


class Cluster:
    """A primary and its replicas. Ask `cluster` for it."""

    def __init__(self, home: Home, replicas: int) -> None:
        self.primary = Server("primary", home)
        self.replicas = [Server(f"replica{number}", home) for number in range(1, replicas + 1)]

    def catch_up(self) -> None:
        """Wait until every replica has what the primary has."""
        # A transaction of its own is flushed at once; what others have begun may wait.
        self.primary.query("SELECT pg_logical_emit_message(true, 'tests', '')")
        [(position,)] = self.primary.query("SELECT pg_current_wal_flush_lsn()::text")
        ask = f"SELECT pg_last_wal_replay_lsn() >= '{position}'"
        for replica in self.replicas:
            _until(lambda replica=replica: replica.query(ask) == [(True,)])


@contextlib.contextmanager
def cluster(replicas: int = 2) -> Iterator[Cluster]:
    """Run a primary with replicas for the length of the block."""
    home = new_home()
    made = Cluster(home, replicas)
    try:
        home.initdb(made.primary.data)
        made.primary.start()
        socket = home.base / made.primary.name
        for replica in made.replicas:
            home.run(
                "pg_basebackup", "-h", socket, "-U", "postgres", "-D", replica.data,
                "--write-recovery-conf", "--wal-method=stream", "--checkpoint=fast", "--no-sync",
            )  # fmt: skip
            replica.start()
        yield made
    finally:
        for server in (*made.replicas, made.primary):
            with contextlib.suppress(Exception):
                server.stop()
        shutil.rmtree(home.base, ignore_errors=True)


@contextlib.contextmanager
def paused(*replicas: Server) -> Iterator[None]:
    """Hold up the replay of some replicas for the block."""
    with contextlib.ExitStack() as stack:
        for replica in replicas:
            replica.pause()
            stack.callback(replica.resume)
        yield


class Delays:
    """Holds the replay of replicas up, at random."""

    def __init__(self, replicas: list[Server], longest: float) -> None:
        self._replicas = replicas
        self._longest = longest
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._hold_up, args=(replica, number))
            for number, replica in enumerate(replicas)
        ]

    def _hold_up(self, replica: Server, seed: int) -> None:
        chance = random.Random(seed)
        while not self._ended.wait(chance.random() * self._longest / 2):
            with paused(replica):
                self._ended.wait(chance.random() * self._longest)

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def watching(replicas: list[Server]) -> Iterator[Callable[[int], bool]]:
    """Connections to the replicas, and a function: has any of them replayed so much of the log?"""
    ask = "SELECT pg_last_wal_replay_lsn() - '0/0'"
    with contextlib.ExitStack() as stack:
        eyes = [
            stack.enter_context(
                psycopg.connect(
                    host=str(replica.url.query["host"]), user="postgres", autocommit=True
                )
            )
            for replica in replicas
        ]

        def has_replayed(position: int) -> bool:
            rows = [eye.execute(ask).fetchone() for eye in eyes]
            return any(row is not None and int(row[0]) >= position for row in rows)

        yield has_replayed


def _until(is_so: Any) -> None:
    limit = time.monotonic() + LIMIT
    while not is_so():
        if time.monotonic() > limit:
            raise TimeoutError("the replica does not come along")
        time.sleep(0.02)
