"""AsyncSession, tasks and cancellation (Y1-Y6, and S3, S4, S6, A1, A4 for async code).

The database is SQLite through aiosqlite with a small pool that cannot overflow. Where a test
needs a database that is slow or gives no answer, the engine's own events make it so.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
import weakref
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.util import await_only
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from rope_middleware import (
    ASGIRopeMiddleware,
    AsyncSessionJenny,
    CrossLoopError,
    NoScopeError,
    RopeError,
    Scope,
    ScopeClosedError,
    SessionJenny,
    WSGIRopeMiddleware,
    current_scope,
    open_scope,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
    from pathlib import Path

LIMIT = 30.0

pytestmark = [
    pytest.mark.anyio,
    # Python 3.13, and aiosqlite, warn of every connection that nobody closed. Those that are cut
    # off here on purpose (cancelled while they connect, invalidated) are left to their finaliser
    # by the drivers; what our own code leaves is found in the pools.
    pytest.mark.filterwarnings("ignore:unclosed database in <sqlite3.Connection:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*was deleted before:ResourceWarning"),
]


@pytest.fixture
def anyio_backend() -> str:
    """SQLAlchemy's asyncio half runs under asyncio alone; trio has tests of its own below."""
    return "asyncio"


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "row"
    n: Mapped[int] = mapped_column(primary_key=True)


@dataclass
class Store:
    """An async engine on a file, a jenny for it, and a count of the sessions made."""

    path: Path
    engine: AsyncEngine
    jenny: AsyncSessionJenny[AsyncSession]
    made: list[AsyncSession]
    holding: int = 0

    async def hold(self) -> None:
        """Begin a transaction and keep it until cancelled; `holding` tells that it is begun."""
        await self.jenny.execute(text("SELECT 1"))
        self.holding += 1
        try:
            await never()
        finally:
            self.holding -= 1

    def held(self) -> int:
        return int(self.engine.pool.checkedout())  # type: ignore[attr-defined]

    async def rows(self) -> list[int]:
        async with self.engine.connect() as connection:
            return list((await connection.execute(select(Row.n).order_by(Row.n))).scalars())


def small_engine(path: Path, **options: Any) -> AsyncEngine:
    told: dict[str, Any] = {"pool_size": 2, "max_overflow": 0, "pool_timeout": LIMIT}
    return create_async_engine(f"sqlite+aiosqlite:///{path}", **(told | options))


@asynccontextmanager
async def open_store(path: Path, **options: Any) -> AsyncIterator[Store]:
    engine = small_engine(path, **options)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    made: list[AsyncSession] = []
    factory = async_sessionmaker(engine, expire_on_commit=False)

    def count() -> AsyncSession:
        made.append(factory())
        return made[-1]

    try:
        yield Store(path, engine, AsyncSessionJenny(count), made)
    finally:
        await engine.dispose()


@pytest.fixture
async def store(tmp_path: Path, anyio_backend: str) -> AsyncIterator[Store]:
    before = set(threading.enumerate())
    async with open_store(tmp_path / "async.db") as found:
        yield found
        gc.collect()
        assert found.held() == 0, "a connection is still out of its pool"
    # The last word of the thread of a connection that was invalidated needs an open loop.
    await poll(
        lambda: (
            not any(
                "_connection_worker" in thread.name
                for thread in set(threading.enumerate()) - before
            )
        )
    )


def http_scope(path: str = "/thing") -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"secret=1",
        "headers": [],
        "client": None,
        "server": None,
    }


async def never() -> Any:
    await anyio.sleep(3600)


async def into_nothing(message: Any) -> None: ...


