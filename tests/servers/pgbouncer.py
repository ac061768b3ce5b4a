"""A real PgBouncer in transaction mode in front of the PostgreSQL of `tests.servers.postgres`.

The program is Debian's package ``pgbouncer``. It listens on a Unix socket in a folder of its own,
so that no port has to be chosen, and is run by the same keeper as PostgreSQL: it ends with the
test process, in whatever way that ends::

    with pgbouncer(server_connections=4) as bouncer:
        engine = create_engine(bouncer.url(database, "psycopg"))
        bouncer.busy()            # how many server connections are in a transaction
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import psycopg.rows

from tests.servers.postgres import KEEPER, START_LIMIT, open_folder, postgres_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import URL

    from tests.servers.postgres import Database

PORT = 6432
"""Names the socket's file; nothing listens on it."""

PROGRAM = shutil.which("pgbouncer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))

MISSING = "" if PROGRAM else "PgBouncer is not installed (on Debian: apt-get install pgbouncer)"


class PgBouncer:
    """A running PgBouncer. Ask `pgbouncer` for it."""

    def __init__(self, folder: Path, user: str) -> None:
        self._folder = folder
        self._user = user

    def url(self, database: Database, driver: str) -> URL:
        """The address of ``database`` through PgBouncer, for ``psycopg`` or ``asyncpg``."""
        url = database.url(driver).difference_update_query(["host", "port"])
        return url.update_query_dict({"host": str(self._folder), "port": str(PORT)})

    def show(self, what: str) -> list[dict[str, Any]]:
        """Ask the admin console: ``SHOW POOLS`` and so on."""
        with psycopg.connect(
            host=str(self._folder),
            port=PORT,
            user=self._user,
            dbname="pgbouncer",
            autocommit=True,
            connect_timeout=int(START_LIMIT),
            row_factory=psycopg.rows.dict_row,
            prepare_threshold=None,
            cursor_factory=psycopg.ClientCursor,  # it knows the simple query protocol alone
        ) as connection:
            return connection.execute(f"SHOW {what}").fetchall()  # type: ignore[call-overload, no-any-return]

    @property
    def version(self) -> tuple[int, ...]:
        """As ``(1, 18, 0)``."""
        found = re.search(r"[\d.]+", self.show("VERSION")[0]["version"])
        assert found is not None
        return tuple(int(part) for part in found[0].split("."))

    def busy(self, database: Database) -> int:
        """How many server connections a client has now: those in a transaction."""
        pools = self.show("POOLS")
        return sum(pool["sv_active"] for pool in pools if pool["database"] == database.name)

    def clients(self, database: Database) -> int:
        """How many clients are connected, in a transaction or not."""
        return sum(1 for client in self.show("CLIENTS") if client["database"] == database.name)

    def servers(self, database: Database) -> int:
        """How many server connections there are, used or not."""
        return sum(1 for server in self.show("SERVERS") if server["database"] == database.name)


@functools.cache
def _plain_statements(program: str) -> dict[str, object]:
    """What has PgBouncer pass on prepared statements as they are.

    1.21 learned to keep track of them, later ones do so by default. Behind those that do not, more
    can go wrong.
    """
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"(\d+)\.(\d+)", told.stdout)
    assert version, told.stdout
    return {"max_prepared_statements": 0} if (int(version[1]), int(version[2])) >= (1, 21) else {}


@contextlib.contextmanager
def pgbouncer(
    server_connections: int, *, users: Mapping[str, str] | None = None, **settings: object
) -> Iterator[PgBouncer]:
    """Run PgBouncer in transaction mode for the length of the block.

    Args:
        server_connections: how many connections each database gets, for each user.
        users: further ones who may connect, and their passwords: each is itself on the server then.
        settings: more of its settings.
    """
    assert PROGRAM, MISSING
    server = postgres_server().url
    folder = Path(tempfile.mkdtemp(prefix="rope_pb_", dir=open_folder()))
    try:
        told = server.translate_connect_args(username="user", database="dbname")
        told |= dict(server.query)
        user, password = told.get("user", "postgres"), told.get("password", "")
        target = {key: told[key] for key in ("host", "port", "user", "password") if key in told}
        if users:
            target.pop("user", None)
        userlist = folder / "userlist.txt"
        names = [(user, password), *(users or {}).items()]
        userlist.write_text("".join(f'"{name}" "{secret}"\n' for name, secret in names))
        lines = ["[databases]", "* = " + " ".join(f"{k}={v}" for k, v in target.items())]
        lines += ["[pgbouncer]"]
        for name, value in {
            "pool_mode": "transaction",
            "default_pool_size": server_connections,
            "max_client_conn": 200,
            "unix_socket_dir": folder,
            "listen_port": PORT,
            "auth_type": "trust",
            "auth_file": userlist,
            "admin_users": user,
            "log_connections": 0,
            "log_disconnections": 0,
            **_plain_statements(PROGRAM),
            **settings,
        }.items():
            lines.append(f"{name} = {value}")
        ini = folder / "pgbouncer.ini"
        ini.write_text("\n".join([*lines, ""]))
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:  # PgBouncer refuses to run as root
            other = pwd.getpwnam("nobody")
            as_user = {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
            for path in (folder, userlist, ini):
                os.chown(path, other.pw_uid, other.pw_gid)
            folder.chmod(0o755)
        orders = {"base": str(folder), "command": [PROGRAM, str(ini)], "as_user": as_user}
        keeper = subprocess.Popen(
            [sys.executable, "-I", "-c", KEEPER, json.dumps(orders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd=folder,
            start_new_session=True,  # Ctrl-C is for the tests; the pipe tells the keeper
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        bouncer = PgBouncer(folder, user)
        limit = time.monotonic() + START_LIMIT
        while True:
            try:
                bouncer.show("VERSION")
                break
            except psycopg.OperationalError as error:
                if time.monotonic() > limit or keeper.poll() is not None:
                    log = (folder / "log").read_text(errors="replace")
                    raise RuntimeError(f"PgBouncer did not start. Its log:\n{log}") from error
                time.sleep(0.05)
        yield bouncer
    finally:
        assert keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            keeper.stdin.close()
        keeper.wait(START_LIMIT)
