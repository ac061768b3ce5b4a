"""T1: whatever a sandbox's jennies do happens in one transaction, and nothing of it lasts."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import create_engine, event, insert, text
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import StaticPool

from rope_middleware import (
    AsyncSessionJenny,
    RopeError,
    RopeMiddleware,
    ScopeClosedError,
    SessionJenny,
    current_scope,
    open_scope,
)
from rope_middleware.testing import Sandbox
from tests.kit.sandboxes import COUNT, Base, Place, Row
from tests.kit.sessions import run_threads

pytestmark = pytest.mark.anyio


@pytest.fixture
def jenny(place: Place) -> Any:
    yield place.jenny
    assert place.rows() == 0


@pytest.fixture
async def ajenny(place: Place, anyio_backend: str) -> Any:
    await place.create()
    yield place.ajenny
    assert await place.arows() == 0


def test_T1_what_is_committed_in_the_block_is_seen_in_it_and_gone_after_it(jenny: Any) -> None:
    """A commit lasts as long as the sandbox."""
    with Sandbox(jenny):
        jenny.session.add(Row(n=1))
        jenny.session.commit()
        with open_scope():
            assert jenny.session.scalar(COUNT) == 1


def test_T1_a_rollback_goes_back_to_the_last_commit(jenny: Any) -> None:
    """What was committed before stays, in the sandbox."""
    with Sandbox(jenny):
        jenny.session.add(Row(n=1))
        jenny.session.commit()
        jenny.session.add(Row(n=2))
        jenny.session.flush()
        jenny.session.rollback()
        assert jenny.session.scalar(COUNT) == 1


def test_T1_savepoints_of_the_application_work(jenny: Any) -> None:
    """begin_nested() goes back to where it began, and no further."""
    with Sandbox(jenny):
        jenny.session.add(Row(n=1))
        with pytest.raises(ZeroDivisionError), jenny.session.begin_nested():
            jenny.session.add(Row(n=2))
            jenny.session.flush()
            raise ZeroDivisionError
        with jenny.session.begin_nested():
            jenny.session.add(Row(n=3))
        jenny.session.commit()
        assert jenny.session.scalar(COUNT) == 2


async def test_T1_async_sessions_do_the_same(ajenny: Any) -> None:
    """The twin, entered with `async with`."""
    async with Sandbox(ajenny):
        ajenny.session.add(Row(n=1))
        await ajenny.session.commit()
        ajenny.session.add(Row(n=2))
        await ajenny.session.flush()
        await ajenny.session.rollback()
        async with open_scope():
            assert await ajenny.session.scalar(COUNT) == 1


async def test_T1_both_kinds_stand_side_by_side(jenny: Any, ajenny: Any, place: Place) -> None:
    """One sandbox, a transaction for each engine; `with` and `async with` are the same."""
    if place.engine.dialect.name == "sqlite" and place.is_shared:
        return  # one file lets one of them write
    with Sandbox(jenny, ajenny):
        jenny.session.add(Row(n=1))
        jenny.session.commit()
        ajenny.session.add(Row(n=2))
        await ajenny.session.commit()
        assert jenny.session.scalar(COUNT) == 1
        assert await ajenny.session.scalar(COUNT) == 1


def test_T1_every_thread_works_in_the_only_open_sandbox(jenny: Any) -> None:
    """Threads that know of no scope: by rope, and in scopes of their own."""

    def by_rope(n: int) -> None:
        jenny.session.add(Row(n=n))
        jenny.session.commit()

    def in_scope(n: int) -> None:
        with open_scope():
            by_rope(n)

    with Sandbox(jenny):
        run_threads([lambda n=n, f=f: f(n) for n, f in enumerate([by_rope, in_scope] * 4, 1)])  # type: ignore[misc]
        assert jenny.session.scalar(COUNT) == 8


async def test_T1_async_sessions_work_from_any_loop(ajenny: Any) -> None:
    """A loop in another thread shares the transaction, in no scope and in one."""

    async def work(n: int) -> None:
        ajenny.session.add(Row(n=n))
        await ajenny.session.commit()
        async with open_scope():
            ajenny.session.add(Row(n=n + 100))
            await ajenny.session.commit()

    async with Sandbox(ajenny):
        await asyncio.gather(
            # Not from 0, for which MariaDB makes up a number: that of whichever comes next.
            *(
                asyncio.to_thread(threading_run, lambda n=n: asyncio.run(work(n)))
                for n in range(1, 5)
            )
        )
        assert await ajenny.session.scalar(COUNT) == 8


def threading_run(function: Any) -> None:
    """Run `function` in a thread that has no context of anybody's."""
    run_threads([function])


