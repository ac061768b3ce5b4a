"""Y2: cancellation at any await leaves no connection out."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import anyio
import anyio.to_thread
import pytest
from sqlalchemy import Engine, create_engine, event, select, text
from sqlalchemy.orm import sessionmaker
from sqlalchemy.util import await_only

from rope_middleware import AsyncSessionJenny, NoScopeError, SessionJenny, current_scope, open_scope
from tests.kit.asgi import serve
from tests.kit.models import Row
from tests.kit.stores import Store, open_store
from tests.kit.waiting import PATIENCE, cancel_again_and_again, never, poll, turns

pytestmark = pytest.mark.anyio


def make_slow(engine: Engine, seconds: float = 0.02) -> list[str]:
    """Let every rollback and every commit of `engine` take a while; what was done, in order."""
    done: list[str] = []

    def slow(what: str) -> Callable[[object], None]:
        def wait(connection: object) -> None:
            await_only(asyncio.sleep(seconds))
            done.append(what)

        return wait

    event.listen(engine, "rollback", slow("rollback"))
    event.listen(engine, "commit", slow("commit"))
    return done


async def test_Y2_cancelled_again_and_again_while_it_closes(store: Store) -> None:
    """The call ends as cancelled, and not before its connection is back."""
    done = make_slow(store.engine)

    for _ in range(5):
        task = asyncio.create_task(serve(store.hold))
        await poll(lambda: store.holding == 1)
        await cancel_again_and_again(task)
        assert store.held() == 0
    assert done == ["rollback"] * 5


async def test_Y2_cancelled_while_it_closes_after_a_normal_end(store: Store) -> None:
    """The cancellation that meets the end of a good request does not stop it."""
    make_slow(store.engine)
    ending = asyncio.Event()

    async def handler() -> None:
        await store.jenny.execute(text("SELECT 1"))
        ending.set()

    task = asyncio.create_task(serve(handler))
    await ending.wait()
    await cancel_again_and_again(task)
    assert store.held() == 0


@pytest.mark.slow
async def test_Y2_cancelled_at_every_turn_of_the_loop(store: Store) -> None:
    """From the first step of a request to its last one, no moment leaks a connection."""

    async def handler() -> None:
        store.jenny.add(Row(n=1))
        await store.jenny.flush()
        await store.jenny.rollback()
        async with open_scope():
            await store.jenny.execute(select(Row))
        await store.jenny.execute(select(Row))

    survived = 0
    for number in turns(20_000):
        task = asyncio.create_task(serve(handler))
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()
        ended = await asyncio.gather(task, return_exceptions=True)
        survived += ended[0] is None
        assert ended[0] is None or isinstance(ended[0], asyncio.CancelledError), ended
        assert store.held() == 0, f"cancelled after {number} turns"
        # aiosqlite may keep the lock of a query that was cancelled until then.
        gc.collect()
        if survived == 3:
            return
    raise AssertionError("the request does not end")


async def test_Y2_in_an_anyio_task_group_that_is_cancelled(store: Store) -> None:
    """A cancelled anyio scope cancels again at each turn; the end is shielded from it."""
    done = make_slow(store.engine)

    for _ in range(3):
        async with anyio.create_task_group() as group:
            group.start_soon(serve, store.hold)
            group.start_soon(serve, store.hold)
            await poll(lambda: store.holding == 2)
            group.cancel_scope.cancel()
        assert store.held() == 0
    assert done == ["rollback"] * 6


async def test_Y2_a_cancelled_scope_does_not_spin_while_it_closes(store: Store) -> None:
    """anyio cancels again at each turn of the loop; the processor has better things to do."""
    make_slow(store.engine, 0.5)

    async with anyio.create_task_group() as group:
        group.start_soon(serve, store.hold)
        await poll(lambda: store.holding == 1)
        before = time.thread_time()
        group.cancel_scope.cancel()
    assert time.thread_time() - before < 0.2
    assert store.held() == 0


async def test_Y2_in_an_asyncio_task_group_whose_other_task_fails(store: Store) -> None:
    """The group cancels its tasks and waits for them; then nothing is out."""
    make_slow(store.engine)

    async def fail() -> None:
        await poll(lambda: store.holding == 1)
        raise LookupError

    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(serve(store.hold))
            group.create_task(fail())
    assert store.held() == 0


@pytest.mark.parametrize("how", ["timeout", "wait_for", "move_on_after", "fail_after"])
async def test_Y2_when_the_time_is_up(store: Store, how: str) -> None:
    """`asyncio.timeout`, `wait_for` and anyio's scopes end as they do without a middleware."""
    done = make_slow(store.engine)

    if how == "timeout":
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await serve(store.hold)
    elif how == "wait_for":
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(serve(store.hold), 0.05)
    elif how == "move_on_after":
        with anyio.move_on_after(0.05) as moved:
            await serve(store.hold)
        assert moved.cancelled_caught
    else:
        with pytest.raises(TimeoutError), anyio.fail_after(0.05):
            await serve(store.hold)
    assert store.held() == 0
    assert done in (["rollback"], [])  # not even connected on a very busy machine
    # nothing of the cancellation is left in this task
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_Y2_open_scope_is_shielded_too(store: Store) -> None:
    """In a block, in the decorator and in `await jenny.remove()`."""
    done = make_slow(store.engine)

    async def block() -> None:
        async with open_scope():
            await store.hold()

    @open_scope()
    async def decorated() -> None:
        await store.hold()

    async def remove() -> None:
        async with open_scope():
            await store.jenny.execute(text("SELECT 1"))
            removing.set()
            await store.jenny.remove()
            await never()

    for work in (block, decorated):
        task = asyncio.create_task(work())
        await poll(lambda: store.holding == 1)
        await cancel_again_and_again(task)
        assert store.held() == 0
    removing = asyncio.Event()
    task = asyncio.create_task(remove())
    await removing.wait()
    await cancel_again_and_again(task)
    assert store.held() == 0
    assert done == ["rollback"] * 3


