"""S4: what outlives its scope is told so, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import anyio
import anyio.to_thread
import pytest
from sqlalchemy import Engine, event, select, text
from sqlalchemy.exc import IllegalStateChangeError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from rope_middleware import (
    RopeError,
    ScopeClosedError,
    SessionJenny,
    current_scope,
    holders,
    open_scope,
)
from tests.kit.asgi import serve
from tests.kit.engines import MakeEngine, counts
from tests.kit.leaks import checked_out, no_scope_here
from tests.kit.models import Data, Row
from tests.kit.sessions import SELECT, Jenny, use
from tests.kit.stores import Store
from tests.kit.waiting import eventually, poll
from tests.kit.ways import REQUESTS, Way, by_with
from tests.kit.wsgi import Probe, Wrap, make_environ

pytestmark = pytest.mark.anyio


USES: dict[str, Callable[[Session], object]] = {
    "execute": lambda session: session.execute(text("SELECT 1")),
    "scalar": lambda session: session.scalar(select(Data.count)),
    "query": lambda session: session.query(Data).all(),
    "get": lambda session: session.get(Data, 1),
    "add, flush": lambda session: (session.add(Data()), session.flush()),
    "connection": lambda session: session.connection(),
    "begin": lambda session: session.begin(),
    "begin_nested": lambda session: session.begin_nested(),
    "commit": lambda session: session.commit(),
    "merge": lambda session: session.merge(Data(id=1)),
}


@pytest.mark.parametrize("do", USES)
def test_S4_a_captured_session_raises_at_every_use(
    jenny: Jenny, engine: Engine, way: Way, do: str
) -> None:
    """Each use says which scope it was and what to do; none checks out a connection."""
    session = way(lambda: use(jenny.session), name="the job")
    for _ in range(3):
        with pytest.raises(ScopeClosedError, match=r"the job'.*with open_scope") as caught:
            USES[do](session)
        assert isinstance(caught.value, RopeError)
        assert checked_out(engine) == 0
        session.expunge_all()


@pytest.mark.parametrize("do", USES)
def test_S4_a_captured_session_that_was_never_used_raises_too(
    jenny: Jenny, engine: Engine, do: str
) -> None:
    """It is the scope that counts, not what the session did in it."""
    with open_scope():
        session = jenny.session
    with pytest.raises(ScopeClosedError):
        USES[do](session)
    assert checked_out(engine) == 0


def test_S4_close_rollback_and_inspection_do_not_raise(jenny: Jenny, engine: Engine) -> None:
    """Cleaning up and looking are no uses."""
    with open_scope():
        session = jenny.session
        row = session.get(Data, 1)
        session.expunge(row)
    session.rollback()
    session.close()
    assert session.in_transaction() is False
    assert not session.new
    assert not session.dirty
    assert not session.deleted
    assert list(session) == []
    assert row not in session
    assert session.is_active
    assert session.bind is engine
    assert session.info is not None
    assert row is not None
    assert row.count == 0
    session.expire_all()
    session.expunge_all()
    session.reset()
    assert checked_out(engine) == 0


def test_S4_a_session_used_in_a_later_scope_is_still_the_old_one(jenny: Jenny) -> None:
    """Another scope that is open does not bring it back to life."""
    with open_scope("old"):
        session = jenny.session
    with open_scope("new"):
        with pytest.raises(ScopeClosedError, match="'old'"):
            use(session)
        use(jenny.session)


def test_S4_a_thread_that_outlived_its_scope_is_told_so(
    jenny: Jenny, engine: Engine, way: Way
) -> None:
    """`jenny.session`, every way to it, and `current_scope()` raise there."""
    ended = threading.Event()
    before = threading.Event()
    plain = scoped_session(sessionmaker(engine), scopefunc=current_scope)

    def late() -> None:
        before.set()
        assert ended.wait(30)
        for _ in range(2):
            for enter in (
                lambda: jenny.session,
                lambda: jenny(),
                lambda: jenny.query(Data),
                lambda: jenny.execute(text("SELECT 1")),
                lambda: jenny.registry(),
                current_scope,
                plain,
            ):
                with pytest.raises(ScopeClosedError, match=r"the job'.*with open_scope\(\):"):
                    enter()
        with open_scope("cure"):
            use(jenny.session)
        assert checked_out(engine) == 0

    def body() -> Any:
        future = pool.submit(contextvars.copy_context().run, late)
        assert before.wait(30)
        return future

    with ThreadPoolExecutor(1) as pool:
        future = way(body, name="the job")
        ended.set()
        future.result(60)


def test_S4_a_session_is_not_made_for_code_that_outlived_its_scope(engine: Engine) -> None:
    """The session factory is not even asked."""
    made: list[Session] = []

    def factory() -> Session:
        made.append(Session(engine))
        return made[-1]

    jenny = SessionJenny(factory)
    with open_scope():
        context = contextvars.copy_context()
    with pytest.raises(ScopeClosedError):
        context.run(lambda: jenny.session)
    assert made == []


@pytest.mark.slow
def test_S4_a_session_class_of_ones_own_and_many_factories(engine: Engine) -> None:
    """Every session class heeds its scope, also one at the address of a class that is gone."""
    for number in range(60):
        own = type("Own", (Session,), {}) if number % 2 else Session
        jenny = SessionJenny(sessionmaker(engine, class_=own))
        with open_scope():
            session = use(jenny.session)
        with pytest.raises(ScopeClosedError):
            use(session)
        del jenny, session, own
        gc.collect()
    assert checked_out(engine) == 0


@pytest.mark.parametrize("way", [by_with, *REQUESTS], ids=lambda way: way.__name__)
def test_S4_a_call_under_way_when_the_scope_ends_leaves_nothing_behind(
    make_engine: MakeEngine, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread that waits for its first connection then is told, each time; the log is silent."""
    engine = make_engine(pool_size=1)
    jenny = SessionJenny(sessionmaker(engine))

    def late(session: Session) -> None:
        for _ in range(3):
            with pytest.raises(ScopeClosedError):
                use(session)

    with ThreadPoolExecutor(1) as pool:

        def body() -> Any:
            future = pool.submit(contextvars.copy_context().run, late, jenny.session)
            eventually(lambda: any(one.waiting for one in holders()), holders)
            return future

        with engine.connect():
            future = way(body)
        future.result(60)
    assert checked_out(engine) == 0
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_S4_the_end_of_a_scope_races_with_its_threads(make_engine: MakeEngine) -> None:
    """Threads in every phase of a use meet the end; each succeeds or is told, none leaks."""
    engine = make_engine(pool_size=4)
    jenny = SessionJenny(sessionmaker(engine))
    outcomes: list[str] = []

    def work(session: Session | None) -> None:
        try:
            (session or jenny.session).execute(text("SELECT 1"))
        except ScopeClosedError:
            outcomes.append("told")
        except Exception as error:
            # Two threads in one session, which SQLAlchemy does not allow: it may say so.
            outcomes.append(type(error).__name__)
        else:
            outcomes.append("done")

    with ThreadPoolExecutor(3) as pool:
        for number in range(150):
            with open_scope(f"scope {number}"):
                captured = jenny.session if number % 2 else None
                futures = [
                    pool.submit(contextvars.copy_context().run, work, captured) for _ in range(2)
                ]
            for future in futures:
                future.result(60)
        assert checked_out(engine) == 0
    assert len(outcomes) == 300
    assert "done" in outcomes or "told" in outcomes