def test_T1_one_that_has_only_read_holds_nobody_up(jenny: Any) -> None:
    """The test has read, and has not ended its transaction; a client writes, the test reads."""

    def client() -> None:
        jenny.session.add(Row(n=1))
        jenny.session.commit()

    with Sandbox(jenny, wait=0.2):
        assert jenny.session.scalar(COUNT) == 0
        run_threads([client])
        assert jenny.session.scalar(COUNT) == 1
        jenny.session.add(Row(n=2))
        jenny.session.commit()
        assert jenny.session.scalar(COUNT) == 2


def test_T1_an_uncommitted_write_is_neither_seen_nor_waited_for(jenny: Any) -> None:
    """The error names the line of the write, and the cure. An inner scope is another session."""
    with Sandbox(jenny, name="mine", wait=0.1):
        jenny.session.add(Row(n=1))
        jenny.session.flush()
        with (
            open_scope(),
            pytest.raises(RopeError, match=r"'mine'.*test_T1_sandbox.py:\d+.*commit\(\)"),
        ):
            jenny.session.scalar(COUNT)
        jenny.session.commit()
        with open_scope():
            assert jenny.session.scalar(COUNT) == 1


async def test_T1_an_uncommitted_write_of_an_async_session(ajenny: Any) -> None:
    """The twin: the line is the application's, not the loop's."""
    async with Sandbox(ajenny, wait=0.1):
        ajenny.session.add(Row(n=1))
        await ajenny.session.flush()
        async with open_scope():
            with pytest.raises(RopeError, match=r"test_T1_sandbox.py:\d+"):
                await ajenny.session.scalar(COUNT)
        await ajenny.session.commit()


@pytest.mark.parametrize("wait", [0.4, float("inf")])
def test_T1_many_short_turns_are_served_in_order_and_are_no_error(jenny: Any, wait: float) -> None:
    """`wait` is the time of one turn: nobody is blamed for what all of them took together."""
    start = threading.Barrier(4)

    def work(n: int) -> None:
        start.wait(5)
        with open_scope(commit_on_success=True):
            jenny.session.add(Row(n=n))
            jenny.session.flush()
            time.sleep(0.15)  # so long is a turn

    with Sandbox(jenny, wait=wait):
        run_threads([partial(work, n) for n in range(1, 5)])
        assert jenny.session.scalar(COUNT) == 4


async def test_T1_many_short_turns_of_async_sessions(ajenny: Any) -> None:
    """The twin."""

    async def work(n: int) -> None:
        async with open_scope(commit_on_success=True):
            ajenny.session.add(Row(n=n))
            await ajenny.session.flush()
            await asyncio.sleep(0.15)

    async with Sandbox(ajenny, wait=0.4):
        await asyncio.gather(*(work(n) for n in range(1, 5)))
        assert await ajenny.session.scalar(COUNT) == 4


async def test_T1_who_waits_for_nobody_still_reads_beside_others(ajenny: Any) -> None:
    """wait=0 is for a write that is not committed; a statement under way is waited for."""

    async def read() -> None:
        async with open_scope():
            for _ in range(3):
                assert await ajenny.session.scalar(COUNT) == 0

    async with Sandbox(ajenny, wait=0):
        await asyncio.gather(*(read() for _ in range(4)))


def test_T1_a_failed_statement_spoils_only_its_own_transaction(jenny: Any) -> None:
    """An error that was swallowed holds nobody up, and the session has to roll back as ever."""
    with Sandbox(jenny, wait=0.2):
        jenny.session.add(Row(n=1))
        jenny.session.commit()
        with pytest.raises(Exception, match=r"(?i)no_such_table"):
            jenny.session.execute(text("SELECT * FROM no_such_table"))
        with open_scope():
            jenny.session.add(Row(n=2))
            jenny.session.commit()
        jenny.session.rollback()
        assert jenny.session.scalar(COUNT) == 2


def test_T1_two_sandboxes_and_no_name_is_an_error_in_words(jenny: Any) -> None:
    """Code that belongs to none of them is asked to say to which."""
    with Sandbox(jenny, name="one"), Sandbox(jenny, name="two"):

        def stray() -> None:
            with pytest.raises(RopeError, match=r"'one', 'two'.*Rope-Sandbox"):
                jenny.session.scalar(COUNT)

        run_threads([stray])


def test_T1_where_none_is_open_it_is_the_real_database(place: Place) -> None:
    """Another jenny's sandbox is none of this one's business."""
    other = type(place.jenny)(place.maker)
    with Sandbox(other), open_scope():
        place.jenny.session.execute(insert(Row).values(n=1))
        place.jenny.session.rollback()
        assert place.jenny.session.get_bind() is place.engine
        assert other.session.get_bind() is not place.engine


