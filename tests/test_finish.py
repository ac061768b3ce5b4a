"""Ending work in threads and in time: the threads are reused, bounded by nothing, and go again."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio.from_thread
import pytest
import trio
from sqlalchemy import Engine, event, text
from sqlalchemy.orm import sessionmaker

from rope_middleware import ASGIRopeMiddleware, Scope, SessionJenny, finish, open_scope
from tests.conftest import MakeEngine, checked_out
from tests.e2e.servers import PATIENCE, eventually

ROOT = Path(__file__).parents[1]


def asgi(handler: Callable[[], object]) -> Any:
    """Make an application whose requests each call `handler`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        handler()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return app


async def ask(app: Any, statuses: list[int] | None = None) -> None:
    async def receive() -> Any:
        raise AssertionError("nobody reads the body")

    async def send(message: Any) -> None:
        if statuses is not None and "status" in message:
            statuses.append(message["status"])

    await app({"type": "http", "method": "GET", "path": "/"}, receive, send)


def workers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "rope_middleware"]


@pytest.fixture
def jenny(engine: Engine) -> SessionJenny[Any]:
    return SessionJenny(sessionmaker(engine))


def test_A3_one_thread_ends_one_request_after_the_other(jenny: SessionJenny[Any]) -> None:
    """A thread for each request would cost more than what it is there for."""
    ended: set[int] = set()

    @event.listens_for(jenny.session_factory.kw["bind"], "rollback")
    def note(connection: Any) -> None:
        ended.add(threading.get_ident())

    app = ASGIRopeMiddleware(asgi(lambda: jenny.execute(text("SELECT 1"))))

    async def main() -> None:
        for _ in range(50):
            await ask(app)

    asyncio.run(main())
    assert len(ended) == 1
    assert threading.get_ident() not in ended


def test_A3_as_many_threads_as_there_are_requests_to_end(make_engine: MakeEngine) -> None:
    """60 rollbacks that wait for each other: no limit of somebody else's stands in the way."""
    together = threading.Barrier(60)
    engine = make_engine(60)
    jenny = SessionJenny(sessionmaker(engine))

    @event.listens_for(engine, "rollback")
    def meet(connection: Any) -> None:
        together.wait(PATIENCE)

    app = ASGIRopeMiddleware(asgi(lambda: jenny.execute(text("SELECT 1"))))

    async def main() -> None:
        await asyncio.gather(*(ask(app) for _ in range(60)))

    asyncio.run(main())
    assert not together.broken
    assert checked_out(engine) == 0


