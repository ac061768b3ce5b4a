"""C5: `on_commit` runs once, after the commit and before the response starts."""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import anyio.from_thread
import anyio.to_thread
import pytest
from sqlalchemy import event, text

from rope_middleware import ASGIRopeMiddleware, RopeError, SessionJenny, current_scope, open_scope
from tests.kit.asgi import answer, http_scope
from tests.kit.models import Row
from tests.kit.stores import Store, open_store
from tests.kit.waiting import never
from tests.kit.web import Exchange, Web


def test_C5_a_sync_function_may_call_back_into_the_event_loop(jenny: SessionJenny[Any]) -> None:
    """``anyio.from_thread`` works in what the application registers."""
    told: list[str] = []

    async def tell(what: str) -> None:
        told.append(what)

    async def main() -> None:
        async with open_scope(commit_on_success=True) as scope:
            jenny.execute(text("SELECT 1"))
            scope.on_commit(lambda: anyio.from_thread.run(tell, "committed"))
            scope.on_close(lambda: anyio.from_thread.run(tell, "closed"))

    asyncio.run(main())
    assert told == ["committed", "closed"]


def test_C5_C2_a_listener_of_a_sync_commit_awaits_an_async_jenny(tmp_path: Path) -> None:
    """In its thread ``anyio.from_thread`` works; what is written so is committed with the rest."""
    first = Store(tmp_path / "first.db", is_async=False)
    seen: list[list[int]] = []

    async def write(scope: Any, receive: Any, send: Any) -> None:
        await anyio.to_thread.run_sync(first.jenny.add, Row(n=1))
        await answer(send)

    async def main() -> None:
        async with open_store(tmp_path / "second.db") as second:

            def audit(session: Any) -> None:
                anyio.from_thread.check_cancelled()
                anyio.from_thread.run(second.add, 2)
                anyio.run(anyio.sleep, 0)  # no event loop runs in this thread

            async def send(message: Any) -> None:
                seen.append(first.rows() + second.rows())

            event.listen(first.session_class, "before_commit", audit, once=True)
            app: Any = ASGIRopeMiddleware(write, commit_on_success=True)
            await app(http_scope(), never, send)
            assert (first.held(), second.held()) == (0, 0)

    anyio.run(main)
    first.engine.dispose()
    assert seen == [[1, 2]] * 2


def test_C5_on_commit_runs_once_after_the_commit_and_before_the_start(web: Web) -> None:
    """In order of registration, when the row is there, and before the client sees the status."""
    order: list[Any] = []

    async def handler(exchange: Exchange) -> None:
        scope = current_scope()
        scope.on_commit(lambda: order.append(("first", web.store.rows())))
        await web.store.add(1)
        scope.on_commit(lambda: order.append(("second", web.store.rows())))
        await exchange.answer(200)

    web.ask(handler, commit_on_success=True, at_start=lambda status: order.append(status))
    assert order == [("first", [1]), ("second", [1]), 200]


@pytest.mark.parametrize("why", ["status", "veto", "doom", "error", "failed commit"])
def test_C5_on_commit_never_runs_after_a_rollback(web: Web, why: str) -> None:
    """No commit, no call."""
    called: list[str] = []

    async def handler(exchange: Exchange) -> None:
        current_scope().on_commit(lambda: called.append(why))
        await web.store.add(1)
        if why == "doom":
            current_scope().doom()
        if why == "error":
            raise LookupError
        if why == "failed commit":
            await web.store.add_orphan(1)
        await exchange.answer(400 if why == "status" else 200)

    web.ask(handler, commit_on_success=True, commit_veto=lambda s, h: why == "veto")
    assert called == []
    assert web.store.rows() == []


def test_C5_on_commit_runs_where_nothing_was_written(web: Web) -> None:
    """A success without a session still is one."""
    called: list[int] = []

    async def handler(exchange: Exchange) -> None:
        current_scope().on_commit(lambda: called.append(1))
        await exchange.answer(204, b"")

    web.ask(handler, commit_on_success=True)
    assert called == [1]


