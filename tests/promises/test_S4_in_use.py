"""S4: a thread is in the middle of a statement when its scope ends."""

from __future__ import annotations

import asyncio
import contextvars
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from rope_middleware import (
    ASGIRopeMiddleware,
    ScopeClosedError,
    SessionJenny,
    current_scope,
    open_scope,
)
from rope_middleware.scope.scope import session_of
from rope_middleware.session.sql.notes import notes_of
from tests.kit.asgi import http_scope, into_nothing
from tests.kit.engines import MakeEngine, hold_up
from tests.kit.sessions import use
from tests.kit.waiting import never, poll
from tests.kit.ways import REQUESTS, Way


class OneAtATime(sqlite3.Connection):
    """Breaks where two threads use it at once, as PyMySQL's does."""

    executing = False

    def rollback(self) -> None:
        if self.executing:
            raise sqlite3.InternalError("Packet sequence number wrong")
        super().rollback()

    def close(self) -> None:
        if not self.executing:  # else SQLite itself might break
            super().close()


class Straggler:
    """A thread that is in the middle of a statement when the request ends."""

    def __init__(self, make_engine: MakeEngine) -> None:
        told = {"timeout": 30, "check_same_thread": False, "factory": OneAtATime}
        self.engine = make_engine(connect_args=told)
        self.jenny = SessionJenny(sessionmaker(self.engine))
        self.plain = scoped_session(sessionmaker(self.engine), scopefunc=current_scope)
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.made: list[OneAtATime] = []
        self.thrown_away: list[object] = []
        self.said: Any = None
        event.listen(self.engine, "connect", self.learn)
        self.engine.dispose()
        event.listen(self.engine, "invalidate", lambda *told: self.thrown_away.append(told))

    def learn(self, connection: Any, _: object) -> None:
        def wait() -> int:
            connection.executing = True
            self.inside.set()
            assert self.go_on.wait(30)
            connection.executing = False
            return 7

        connection.create_function("wait", 0, wait)
        self.made.append(connection)

    def work(self, session: Any) -> None:
        try:
            self.said = session.scalar(text("SELECT wait()"))
            session.scalar(text("SELECT 1"))
        except Exception as error:
            self.said = self.said, type(error)

    def start(self, session: Any, after: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(self.work, session))
        thread.start()
        assert self.inside.wait(30)
        after()
        return thread


def by_sync_scope(body: Callable[[], Any], **options: Any) -> Any:
    with open_scope(close_timeout=options["close_timeout"]):
        return body()


def by_cancelled_request(
    body: Callable[[], Any], on_leave: Callable[[], object] = lambda: None, **options: Any
) -> Any:
    """The client leaves, and the server cancels the task."""
    found = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(await asyncio.to_thread(body))
        await never()

    async def main() -> None:
        call = asyncio.create_task(
            ASGIRopeMiddleware(app, **options)(http_scope(), never, into_nothing)
        )
        await poll(lambda: bool(found))
        call.cancel()
        on_leave()
        await asyncio.wait({call})

    asyncio.run(main())
    return found[0]


STRAGGLES = [by_sync_scope, by_cancelled_request, *REQUESTS]


