"""Y1, Y3-Y6: everything, for AsyncSession."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import anyio
import anyio.to_thread
import pytest
from sqlalchemy import Engine, event, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util import greenlet_spawn

from rope_middleware import (
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
from tests.kit.asgi import serve
from tests.kit.engines import hold_up, small_async_engine, small_engine
from tests.kit.leaks import checked_out, no_scope_here
from tests.kit.models import Row
from tests.kit.said import Said
from tests.kit.sessions import SELECT, Jenny, beside, touch
from tests.kit.stores import Store, open_store
from tests.kit.waiting import poll
from tests.kit.wsgi import Server, make_environ

pytestmark = pytest.mark.anyio


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
        await first.execute(SELECT)
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
    assert store.rows() == [1, 2, 3]


async def test_Y1_remove_is_awaited_and_the_next_use_makes_a_new_session(store: Store) -> None:
    """In the same scope, which does not forget the removed one; what it had written is gone."""
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
        await first.execute(SELECT)
        assert store.held() == 1
    assert store.held() == 0
    assert store.rows() == [2]


async def test_Y1_sync_and_async_jennies_side_by_side_in_one_scope(
    store: Store, jenny: Jenny, engine: Engine, tmp_path: Path
) -> None:
    """Each has and closes its own session, in a request and in `async with open_scope():`."""
    async with open_store(tmp_path / "second.db") as second:

        async def handler() -> None:
            jenny.execute(SELECT)
            await store.jenny.execute(SELECT)
            await second.jenny.execute(SELECT)
            assert store.jenny.session is not second.jenny.session
            assert (checked_out(engine), store.held(), second.held()) == (1, 1, 1)

        for _ in range(2):
            await serve(handler)
            assert (checked_out(engine), store.held(), second.held()) == (0, 0, 0)
            async with open_scope():
                await handler()
            assert (checked_out(engine), store.held(), second.held()) == (0, 0, 0)


async def test_Y1_open_scope_by_hand_has_a_name_and_its_own_session(store: Store) -> None:
    """`async with open_scope("nightly"):` in a script, and the decorator, call by call."""
    seen: list[AsyncSession] = []

    @open_scope("work")
    async def work() -> str | None:
        seen.append(store.jenny.session)
        await store.jenny.execute(SELECT)
        return current_scope().name

    async with open_scope("nightly") as scope:
        assert scope.name == "nightly"
        assert current_scope() is scope
        assert not scope.closed
    assert scope.closed
    assert await work() == await work() == "work"
    assert seen[0] is not seen[1]
    assert store.held() == 0
    assert no_scope_here()


async def test_Y1_the_first_use_in_a_worker_thread_is_seen_by_the_middleware(
    jenny: Jenny, engine: Engine
) -> None:
    """A sync session made in a thread of an async request is closed with the request (S2)."""

    async def handler() -> None:
        session = await anyio.to_thread.run_sync(touch, jenny)
        assert jenny.session is session
        assert checked_out(engine) == 1

    await serve(handler)
    assert checked_out(engine) == 0


async def test_Y1_a_session_made_in_a_child_task_is_closed_by_the_middleware(store: Store) -> None:
    """Sessions are kept in the scope, not in the task's context (S2)."""

    async def child() -> AsyncSession:
        await store.jenny.execute(SELECT)
        return store.jenny.session

    async def handler() -> None:
        made = await asyncio.create_task(child())
        assert store.jenny.session is made

    await serve(handler)
    assert store.held() == 0


class OwnSession(AsyncSession):
    pass


class OwnInner(Session):
    pass


class OwnMaker(async_sessionmaker[AsyncSession]):
    def __call__(self, **kw: Any) -> AsyncSession:
        kw.setdefault("info", {"by": "its own call"})
        return super().__call__(**kw)


def _configured(maker: async_sessionmaker[AsyncSession]) -> None:
    maker.configure(expire_on_commit=False, info={"a": 1}, sync_session_class=OwnInner)


def _of_another_class(maker: async_sessionmaker[AsyncSession]) -> None:
    maker.class_ = OwnSession


