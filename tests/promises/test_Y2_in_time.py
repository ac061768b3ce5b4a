"""Y2: nothing of the end hangs for ever, where the database or the application gives no answer."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.util import await_only

from rope_middleware import (
    ASGIRopeMiddleware,
    AsyncSessionJenny,
    CommitInDoubtError,
    current_scope,
    open_scope,
)
from tests.kit.asgi import answer, http_scope, serve
from tests.kit.models import Row
from tests.kit.stores import Store
from tests.kit.waiting import PATIENCE, cancel_again_and_again, never, poll

pytestmark = pytest.mark.anyio
LIMIT = 0.2


@asynccontextmanager
async def in_time() -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    before = loop.time()
    yield
    assert LIMIT * 0.7 <= loop.time() - before < PATIENCE


def hang(store: Store, what: str) -> None:
    event.listen(store.engine, what, lambda connection: await_only(asyncio.sleep(3600)))


@pytest.mark.parametrize("where", ["a request", "open_scope"])
async def test_Y2_a_commit_that_is_not_answered_is_in_doubt(store: Store, where: str) -> None:
    """Past close_timeout nobody can tell whether it stands; no connection is out."""
    hang(store, "commit")

    async def handler() -> None:
        await store.add(1)

    async with in_time():
        with pytest.raises(CommitInDoubtError, match=r"no answer came within 0\.2 seconds"):
            if where == "a request":
                await serve(handler, commit_on_success=True, close_timeout=LIMIT)
            else:
                async with open_scope(commit_on_success=True, close_timeout=LIMIT):
                    await handler()
    assert store.held() == 0
    assert store.rows() == []


async def test_Y2_a_sync_commit_that_hangs_holds_a_cancelled_request_for_its_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Then its connection is back; the thread comes to its end, and commits nothing more."""
    store = Store(tmp_path / "sync.db", is_async=False)
    hanging, goes_on = threading.Event(), threading.Event()

    def hang(session: object) -> None:
        hanging.set()
        assert goes_on.wait(PATIENCE)

    event.listen(store.session_class, "before_commit", hang, once=True)
    task = asyncio.create_task(
        serve(lambda: store.add(1), commit_on_success=True, close_timeout=LIMIT)
    )
    await poll(hanging.is_set)
    async with in_time():
        await cancel_again_and_again(task)
    assert "commit of 'GET /thing' failed: asyncio.exceptions.CancelledError" in caplog.text
    assert store.held() == 0
    goes_on.set()
    await serve(lambda: store.add(2), commit_on_success=True)
    assert (store.held(), store.rows()) == (0, [2])
    store.engine.dispose()


@pytest.mark.parametrize("where", ["a request", "open_scope"])
async def test_Y2_a_slow_flush_is_no_commit_without_an_answer(store: Store, where: str) -> None:
    """The limit is for the database's answer, not for the statements of the application."""

    @event.listens_for(store.engine, "before_cursor_execute")
    def slowly(_: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.startswith("INSERT"):
            await_only(asyncio.sleep(2 * LIMIT))

    numbers = iter(range(1, 5))

    async def handler() -> None:
        await store.execute(text(f"INSERT INTO row (n) VALUES ({next(numbers)})"))
        store.jenny.add(Row(n=next(numbers)))

    async def ask() -> None:
        if where == "a request":
            await serve(handler, commit_on_success=True, close_timeout=LIMIT)
        else:
            async with open_scope(commit_on_success=True, close_timeout=LIMIT):
                await handler()

    await ask()
    assert store.rows() == [1, 2]
    hang(store, "commit")  # after such a flush the limit counts all the same
    with pytest.raises(CommitInDoubtError):
        await asyncio.wait_for(ask(), PATIENCE)
    assert store.held() == 0
    assert store.rows() == [1, 2]


@pytest.mark.parametrize("commit", [False, True])
async def test_Y2_the_time_of_an_end_begins_with_its_work(
    store: Store, commit: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Not before: a loop that something else blocks meanwhile has cut off nothing."""

    async def handler() -> None:
        await store.execute(text("INSERT INTO row (n) VALUES (1)"))
        await store.execute(text("SELECT 1"))
        asyncio.get_running_loop().call_soon(time.sleep, 2 * LIMIT)

    async with open_scope(close_timeout=LIMIT, commit_on_success=commit):
        await handler()
    assert store.rows() == ([1] if commit else [])
    assert store.held() == 0
    assert "gave up" not in caplog.text


async def test_Y2_remove_gives_up_where_the_database_is_silent(store: Store) -> None:
    """It raises, its connection is invalidated, and the next use has another one."""
    silent = True

    @event.listens_for(store.engine, "rollback")
    def hang(connection: object) -> None:
        if silent:
            await_only(asyncio.sleep(3600))

    async with open_scope(close_timeout=LIMIT):
        await store.execute(text("SELECT 1"))
        async with in_time():
            with pytest.raises(TimeoutError):
                await store.jenny.remove()
        assert store.held() == 0
        silent = False
        await store.execute(text("SELECT 1"))


async def test_S5_an_on_close_function_that_does_not_end_is_cut_off(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so, and the others still run."""
    ran: list[str] = []

    async def never_ends() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ran.append("cut off")

    async def handler() -> None:
        current_scope().on_close(lambda: ran.append("the other one"))
        current_scope().on_close(never_ends)

    async with in_time():
        await serve(handler, close_timeout=LIMIT)
    assert ran == ["cut off", "the other one"]
    assert "never_ends" in caplog.text
    assert "gave up after 0.2 seconds" in caplog.text


@pytest.mark.told
@pytest.mark.filterwarnings("ignore:unclosed database in <sqlite3.Connection:ResourceWarning")
def test_Y2_a_coroutine_that_is_closed_in_the_middle_of_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of ours asks for an event loop that does not run any more, and nothing stays out."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'closed.db'}")
    jenny = AsyncSessionJenny(async_sessionmaker(engine))
    loop = asyncio.new_event_loop()
    errors: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda one: errors.append(str(one.exc_value)))

    def hang_and_stop(_: Any) -> None:
        loop.call_soon(loop.stop)
        await_only(asyncio.sleep(3600))

    event.listen(engine.sync_engine, "commit", hang_and_stop, once=True)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await jenny.session.execute(text("CREATE TABLE IF NOT EXISTS t (n INTEGER)"))
        await answer(send)

    served: Any = ASGIRopeMiddleware(app, commit_on_success=True)
    request = loop.create_task(served(http_scope(), never, never))
    loop.run_forever()
    (commits,) = asyncio.all_tasks(loop) - {request}
    coroutines: list[Any] = [commits.get_coro(), request.get_coro()]
    for coroutine in [*coroutines, *coroutines]:
        try:
            coroutine.close()
        except RuntimeError as error:
            errors.append(str(error))
        gc.collect()
    # SQLAlchemy awaits the end of its connection all the same.
    assert set(errors) <= {"coroutine ignored GeneratorExit"}
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    for task in (request, commits):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.run_until_complete(engine.dispose())
    loop.close()