@pytest.mark.parametrize("ends", STRAGGLES, ids=lambda ends: ends.__name__)
@pytest.mark.parametrize("how", ["jenny", "jenny, on_close", "registries"])
def test_S4_the_end_waits_for_a_statement_of_another_thread(
    make_engine: MakeEngine, ends: Way, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection goes back whole, nothing is logged, and the next statement is refused."""
    if how == "registries" and ends is by_sync_scope:
        return  # a middleware's option
    one = Straggler(make_engine)

    def body() -> threading.Thread:
        if how == "jenny, on_close":
            current_scope().on_close(lambda: None)
        session = one.plain if how == "registries" else one.jenny.session
        return one.start(session, threading.Timer(0.1, one.go_on.set).start)

    options = {"registries": [one.plain]} if how == "registries" else {}
    ends(body, close_timeout=10.0, **options).join(30)
    assert one.said == (7, ScopeClosedError)
    assert one.thrown_away == []
    assert [record.getMessage() for record in caplog.records if record.levelno > 20] == []
    with one.engine.connect() as connection:  # the pool's is in no transaction
        assert connection.connection.driver_connection.in_transaction is False  # type: ignore[union-attr]


def test_A3_the_event_loop_does_not_wait_for_a_statement_of_another_thread(
    make_engine: MakeEngine,
) -> None:
    """The thread may need the loop for what it does: here it goes on when the loop says so."""
    one = Straggler(make_engine)

    def on_leave() -> None:
        asyncio.get_running_loop().call_later(0.1, one.go_on.set)

    by_cancelled_request(lambda: one.start(one.jenny, lambda: None), on_leave).join(30)
    assert one.said == (7, ScopeClosedError)
    assert one.thrown_away == []


@pytest.mark.parametrize("ends", STRAGGLES, ids=lambda ends: ends.__name__)
def test_S4_the_end_waits_for_a_statement_no_longer_than_it_may(
    make_engine: MakeEngine, ends: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """Then the session is closed all the same: its connection is invalidated, and the log says."""
    one = Straggler(make_engine)
    thread = ends(lambda: one.start(one.jenny.session, lambda: None), close_timeout=0.2)
    assert not one.go_on.is_set()
    one.go_on.set()
    thread.join(30)
    one.made[0].close()
    assert len(one.thrown_away) == 1
    (told,) = [record.getMessage() for record in caplog.records if record.levelno > 20]
    assert "failed, its connection is invalidated" in told


def test_S4_a_statement_that_a_thread_is_about_to_send_is_refused(make_engine: MakeEngine) -> None:
    """It is not sent over a connection that is back in its pool."""
    engine = make_engine(pool_size=1)
    jenny = SessionJenny(sessionmaker(engine))
    inside, go_on = hold_up(engine, "before_cursor_execute")
    with ThreadPoolExecutor(1) as pool:
        with open_scope():
            go_on.set()
            session = use(jenny.session)
            go_on.clear()
            inside.clear()
            future = pool.submit(session.execute, text("BEGIN IMMEDIATE"))
            assert inside.wait(30)
        go_on.set()
        with pytest.raises(ScopeClosedError):
            future.result(30)
    with engine.connect() as connection:
        assert connection.connection.driver_connection.in_transaction is False  # type: ignore[union-attr]


def test_S4_the_first_statement_is_noted_alike(make_engine: MakeEngine) -> None:
    """Whether somebody has asked for the notes of its connection before, or nobody has."""
    jenny = SessionJenny(sessionmaker(make_engine()))
    found: list[tuple[int, bool, object]] = []
    for asks_before in (True, False, False):  # nothing is watched before the first
        with open_scope():
            connection = jenny.session.connection()
            before = notes_of(connection) if asks_before else None
            jenny.session.execute(text("SELECT 1"))
            notes = notes_of(connection)
            assert before is None or before is notes
            found.append((len(notes), notes.has_unread(), notes.gone))
        assert notes.gone is not None  # nobody begins another statement
    assert found == [(1, False, None)] * 3


def test_S4_a_session_that_is_made_while_its_scope_ends_is_refused(make_engine: MakeEngine) -> None:
    """The first one of a class, and later ones, which are made in one go: nothing is kept of it."""
    while_made: list[Callable[[], object]] = []

    class Slow(Session):
        def __init__(self, *args: Any, **kw: Any) -> None:
            super().__init__(*args, **kw)
            while while_made:
                while_made.pop()()

    for makes_before in (0, 2):
        jenny = SessionJenny(sessionmaker(make_engine(), class_=Slow))
        for _ in range(makes_before):
            with open_scope():
                use(jenny.session)
        with ExitStack() as stack:
            scope = stack.enter_context(open_scope())
            while_made.append(stack.close)
            with pytest.raises(ScopeClosedError):
                _ = jenny.session
            assert scope.closed
            assert session_of(scope, jenny.registry) is None