def test_T1_a_session_made_before_the_sandbox_works_in_it(jenny: Any, place: Place) -> None:
    """And afterwards on the real database again, where no scope says otherwise."""
    seen: list[object] = []

    def stray(begin: threading.Event, go_on: threading.Event) -> None:
        session = jenny.session
        session.scalar(COUNT)
        session.rollback()
        begin.set()
        go_on.wait(30)
        session.add(Row(n=1))
        session.commit()
        seen.append(session.scalar(COUNT))
        session.rollback()

    begin, go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=stray, args=(begin, go_on))
    thread.start()
    begin.wait(30)
    with Sandbox(jenny):
        go_on.set()
        thread.join(30)
    assert seen == [1]


def test_T3_what_outlives_the_sandbox_is_told_so(jenny: Any) -> None:
    """A session and a scope of the block's are over with it; the text names the sandbox."""
    with Sandbox(jenny, name="gone"):
        scope = open_scope("inner")
        scope.__enter__()
        session = jenny.session
        session.add(Row(n=1))
        session.flush()
    with pytest.raises(ScopeClosedError, match=r"'gone'"):
        session.commit()
    session.rollback()
    with pytest.raises(ScopeClosedError, match=r"'gone'"):
        session.scalar(COUNT)
    scope.__exit__(None, None, None)


def test_T1_a_commit_in_two_phases_is_one_like_any_other(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """C7 in a sandbox: nothing is prepared, nothing is left, and one left open ends in silence."""
    if place.engine.dialect.name == "sqlite":
        return  # it has none
    jenny = SessionJenny(sessionmaker(place.engine, twophase=True))
    with Sandbox(jenny):
        with open_scope(commit_on_success=True):
            jenny.session.add(Row(n=1))
        with pytest.raises(ZeroDivisionError), open_scope(commit_on_success=True):
            jenny.session.add(Row(n=2))
            jenny.session.flush()
            raise ZeroDivisionError
        assert jenny.session.scalar(COUNT) == 1
    assert place.rows() == 0
    assert not caplog.records


async def test_T1_async_sessions_commit_in_two_phases(
    place: Place, anyio_backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The twin, where the dialect sends them as text."""
    if place.engine.dialect.name == "sqlite":
        return
    jenny = AsyncSessionJenny(async_sessionmaker(place.async_engine, twophase=True))
    async with Sandbox(jenny):
        async with open_scope(commit_on_success=True):
            jenny.session.add(Row(n=1))
        assert await jenny.session.scalar(COUNT) == 1
    assert place.rows() == 0
    assert not caplog.records


async def test_T1_callbacks_of_the_tests_own_scope_run(
    ajenny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """At its end, async ones in the test's loop; nothing is said of what is meant to be lost."""
    ended: list[object] = []

    async def on_close() -> None:
        ended.append(asyncio.get_running_loop())

    async with Sandbox(ajenny):
        current_scope().on_close(on_close)
        ajenny.session.add(Row(n=1))
        await ajenny.session.flush()
    assert ended == [asyncio.get_running_loop()]
    with Sandbox(ajenny), pytest.raises(RopeError):
        current_scope().on_close(on_close)
    assert not caplog.records


def test_T1_an_in_memory_database_of_one_thread() -> None:
    """SQLAlchemy's default pool for sqlite://, with a client that stays in the thread."""
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    jenny = SessionJenny(sessionmaker(engine))
    app = Flask(__name__)

    @app.post("/")
    def add() -> tuple[str, int]:
        jenny.session.add(Row(n=1))
        return "", 201

    wrapped = RopeMiddleware(app.wsgi_app, commit_on_success=True)
    app.wsgi_app = wrapped  # type: ignore[method-assign]
    for _ in range(2):
        with Sandbox(jenny):
            assert app.test_client().post("/").status_code == 201
            assert jenny.session.scalar(COUNT) == 1
    engine.dispose()


MEMORY: dict[str, Any] = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}


SWITCH_ON = "PRAGMA foreign_keys=ON"


@pytest.mark.parametrize("options", [MEMORY, {}], ids=["memory", "file"])
def test_T1_after_a_dispose_a_sandbox_is_on_what_the_engine_is_on(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """The engine has a new pool then: another database in memory, listeners that came later."""
    engine = create_engine("sqlite://" if options else f"sqlite:///{tmp_path}/t.db", **options)
    jenny = SessionJenny(sessionmaker(engine))
    for keys in 0, 1:
        Base.metadata.create_all(engine)
        with Sandbox(jenny):
            assert jenny.session.scalar(COUNT) == 0
            assert jenny.session.scalar(text("PRAGMA foreign_keys")) == keys
        if not keys:
            event.listen(engine, "connect", lambda made, _: made.execute(SWITCH_ON))
        engine.dispose()


async def test_T1_a_test_may_use_both_kinds_where_its_loop_runs(jenny: Any, ajenny: Any) -> None:
    """In a test that is no mistake, and nothing is told of it."""
    async with Sandbox(jenny):
        jenny.session.add(Row(n=1))
        jenny.session.commit()
    with Sandbox(jenny):
        jenny.session.add(Row(n=1))
        jenny.session.flush()
