"""H5: an error of a lock names the other request of this process, and its line."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from rope_middleware import AsyncSessionJenny, SessionJenny, open_scope
from tests.kit.engines import fill, small_engine
from tests.kit.models import Row
from tests.kit.sessions import run_threads
from tests.servers.postgres import Database, postgres_server

pytestmark = pytest.mark.anyio


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def test_H5_a_locked_database_names_who_has_written(tmp_path: Path) -> None:
    """SQLite says that it is locked; the note says by which request, and where that is now."""
    engine = small_engine(
        tmp_path / "x.sqlite", connect_args={"timeout": 0.01, "check_same_thread": False}
    )
    jenny = SessionJenny(sessionmaker(engine))
    written, leave = threading.Event(), threading.Event()

    def writes() -> None:
        with open_scope("writes"):
            jenny.session.add(Row(n=1))
            jenny.session.flush()
            written.set()
            assert leave.wait(60)
            jenny.session.rollback()

    def fails() -> None:
        assert written.wait(60)
        with open_scope("fails"), pytest.raises(OperationalError) as raised:
            jenny.session.add(Row(n=2))
            jenny.session.flush()
        leave.set()
        told = notes(raised.value)
        assert "The other side, in this process: 'writes' at test_H5_locks.py:" in told
        assert "began at test_H5_locks.py:" in told

    run_threads([writes, fails])
    engine.dispose()


def test_H5_who_has_only_read_is_not_named(tmp_path: Path) -> None:
    """And somebody else's lock has no other side in this process."""
    engine = small_engine(
        tmp_path / "x.sqlite", connect_args={"timeout": 0.01, "check_same_thread": False}
    )
    jenny = SessionJenny(sessionmaker(engine))
    with engine.connect() as other, open_scope("reads"):
        jenny.session.scalars(select(Row)).all()
        other.exec_driver_sql("BEGIN IMMEDIATE")
        with open_scope("fails"), pytest.raises(OperationalError) as raised:
            jenny.session.add(Row(n=2))
            jenny.session.flush()
        assert notes(raised.value) == ""
        other.rollback()
    engine.dispose()


@pytest.fixture(scope="module")
def server_database() -> Iterator[Database]:
    with postgres_server().new_database() as found:
        fill(found.url("psycopg"), 10)
        yield found


def test_H5_a_deadlock_names_the_other_request(server_database: Database) -> None:
    """Two requests lock two rows in opposite orders; whoever loses reads of the other."""
    engine = create_engine(server_database.url("psycopg"))
    jenny = SessionJenny(sessionmaker(engine))
    together = threading.Barrier(2)
    failed: list[BaseException] = []

    def lock(first: int, second: int) -> None:
        try:
            with open_scope(f"{first} then {second}"):
                jenny.session.get_one(Row, first).name = "x"
                jenny.session.flush()
                together.wait(60)
                jenny.session.get_one(Row, second).name = "x"
                jenny.session.commit()
        except DBAPIError as error:
            failed.append(error)

    run_threads([lambda: lock(1, 2), lambda: lock(2, 1)])
    (error,) = failed
    others = [name for name in ("1 then 2", "2 then 1") if f"{name!r}" in notes(error)]
    assert len(others) == 1, notes(error)
    assert "test_H5_locks.py:" in notes(error)
    engine.dispose()


async def test_H5_a_deadlock_of_tasks_names_the_other_request(server_database: Database) -> None:
    """The twin, by asyncpg."""
    engine = create_async_engine(server_database.url("asyncpg"))
    jenny = AsyncSessionJenny(async_sessionmaker(engine))
    locked = 0

    async def lock(first: int, second: int) -> None:
        nonlocal locked
        async with open_scope(f"{first} then {second}"):
            (await jenny.session.get_one(Row, first)).name = "x"
            await jenny.session.flush()
            locked += 1
            while locked < 2:
                await asyncio.sleep(0.01)
            (await jenny.session.get_one(Row, second)).name = "x"
            await jenny.session.commit()

    done = await asyncio.gather(lock(3, 4), lock(4, 3), return_exceptions=True)
    (error,) = [one for one in done if one is not None]
    others = [name for name in ("3 then 4", "4 then 3") if f"{name!r}" in notes(error)]
    assert len(others) == 1, notes(error)
    await engine.dispose()


def test_H5_a_lock_that_is_not_waited_for_names_who_has_written(server_database: Database) -> None:
    """NOWAIT: of the requests of that engine those that have written are named."""
    engine = create_engine(server_database.url("psycopg"))
    jenny: Any = SessionJenny(sessionmaker(engine))
    with open_scope("has written"):
        jenny.session.execute(text("UPDATE row SET name = 'y' WHERE n = 5"))
        with open_scope("wants it"), pytest.raises(OperationalError) as raised:
            jenny.session.execute(text("SELECT 1 FROM row WHERE n = 5 FOR UPDATE NOWAIT"))
        assert "'has written' at test_H5_locks.py:" in notes(raised.value)
        jenny.session.rollback()
    engine.dispose()


def test_H5_who_has_just_committed_is_named(tmp_path: Path) -> None:
    """The other side may have ended before the error is here: for a second it is named."""
    engine = small_engine(
        tmp_path / "x.sqlite", connect_args={"timeout": 0.01, "check_same_thread": False}
    )
    jenny = SessionJenny(sessionmaker(engine))
    with engine.connect() as other:
        with open_scope("was here"):
            jenny.session.add(Row(n=1))
            jenny.session.commit()
        other.exec_driver_sql("BEGIN IMMEDIATE")
        with open_scope("fails"), pytest.raises(OperationalError) as raised:
            jenny.session.add(Row(n=2))
            jenny.session.flush()
        other.rollback()
    assert "'was here', which has just ended" in notes(raised.value)
    engine.dispose()