async def test_Y2_several_sessions_are_all_closed_by_a_cancelled_scope(
    store: Store, tmp_path: Path
) -> None:
    """The cancellation that arrives while the first is closed does not strand the second."""
    async with open_store(tmp_path / "second.db") as second:
        done = make_slow(store.engine)
        done_too = make_slow(second.engine)

        async def handler() -> None:
            await second.jenny.execute(text("SELECT 1"))
            await store.hold()

        task = asyncio.create_task(serve(handler))
        await poll(lambda: store.holding == second.held() == 1)
        await cancel_again_and_again(task)
        assert (store.held(), second.held()) == (0, 0)
        assert done == done_too == ["rollback"]


async def test_Y2_the_commit_of_a_cancelled_request_is_whole(store: Store) -> None:
    """Cancelled while it commits: the row is there or not, and nothing is held."""
    make_slow(store.engine)

    async def handler() -> None:
        store.jenny.add(Row(n=await count()))
        await store.jenny.flush()

    async def count() -> int:
        return int(await store.jenny.scalar(text("SELECT count(*) FROM row")) or 0) + 1

    for moments in range(0, 60, 3):
        task = asyncio.create_task(serve(handler, commit_on_success=True))
        for _ in range(moments):
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert store.held() == 0
    found = store.rows()
    assert found == list(range(1, len(found) + 1))


async def test_Y2_the_same_under_commit_when_cancelled_again_and_again(store: Store) -> None:
    """No await of the commit's path leaks either."""
    make_slow(store.engine, 0.01)
    reached = asyncio.Event()

    async def handler() -> None:
        store.jenny.add(Row(n=1))
        await store.jenny.flush()
        reached.set()

    task = asyncio.create_task(serve(handler, commit_on_success=True))
    await reached.wait()
    async with asyncio.timeout(PATIENCE):
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
    assert store.held() == 0
    assert store.rows() in ([], [1])


