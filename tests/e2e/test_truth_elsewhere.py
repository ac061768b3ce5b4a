"""C8 and C9 through PgBouncer, and on MariaDB: what is told there, and what is not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from tests.kit.models import Row
from tests.kit.shop import MARIA, Answer, Shop, Work, add, ask_once, send
from tests.servers.mariadb import MariaDatabase, mariadb_server
from tests.servers.pgbouncer import MISSING, pgbouncer
from tests.servers.postgres import postgres_server
from tests.servers.wire import COMMIT, DOWN, UP, Cut, Wire

TABLE = "CREATE TABLE row (n int PRIMARY KEY, name varchar(9) NOT NULL DEFAULT '')"


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize("cut", [Cut(DOWN, COMMIT), Cut(UP, COMMIT)], ids=lambda cut: cut.kind)
def test_C9_through_pgbouncer_in_transaction_mode(cut: Cut) -> None:
    """The transaction's id is the server's, whichever connection asks for it."""
    with postgres_server().new_database() as database, pgbouncer(server_connections=4) as bouncer:
        database.query(TABLE)
        url = bouncer.url(database, "psycopg")
        socket = Path(str(url.query["host"])) / f".s.PGSQL.{url.query['port']}"
        with Wire(socket) as wire:
            wire.cut_next(cut)
            shop = Shop(
                "wsgi",
                wire.url(database, "psycopg"),
                add,
                {"connect_args": {"prepare_threshold": None}},
                commit_on_success=True,
                retries=3,
            )
            assert asyncio.run(send(shop)).status == 201
        assert sum(wire.cuts.values()) == 1
        assert database.query("SELECT n FROM row") == [(1,)]


@pytest.fixture
def maria() -> Iterator[MariaDatabase]:
    with mariadb_server().new_database(TABLE.replace("row", "`row`")) as found:
        yield found


def ask_maria(kind: str, database: MariaDatabase, work: Work, **options: object) -> Answer:
    return ask_once(kind, database.url(MARIA[kind]), work, **options)


def kill(session: Session, database: MariaDatabase) -> None:
    database.query("KILL %s", session.scalar(text("SELECT connection_id()")))


@pytest.mark.parametrize("kind", MARIA)
def test_C8_on_mariadb_a_lost_connection_is_tried_again(kind: str, maria: MariaDatabase) -> None:
    """Before anything is committed."""
    tries: list[int] = []

    def work(session: Session, n: int) -> int:
        tries.append(n)
        session.add(Row(n=n))
        session.flush()
        if len(tries) == 1:
            kill(session, maria)
        session.execute(text("SELECT 1"))
        return 201

    assert ask_maria(kind, maria, work, commit_on_success=True, retries=3).status == 201
    assert (len(tries), maria.query("SELECT n FROM `row`")) == (2, [(1,)])


@pytest.mark.parametrize("kind", MARIA)
@pytest.mark.parametrize("retries", [0, 3])
def test_C9_on_mariadb_a_commit_in_doubt_is_told(
    kind: str, maria: MariaDatabase, retries: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody can be asked: 5xx, "in doubt" in the log, and no second try."""
    tries: list[int] = []

    def work(session: Session, n: int) -> int:
        tries.append(n)
        session.add(Row(n=n))
        session.flush()
        kill(session, maria)
        return 201

    caplog.set_level(logging.INFO, "rope_middleware")
    assert ask_maria(kind, maria, work, commit_on_success=True, retries=retries).status == 500
    assert "commit of 'POST /1' in doubt" in caplog.text
    assert len(tries) == 1