def test_S4_the_first_use_races_with_the_end_of_the_scope(engine: Engine) -> None:
    """A session is either closed with the scope or never handed out."""
    made: list[Session] = []
    plain = sessionmaker(engine)

    def factory() -> Session:
        made.append(plain())
        return made[-1]

    jenny = SessionJenny(factory)
    got: list[Session] = []

    def work() -> None:
        with suppress(ScopeClosedError):
            got.append(jenny.session)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(200):
            with open_scope():
                futures = [pool.submit(contextvars.copy_context().run, work) for _ in range(2)]
            for future in futures:
                future.result(30)
    for session in got:
        with pytest.raises(ScopeClosedError):
            use(session)
    for session in made:
        assert not session.in_transaction()
    assert checked_out(engine) == 0


@pytest.mark.parametrize("begun", [False, True])
def test_S4_a_session_that_is_made_while_the_scope_ends(engine: Engine, begun: bool) -> None:
    """The scope is over when the factory returns: the session is refused and given back."""
    asked, ended = threading.Event(), threading.Event()

    def factory() -> Session:
        asked.set()
        assert ended.wait(30)
        return use(Session(engine)) if begun else Session(engine)

    jenny = SessionJenny(factory)

    def work() -> None:
        gc.disable()  # the garbage collector would do it, some time
        try:
            with pytest.raises(ScopeClosedError) as caught:
                _ = jenny.session
            assert checked_out(engine) == 0
            assert caught.value is not None
        finally:
            gc.enable()

    with ThreadPoolExecutor(1) as pool:
        with open_scope() as scope:
            future = pool.submit(contextvars.copy_context().run, work)
            assert asked.wait(30)
        assert scope.closed
        ended.set()
        future.result(30)
    assert not scope._sessions