async def test_Y2_a_database_that_gives_no_answer_holds_a_request_for_close_timeout(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """Past the limit the connection is invalidated, and the log says so."""
    silent = True

    @event.listens_for(store.engine, "rollback")
    def hang(connection: object) -> None:
        if silent:
            await_only(asyncio.sleep(3600))

    async def handler() -> None:
        await store.jenny.execute(text("SELECT 1"))

    loop = asyncio.get_running_loop()
    before = loop.time()
    await serve(handler, close_timeout=0.2)
    assert 0.15 <= loop.time() - before < PATIENCE
    assert store.held() == 0
    assert "GET /thing" in caplog.text
    async with open_scope(close_timeout=0.2):
        await handler()
    assert store.held() == 0
    silent = False
    for _ in range(3):  # the pool is as large as before
        await serve(handler)
    assert store.held() == 0


async def test_Y2_a_silent_database_does_not_hold_a_cancelled_request(store: Store) -> None:
    """The limit holds for a request that is cancelled as well."""
    event.listen(store.engine, "rollback", lambda connection: await_only(asyncio.sleep(3600)))

    task = asyncio.create_task(serve(store.hold, close_timeout=0.2))
    await poll(lambda: store.holding == 1)
    await cancel_again_and_again(task)
    assert store.held() == 0


async def test_Y2_a_loop_that_ends_leaves_no_task_behind(tmp_path: Path) -> None:
    """`asyncio.run` cancels what is left over; the end of a request still finishes."""
    held: list[int] = []

    async def main() -> None:
        async with open_store(tmp_path / "run.db") as store:
            make_slow(store.engine)

            async def handler() -> None:
                try:
                    await store.hold()
                finally:
                    await asyncio.sleep(0)

            task = asyncio.create_task(serve(handler))
            await poll(lambda: store.holding == 1)

            async def last() -> None:
                try:
                    await never()
                finally:
                    await asyncio.gather(task, return_exceptions=True)
                    held.append(store.held())

            asyncio.current_task()
            leftover = asyncio.create_task(last())
            await asyncio.sleep(0)
            leftover.cancel()
            task.cancel()
            await asyncio.gather(leftover, return_exceptions=True)

    await anyio.to_thread.run_sync(lambda: asyncio.run(main()))
    assert held == [0]


async def test_Y2_nothing_is_left_for_the_garbage_collector(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """After cancellations the pool's own complaint about lost connections is not heard."""

    async def handler() -> None:
        await store.jenny.execute(text("SELECT 1"))
        await asyncio.sleep(0.001)

    for number in range(60):
        task = asyncio.create_task(serve(handler))
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    gc.collect()
    assert "garbage collector" not in caplog.text
    assert store.held() == 0


class Local:
    """Something that a handler has in a local variable."""


async def test_Y2_a_request_that_was_cancelled_twice_is_freed_at_once(store: Store) -> None:
    """No reference cycle keeps its frames (and its cursor) for the garbage collector."""
    kept: list[weakref.ref[Local]] = []

    async def handler() -> None:
        local = Local()
        kept.append(weakref.ref(local))
        await store.hold()

    gc.collect()
    gc.disable()
    try:
        task = asyncio.create_task(serve(handler))
        await poll(lambda: store.holding == 1)
        await cancel_again_and_again(task)
        del task
        await asyncio.sleep(0)
        assert kept[0]() is None
    finally:
        gc.enable()


class TestTrio:
    """The parts of an async scope that need no SQLAlchemy, under trio."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "trio"

    async def test_Y2_under_trio_the_end_is_shielded(self, anyio_backend: str) -> None:
        """An async `on_close` finishes in a cancelled nursery."""
        order: list[str] = []

        async def later() -> None:
            await anyio.sleep(0.02)
            order.append("finished")

        async def handler() -> None:
            current_scope().on_close(later)
            ready.set()
            await never()

        for _ in range(2):
            ready = anyio.Event()
            async with anyio.create_task_group() as group:
                group.start_soon(serve, handler)
                await ready.wait()
                group.cancel_scope.cancel()
        assert order == ["finished"] * 2

    async def test_Y2_under_trio_a_sync_session_is_closed_when_cancelled(
        self, anyio_backend: str, tmp_path: Path
    ) -> None:
        """Its end in a worker thread is waited for."""
        engine = create_engine(f"sqlite:///{tmp_path / 'trio.db'}", pool_size=1, max_overflow=0)
        jenny = SessionJenny(sessionmaker(engine))

        async def handler() -> None:
            await anyio.to_thread.run_sync(lambda: jenny.execute(text("SELECT 1")))
            ready.set()
            await never()

        for _ in range(3):
            ready = anyio.Event()
            async with anyio.create_task_group() as group:
                group.start_soon(serve, handler)
                await ready.wait()
                assert engine.pool.checkedout() == 1  # type: ignore[attr-defined]
                group.cancel_scope.cancel()
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        engine.dispose()

    @pytest.mark.told
    async def test_S3_under_trio_a_close_that_takes_too_long_is_logged(
        self, anyio_backend: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is cut off, and replaces neither a result nor the application's own error."""

        class Stuck:
            async def close(self) -> None:
                await never()

        jenny: Any = AsyncSessionJenny(cast("Any", Stuck))
        async with open_scope(close_timeout=0.02) as scope:
            assert jenny.session
        with pytest.raises(ZeroDivisionError):
            async with open_scope(close_timeout=0.02):
                assert jenny.session
                raise ZeroDivisionError
        assert scope.closed
        assert caplog.text.count("gave up after 0.02 seconds") == 2

    async def test_S6_under_trio_scopes_nest(self, anyio_backend: str) -> None:
        """`async with open_scope():`, the decorator and their errors."""

        @open_scope("inner")
        async def inner() -> str | None:
            await anyio.sleep(0)
            return current_scope().name

        async with open_scope() as outer:
            assert await inner() == "inner"
            assert current_scope() is outer
        with pytest.raises(NoScopeError):
            current_scope()