def _says(session: AsyncSession) -> list[object]:
    """Tell all that a factory has a say in; of the inner class what is not ours."""
    inner = session.sync_session
    bases = [one for one in type(inner).__mro__ if not one.__dict__.get("execute")]
    says: list[object] = [type(session), bases, session.info]
    return [*says, inner.bind, inner.autoflush, inner.expire_on_commit]


async def test_Y1_a_call_that_somebody_has_put_around_a_factory_is_made(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that traces, for example: also where it comes when the jenny knows its factory."""
    jenny = AsyncSessionJenny(async_sessionmaker(store.async_engine))
    called: list[dict[str, Any]] = []
    call = async_sessionmaker.__call__

    def traced(self: Any, **kw: Any) -> Any:
        called.append(kw)
        return call(self, **kw)

    for _ in range(2):
        async with open_scope():
            assert isinstance(jenny.session, AsyncSession)
    monkeypatch.setattr(async_sessionmaker, "__call__", traced)
    async with open_scope():
        assert isinstance(jenny.session, AsyncSession)
    assert len(called) == 1


@pytest.mark.parametrize("change", [lambda maker: None, _configured, _of_another_class])
@pytest.mark.parametrize("maker_class", [async_sessionmaker, OwnMaker])
async def test_Y1_a_session_is_made_as_its_factory_makes_it(
    store: Store, maker_class: type[async_sessionmaker[AsyncSession]], change: Callable[[Any], None]
) -> None:
    """Also where the factory is changed later, once the jenny knows what comes of it."""
    maker = maker_class(store.async_engine, autoflush=False)
    jenny = AsyncSessionJenny(maker)
    for changed in (lambda _: None, change):
        changed(maker)
        for _ in range(3):
            async with open_scope():
                found = jenny.session
                assert _says(found) == _says(maker())
                assert type(found.sync_session) is not maker().sync_session_class
    async with open_scope():
        assert jenny(info={"b": 2}).info == maker(info={"b": 2}).info


async def test_Y3_gather_over_the_decorator_gives_each_task_its_own_session(store: Store) -> None:
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
    assert store.rows() == list(range(1, 9))


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
    assert store.rows() == list(range(1, 9))


def leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in leaves(part)]
    return [error]


def note_on(error: BaseException) -> str:
    """Return the one note that tells of the shared session."""
    (note,) = [note for note in getattr(error, "__notes__", []) if "open_scope" in note]
    return str(note)


def line_of(function: Callable[..., object], number: int = 1) -> str:
    """Return the line of this file that comes so many lines after the function's first."""
    return f"{Path(__file__).name}:{function.__code__.co_firstlineno + number}"


@pytest.fixture
def jenny_of_its_own(store: Store) -> AsyncSessionJenny[Any]:
    """A jenny for the store's engine, by a session factory as users have it."""
    return AsyncSessionJenny(async_sessionmaker(store.async_engine))


@pytest.mark.told
@pytest.mark.parametrize("how", ["gather", "TaskGroup", "open_scope"])
async def test_Y3_a_shared_session_gets_a_note_that_names_open_scope(
    store: Store, how: str
) -> None:
    """SQLAlchemy's IllegalStateChangeError says what happened; the note says what to do."""

    async def query() -> None:
        await store.jenny.execute(SELECT)

    async def handler() -> None:
        if how == "TaskGroup":
            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(query())
        else:
            await asyncio.gather(*(query() for _ in range(4)))

    await store.async_engine.dispose()  # to connect takes a while: the first one is still at it
    with pytest.raises((InvalidRequestError, ExceptionGroup)) as caught:
        if how == "open_scope":
            async with open_scope():
                await handler()
        else:
            await serve(handler)
    for leaf in leaves(caught.value):
        assert getattr(leaf, "code", None) == "isce", leaf
        assert note_on(leaf)
    await poll(lambda: store.held() == 0)


@pytest.mark.told
def test_Y3_two_threads_that_share_a_session_are_told_of_threads(
    tmp_path: Path, said: Said
) -> None:
    """The words are those of a Session: there is nothing to await, and no task."""
    engine = small_engine(tmp_path / "threads.db")
    jenny = SessionJenny(sessionmaker(engine))
    commits, may_go = hold_up(engine)
    with pytest.raises(InvalidRequestError) as caught, open_scope():
        jenny.session.execute(text("SELECT 1"))
        with beside(jenny.session.commit, until=may_go):
            assert commits.wait(5)
            jenny.session.commit()
    (note,) = caught.value.__notes__
    assert note.startswith("Two threads have probably used one Session at the same time")
    assert "'with open_scope():'" in note
    assert said.warnings == [note]
    engine.dispose()


@pytest.mark.told
@pytest.mark.parametrize("swallows", [False, True], ids=["raises", "swallowed"])
async def test_Y3_note_and_log_name_both_lines(
    store: Store, jenny_of_its_own: AsyncSessionJenny[Any], said: Said, swallows: bool
) -> None:
    """Where this task is, and where the other one; the log says it once for each line.

    Also where the application swallows the error, as GraphQL does, which answers an error of a
    resolver itself.
    """
    jenny = jenny_of_its_own if swallows else store.jenny

    async def one() -> None:
        await jenny.execute(SELECT)

    async def other() -> None:
        await jenny.scalars(text("SELECT 2"))

    async def handler() -> None:
        results = await asyncio.gather(one(), other(), return_exceptions=swallows)
        (error,) = [result for result in results if result is not None]
        notes.append(note_on(error))

    notes: list[str] = []
    for _ in range(3):
        await store.async_engine.dispose()
        if swallows:
            await serve(handler)
        else:
            with pytest.raises(InvalidRequestError) as caught:
                async with open_scope():
                    await handler()
            notes.append(note_on(caught.value))
        await poll(lambda: store.held() == 0)
    assert len(notes) == 3
    (warning,) = [text for text in said.warnings if "Two tasks" in text]
    assert "open_scope" in warning
    for told in (*notes, warning):
        assert line_of(one) in told and line_of(other) in told, told
    assert [record.levelname for record in said.records] == ["WARNING"]


@pytest.mark.told
@pytest.mark.parametrize("how", ["flush", "commit"])
async def test_Y3_two_tasks_that_write_are_told_as_well(
    jenny_of_its_own: AsyncSessionJenny[Any], said: Said, how: str
) -> None:
    """SQLAlchemy's errors for that have no code: "Session is already flushing", for example."""
    jenny = jenny_of_its_own

    async def one() -> None:
        await (jenny.flush() if how == "flush" else jenny.commit())

    async def other() -> None:
        await jenny.flush()

    async def handler() -> None:
        jenny.add(Row(name="x"))
        (error,) = filter(None, await asyncio.gather(one(), other(), return_exceptions=True))
        assert note_on(error)
        await jenny.rollback()

    await serve(handler)
    (warning,) = said.warnings
    assert "Two tasks" in warning and "test_Y_async.py" in warning.partition("the other at")[2]


async def test_Y3_a_flush_within_a_flush_gets_no_note(
    jenny_of_its_own: AsyncSessionJenny[Any],
) -> None:
    """A listener's: nobody shares the session."""
    jenny = jenny_of_its_own

    async def handler() -> None:
        session = jenny().sync_session
        event.listen(session, "before_flush", lambda *_: session.flush())
        jenny.add(Row(name="x"))
        await jenny.flush()

    with pytest.raises(InvalidRequestError, match="already flushing") as caught:
        await serve(handler)
    assert getattr(caught.value, "__notes__", []) == []


@pytest.mark.told
@pytest.mark.parametrize("own_factory", [False, True])
async def test_Y3_no_line_says_that_closing_a_session_has_failed(
    store: Store, said: Said, own_factory: bool
) -> None:
    """The first task is still at it when the second one's error ends the scope."""
    make = async_sessionmaker(store.async_engine)
    jenny = AsyncSessionJenny((lambda: make()) if own_factory else make)

    async def query() -> None:
        await jenny.execute(SELECT)

    await store.async_engine.dispose()
    with pytest.raises(InvalidRequestError) as caught:
        async with open_scope():
            await asyncio.gather(query(), query())
    assert note_on(caught.value)
    assert len(said.warnings) == 1
    assert [record.levelname for record in said.records] == ["WARNING"]
    await poll(lambda: store.held() == 0)


@pytest.mark.told
async def test_Y3_a_task_that_outlives_its_scope_is_told_with_its_line(
    store: Store, said: Said
) -> None:
    """The end meets it in the middle of a call: its line and the cure, and no traceback of ours."""
    tasks: list[asyncio.Task[None]] = []

    async def late() -> None:
        await store.jenny.execute(SELECT)

    async def handler() -> None:
        tasks.append(asyncio.create_task(late()))
        await asyncio.sleep(0)

    await store.async_engine.dispose()
    await serve(handler)
    (warning,) = said.warnings
    assert "another task was in the middle of a call" in warning and "open_scope" in warning
    assert line_of(late) in warning
    assert [record.levelname for record in said.records] == ["WARNING"]
    await asyncio.gather(*tasks, return_exceptions=True)
    await poll(lambda: store.held() == 0)


async def test_Y3_another_error_gets_no_note(store: Store) -> None:
    """The note is for sessions that are shared."""

    async def handler() -> None:
        await store.jenny.execute(text("SELECT nonsense"))

    with pytest.raises(Exception, match="nonsense") as caught:
        await serve(handler)
    assert getattr(caught.value, "__notes__", []) == []


async def test_Y4_another_event_loop_is_refused(store: Store) -> None:
    """A thread with a loop of its own, in the context of the request."""

    def other_loop() -> None:
        with pytest.raises(CrossLoopError, match="open_scope"):
            asyncio.run(store.jenny.execute(SELECT))

    async def handler() -> None:
        await anyio.to_thread.run_sync(other_loop)
        await store.jenny.execute(SELECT)
        await anyio.to_thread.run_sync(other_loop)

    await serve(handler)
    assert store.held() == 0


async def test_Y4_in_the_other_loop_a_scope_of_its_own_is_the_cure(tmp_path: Path) -> None:
    """What the text proposes works."""
    async with open_store(tmp_path / "outer.db") as outer:

        def other_loop() -> None:
            async def main() -> None:
                async with open_store(tmp_path / "inner.db") as inner, open_scope():
                    await inner.jenny.execute(SELECT)

            asyncio.run(main())

        async with open_scope():
            await outer.jenny.execute(SELECT)
            await anyio.to_thread.run_sync(other_loop)


async def test_Y5_outside_of_any_scope_there_is_no_rope(store: Store) -> None:
    """`NoScopeError`, with the cure, for every way to get at a session."""
    for strict in (False, True):
        jenny = AsyncSessionJenny(async_sessionmaker(store.async_engine), strict=strict)
        with pytest.raises(NoScopeError, match="open_scope"):
            _ = jenny.session
        with pytest.raises(NoScopeError, match="open_scope"):
            jenny()
        with pytest.raises(NoScopeError, match="open_scope"):
            await jenny.execute(SELECT)
        await jenny.remove()  # silent, as in SQLAlchemy
    assert isinstance(NoScopeError("x"), LookupError)
    assert store.held() == 0


async def test_Y5_with_a_scopefunc_it_is_keyed_as_sqlalchemy_does(store: Store) -> None:
    """Outside of scopes; inside, the scope's session it is."""
    make = async_sessionmaker(store.async_engine)
    jenny = AsyncSessionJenny(make, scopefunc=asyncio.current_task)
    outside = jenny.session
    assert jenny.session is outside
    await outside.execute(SELECT)

    async def other() -> AsyncSession:
        found = jenny.session
        await jenny.remove()
        return found

    assert await asyncio.create_task(other()) is not outside
    async with open_scope():
        assert jenny.session is not outside
        await jenny.execute(SELECT)
        assert store.held() == 2
    assert store.held() == 1
    await jenny.remove()
    assert store.held() == 0


async def test_Y5_strict_refuses_even_with_a_scopefunc(store: Store) -> None:
    """`strict=True` raises outside of scopes."""
    jenny = AsyncSessionJenny(
        async_sessionmaker(store.async_engine), scopefunc=asyncio.current_task, strict=True
    )
    with pytest.raises(NoScopeError):
        _ = jenny.session
    async with open_scope():
        await jenny.execute(SELECT)


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
    engine = small_async_engine(tmp_path / "wsgi.db")
    jenny = AsyncSessionJenny(async_sessionmaker(engine))
    texts: list[str] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        for use in (lambda: jenny.session, lambda: asyncio.run(jenny.execute(SELECT))):
            with pytest.raises(RopeError) as caught:
                use()
            texts.append(str(caught.value))
        start_response("200 OK", [])
        return [b"x"]

    seen = Server()(WSGIRopeMiddleware(app), make_environ("/thing"))
    assert (seen.error, seen.body) == (None, b"x")
    assert len(texts) == 2
    for told in texts:
        assert "WSGI" in told
        assert "GET /thing" in told


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


@pytest.mark.told
@pytest.mark.parametrize("commits", [False, True])
async def test_S3_the_inner_session_of_a_removed_one_ends_with_its_scope(
    store: Store, said: Said, commits: bool
) -> None:
    """Also where its AsyncSession is gone: nothing leaks, and what is lost is told."""
    async with open_scope(commit_on_success=commits):
        await store.jenny.execute(text("SELECT 1"))
        inner = store.jenny.session.sync_session
        await store.jenny.remove()
        store.made.clear()
        gc.collect()
        assert async_session(inner) is None
        inner.add(Row(n=1))
        await greenlet_spawn(inner.flush)
        assert store.held() == 1
    assert store.held() == 0
    with pytest.raises(ScopeClosedError):
        await greenlet_spawn(inner.execute, text("SELECT 1"))
    assert store.rows() == ([1] if commits else [])
    assert [("1 Row" in warning) for warning in said.warnings] == ([] if commits else [True])


async def test_Y1_inner_sessions_may_come_from_any_callable(store: Store) -> None:
    """SQLAlchemy documents that of `sync_session_class`: a function, a sessionmaker, a method."""

    class Maker:
        __slots__ = ()

        def __call__(self, **kw: Any) -> Session:
            return OwnInner(**kw)

    makers: list[Any] = [lambda **kw: OwnInner(**kw), sessionmaker(class_=OwnInner), Maker()]
    for make in (*makers, makers[2].__call__):
        maker = async_sessionmaker(store.async_engine, sync_session_class=make)
        jenny = AsyncSessionJenny(maker)
        for _ in range(2):
            async with open_scope(commit_on_success=True):
                jenny.session.add(Row())
                await jenny.session.flush()
                assert isinstance(jenny.session.sync_session, OwnInner)
            assert store.held() == 0
    assert len(store.rows()) == 8


async def test_J6_the_inner_sessions_of_each_class_are_of_one_class_of_ours(tmp_path: Path) -> None:
    """Whoever makes them, and in whichever order; and a class that is gone is not kept."""

    class Own(Session):
        pass

    engine = small_async_engine(tmp_path / "x.db")
    makers: list[Any] = [
        async_sessionmaker(engine),
        async_sessionmaker(engine, sync_session_class=Own),
        async_sessionmaker(engine, sync_session_class=None),
    ]
    found: list[list[type]] = []
    for _ in range(3):
        async with open_scope():
            found.append([type(AsyncSessionJenny(one).session.sync_session) for one in makers])
    assert found[0] == found[1] == found[2]
    plain, own, none = found[0]
    assert (plain.__base__, own.__base__, none) == (Session, Own, plain)
    gone = ref(Own)
    del Own, makers, found, own
    gc.collect()
    assert gone() is None
    await engine.dispose()


async def test_Y1_a_method_that_somebody_replaces_is_called(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the class that an inner session's is derived from: for a test, say, and not after it."""

    class Own(Session):
        pass

    jenny = AsyncSessionJenny(async_sessionmaker(store.async_engine, sync_session_class=Own))
    called: list[Session] = []
    for expected in (1, 2):  # first of a class that nobody knows yet
        with monkeypatch.context() as patch:
            patch.setattr(Own, "flush", lambda self, **_: called.append(self))
            async with open_scope():
                await jenny.session.flush()
        async with open_scope():
            await jenny.session.flush()
        assert len(called) == expected