def test_C5_one_registered_after_the_start_runs_after_the_final_commit(web: Web) -> None:
    """It belongs to the second transaction."""
    order: list[Any] = []

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)
        await web.store.add(2)
        current_scope().on_commit(lambda: order.append(web.store.rows()))
        await exchange.chunk(b"y")
        assert order == []

    answer = web.ask(handler, commit_on_success=True)
    assert answer.error is None
    assert order == [[1, 2]]


def test_C5_one_registered_after_the_start_does_not_run_if_the_rest_raises(web: Web) -> None:
    """The second transaction was rolled back."""
    order: list[Any] = []

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(200)
        await web.store.add(2)
        current_scope().on_commit(lambda: order.append(1))
        raise LookupError

    web.ask(handler, commit_on_success=True)
    assert order == []


def test_C5_an_error_in_on_commit_is_logged_and_changes_nothing(
    web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    """The response, the row and the other callbacks stay as they are."""
    called: list[int] = []

    def broken() -> None:
        raise LookupError("broken callback")

    async def handler(exchange: Exchange) -> None:
        current_scope().on_commit(broken)
        current_scope().on_commit(lambda: called.append(1))
        await web.store.add(1)
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True)
    assert (answer.status, answer.complete, answer.error) == (200, True, None)
    assert web.store.rows() == [1]
    assert called == [1]
    assert any(
        record.name == "rope_middleware" and record.levelno >= logging.ERROR
        for record in caplog.records
    )
    assert "LookupError" in caplog.text


def test_C5_sync_functions_run_in_a_thread_under_asgi(web: Web) -> None:
    """The event loop does not wait for a callback that blocks."""
    threads: list[int] = []

    async def handler(exchange: Exchange) -> None:
        current_scope().on_commit(lambda: threads.append(threading.get_ident()))
        await web.store.add(1)
        await exchange.answer(200)

    web.ask(handler, commit_on_success=True)
    assert (threads[0] == threading.get_ident()) is web.wsgi


@pytest.mark.parametrize("web", ["asgi-async", "asgi-sync"], indirect=True)
def test_C5_async_functions_are_awaited_under_asgi(web: Web) -> None:
    """In the loop, mixed with sync ones in order of registration."""
    order: list[Any] = []

    async def tell(what: str) -> None:
        await asyncio.sleep(0)
        order.append((what, web.store.rows()))

    async def handler(exchange: Exchange) -> None:
        scope = current_scope()

        async def first() -> None:
            await tell("async")

        scope.on_commit(first)
        scope.on_commit(lambda: order.append(("sync", web.store.rows())))
        await web.store.add(1)
        await exchange.answer(200)

    web.ask(handler, commit_on_success=True, at_start=order.append)
    assert order == [("async", [1]), ("sync", [1]), 200]


def test_C5_in_a_scope_that_does_not_commit_it_raises(web: Web) -> None:
    """The error names the option that is missing."""

    async def handler(exchange: Exchange) -> None:
        with pytest.raises(RopeError, match="commit_on_success"):
            current_scope().on_commit(lambda: None)
        await exchange.answer(200)

    answer = web.ask(handler)
    assert (answer.status, answer.error) == (200, None)
    with open_scope() as scope, pytest.raises(RopeError, match="commit_on_success"):
        scope.on_commit(lambda: None)


def test_C5_in_open_scope_on_commit_runs_after_the_commit(tmp_path: Path) -> None:
    """Both colours of block, after the commit and before `on_close`."""
    sync, other = Web("wsgi", tmp_path / "one.db"), Web("asgi-async", tmp_path / "two.db")
    order: list[Any] = []
    with open_scope(commit_on_success=True) as scope:
        scope.on_close(lambda: order.append("closed"))
        scope.on_commit(lambda: order.append(sync.store.rows()))
        sync.store.jenny.session.add(Row(n=1))
    assert order == [[1], "closed"]

    async def run() -> None:
        async def later() -> None:
            order.append(other.store.rows())

        async with open_scope(commit_on_success=True) as scope:
            scope.on_commit(later)
            await other.store.add(2)

    other.loop.run(run())
    assert order == [[1], "closed", [2]]
    other.close()  # first: the other one waits for its threads
    sync.close()


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