async def serve(handler: Callable[[], Awaitable[object]], **options: Any) -> None:
    """Send one request to an app that is nothing but `handler` behind the middleware."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await handler()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    await ASGIRopeMiddleware(app, **options)(http_scope(), never, into_nothing)


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test"
    )


# --------------------------------------------------------------------------------------------
# Y1: everything, for AsyncSession


def test_Y1_it_is_an_async_scoped_session_with_every_name_of_it() -> None:
    """The names of `async_scoped_session` minus ours are the empty set."""
    jenny = AsyncSessionJenny(async_sessionmaker())
    assert isinstance(jenny, async_scoped_session)
    theirs = {name for name in dir(async_scoped_session) if not name.startswith("_")}
    assert theirs - set(dir(jenny)) == set()


async def test_Y1_a_session_is_made_on_first_use_and_closed_with_the_scope(store: Store) -> None:
    """One session for the whole request, none before it is needed, nothing held after it."""

    async def handler() -> None:
        assert store.made == []
        first = store.jenny.session
        assert store.jenny.session is first
        assert store.jenny() is first
        await first.execute(text("SELECT 1"))
        assert store.held() == 1

    await serve(handler)
    assert len(store.made) == 1
    assert store.held() == 0
    await serve(lambda: anyio.sleep(0))
    assert len(store.made) == 1, "a request that touches no database makes no session"


async def test_Y1_the_methods_go_to_the_sessions_of_the_scope(store: Store) -> None:
    """`await jenny.execute()` and its like are those of the current session."""
    jenny = store.jenny
    async with open_scope():
        first = Row(n=1)
        jenny.add(first)
        jenny.add_all([Row(n=2), Row(n=3)])
        assert len(jenny.new) == 3
        await jenny.flush()
        assert first in jenny
        assert first in jenny.identity_map.values()
        assert (await jenny.get_one(Row, 2)).n == 2
        assert await jenny.scalar(select(Row.n).where(Row.n == 3)) == 3
        assert len((await jenny.scalars(select(Row))).all()) == 3
        streamed = await jenny.stream(select(Row.n).order_by(Row.n))
        assert [row.n async for row in streamed] == [1, 2, 3]
        assert jenny.is_active
        await jenny.commit()
        jenny.add(Row(n=4))
        await jenny.rollback()
    assert len(store.made) == 1
    assert await store.rows() == [1, 2, 3]


async def test_Y1_remove_is_awaited_and_the_next_use_makes_a_new_session(store: Store) -> None:
    """Inside the same scope; what was not committed is gone."""
    async with open_scope() as scope:
        first = store.jenny.session
        first.add(Row(n=1))
        await first.flush()
        await store.jenny.remove()
        assert store.held() == 0
        second = store.jenny.session
        assert second is not first
        assert current_scope() is scope
        second.add(Row(n=2))
        await second.commit()
        await store.jenny.remove()
        await store.jenny.remove()  # silent
    assert await store.rows() == [2]


async def test_Y1_a_removed_session_that_is_used_on_is_closed_with_its_scope(store: Store) -> None:
    """`remove()` does not make the scope forget who made the session."""
    async with open_scope():
        session = store.jenny.session
        await store.jenny.remove()
        await session.execute(text("SELECT 1"))
        assert store.held() == 1
    assert store.held() == 0


async def test_Y1_sync_and_async_jennies_side_by_side_in_one_scope(
    store: Store, tmp_path: Path
) -> None:
    """Each closes its own, under the middleware and in `async with open_scope():`."""
    engine = create_engine(f"sqlite:///{tmp_path / 'sync.db'}", pool_size=1, max_overflow=0)
    jenny = SessionJenny(sessionmaker(engine))

    async def handler() -> None:
        jenny.execute(text("SELECT 1"))
        await store.jenny.execute(text("SELECT 1"))
        assert (engine.pool.checkedout(), store.held()) == (1, 1)  # type: ignore[attr-defined]

    for _ in range(2):
        await serve(handler)
        assert (engine.pool.checkedout(), store.held()) == (0, 0)  # type: ignore[attr-defined]
        async with open_scope():
            await handler()
        assert (engine.pool.checkedout(), store.held()) == (0, 0)  # type: ignore[attr-defined]
    engine.dispose()


async def test_Y1_two_async_jennies_have_two_sessions(store: Store, tmp_path: Path) -> None:
    """Several databases side by side in one scope."""
    async with open_store(tmp_path / "second.db") as second:
        async with open_scope():
            await store.jenny.execute(text("SELECT 1"))
            await second.jenny.execute(text("SELECT 1"))
            assert store.jenny.session is not second.jenny.session
            assert (store.held(), second.held()) == (1, 1)
        assert (store.held(), second.held()) == (0, 0)


async def test_Y1_open_scope_by_hand_has_a_name_and_its_own_session(store: Store) -> None:
    """`async with open_scope("nightly"):` in a script, and the decorator, call by call."""
    seen: list[AsyncSession] = []

    @open_scope("work")
    async def work() -> str | None:
        seen.append(store.jenny.session)
        await store.jenny.execute(text("SELECT 1"))
        return current_scope().name

    async with open_scope("nightly") as scope:
        assert scope.name == "nightly"
        assert current_scope() is scope
        assert not scope.closed
    assert scope.closed
    assert await work() == await work() == "work"
    assert seen[0] is not seen[1]
    assert store.held() == 0
    with pytest.raises(NoScopeError):
        current_scope()


async def test_Y1_the_first_use_in_a_worker_thread_is_seen_by_the_middleware(
    store: Store, tmp_path: Path
) -> None:
    """A sync session made in a thread of an async request is closed with the request (S2)."""
    engine = create_engine(f"sqlite:///{tmp_path / 'sync.db'}", pool_size=1, max_overflow=0)
    jenny = SessionJenny(sessionmaker(engine))
    sessions: list[Session] = []

    def query() -> None:
        sessions.append(jenny.session)
        jenny.execute(text("SELECT 1"))

    async def handler() -> None:
        await anyio.to_thread.run_sync(query)
        assert jenny.session is sessions[-1]
        assert engine.pool.checkedout() == 1  # type: ignore[attr-defined]

    await serve(handler)
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    engine.dispose()


async def test_Y1_a_session_made_in_a_child_task_is_closed_by_the_middleware(
    store: Store,
) -> None:
    """Sessions are kept in the scope, not in the task's context (S2)."""

    async def child() -> AsyncSession:
        await store.jenny.execute(text("SELECT 1"))
        return store.jenny.session

    async def handler() -> None:
        made = await asyncio.create_task(child())
        assert store.jenny.session is made

    await serve(handler)
    assert store.held() == 0


# --------------------------------------------------------------------------------------------
# S3: whatever happens


async def test_S3_an_exception_passes_and_everything_is_given_back(store: Store) -> None:
    """The application's own error arrives as it was; the ContextVar has its former value."""
    error = LookupError("mine")

    async def handler() -> None:
        store.jenny.add(Row(n=1))
        await store.jenny.flush()
        raise error

    with pytest.raises(LookupError) as caught:
        await serve(handler)
    assert caught.value is error
    assert store.held() == 0
    with pytest.raises(NoScopeError):
        current_scope()
    assert await store.rows() == []


async def pieces(store: Store) -> AsyncGenerator[int]:
    async with open_scope("pieces"):
        await store.jenny.execute(text("SELECT 1"))
        yield 1
        yield 2


