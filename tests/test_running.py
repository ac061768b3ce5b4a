"""Ending work in threads and in time: what no public name shows."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import math
import threading
from collections import deque
from collections.abc import Awaitable
from time import monotonic, sleep
from typing import Any

import anyio
import pytest
from sqlalchemy import Engine, text

from rope_middleware import ASGIRopeMiddleware, Scope, SessionJenny, open_scope
from rope_middleware.running import deadlines, finish, threads, ticker
from tests.kit.asgi import asgi_app, ask
from tests.kit.leaks import checked_out
from tests.kit.programs import run_python
from tests.kit.sessions import workers
from tests.kit.waiting import PATIENCE, eventually


def test_A3_threads_without_work_end(
    jenny: SessionJenny[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application that is at rest has none, and one that wakes up has them again."""
    monkeypatch.setattr(threads, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(threads, "_idle", deque())  # other tests' threads take their time
    before = workers()
    app = ASGIRopeMiddleware(asgi_app(lambda: jenny.execute(text("SELECT 1"))))
    for _ in range(2):
        asyncio.run(ask(app))
        assert set(workers()) > set(before)
        eventually(lambda: set(workers()) <= set(before), lambda: f"gone: {workers()}")


def noted() -> set[object]:
    """Return the tasks that are still known; of other tests, some whose loop was closed first."""
    return {*deadlines.ending, *deadlines.deadlines}


def test_Y2_each_has_its_own_time() -> None:
    """One timer serves them all: a short time after a long one, and one that is up first."""

    async def ends_after(seconds: float, work: Awaitable[object]) -> str:
        try:
            await finish.finish(deadlines.within(seconds, work))
        except TimeoutError as error:
            return str(error)
        return "done"

    async def main() -> list[str]:
        gone = asyncio.Event()
        long = asyncio.create_task(ends_after(2 * PATIENCE, gone.wait()))
        await asyncio.sleep(0)
        short = [asyncio.create_task(ends_after(s, asyncio.Event().wait())) for s in (0.1, 0.05)]
        done = [await asyncio.wait_for(task, PATIENCE) for task in short]
        assert not long.done()
        gone.set()
        return [*done, await asyncio.wait_for(long, PATIENCE)]

    assert asyncio.run(main()) == [
        "gave up after 0.1 seconds",
        "gave up after 0.05 seconds",
        "done",
    ]


def test_Y2_a_cancelled_caller_waits_no_longer_than_its_grace() -> None:
    """What gives no end is cancelled then: a listener of an event that never comes, for example."""

    async def main() -> None:
        comes = asyncio.Event()
        task = asyncio.create_task(finish.finish(comes.wait(), grace=0.05))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=PATIENCE)
        has_ended = task.cancelled()
        comes.set()
        assert has_ended

    asyncio.run(main())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_Y2_the_ticker_sees_to_the_times_that_are_up_late(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So no timer makes each turn of the loop dearer; one who never looks is not waited for."""
    monkeypatch.setattr(ticker, "look_at_deadlines", lambda _: None)  # that of other tests

    async def main() -> None:
        async def take(seconds: float) -> None:
            await finish.finish(deadlines.within(seconds, asyncio.Event().wait()))

        async def look(next_look: float) -> bool:
            """Look, in another thread; tell whether there is a timer."""
            await asyncio.to_thread(deadlines.look_at_deadlines, next_look)
            await asyncio.sleep(0)
            timer = deadlines._timers.get(asyncio.get_running_loop())
            return timer is not None and timer._wakes_at < math.inf

        for last_look in (monotonic() + PATIENCE, -math.inf):
            deadlines.look_at_deadlines(monotonic() + 0.05)
            task = asyncio.create_task(take(0.5))
            await asyncio.sleep(0)
            assert await look(monotonic() + 0.05) is False
            assert await look(last_look) is True
            with pytest.raises(TimeoutError, match=r"gave up after 0\.5 seconds"):
                await asyncio.wait_for(task, PATIENCE)
        for long_ago in (monotonic() - 2 * deadlines.LATE, -math.inf):
            deadlines.look_at_deadlines(long_ago)
            with pytest.raises(TimeoutError, match=r"gave up after 0\.01 seconds"):
                await asyncio.wait_for(take(0.01), PATIENCE)

    try:
        pytest.importorskip(loop).run(main())
    finally:
        deadlines.look_at_deadlines(-math.inf)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_Y2_a_time_begins_with_the_work(loop: str) -> None:
    """Not before: a loop that something else blocks meanwhile has not cut it off unbegun."""

    async def main() -> str:
        work = finish.finish(asyncio.sleep(0, "done"), seconds=0.02)
        task = asyncio.create_task(work)
        asyncio.get_running_loop().call_soon(sleep, 0.05)  # after the first step of `finish`
        return await task

    assert pytest.importorskip(loop).run(main()) == "done"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_Y2_work_that_tells_itself_of_its_end_is_not_cut_off_unbegun(loop: str) -> None:
    """Its time is noted when its task is made. uvloop calls timers before a task's first step."""

    async def work(tells: list[Any]) -> str:
        deadlines.deadlines[tells[1]] = monotonic() + PATIENCE
        await asyncio.sleep(0.03)
        tells[0].set_result(None)
        return "done"

    async def main() -> str:
        tells: list[Any] = []
        task = asyncio.create_task(finish.finish(work(tells), PATIENCE, 0.02, tells))
        asyncio.get_running_loop().call_soon(sleep, 0.05)  # after the first step of `finish`
        return await asyncio.wait_for(task, PATIENCE)

    deadlines.look_at_deadlines(-math.inf)  # no look of another test's is counted on
    assert pytest.importorskip(loop).run(main()) == "done"


def test_Y2_what_cancels_the_work_itself_is_no_timeout() -> None:
    """A cancellation from elsewhere passes through as it is."""

    async def main() -> None:
        work = asyncio.create_task(deadlines.within(PATIENCE, asyncio.Event().wait()))
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(main())


def test_Y2_work_that_is_cancelled_before_it_begins_is_waited_for_by_nobody() -> None:
    """As where an event loop is shut down: whoever has begun to wait goes on, at every turn."""

    async def main() -> None:
        for turns in range(4):
            mine = asyncio.current_task()
            waiter = asyncio.create_task(finish.finish(asyncio.sleep(0.001), PATIENCE))
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in asyncio.all_tasks() - {mine, waiter}:
                task.cancel()
            if turns == 2:
                waiter.cancel()  # both, as asyncio.run() does
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait_for(waiter, PATIENCE)
            assert noted() <= before

    before = noted()
    asyncio.run(main())


def test_Y2_work_that_tells_itself_of_its_end_has_so_long_for_it() -> None:
    """Whoever waits for it goes on when its time is up, where it was cancelled unbegun."""

    async def work(tells: list[Any]) -> str:
        await asyncio.sleep(0)
        tells[0].set_result(None)
        return "done"

    async def main() -> None:
        others = asyncio.all_tasks()
        tells: list[Any] = []
        assert await finish.finish(work(tells), PATIENCE, PATIENCE, tells) == "done"
        tells = []
        unbegun = work(tells)
        waiter = asyncio.create_task(finish.finish(unbegun, PATIENCE, 0.05, tells))
        await asyncio.sleep(0)
        (task,) = asyncio.all_tasks() - others - {waiter}
        task.cancel()
        await asyncio.wait([waiter], timeout=PATIENCE)
        assert waiter.cancelled()
        assert inspect.getcoroutinestate(unbegun) == inspect.CORO_CLOSED
        assert noted() <= before

    before = noted()
    asyncio.run(main())


def test_Y2_work_whose_waiter_is_gone_goes_on() -> None:
    """As where a server closes a generator: nobody is told, and nothing is kept of it."""

    async def main() -> bool:
        done: list[None] = []

        async def work() -> None:
            await asyncio.sleep(0.01)
            done.append(None)

        waiting = finish.finish(work(), seconds=PATIENCE)
        waiting.send(None)
        waiting.close()
        gc.collect()
        await asyncio.sleep(0.05)
        assert noted() <= before
        return bool(done)

    before = noted()
    assert asyncio.run(main())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_Y2_who_waits_for_a_thread_is_cancelled_as_by_a_future_of_asyncios(loop: str) -> None:
    """By the time-outs of asyncio and of anyio, which tells its own cancellations; places stay."""
    goes_on = threading.Event()

    def wait(_: None) -> None:
        assert goes_on.wait(PATIENCE)

    async def main() -> None:
        with anyio.move_on_after(0.02) as moved:
            await threads.in_thread(wait, None)
        assert moved.cancelled_caught
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await threads.finish_in_thread(wait, None, 0.02)
        tasks = [
            asyncio.create_task(threads.there_and_back(wait, None, PATIENCE, kind))
            for kind in (threads.WRITES, threads.COMMITS, threads.NEEDS) * 40
        ]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
        goes_on.set()
        for task in tasks:
            result, cancelled = await task
            assert result is None and cancelled is not None
        with pytest.raises(ZeroDivisionError):
            await threads.in_app_thread(lambda _: 1 // 0, None)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await threads.in_thread(next, iter(()))
        await asyncio.gather(*(threads.in_thread(wait, None) for _ in range(40)))

    pytest.importorskip(loop).run(main())


def test_Y2_a_call_that_is_cancelled_at_every_turn_keeps_its_result() -> None:
    """Also where it comes back in the turn of a cancellation: a commit that stands, stands."""
    goes_on = threading.Event()

    async def main() -> None:
        call = threads.there_and_back(goes_on.wait, PATIENCE, PATIENCE, threads.COMMITS)
        task = asyncio.create_task(call)
        await asyncio.sleep(0)
        goes_on.set()
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        result, cancelled = task.result()
        assert result is True
        assert cancelled is not None

    asyncio.run(main())


def test_S3_where_no_thread_can_be_started_the_scope_ends_all_the_same(
    jenny: SessionJenny[Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is invalidated instead of rolled back, and the request does not fail of it."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> Scope:
        async with open_scope() as scope:
            jenny.execute(text("SELECT 1"))
            monkeypatch.setattr(threads, "_idle", deque())
            monkeypatch.setattr(threads._Worker, "start", refuse)
        return scope

    assert asyncio.run(main()).closed
    assert checked_out(engine) == 0


KEEPS = """
import asyncio, gc, weakref
from rope_middleware import open_scope
from rope_middleware.running.threads import in_thread
from rope_middleware.testing.lanes import loop

async def main():
    async with open_scope() as scope:
        await {start}
    return weakref.ref(scope)

kept = asyncio.run(main())
gc.collect()
print(kept())
"""


@pytest.mark.parametrize("start", ["in_thread(id, 0)", "asyncio.sleep(0, loop())"])
def test_A3_a_thread_keeps_nothing_of_the_scope_in_which_it_was_started(start: str) -> None:
    """Where threads inherit contexts: always in free-threaded Python 3.14, elsewhere if asked."""
    done = run_python("-X", "thread_inherit_context=1", "-c", KEEPS.replace("{start}", start))
    assert done.stdout == "None\n"


@pytest.mark.slow
def test_P4_times_that_differ_gather_no_timers() -> None:
    """Short ones arm a timer before the long one's, which must not then go on beside it."""

    async def main() -> int:
        loop = asyncio.get_running_loop()
        armed: list[object] = []
        call_later = loop.call_later
        end = loop.time() + 2

        def counted(delay: float, callback: Any, *args: Any, **kwargs: Any) -> Any:
            armed.append(getattr(callback, "__self__", None))
            return call_later(delay, callback, *args, **kwargs)

        async def long() -> None:
            while loop.time() < end:
                await finish.finish(deadlines.within(0.2, asyncio.sleep(0.01)))

        async def short() -> None:
            while loop.time() < end:
                await asyncio.sleep(0.02)
                await finish.finish(deadlines.within(0.1, asyncio.sleep(0)))

        loop.call_later = counted  # type: ignore[method-assign]
        await asyncio.gather(long(), long(), short())
        return sum(one is deadlines._timers[loop] for one in armed)

    # About 40 in the two seconds; with old ones that go on, about 400.
    assert asyncio.run(main()) < 120