def test_A3_threads_without_work_end(
    jenny: SessionJenny[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application that is at rest has none, and one that wakes up has them again."""
    monkeypatch.setattr(finish, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(finish, "_idle", deque())  # other tests' threads take their time
    before = workers()
    app = ASGIRopeMiddleware(asgi(lambda: jenny.execute(text("SELECT 1"))))
    for _ in range(2):
        asyncio.run(ask(app))
        assert set(workers()) > set(before)
        eventually(lambda: set(workers()) <= set(before), lambda: f"gone: {workers()}")


_FORK = """
import asyncio, os, signal
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import NullPool
from rope_middleware import SessionJenny, open_scope

jenny = SessionJenny(sessionmaker(create_engine("sqlite://", poolclass=NullPool)))

async def request():
    async with open_scope():
        jenny.execute(text("SELECT 1"))

asyncio.run(request())
child = os.fork()
if child == 0:
    signal.alarm(20)
    asyncio.run(request())
    os._exit(0)
print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_S3_a_forked_process_has_threads_of_its_own() -> None:
    """A server that forks its workers after a request was served in it."""
    done = subprocess.run(
        [sys.executable, "-c", _FORK], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "child: 0\n", done.stderr


def test_S3_the_thread_ends_the_scope_also_where_its_loop_is_gone(
    jenny: SessionJenny[Any], engine: Engine
) -> None:
    """A loop that is closed in the middle of a rollback: the connection comes back."""
    reached, may_go = threading.Event(), threading.Event()

    @event.listens_for(engine, "rollback")
    def wait(connection: Any) -> None:
        reached.set()
        assert may_go.wait(PATIENCE)

    loop = asyncio.new_event_loop()
    request = ask(ASGIRopeMiddleware(asgi(lambda: jenny.execute(text("SELECT 1")))))
    task = loop.create_task(request)
    while not reached.is_set():
        loop.run_until_complete(asyncio.sleep(0))
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # that is what is tested
    loop.close()
    may_go.set()
    eventually(lambda: checked_out(engine) == 0, lambda: engine.pool.status())
    # The worker has come out of it, and takes the next.
    asyncio.run(ask(ASGIRopeMiddleware(asgi(lambda: jenny.execute(text("SELECT 1"))))))


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


def test_Y2_each_has_its_own_time() -> None:
    """One timer serves them all: a short time after a long one, and one that is up first."""

    async def ends_after(seconds: float, work: Awaitable[object]) -> str:
        try:
            await finish.finish(finish.within(seconds, work))
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


def test_Y2_what_cancels_the_work_itself_is_no_timeout() -> None:
    """A cancellation from elsewhere passes through as it is."""

    async def main() -> None:
        work = asyncio.create_task(finish.within(PATIENCE, asyncio.Event().wait()))
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(main())


# -- faults ------------------------------------------------------------------------------------


class Stop(StopIteration):
    """What a future takes for a result, where it is not looked at."""


@pytest.mark.parametrize("error", [StopIteration, Stop])
@pytest.mark.parametrize("commit", [False, True])
def test_C3_a_listener_that_raises_stop_iteration_fails_as_any_other(
    make_engine: MakeEngine, error: type[Exception], commit: bool
) -> None:
    """No success without its row, and no request that waits for ever."""
    engine = make_engine()
    jenny = SessionJenny(sessionmaker(engine))

    @event.listens_for(engine, "commit" if commit else "rollback")
    def fail(connection: Any) -> None:
        raise error

    app = ASGIRopeMiddleware(
        asgi(lambda: jenny.execute(text("SELECT 1"))), commit_on_success=commit
    )
    statuses: list[int] = []

    async def main() -> None:
        await asyncio.wait_for(ask(app, statuses), PATIENCE)

    if commit:
        with pytest.raises(RuntimeError, match="StopIteration"):
            asyncio.run(main())
        assert statuses == []
    else:
        asyncio.run(main())
        assert statuses == [200]
    assert checked_out(engine) == 0


def test_S3_where_no_thread_can_be_started_the_scope_ends_all_the_same(
    jenny: SessionJenny[Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is invalidated instead of rolled back, and the request does not fail of it."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> Scope:
        async with open_scope() as scope:
            jenny.execute(text("SELECT 1"))
            monkeypatch.setattr(finish, "_idle", deque())
            monkeypatch.setattr(finish._Worker, "start", refuse)
        return scope

    assert asyncio.run(main()).closed
    assert checked_out(engine) == 0


def test_S3_a_rollback_that_does_not_come_back_holds_a_cancelled_request_for_its_grace(
    make_engine: MakeEngine,
) -> None:
    """Then the connection is given up, and the scope is closed."""
    engine = make_engine()
    jenny = SessionJenny(sessionmaker(engine))
    reached, may_go = threading.Event(), threading.Event()
    rollback = engine.dialect.do_rollback

    def freeze(connection: Any) -> None:
        reached.set()
        assert may_go.wait(PATIENCE)
        rollback(connection)

    engine.dialect.do_rollback = freeze  # type: ignore[method-assign]
    scopes: list[Scope] = []

    async def request() -> None:
        async with open_scope(close_timeout=0.2) as scope:
            scopes.append(scope)
            jenny.execute(text("SELECT 1"))

    async def main() -> None:
        task = asyncio.create_task(request())
        while not reached.is_set():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, PATIENCE)
        assert scopes[0].closed
        assert checked_out(engine) == 0
        may_go.set()

    asyncio.run(main())
    engine.dialect.do_rollback = rollback  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["raises", "is itself"])
def test_S3_an_odd_error_keeps_no_session_from_being_closed(
    make_engine: MakeEngine, kind: str
) -> None:
    """The log names the driver's error by `orig`, which may be anything."""

    class OddError(Exception):
        @property
        def orig(self) -> object:
            if kind == "raises":
                raise ValueError("no orig")
            return self

    first, second = make_engine(), make_engine()

    @event.listens_for(first, "rollback")
    def fail(connection: Any) -> None:
        raise OddError

    with open_scope() as scope:
        for engine in (first, second):
            SessionJenny(sessionmaker(engine)).execute(text("SELECT 1"))
    assert scope.closed
    assert (checked_out(first), checked_out(second)) == (0, 0)


def test_A1_an_async_remove_is_awaited_under_trio() -> None:
    """Of `registries=`: any object with a remove()."""
    removed: list[bool] = []

    class Scoped:
        async def remove(self) -> None:
            removed.append(True)

    trio.run(ask, ASGIRopeMiddleware(asgi(lambda: None), registries=[Scoped()]))
    assert removed == [True]


def test_P4_times_that_differ_gather_no_timers() -> None:
    """Short ones arm a timer before the long one's, which must not then go on beside it."""

    async def main() -> int:
        loop = asyncio.get_running_loop()
        armed: list[object] = []
        call_at = loop.call_at
        end = loop.time() + 2

        def counted(when: float, callback: Any, *args: Any, **kwargs: Any) -> Any:
            armed.append(getattr(callback, "__self__", None))
            return call_at(when, callback, *args, **kwargs)

        async def long() -> None:
            while loop.time() < end:
                await finish.finish(finish.within(0.2, asyncio.sleep(0.01)))

        async def short() -> None:
            while loop.time() < end:
                await asyncio.sleep(0.02)
                await finish.finish(finish.within(0.1, asyncio.sleep(0)))

        loop.call_at = counted  # type: ignore[method-assign]
        await asyncio.gather(long(), long(), short())
        return sum(one is finish._deadlines[loop] for one in armed)

    # About 40 in the two seconds; with old ones that go on, about 400.
    assert asyncio.run(main()) < 120
