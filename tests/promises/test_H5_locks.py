"""H5: an error of a lock names the other request of this process, and its line."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, insert, select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import sessionmaker

from rope_middleware import SessionJenny, open_scope
from tests.kit.either import Either, now
from tests.kit.engines import fill, rows, small_engine
from tests.kit.models import Row
from tests.kit.sessions import run_threads
from tests.servers.mariadb import mariadb_server
from tests.servers.postgres import postgres_server

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
def url_of() -> Iterator[Callable[[str], URL]]:
    """Tell the address of a database with 10 rows, on the server of a driver."""
    with ExitStack() as stack:
        yield cache(partial(_filled, stack))


def _filled(stack: ExitStack, driver: str) -> URL:
    if driver.startswith("postgresql"):
        url = stack.enter_context(postgres_server().new_database()).url(driver.partition("+")[2])
        fill(url.set(drivername="postgresql+psycopg"), 10)
        return url
    table = "CREATE TABLE `row` (n INTEGER PRIMARY KEY, name VARCHAR(9) NOT NULL)"
    rows = "INSERT INTO `row` SELECT seq, '' FROM seq_0_to_9"
    return stack.enter_context(mariadb_server().new_database(table, rows)).url(driver)


class Served(Either):
    """A jenny on a server, with as many connections as are asked for."""

    def __init__(self, driver: str, url: URL) -> None:
        super().__init__([url], is_async=driver.endswith(("+asyncpg", "+asyncmy")), engine={})

    async def at_once(self, *bodies: Callable[[], Any]) -> None:
        """Run coroutines in tasks or, with the sync driver, in threads."""
        if self.is_async:
            await asyncio.gather(*(body() for body in bodies))
        else:
            run_threads([lambda body=body: now(body()) for body in bodies])  # type: ignore[misc]

    def barrier(self) -> Callable[[], Any]:
        """Make what two of them wait for each other with."""
        if self.is_async:
            return asyncio.Barrier(2).wait
        barrier = threading.Barrier(2)

        async def wait() -> None:
            barrier.wait(60)

        return wait


DRIVERS = ["postgresql+psycopg", "postgresql+asyncpg", "mariadb+pymysql", "mariadb+asyncmy"]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("by", ["flush", "Core"])
async def test_H5_a_deadlock_names_the_other_request(
    url_of: Callable[[str], URL], driver: str, by: str
) -> None:
    """Two requests lock two rows in opposite orders; whoever loses reads of the other."""
    failed: list[BaseException] = []
    async with Served(driver, url_of(driver)) as served:
        together = served.barrier()

        async def change(n: int) -> None:
            if by == "flush":
                (await served.do("get_one", Row, n)).name = "x"
                await served.do("flush")
            else:
                await served.do("execute", update(Row).where(Row.n == n).values(name="y"))

        async def lock(first: int, second: int) -> None:
            try:
                async with served.scope(name=f"{first} then {second}"):
                    await change(first)
                    await together()
                    await change(second)
                    await served.do("commit")
            except DBAPIError as error:
                failed.append(error)

        await served.at_once(lambda: lock(1, 2), lambda: lock(2, 1))
    (error,) = failed
    others = [name for name in ("1 then 2", "2 then 1") if f"{name!r}" in notes(error)]
    assert len(others) == 1, notes(error)
    assert "began at either.py:" in notes(error)


NOT_LONG = {
    "postgresql": text("SET LOCAL lock_timeout = 10"),
    "mariadb": text("SET SESSION innodb_lock_wait_timeout = 0"),
}
HOLD: dict[str, Any] = {
    "Core": update(Row).where(Row.n == 5).values(name="y"),
    "text": "UPDATE {} SET name = 'y' WHERE n = 5",
    "locking": select(Row).where(Row.n == 5).with_for_update(),
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("by", HOLD)
async def test_H5_a_lock_that_is_not_waited_for_names_who_holds_it(
    url_of: Callable[[str], URL], driver: str, by: str
) -> None:
    """NOWAIT, or a time-out: the requests of that engine that wrote or locked are named."""
    wants = [
        [select(Row).where(Row.n == 5).with_for_update(nowait=True)],
        [NOT_LONG[driver.partition("+")[0]], update(Row).where(Row.n == 5).values(name="z")],
    ]
    async with Served(driver, url_of(driver)) as served:
        async with served.scope(name="holds it"):
            quoted = served.engine.dialect.identifier_preparer.quote("row")
            hold = HOLD[by]
            await served.do("execute", hold if by != "text" else text(hold.format(quoted)))
            for statements in wants:
                async with served.scope(name="wants it"):
                    with pytest.raises(DBAPIError) as raised:
                        for statement in statements:
                            await served.do("execute", statement)
                assert "'holds it' at either.py:" in notes(raised.value)
                assert "(its transaction began at either.py:" in notes(raised.value)
                assert "wants it" not in notes(raised.value)
            await served.do("rollback")


@pytest.mark.parametrize("by", ["flush", "Core"])
def test_H5_who_has_just_committed_is_named(tmp_path: Path, by: str) -> None:
    """The other side may have ended before the error is here: for a second it is named.

    Here it has written what the loser had read before, which SQLite refuses at once. Who had ended
    before the loser began is nobody's other side.
    """
    engine = small_engine(tmp_path / "x.sqlite")
    jenny = SessionJenny(sessionmaker(engine))

    def write(n: int) -> None:
        if by == "flush":
            jenny.session.add(Row(n=n))
        else:
            jenny.session.execute(insert(Row).values(n=n))

    with open_scope("ended before"):
        jenny.session.connection().exec_driver_sql("PRAGMA journal_mode = WAL")
        write(1)
        jenny.session.commit()
    with open_scope("fails"):
        jenny.session.connection().exec_driver_sql("BEGIN")
        jenny.session.scalars(select(Row)).all()
        with open_scope("was here"):
            write(2)
            jenny.session.commit()
        with pytest.raises(OperationalError) as raised:
            write(3)
            jenny.session.flush()
    told = notes(raised.value)
    assert "side, in this process: 'was here', which has just ended" in told
    assert "ended before" not in told
    engine.dispose()


def test_H5_no_commit_fails_for_the_note_of_who_has_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands is told as a success, also where the interpreter ends and imports nothing."""
    engine = small_engine(tmp_path / "x.sqlite")
    jenny = SessionJenny(sessionmaker(engine))
    with open_scope("another session"):
        assert jenny.session.scalars(select(Row)).all() == []
        monkeypatch.setitem(sys.modules, "rope_middleware.session.sql.statements", None)
        with open_scope():
            jenny.session.execute(insert(Row).values(n=1))
            jenny.session.commit()
    assert rows(engine) == 1
    engine.dispose()