async def test_S3_a_generator_that_is_closed_early_gives_everything_back(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """`aclose()` can be awaited, so the connection is returned whole and nobody complains."""
    invalidated: list[object] = []
    event.listen(store.engine.sync_engine, "invalidate", lambda *told: invalidated.append(told))
    running = pieces(store)
    assert await anext(running) == 1
    assert store.held() == 1
    await running.aclose()
    assert store.held() == 0
    assert invalidated == []
    assert [record for record in caplog.records if record.name == "rope_middleware"] == []


async def test_S3_a_generator_that_is_forgotten_gives_everything_back(store: Store) -> None:
    """The event loop closes it when it is collected: a client left a stream."""
    running = pieces(store)
    assert await anext(running) == 1
    assert store.held() == 1
    del running
    gc.collect()
    await poll(lambda: store.held() == 0)


async def test_S3_a_coroutine_that_is_closed_gives_everything_back(store: Store) -> None:
    """Nothing can be awaited there: the connection is invalidated, and the pool has its place."""

    waits = False

    async def handler() -> None:
        nonlocal waits
        await store.jenny.execute(text("SELECT 1"))
        waits = True
        await asyncio.Event().wait()

    for work in (serve(handler), open_scope()(handler)(), serve(handler, commit_on_success=True)):
        waits = False
        step = work.__await__()
        waiting = next(step)
        while not waits:
            while not waiting.done():  # an asyncio future
                await asyncio.sleep(0)
            waiting = next(step)
        step.close()
        assert store.held() == 0
        with pytest.raises(NoScopeError):
            current_scope()


class FailingSession(AsyncSession):
    """Its close fails before it gives its connection back."""

    async def close(self) -> None:
        raise OSError("broken close")


async def test_S3_a_close_that_fails_is_logged_and_the_next_session_is_closed(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It replaces no exception of the application, and its connection is invalidated."""
    engine = small_engine(tmp_path / "failing.db")
    failing = AsyncSessionJenny(async_sessionmaker(engine, class_=FailingSession))
    invalidated: list[object] = []
    event.listen(engine.sync_engine, "invalidate", lambda *told: invalidated.append(told))

    async def handler() -> None:
        await store.jenny.execute(text("SELECT 1"))
        await failing.execute(text("SELECT 1"))

    async def broken() -> None:
        await failing.execute(text("SELECT 1"))
        await store.jenny.execute(text("SELECT 1"))
        raise LookupError("mine")

    await serve(handler)
    assert (engine.pool.checkedout(), store.held()) == (0, 0)  # type: ignore[attr-defined]
    assert len(invalidated) == 1
    assert "OSError" in caplog.text
    assert "GET /thing" in caplog.text
    with pytest.raises(LookupError, match="mine"):
        await serve(broken)
    assert (engine.pool.checkedout(), store.held()) == (0, 0)  # type: ignore[attr-defined]
    assert len(invalidated) == 2
    await engine.dispose()


async def test_S3_a_rollback_that_fails_in_the_driver_invalidates_the_connection(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """`Session.close()` forgets its connections before it fails; the scope knows them."""
    arm = True

    @event.listens_for(store.engine.sync_engine, "rollback")
    def fail(connection: object) -> None:
        if arm:
            raise OSError("broken rollback")

    async def handler() -> None:
        await store.jenny.execute(text("SELECT 1"))

    await serve(handler)
    assert store.held() == 0
    assert "OSError" in caplog.text
    arm = False
    await serve(handler)
    assert store.held() == 0


async def test_S3_in_the_end_the_context_is_as_before(store: Store) -> None:
    """Inside of another scope the outer one is current again, also after an error."""
    async with open_scope() as outer:
        with suppress(LookupError):
            async with open_scope():
                raise LookupError
        assert current_scope() is outer
        with suppress(asyncio.CancelledError):
            async with open_scope():
                raise asyncio.CancelledError
        assert current_scope() is outer


# --------------------------------------------------------------------------------------------
# S4: after the end


async def test_S4_a_task_that_outlived_its_request_is_told_so(store: Store) -> None:
    """`ScopeClosedError` says which scope it was and what to do; no connection is taken."""
    ended = anyio.Event()
    texts: list[str] = []

    async def late() -> None:
        await ended.wait()
        for _ in range(2):
            with pytest.raises(ScopeClosedError) as caught:
                _ = store.jenny.session
            texts.append(str(caught.value))
            with pytest.raises(ScopeClosedError):
                await store.jenny.execute(text("SELECT 1"))
            with pytest.raises(ScopeClosedError):
                current_scope()
        async with open_scope():
            await store.jenny.execute(text("SELECT 1"))

    tasks: list[asyncio.Task[None]] = []

    async def handler() -> None:
        tasks.append(asyncio.create_task(late()))
        await store.jenny.execute(text("SELECT 1"))

    await serve(handler)
    ended.set()
    await tasks[0]
    for told in texts:
        assert "GET /thing" in told
        assert "open_scope" in told
        assert "secret" not in told
    assert store.held() == 0


USES: dict[str, Callable[[AsyncSession], Awaitable[object]]] = {
    "execute": lambda session: session.execute(text("SELECT 1")),
    "scalar": lambda session: session.scalar(text("SELECT 1")),
    "scalars": lambda session: session.scalars(select(Row)),
    "stream": lambda session: session.stream(select(Row)),
    "stream_scalars": lambda session: session.stream_scalars(select(Row)),
    "get": lambda session: session.get(Row, 1),
    "connection": lambda session: session.connection(),
    "begin": lambda session: session.begin().start(),
    "begin_nested": lambda session: session.begin_nested().start(),
    "run_sync": lambda session: session.run_sync(lambda sync: sync.connection()),
}


@pytest.mark.parametrize("use", USES)
async def test_S4_a_captured_session_raises_at_every_use(store: Store, use: str) -> None:
    """Whatever would begin a transaction, every time, and it checks out no connection."""
    captured: list[AsyncSession] = []

    async def handler() -> None:
        captured.append(store.jenny.session)
        await store.jenny.execute(text("SELECT 1"))

    await serve(handler)
    checkouts: list[object] = []
    event.listen(store.engine.sync_engine, "checkout", lambda *told: checkouts.append(told))
    for _ in range(3):
        with pytest.raises(ScopeClosedError, match="open_scope"):
            await USES[use](captured[0])
    assert checkouts == []
    assert store.held() == 0


async def test_S4_a_captured_session_that_was_never_used_raises_too(store: Store) -> None:
    """Also where the first transaction would begin after the end."""
    captured: list[AsyncSession] = []

    async def handler() -> None:
        captured.append(store.jenny.session)

    await serve(handler)
    with pytest.raises(ScopeClosedError):
        await captured[0].execute(text("SELECT 1"))
    for _ in range(2):
        with pytest.raises(ScopeClosedError):
            captured[0].add(Row(n=1))  # begins, as SQLAlchemy's autobegin has it
        with pytest.raises(ScopeClosedError):
            await captured[0].commit()
    assert store.held() == 0


async def test_S4_close_rollback_and_inspection_do_not_raise(store: Store) -> None:
    """Who cleans up late does no harm."""
    captured: list[AsyncSession] = []

    async def handler() -> None:
        captured.append(store.jenny.session)
        await store.jenny.execute(text("SELECT 1"))

    await serve(handler)
    session = captured[0]
    for _ in range(2):
        await session.rollback()
        await session.close()
        assert not session.in_transaction()
        assert list(session.new) == []
        assert session.get_transaction() is None
        assert repr(session)
    assert store.held() == 0


async def test_S4_a_call_under_way_when_the_scope_ends_leaves_nothing_behind(
    store: Store,
) -> None:
    """It may succeed or fail; the connection comes back in either case."""
    started = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def work() -> None:
        for _ in range(200):
            started.set()
            await store.jenny.execute(text("SELECT 1"))
            await store.jenny.commit()

    async def handler() -> None:
        started.clear()
        tasks.append(asyncio.create_task(work()))
        await started.wait()
        await asyncio.sleep(0.001 * len(tasks))

    for _ in range(20):
        with suppress(InvalidRequestError):
            await serve(handler)
        results = await asyncio.gather(tasks[-1], return_exceptions=True)
        assert results[0] is None or isinstance(results[0], Exception)
        await poll(lambda: store.held() == 0)


async def poll(condition: Callable[[], bool], limit: float = LIMIT) -> None:
    with anyio.fail_after(limit):
        while not condition():
            await anyio.sleep(0.005)


# --------------------------------------------------------------------------------------------
# S5: on_close in async scopes


async def test_S5_async_and_sync_functions_run_newest_first(store: Store) -> None:
    """When the sessions are closed and the scope has ended; an error does not stop the rest."""
    order: list[Any] = []

    async def handler() -> None:
        scope = current_scope()

        async def later() -> None:
            await asyncio.sleep(0)
            order.append(("async", store.held()))

        def broken() -> None:
            raise LookupError("broken")

        scope.on_close(later)
        scope.on_close(broken)
        scope.on_close(lambda: order.append(("sync", store.held())))
        await store.jenny.execute(text("SELECT 1"))

    await serve(handler)
    assert order == [("sync", 0), ("async", 0)]


async def test_S5_on_close_finishes_though_the_request_is_cancelled(store: Store) -> None:
    """The callbacks belong to the end, and the end is shielded."""
    order: list[str] = []

    async def later() -> None:
        await asyncio.sleep(0.05)
        order.append("finished")

    async def handler() -> None:
        current_scope().on_close(later)
        await store.hold()

    task = asyncio.create_task(serve(handler))
    await poll(lambda: store.holding == 1)
    await cancel_again_and_again(task)
    assert order == ["finished"]


# --------------------------------------------------------------------------------------------
# S6: nesting


async def test_S6_an_inner_scope_has_sessions_of_its_own(store: Store) -> None:
    """The outer one is untouched and current again afterwards."""
    async with open_scope() as outer:
        session = store.jenny.session
        await session.execute(text("SELECT 1"))
        async with open_scope() as inner:
            assert current_scope() is inner is not outer
            assert store.jenny.session is not session
            await store.jenny.execute(text("SELECT 1"))
            assert store.held() == 2
        assert store.held() == 1
        assert current_scope() is outer
        assert store.jenny.session is session
        assert session.in_transaction()
    assert store.held() == 0


async def test_S6_two_middlewares_around_one_request_share_one_scope(store: Store) -> None:
    """The inner one finds the scope in the ASGI dict and leaves it to the outer one."""
    seen: list[Scope] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["rope_middleware.scope"] is current_scope()
        seen.append(current_scope())
        await store.jenny.execute(text("SELECT 1"))

    async def between(scope: Any, receive: Any, send: Any) -> None:
        seen.append(current_scope())
        await ASGIRopeMiddleware(app)(scope, receive, send)
        assert not seen[0].closed
        assert store.held() == 1

    await ASGIRopeMiddleware(between)(http_scope(), never, into_nothing)
    assert seen[0] is seen[1]
    assert store.held() == 0


async def test_S6_another_request_of_a_client_in_the_same_process_has_its_own_scope(
    store: Store,
) -> None:
    """An ASGI call never looks for its scope in the ContextVar."""
    seen: list[Scope] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(current_scope())
        await store.jenny.execute(text("SELECT 1"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inner"})

    async def handler() -> None:
        outer = current_scope()
        await store.jenny.execute(text("SELECT 1"))
        async with client(ASGIRopeMiddleware(inner)) as other:
            assert (await other.get("/inner")).text == "inner"
        assert seen[0] is not outer
        assert seen[0].closed
        assert current_scope() is outer
        assert store.held() == 1

    await serve(handler)
    assert store.held() == 0


# --------------------------------------------------------------------------------------------
# Y2: cancellation


async def cancel_again_and_again(task: asyncio.Task[Any]) -> None:
    """Cancel `task` at every turn of the loop until it has ended."""
    async with asyncio.timeout(LIMIT):
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
    assert task.cancelled()


def make_slow(engine: AsyncEngine, seconds: float = 0.02) -> list[str]:
    """Let every rollback and every commit of `engine` take a while; what was done, in order."""
    done: list[str] = []

    def slow(what: str) -> Callable[[object], None]:
        def wait(connection: object) -> None:
            await_only(asyncio.sleep(seconds))
            done.append(what)

        return wait

    event.listen(engine.sync_engine, "rollback", slow("rollback"))
    event.listen(engine.sync_engine, "commit", slow("commit"))
    return done


async def test_Y2_cancelled_again_and_again_while_it_closes(store: Store) -> None:
    """The call ends as cancelled, and not before its connection is back."""
    done = make_slow(store.engine)

    async def handler() -> None:
        await store.hold()

    for _ in range(5):
        task = asyncio.create_task(serve(handler))
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


async def test_Y2_cancelled_at_every_turn_of_the_loop(store: Store) -> None:
    """From the first step of a request to its last one, no moment leaks a connection."""

    async def handler() -> None:
        store.jenny.add(Row(n=1))
        await store.jenny.flush()
        await store.jenny.rollback()
        async with open_scope():
            await store.jenny.execute(select(Row))
        await store.jenny.execute(select(Row))

    turns = 0
    survived = 0
    while survived < 3:
        task = asyncio.create_task(serve(handler))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        ended = await asyncio.gather(task, return_exceptions=True)
        survived += ended[0] is None
        assert ended[0] is None or isinstance(ended[0], asyncio.CancelledError), ended
        assert store.held() == 0, f"cancelled after {turns} turns"
        turns += 1
        assert turns < 20_000


async def test_Y2_in_an_anyio_task_group_that_is_cancelled(store: Store) -> None:
    """A cancelled anyio scope cancels again at each turn; the end is shielded from it."""
    done = make_slow(store.engine)

    async def handler() -> None:
        await store.hold()

    for _ in range(3):
        async with anyio.create_task_group() as group:
            group.start_soon(serve, handler)
            group.start_soon(serve, handler)
            await poll(lambda: store.holding == 2)
            group.cancel_scope.cancel()
        assert store.held() == 0
    assert done == ["rollback"] * 6


async def test_Y2_a_cancelled_scope_does_not_spin_while_it_closes(store: Store) -> None:
    """anyio cancels again at each turn of the loop; the processor has better things to do."""
    make_slow(store.engine, 0.5)

    async def handler() -> None:
        await store.hold()

    async with anyio.create_task_group() as group:
        group.start_soon(serve, handler)
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

    async def handler() -> None:
        await store.hold()

    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            group.create_task(serve(handler))
            group.create_task(fail())
    assert store.held() == 0


@pytest.mark.parametrize("how", ["timeout", "wait_for", "move_on_after", "fail_after"])
async def test_Y2_when_the_time_is_up(store: Store, how: str) -> None:
    """`asyncio.timeout`, `wait_for` and anyio's scopes end as they do without a middleware."""
    done = make_slow(store.engine)

    async def handler() -> None:
        await store.hold()

    if how == "timeout":
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await serve(handler)
    elif how == "wait_for":
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(serve(handler), 0.05)
    elif how == "move_on_after":
        with anyio.move_on_after(0.05) as moved:
            await serve(handler)
        assert moved.cancelled_caught
    else:
        with pytest.raises(TimeoutError), anyio.fail_after(0.05):
            await serve(handler)
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

    for turns in range(0, 60, 3):
        task = asyncio.create_task(serve(handler, commit_on_success=True))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert store.held() == 0
    found = await store.rows()
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
    async with asyncio.timeout(LIMIT):
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
    assert store.held() == 0
    assert await store.rows() in ([], [1])


async def test_Y2_a_database_that_gives_no_answer_holds_a_request_for_close_timeout(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """Past the limit the connection is invalidated, and the log says so."""
    silent = True

    @event.listens_for(store.engine.sync_engine, "rollback")
    def hang(connection: object) -> None:
        if silent:
            await_only(asyncio.sleep(3600))

    async def handler() -> None:
        await store.jenny.execute(text("SELECT 1"))

    loop = asyncio.get_running_loop()
    before = loop.time()
    await serve(handler, close_timeout=0.2)
    assert 0.15 <= loop.time() - before < LIMIT
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
    event.listen(
        store.engine.sync_engine,
        "rollback",
        lambda connection: await_only(asyncio.sleep(3600)),
    )

    async def handler() -> None:
        await store.hold()

    task = asyncio.create_task(serve(handler, close_timeout=0.2))
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


# --------------------------------------------------------------------------------------------
# Y3: one scope per concurrent task


async def test_Y3_gather_over_the_decorator_gives_each_task_its_own_session(
    store: Store,
) -> None:
    """Concurrent work of one request on a pool of 2, without a shared session."""

    @open_scope()
    async def work(n: int) -> AsyncSession:
        store.jenny.add(Row(n=n))
        await store.jenny.flush()
        await asyncio.sleep(0.001)
        await store.jenny.commit()
        return store.jenny.session

    async def handler() -> None:
        mine = store.jenny.session
        sessions = await asyncio.gather(*(work(n) for n in range(1, 9)))
        assert len({id(session) for session in [mine, *sessions]}) == 9
        assert store.jenny.session is mine

    await serve(handler)
    assert await store.rows() == list(range(1, 9))


@pytest.mark.parametrize("library", ["asyncio", "anyio"])
async def test_Y3_task_groups_over_open_scope(store: Store, library: str) -> None:
    """`async with open_scope():` in each task of a group."""
    seen: list[Scope] = []

    async def work(n: int) -> None:
        async with open_scope() as scope:
            seen.append(scope)
            store.jenny.add(Row(n=n))
            await store.jenny.commit()

    async def handler() -> None:
        outer = current_scope()
        if library == "asyncio":
            async with asyncio.TaskGroup() as group:
                for n in range(1, 9):
                    group.create_task(work(n))
        else:
            async with anyio.create_task_group() as anyio_group:
                for n in range(1, 9):
                    anyio_group.start_soon(work, n)
        assert current_scope() is outer

    await serve(handler)
    assert len(set(seen)) == 8
    assert all(scope.closed for scope in seen)
    assert await store.rows() == list(range(1, 9))


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in leaves(part)]
    return [error]


@pytest.mark.parametrize("how", ["gather", "TaskGroup", "open_scope"])
async def test_Y3_a_shared_session_gets_a_note_that_names_open_scope(
    store: Store, how: str
) -> None:
    """SQLAlchemy's IllegalStateChangeError says what happened; the note says what to do."""

    async def query() -> None:
        await store.jenny.execute(text("SELECT 1"))

    async def handler() -> None:
        if how == "TaskGroup":
            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(query())
        else:
            await asyncio.gather(*(query() for _ in range(4)))

    await store.engine.dispose()  # to connect takes a while: the first one is still at it
    with pytest.raises((InvalidRequestError, ExceptionGroup)) as caught:
        if how == "open_scope":
            async with open_scope():
                await handler()
        else:
            await serve(handler)
    found = leaves(caught.value)
    assert all(getattr(leaf, "code", None) == "isce" for leaf in found), found
    for leaf in found:
        notes = getattr(leaf, "__notes__", [])
        assert len([note for note in notes if "open_scope" in note]) == 1, notes
    await poll(lambda: store.held() == 0)


async def test_Y3_another_error_gets_no_note(store: Store) -> None:
    """The note is for sessions that are shared."""

    async def handler() -> None:
        await store.jenny.execute(text("SELECT nonsense"))

    with pytest.raises(Exception, match="nonsense") as caught:
        await serve(handler)
    assert getattr(caught.value, "__notes__", []) == []


# --------------------------------------------------------------------------------------------
# Y4, Y5, Y6: refusals, in words


async def test_Y4_another_event_loop_is_refused(store: Store) -> None:
    """A thread with a loop of its own, in the context of the request."""
    errors: list[BaseException] = []

    def other_loop(made: bool) -> None:
        async def main() -> None:
            try:
                await store.jenny.execute(text("SELECT 1"))
            except BaseException as error:
                errors.append(error)

        asyncio.run(main())

    async def handler() -> None:
        await anyio.to_thread.run_sync(other_loop, False)
        await store.jenny.execute(text("SELECT 1"))
        await anyio.to_thread.run_sync(other_loop, True)

    await serve(handler)
    assert [type(error) for error in errors] == [CrossLoopError] * 2
    assert all("open_scope" in str(error) for error in errors), errors
    assert store.held() == 0


async def test_Y4_in_the_other_loop_a_scope_of_its_own_is_the_cure(tmp_path: Path) -> None:
    """What the text proposes works."""
    async with open_store(tmp_path / "outer.db") as outer:

        def other_loop() -> None:
            async def main() -> None:
                async with open_store(tmp_path / "inner.db") as inner, open_scope():
                    await inner.jenny.execute(text("SELECT 1"))

            asyncio.run(main())

        async with open_scope():
            await outer.jenny.execute(text("SELECT 1"))
            await anyio.to_thread.run_sync(other_loop)


async def test_Y5_outside_of_any_scope_there_is_no_rope(store: Store) -> None:
    """`NoScopeError`, with the cure, for every way to get at a session."""
    for strict in (False, True):
        jenny = AsyncSessionJenny(async_sessionmaker(store.engine), strict=strict)
        with pytest.raises(NoScopeError, match="open_scope"):
            _ = jenny.session
        with pytest.raises(NoScopeError, match="open_scope"):
            jenny()
        with pytest.raises(NoScopeError, match="open_scope"):
            await jenny.execute(text("SELECT 1"))
        await jenny.remove()  # silent, as in SQLAlchemy
    assert isinstance(NoScopeError("x"), LookupError)
    assert store.held() == 0


async def test_Y5_with_a_scopefunc_it_is_keyed_as_sqlalchemy_does(store: Store) -> None:
    """Outside of scopes; inside, the scope's session it is."""
    jenny = AsyncSessionJenny(async_sessionmaker(store.engine), scopefunc=asyncio.current_task)
    outside = jenny.session
    assert jenny.session is outside
    await outside.execute(text("SELECT 1"))

    async def other() -> AsyncSession:
        found = jenny.session
        await jenny.remove()
        return found

    assert await asyncio.create_task(other()) is not outside
    async with open_scope():
        assert jenny.session is not outside
        await jenny.execute(text("SELECT 1"))
        assert store.held() == 2
    assert store.held() == 1
    await jenny.remove()
    assert store.held() == 0


async def test_Y5_strict_refuses_even_with_a_scopefunc(store: Store) -> None:
    """`strict=True` raises outside of scopes."""
    jenny = AsyncSessionJenny(
        async_sessionmaker(store.engine), scopefunc=asyncio.current_task, strict=True
    )
    with pytest.raises(NoScopeError):
        _ = jenny.session
    async with open_scope():
        await jenny.execute(text("SELECT 1"))


async def test_Y6_in_a_sync_open_scope_it_is_refused_in_words(store: Store) -> None:
    """At its first use, by a `RopeError` that says what to do; the scope ends as ever."""
    with open_scope("report"):
        for _ in range(2):
            with pytest.raises(RopeError, match="async with open_scope") as caught:
                _ = store.jenny.session
            assert not isinstance(caught.value, (NoScopeError, ScopeClosedError))
    assert store.made == []


def test_Y6_in_a_wsgi_scope_it_is_refused_in_words(tmp_path: Path) -> None:
    """Also where the thread runs a loop for the handler, as Flask's async views do."""
    engine = small_engine(tmp_path / "wsgi.db")
    jenny = AsyncSessionJenny(async_sessionmaker(engine))
    texts: list[str] = []

    async def view() -> None:
        await jenny.execute(text("SELECT 1"))

    def app(environ: Any, start_response: Any) -> list[bytes]:
        with pytest.raises(RopeError) as caught:
            _ = jenny.session
        texts.append(str(caught.value))
        with pytest.raises(RopeError) as caught:
            asyncio.run(view())
        texts.append(str(caught.value))
        start_response("200 OK", [])
        return [b"x"]

    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/thing", "SCRIPT_NAME": ""}
    body: Any = WSGIRopeMiddleware(app)(
        environ, lambda status, headers, exc_info=None: lambda data: None
    )
    assert b"".join(body) == b"x"
    body.close()
    assert len(texts) == 2
    for told in texts:
        assert "WSGI" in told
        assert "GET /thing" in told


# --------------------------------------------------------------------------------------------
# A1, A4 and what frameworks do


async def test_A1_lifespan_and_unknown_types_pass_untouched() -> None:
    """The same objects go through, and no scope is open."""
    told: list[Any] = []

    async def app(*call: Any) -> None:
        told.append(call)
        with pytest.raises(NoScopeError):
            current_scope()

    wrapped = ASGIRopeMiddleware(app)
    for kind in ("lifespan", "quic.future"):
        call = ({"type": kind}, never, into_nothing)
        before = dict(call[0])
        await wrapped(*call)
        assert all(given is got for given, got in zip(call, told[-1], strict=True))
        assert call[0] == before


async def test_A1_a_lifespan_uses_open_scope_by_hand(store: Store) -> None:
    """Start-up code makes its first row in a scope of its own; requests then have theirs."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with open_scope("start", commit_on_success=True):
            store.jenny.add(Row(n=1))
        yield
        async with open_scope("stop", commit_on_success=True):
            store.jenny.add(Row(n=2))

    async def view(request: Any) -> PlainTextResponse:
        return PlainTextResponse(str(len((await store.jenny.scalars(select(Row))).all())))

    app = Starlette(routes=[Route("/", view)], lifespan=lifespan)
    app.add_middleware(ASGIRopeMiddleware)
    messages: list[str] = []
    done = asyncio.Event()
    started = asyncio.Event()
    asked = iter(("lifespan.startup", "lifespan.shutdown"))

    async def receive() -> dict[str, Any]:
        kind = next(asked)
        if kind == "lifespan.shutdown":
            await done.wait()
        return {"type": kind}

    async def send(message: Any) -> None:
        messages.append(message["type"])
        started.set()

    running = asyncio.create_task(app({"type": "lifespan", "state": {}}, receive, send))
    await started.wait()
    async with client(app) as browser:
        assert (await browser.get("/")).text == "1"
    done.set()
    await running
    assert messages == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert await store.rows() == [1, 2]
    assert store.held() == 0


@pytest.mark.parametrize("commits", [False, True])
async def test_A4_a_background_task_still_has_the_scope(store: Store, commits: bool) -> None:
    """The scope lives until the app's call returns, background work included."""

    seen: list[bool] = []

    async def later(scope: Scope) -> None:
        seen.append(current_scope() is scope and not scope.closed)
        store.jenny.add(Row(n=2))
        await store.jenny.flush()
        if not commits:
            await store.jenny.commit()

    async def view(request: Any) -> PlainTextResponse:
        store.jenny.add(Row(n=1))
        if not commits:
            await store.jenny.commit()
        return PlainTextResponse("x", background=BackgroundTask(later, current_scope()))

    app = Starlette()
    app.add_route("/", view)
    app.add_middleware(ASGIRopeMiddleware, commit_on_success=commits)
    async with client(app) as browser:
        assert (await browser.get("/")).status_code == 200
    assert seen == [True]
    assert await store.rows() == [1, 2]
    assert store.held() == 0


async def test_A4_a_background_task_that_fails_is_rolled_back(store: Store) -> None:
    """Its transaction is the second one; the request's own row stays."""

    async def later() -> None:
        store.jenny.add(Row(n=2))
        await store.jenny.flush()
        raise LookupError

    async def view(request: Any) -> PlainTextResponse:
        store.jenny.add(Row(n=1))
        return PlainTextResponse("x", background=BackgroundTask(later))

    app = Starlette()
    app.add_route("/", view)
    app.add_middleware(ASGIRopeMiddleware, commit_on_success=True)
    async with client(app) as browser:
        assert (await browser.get("/")).status_code == 200
    assert await store.rows() == [1]


async def test_A4_server_sent_events_use_the_scope_chunk_by_chunk(store: Store) -> None:
    """Each event may query; with `commit_on_success` and short scopes none is held between."""

    held: list[int] = []

    async def events() -> AsyncIterator[str]:
        for _ in range(3):
            async with open_scope():
                found = (await store.jenny.scalars(select(Row))).all()
            held.append(store.held())
            yield f"data: {len(found)}\n\n"

    async def view(request: Any) -> StreamingResponse:
        store.jenny.add(Row(n=1))
        return StreamingResponse(events(), media_type="text/event-stream")

    app = Starlette()
    app.add_route("/", view)
    app.add_middleware(ASGIRopeMiddleware, commit_on_success=True)
    async with client(app) as browser:
        assert (await browser.get("/")).text == "data: 1\n\n" * 3
    assert held == [0, 0, 0]
    assert store.held() == 0


async def test_A4_a_client_that_leaves_a_stream_gives_the_connection_back(store: Store) -> None:
    """Starlette cancels the stream at `http.disconnect`."""

    async def events() -> AsyncIterator[str]:
        while True:
            await store.jenny.execute(text("SELECT 1"))
            yield "data: x\n\n"
            await asyncio.sleep(0)

    async def view(request: Any) -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    app = Starlette()
    app.add_route("/thing", view)
    app.add_middleware(ASGIRopeMiddleware)
    chunks: list[bytes] = []
    enough = asyncio.Event()
    first = True

    async def receive() -> dict[str, Any]:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": b"", "more_body": False}
        await enough.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        chunks.append(message.get("body", b""))
        if len(chunks) > 5:
            enough.set()

    async with asyncio.timeout(LIMIT):
        with suppress(Exception):
            await app(http_scope(), receive, send)
    assert len(chunks) > 5
    assert store.held() == 0


@pytest.mark.parametrize("commits", [False, True])
async def test_A4_fastapi_dependencies_share_the_scope(store: Store, commits: bool) -> None:
    """A dependency with `yield`, a sync one in a thread, the view and a background task."""

    scopes: list[Scope] = []

    async def session() -> AsyncIterator[AsyncSession]:
        scopes.append(current_scope())
        yield store.jenny.session
        scopes.append(current_scope())

    def threaded() -> int:
        scopes.append(current_scope())
        return threading.get_ident()

    app = FastAPI()

    @app.get("/{n}")
    async def view(
        n: int,
        tasks: BackgroundTasks,
        db: Any = Depends(session),
        ident: int = Depends(threaded),
    ) -> dict[str, bool]:
        scopes.append(current_scope())
        db.add(Row(n=n))
        await db.flush()
        if n == 13:
            raise HTTPException(418)
        if not commits:
            await db.commit()
        tasks.add_task(lambda: scopes.append(current_scope()))
        return {"same": db is store.jenny.session}

    app.add_middleware(ASGIRopeMiddleware, commit_on_success=commits)
    async with client(app) as browser:
        assert (await browser.get("/1")).json() == {"same": True}
        assert len(scopes) == 5
        assert len({id(scope) for scope in scopes}) == 1
        assert scopes[0].closed
        assert (await browser.get("/13")).status_code == 418
    assert await store.rows() == [1]
    assert store.held() == 0


@pytest.mark.parametrize("place", ["above", "below", "both"])
@pytest.mark.parametrize("commits", [False, True])
async def test_A4_base_http_middleware_above_and_below(
    store: Store, place: str, commits: bool
) -> None:
    """Starlette's BaseHTTPMiddleware runs the rest in another task; the scope reaches it."""

    class Header(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            inside = "rope_middleware.scope" in request.scope
            if inside:
                store.jenny.add(Row(n=10 + len(seen)))
            response = await call_next(request)
            response.headers["x-seen"] = "yes"
            if inside:
                assert current_scope() is seen[-1]
            return response

    seen: list[Scope] = []
    below = place != "above"

    async def view(request: Any) -> PlainTextResponse:
        seen.append(current_scope())
        store.jenny.add(Row(n=1))
        await store.jenny.flush()
        if request.url.path == "/error":
            raise LookupError
        if not commits:
            await store.jenny.commit()
        return PlainTextResponse("x")

    ours = Middleware(ASGIRopeMiddleware, commit_on_success=commits)
    theirs = Middleware(Header)
    order = {"above": [theirs, ours], "below": [ours, theirs], "both": [theirs, ours, theirs]}
    app = Starlette(middleware=order[place])
    app.add_route("/", view)
    app.add_route("/error", view)
    async with client(app) as browser:
        answer = await browser.get("/")
        assert (answer.status_code, answer.headers["x-seen"]) == (200, "yes")
        assert await store.rows() == ([1, 10] if below else [1])
        assert (await browser.get("/error")).status_code == 500
    assert await store.rows() == ([1, 10] if below else [1])
    assert all(scope.closed for scope in seen)
    assert store.held() == 0


async def test_A2_context_variables_of_the_application_are_its_own(store: Store) -> None:
    """What the application sets in its own context is as without the middleware."""
    mine: contextvars.ContextVar[int] = contextvars.ContextVar("mine", default=0)

    async def handler() -> None:
        mine.set(1)
        await store.jenny.execute(text("SELECT 1"))

    await serve(handler)
    assert mine.get() == 1


async def test_S7_three_hundred_requests_share_a_pool_of_two(
    store: Store,
) -> None:
    """On a pool of 2, each request has its own session and all succeed."""
    sessions: set[int] = set()
    alive: list[AsyncSession] = []

    async def handler() -> None:
        await store.jenny.execute(text("SELECT 1"))
        sessions.add(id(store.jenny.session))
        alive.append(store.jenny.session)

    for _ in range(10):
        await asyncio.gather(*(serve(handler) for _ in range(30)))
    assert len(sessions) == 300
    assert store.held() == 0
