"""A real MariaDB for the tests: started on demand, once per test session.

``DATABASE_URL_MARIADB`` names a running server, whose user must be allowed to create databases,
to see all processes and to end its own connections. Where it is not set and the program
``mariadbd`` is there (Debian's package ``mariadb-server-core`` is all that it takes), a server of
the tests' own is started: its data in a temporary folder, reached over a socket in that folder,
owned by a keeper process that ends it and removes the folder when the test process ends, in
whatever way.

    with mariadb_server().new_database() as database:
        engine = create_async_engine(database.url("mariadb+asyncmy"))

Run as a script this module starts a server on a loopback port and tells its address::

    $ make mariadb
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymysql
from sqlalchemy import URL, make_url

from tests.servers.asgi import HOST, free_port
from tests.servers.postgres import START_LIMIT, OwnServer, keep, nobody, open_folder

USER = "rope"
LOCK_WAIT_TIMEOUT = 1205
PREFIXES = ("mysql_", "mariadb_")
MISSING = (
    "no MariaDB is there: install its server (on Debian and Ubuntu: make get-servers), "
    "or name a running one in DATABASE_URL_MARIADB"
)

SETTINGS = {
    "innodb-flush-log-at-trx-commit": "0",  # the machine does not crash in a test
    "innodb-buffer-pool-size": "32M",
    "innodb-log-file-size": "8M",
    "innodb-use-native-aio": "0",  # containers have few of the kernel's slots for it
    "log-warnings": "0",
    "max-connections": "200",
    "performance-schema": "off",
}

# Runs told["command"] until its standard input is closed, then ends it and removes its folder.
# Nobody needs the data any more, so that it need not shut down in order. A line on the standard
# input is the number of a signal: the server gets it, and is started again when it has ended.
KEEPER = """
import json, os, shutil, signal, subprocess, sys
told = json.loads(sys.argv[1])
signal.signal(signal.SIGINT, signal.SIG_IGN)
with open(os.path.join(told["base"], "log"), "ab") as log:
    def start():
        return subprocess.Popen(
            told["command"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, **told["as_user"]
        )
    server = start()
    for line in sys.stdin:
        server.send_signal(int(line))
        server.wait()
        server = start()
    server.kill()
    server.wait()
shutil.rmtree(told["base"], ignore_errors=True)
"""


class NoMariaDBError(Exception):
    """There is none, and the text says what to do: a visible skip in a test."""


class MariaDatabase:
    """One fresh database on the server, with an eye on it from the side."""

    def __init__(self, server: URL, name: str) -> None:
        self._server = server
        self.name = name

    def url(self, drivername: str) -> URL:
        """The address of the database for ``mariadb+pymysql`` or ``mariadb+asyncmy``."""
        return self._server.set(drivername=drivername, database=self.name)

    def query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own and return the rows, if it has any."""
        with connect(self._server, self.name) as cursor:
            cursor.execute(statement, values)
            return list(cursor.fetchall())

    def in_transaction(self, table: str) -> list[str]:
        """Who is in a transaction that has used the table; one is idle if it is so for long."""
        try:
            # Such a transaction holds the table's metadata lock, also if it has only read.
            self.query(f"LOCK TABLES {table} WRITE NOWAIT")
        except pymysql.err.OperationalError as error:
            if error.args[0] != LOCK_WAIT_TIMEOUT:
                raise
            rows = self.query(
                "SELECT id, command, info FROM information_schema.processlist"
                " WHERE db = %s AND id <> connection_id()",
                self.name,
            )
            return [str(row) for row in rows] or ["one that has gone meanwhile"]
        return []

    def waiting(self) -> list[tuple[Any, ...]]:
        """The clients of this database that wait for a row that another one has locked."""
        # The server reads this table anew only if nobody has asked for it within 0.1 s.
        time.sleep(0.15)
        return self.query(
            "SELECT p.id, p.info FROM information_schema.innodb_trx t"
            " JOIN information_schema.processlist p ON p.id = t.trx_mysql_thread_id"
            " WHERE p.db = %s AND t.trx_state = 'LOCK WAIT'",
            self.name,
        )


class MariaDBServer(OwnServer):
    """A running server. Ask `mariadb_server()` for it."""

    log: Path
    """Where one that was started here tells of itself."""

    def starts(self) -> int:
        """How often it has begun to listen; who asks its socket may miss a quick restart."""
        return self.told().count("ready for connections")

    def told(self) -> str:
        """What it has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @contextlib.contextmanager
    def new_database(self, *statements: str) -> Iterator[MariaDatabase]:
        """A fresh database, dropped at the end even if connections are still open.

        Args:
            statements: what is run in it first.
        """
        name = f"rope_{uuid.uuid4().hex[:12]}"
        with connect(self.url) as cursor:
            cursor.execute(f"CREATE DATABASE {name}")
        try:
            database = MariaDatabase(self.url, name)
            for statement in statements:
                database.query(statement)
            yield database
        finally:
            with connect(self.url) as cursor:
                # An open transaction would have DROP wait for its metadata lock.
                cursor.execute(
                    "SELECT id FROM information_schema.processlist WHERE db = %s", (name,)
                )
                for (number,) in cursor.fetchall():
                    with contextlib.suppress(pymysql.err.OperationalError):  # gone meanwhile
                        cursor.execute("KILL %s", (number,))
                cursor.execute(f"DROP DATABASE IF EXISTS {name}")

    def restart(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End a server that was started here, in order or by SIGKILL, and start it again."""
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        before = self.starts()
        self._keeper.stdin.write(b"%d\n" % how)
        self._keeper.stdin.flush()
        limit = time.monotonic() + START_LIMIT
        while self.starts() == before:
            if time.monotonic() > limit:
                raise RuntimeError(f"MariaDB did not come again. Its log:\n{self.told()}")
            time.sleep(0.005)


@functools.cache
def mariadb_server() -> MariaDBServer:
    """The server of this test session, started at the first call.

    Raises:
        NoMariaDBError: none is named, and none is installed.
    """
    given = os.environ.get("DATABASE_URL_MARIADB")
    if given:
        return MariaDBServer(make_url(given))
    server = start()
    atexit.register(server.stop)
    return server


@contextlib.contextmanager
def connect(server: URL, database: str | None = None) -> Iterator[Any]:
    """A cursor on a connection of its own, in autocommit."""
    told = server.translate_connect_args(username="user") | dict(server.query)
    told["database"] = database
    connection: Any = pymysql.connect(autocommit=True, connect_timeout=30, **told)
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()


def start(port: int | None = None) -> MariaDBServer:
    """Start a server of our own, on a loopback port or else on a socket in its folder only.

    Raises:
        NoMariaDBError: none is installed.
        RuntimeError: it does not start.
    """
    program = _program()
    password = secrets.token_urlsafe(16)
    base = Path(tempfile.mkdtemp(prefix="rope_maria_", dir=open_folder()))
    try:
        (base / "data").mkdir()
        as_user = nobody(base, base / "data")
        command = [program, "--no-defaults", f"--datadir={base}/data", f"--tmpdir={base}"]
        command += [f"--{name}={value}" for name, value in SETTINGS.items()]
        _bootstrap(program, command, password, as_user)
        command += [f"--socket={base}/socket", "--skip-name-resolve"]
        url = make_url(f"mysql+pymysql://{USER}:{password}@{HOST}")
        if port is None:
            command += ["--skip-networking"]
            url = url.update_query_dict({"unix_socket": f"{base}/socket"})
        else:
            command += [f"--bind-address={HOST}", f"--port={port}"]
            url = url.set(port=port)
        keeper = keep(KEEPER, base, command, as_user)
    except BaseException:
        shutil.rmtree(base, ignore_errors=True)
        raise
    server = MariaDBServer(url, keeper)
    server.log = base / "log"
    limit = time.monotonic() + START_LIMIT
    while not server.starts():
        log = server.told()
        # mariadbd says so when it ends; its keeper waits for the pipe.
        has_ended = "[ERROR] Aborting" in log or keeper.poll() is not None
        if time.monotonic() > limit or has_ended:
            server.stop()
            raise RuntimeError(f"MariaDB did not start. Its log:\n{log}")
        time.sleep(0.05)
    return server


def _program() -> str:
    # /usr/sbin is on nobody's PATH but root's.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which("mariadbd", path=path)
    if found is None:
        if "PYTEST_CURRENT_TEST" in os.environ:
            import pytest  # this module is a command, too

            pytest.skip(MISSING)
        raise NoMariaDBError(MISSING)
    return found


def _bootstrap(program: str, command: list[str], password: str, as_user: dict[str, Any]) -> None:
    """Make the system tables, and one user with every right.

    ``mariadb-install-db`` does the same with the same files, but needs programs of the client's
    package.
    """
    share = Path(program).resolve().parents[1] / "share"
    names = ("system_tables", "performance_tables", "system_tables_data")
    # The folder and the files have two names each, older and newer.
    for folder, prefix in itertools.product((share / "mysql", share / "mariadb"), PREFIXES):
        files = [folder / f"{prefix}{name}.sql" for name in names]
        if all(file.is_file() for file in files):
            break
    else:
        raise RuntimeError(f"{program} is there, but in {share} none of its {names}.")
    statements = [
        "CREATE DATABASE mysql;",
        "USE mysql;",
        "SET @auth_root_socket = NULL;",
        *(file.read_text(encoding="utf-8") for file in files),
        "DELETE FROM global_priv WHERE User = 'root';",  # it would have no password
        "FLUSH PRIVILEGES;",
        f"CREATE USER {USER}@'%' IDENTIFIED BY '{password}';",
        f"GRANT ALL ON *.* TO {USER}@'%';",
        "",
    ]
    done = subprocess.run(
        [*command, "--bootstrap"],
        input="\n".join(statements).encode(),
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        timeout=START_LIMIT,
        **as_user,
    )
    if done.returncode:
        raise RuntimeError(f"{program} made no tables:\n{done.stdout.decode(errors='replace')}")


def main() -> None:
    """Run a server on a loopback port until Ctrl-C or the end of the standard input."""
    try:
        server = start(free_port())
    except NoMariaDBError as error:
        sys.exit(f"{error}.")
    try:
        address = server.url.render_as_string(hide_password=False)
        print(f"DATABASE_URL_MARIADB='{address}'", flush=True)
        print("Ctrl-C ends it.", file=sys.stderr, flush=True)
        while sys.stdin.read(1):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        server.stop()


if __name__ == "__main__":
    main()
