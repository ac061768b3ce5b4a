"""S8: what was in a transaction when the process was forked is the parent's, whoever kept it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from threading import Event, Thread
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from rope_middleware import AsyncSessionJenny, ScopeClosedError, SessionJenny, holders, open_scope
from tests.kit.engines import fill
from tests.kit.models import Row
from tests.kit.waiting import PATIENCE
from tests.servers.postgres import Database, postgres_server

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]

BACKEND = text("SELECT pg_backend_pid()")


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    with postgres_server().new_database() as found:
        fill(found.url("psycopg"), 0)
        yield found


@pytest.fixture
def engine(database: Database) -> Iterator[Engine]:
    engine = create_engine(database.url("psycopg"))
    yield engine
    engine.dispose()


def write(session: Session) -> Session:
    """Begin a transaction and write in it."""
    session.execute(text("DELETE FROM row"))
    session.add(Row(n=1))
    session.flush()
    return session


def in_child(work: Callable[[], object]) -> str:
    """Fork, run `work` in the child; return what went wrong there."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            work()
            gc.collect()
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pipe.read()


def try_everything(session: Session) -> None:
    """Use what the parent has in a transaction, in each way that would say something over it."""
    kept = session.connection
    for use in (
        lambda: session.execute(BACKEND),
        lambda: session.execute(BACKEND),
        lambda: kept().exec_driver_sql("SELECT 1"),
        session.commit,
    ):
        with pytest.raises(ScopeClosedError, match=r"this (one|process) was forked"):
            use()
    assert not holders()
    session.rollback()
    session.close()


def stands(session: Session, backend: object) -> None:
    """Check that the transaction goes on where it was."""
    assert session.scalar(BACKEND) == backend
    session.commit()
    assert session.scalar(text("SELECT count(*) FROM row")) == 1


@pytest.mark.parametrize("way", ["scope", "rope", "scopefunc"])
def test_S8_a_session_that_the_child_has_kept_says_nothing_over_the_parents_connection(
    way: str, engine: Engine
) -> None:
    """Its use raises. By rope it begins anew once it is closed, on a connection of the child's."""
    jenny = SessionJenny(sessionmaker(engine), (lambda: 1) if way == "scopefunc" else None)

    def child() -> None:
        try_everything(session)
        if way == "scope":
            with pytest.raises(ScopeClosedError):
                session.execute(BACKEND)
        else:
            assert session.scalar(BACKEND) != backend
        with open_scope():
            assert jenny.scalar(BACKEND) != backend
        session.get_bind().dispose()  # type: ignore[union-attr]

    with open_scope() if way == "scope" else nullcontext():
        session = write(jenny.session)
        backend = session.scalar(BACKEND)
        assert in_child(child) == ""
        stands(session, backend)
        jenny.remove()


def test_S8_sessions_of_other_threads_are_the_parents_too(engine: Engine) -> None:
    """A thread that forks does not know what the others have open."""
    jenny = SessionJenny(sessionmaker(engine))
    found: list[Any] = []
    is_open, may_end = Event(), Event()

    def other() -> None:
        with open_scope("other"):
            session = write(jenny.session)
            found.extend((session, session.scalar(BACKEND)))
            is_open.set()
            assert may_end.wait(PATIENCE)
            stands(*found)

    thread = Thread(target=contextvars.Context().run, args=(other,))
    thread.start()
    assert is_open.wait(PATIENCE)
    failed = in_child(lambda: try_everything(found[0]))
    may_end.set()
    thread.join()
    assert failed == ""


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_S8_an_async_session_that_the_child_has_kept_says_nothing_either(
    driver: str, database: Database
) -> None:
    """Closing it in the child waits for nothing: the loop that it would wait in is the parent's."""
    engine = create_async_engine(database.url(driver))
    jenny = AsyncSessionJenny(async_sessionmaker(engine))

    async def request() -> None:
        async with open_scope():
            await jenny.session.run_sync(write)
            backend = await jenny.scalar(BACKEND)
            session = jenny.session.sync_session
            assert in_child(lambda: try_everything(session)) == ""
            await jenny.session.run_sync(stands, backend)
        await engine.dispose()

    asyncio.run(request())


def test_S8_what_another_thread_is_in_the_middle_of_does_not_stop_the_child(
    engine: Engine,
) -> None:
    """A session class is met for the first time: that is done one after the other."""
    is_meeting, may_go_on = Event(), Event()

    class Slow(type):
        def __getattribute__(cls, name: str) -> Any:
            if name == "get_bind" and not is_meeting.is_set():
                is_meeting.set()
                may_go_on.wait(PATIENCE)
            return super().__getattribute__(name)

    class SlowSession(Session, metaclass=Slow):
        pass

    def use(session_class: type[Session]) -> None:
        with open_scope():
            SessionJenny(sessionmaker(engine, class_=session_class)).session.get_bind()

    def child() -> None:
        first = Thread(target=use, args=(Session,), daemon=True)
        first.start()
        first.join(PATIENCE / 4)
        assert not first.is_alive(), "it waits for ever"

    other = Thread(target=use, args=(SlowSession,))
    other.start()
    assert is_meeting.wait(PATIENCE)
    failed = in_child(child)
    may_go_on.set()
    other.join()
    assert failed == ""
