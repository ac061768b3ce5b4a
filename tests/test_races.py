"""Ends that something comes in the way of: threads, generators, errors without a text."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, event, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from rope_middleware import (
    AsyncSessionJenny,
    CrossLoopError,
    NoScopeError,
    ScopeClosedError,
    SessionJenny,
    WSGIRopeMiddleware,
    current_scope,
    open_scope,
)
from tests.conftest import Data, checked_out

SELECT = text("SELECT 1")


@pytest.fixture
def jenny(engine: Engine) -> SessionJenny[Session]:
    return SessionJenny(sessionmaker(engine))


def serve(app: Callable[..., Iterable[bytes]], **options: Any) -> list[bytes]:
    """Ask a WSGI application once, as a server does."""
    environ = {"REQUEST_METHOD": "GET", "wsgi.input": io.BytesIO()}
    body = WSGIRopeMiddleware(app, **options)(environ, lambda *_: print)
    try:
        return list(body)
    finally:
        body.close()  # type: ignore[attr-defined]


def test_S3_an_error_without_a_text_does_not_keep_the_scope_open(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """Looking for what to note on an error must not raise another one."""

    class MuteError(Exception):
        def __str__(self) -> str:
            raise ValueError

    with pytest.raises(MuteError), open_scope():
        jenny.session.execute(SELECT)
        raise MuteError
    assert checked_out(engine) == 0
    with pytest.raises(NoScopeError):
        current_scope()


def test_S4_the_end_waits_for_a_flush_of_another_thread(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """Its next INSERT would land on a connection that somebody else has by then."""
    flushing, go_on = threading.Event(), threading.Event()

    with open_scope():
        session = jenny.session
        session.execute(SELECT)

        @event.listens_for(session, "pending_to_persistent")
        def in_the_middle(_session: Session, _instance: Any) -> None:
            flushing.set()
            assert go_on.wait(30)

        def straggle() -> None:
            session.add(Data(count=7))
            session.flush()

        thread = threading.Thread(target=straggle)
        thread.start()
        assert flushing.wait(30)
        threading.Timer(0.2, go_on.set).start()
    assert go_on.is_set()  # not before the flush was over
    thread.join(30)
    assert checked_out(engine) == 0
    with engine.connect() as connection:
        assert connection.scalars(select(Data.count)).all() == [0]


def test_S3_what_clear_forgets_in_a_transaction_is_closed_all_the_same(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """`registry.clear()` forgets the session; the scope does not."""
    with open_scope():
        jenny.session.execute(SELECT)
        jenny.registry.clear()
        assert checked_out(engine) == 1
    assert checked_out(engine) == 0


def test_S6_scopes_of_generators_may_be_left_in_any_order() -> None:
    """What was current before both is current after both."""

    def hold(name: str) -> Iterator[None]:
        with open_scope(name):
            yield

    first, second = hold("first"), hold("second")
    next(first)
    next(second)
    first.close()
    assert current_scope().name == "second"
    second.close()
    with pytest.raises(NoScopeError):
        current_scope()


def test_S6_a_scope_around_several_chunks_is_current_for_each(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """`with open_scope():` in a generator body is not lost between its chunks."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        outer = jenny.session
        with open_scope():
            inner = jenny.session
            yield b"1"
            assert jenny.session is inner
        assert jenny.session is outer
        yield b"2"

    assert serve(app) == [b"1", b"2"]
    assert checked_out(engine) == 0


def test_S6_an_inner_scope_ends_the_plain_sessions_that_are_used_in_it(engine: Engine) -> None:
    """The registries of a request are those of its inner scopes, too."""
    plain = scoped_session(sessionmaker(engine), scopefunc=current_scope)

    def app(environ: Any, start_response: Any) -> list[bytes]:
        with open_scope():
            plain.execute(SELECT)
        assert checked_out(engine) == 0
        start_response("200 OK", [])
        return [b""]

    serve(app, registries=[plain])
    assert not plain.registry.registry


def test_S4_a_plain_session_that_was_kept_is_refused(engine: Engine) -> None:
    """A session of `registries=` knows its scope, too."""
    plain = scoped_session(sessionmaker(engine), scopefunc=current_scope)
    kept: list[Session] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        kept.append(plain())
        plain.execute(SELECT)
        start_response("200 OK", [])
        return [b""]

    serve(app, registries=[plain])
    for _ in range(2):
        with pytest.raises(ScopeClosedError):
            kept[0].execute(SELECT)
    assert checked_out(engine) == 0


def test_C6_what_a_plain_session_committed_is_not_written_again(engine: Engine) -> None:
    """A commit of a session of `registries=` ends the retries."""
    plain = scoped_session(sessionmaker(engine), scopefunc=current_scope)
    runs: list[int] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        runs.append(1)
        plain.add(Data(count=7))
        plain.commit()
        plain.execute(text("INSERT INTO nowhere VALUES (1)"))
        return []

    @event.listens_for(engine, "handle_error")
    def refuse(context: Any) -> None:
        context.original_exception.sqlite_errorcode = 5

    with pytest.raises(OperationalError):
        serve(app, registries=[plain], retries=3)
    assert len(runs) == 1
    with engine.connect() as connection:
        assert connection.scalars(select(Data.count)).all() == [0, 7]


def test_Y4_a_session_is_refused_in_another_loop_each_time() -> None:
    """The refusal leaves no transaction behind for the next use."""
    engine = create_async_engine("sqlite+aiosqlite://")
    jenny = AsyncSessionJenny(async_sessionmaker(engine))

    async def elsewhere(session: Any) -> None:
        for _ in range(3):
            with pytest.raises(CrossLoopError):
                await session.execute(SELECT)

    async def main() -> None:
        async with open_scope():
            session = jenny.session
            await asyncio.to_thread(asyncio.run, elsewhere(session))
            assert not session.in_transaction()
        await engine.dispose()

    asyncio.run(main())


def test_C5_a_callback_that_is_cancelled_is_logged_and_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """CancelledError out of a callback is its own error, not the request's."""
    done: list[str] = []

    async def cancelled() -> None:
        raise asyncio.CancelledError

    async def main() -> None:
        async with open_scope(commit_on_success=True) as scope:
            scope.on_commit(cancelled)
            scope.on_commit(lambda: done.append("commit"))
            scope.on_close(lambda: done.append("close"))
            scope.on_close(cancelled)

    asyncio.run(main())
    assert done == ["commit", "close"]
    assert caplog.text.count("failed") == 2