@pytest.mark.parametrize(
    "options",
    [
        {"autobegin": False},
        {"close_resets_only": False},
        {"expire_on_commit": False},
        {"autoflush": False, "info": {"mine": 1}},
        {"join_transaction_mode": "create_savepoint"},
    ],
    ids=str,
)
def test_S4_whatever_the_options_of_the_session(engine: Engine, options: dict[str, Any]) -> None:
    """It is closed with its scope, and refuses to begin again, every time."""
    jenny = SessionJenny(sessionmaker(engine, **options))
    with open_scope():
        session = jenny.session
        with session.begin():
            session.execute(text("SELECT 1"))
        session.begin() if options.get("autobegin") is False else None
        use(session)
        if "info" in options:
            assert session.info["mine"] == 1
    assert checked_out(engine) == 0
    for _ in range(3):
        with pytest.raises(ScopeClosedError):
            session.begin()
    assert checked_out(engine) == 0


def test_S4_a_session_in_use_by_another_thread_when_the_scope_ends(make_engine: MakeEngine) -> None:
    """SQLAlchemy refuses to close it under the other thread's hands; nothing stays out."""
    engine = make_engine(pool_size=2)
    jenny = SessionJenny(sessionmaker(engine))
    inside, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        if not inside.is_set():
            inside.set()
            assert go_on.wait(30)

    def work() -> None:
        try:
            jenny.session.connection()
        except (ScopeClosedError, IllegalStateChangeError):
            return

    event.listen(engine, "checkout", slow)
    with ThreadPoolExecutor(1) as pool:
        try:
            with open_scope():
                future = pool.submit(contextvars.copy_context().run, work)
                assert inside.wait(30)
        finally:
            go_on.set()
        future.result(60)
    assert checked_out(engine) == 0


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


ASYNC_USES: dict[str, Callable[[AsyncSession], Awaitable[object]]] = {
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


@pytest.mark.parametrize("use", ASYNC_USES)
async def test_S4_async_a_captured_session_raises_at_every_use(store: Store, use: str) -> None:
    """Whatever would begin a transaction, every time, and it checks out no connection."""
    captured: list[AsyncSession] = []

    async def handler() -> None:
        captured.append(store.jenny.session)
        await store.jenny.execute(text("SELECT 1"))

    await serve(handler)
    checkouts: list[object] = []
    event.listen(store.engine, "checkout", lambda *told: checkouts.append(told))
    for _ in range(3):
        with pytest.raises(ScopeClosedError, match="open_scope"):
            await ASYNC_USES[use](captured[0])
    assert checkouts == []
    assert store.held() == 0


async def test_S4_async_a_captured_session_that_was_never_used_raises_too(store: Store) -> None:
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


async def test_S4_async_close_rollback_and_inspection_do_not_raise(store: Store) -> None:
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


@pytest.mark.told
async def test_S4_async_a_call_under_way_when_the_scope_ends_leaves_nothing_behind(
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


def test_S4_a_body_used_after_its_close(wrap: Wrap, jenny: Jenny, engine: Engine) -> None:
    """A server that goes on after close() gets an error or nothing, and opens no scope again."""
    probe = Probe(jenny, "iterable")
    result = wrap(probe)(make_environ(), lambda *args: print)
    chunks = iter(result)
    next(chunks)
    result.close()
    with pytest.raises((ScopeClosedError, StopIteration)):
        next(chunks)
    assert checked_out(engine) == 0
    assert no_scope_here()


@pytest.mark.told
def test_S4_the_end_waits_for_a_flush_of_another_thread(jenny: Jenny, engine: Engine) -> None:
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
    assert counts(engine) == [0]
