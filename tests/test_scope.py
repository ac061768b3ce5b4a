"""S1-S7 for sync code: the scope, `open_scope` by hand, and their ends."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import anyio.to_thread
import pytest
from sqlalchemy import Connection, Engine, event, select, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from rope_middleware import (
    NoScopeError,
    RopeError,
    Scope,
    ScopeClosedError,
    SessionJenny,
    current_scope,
    open_scope,
)
from tests.conftest import Data, MakeEngine, checked_out

Jenny = SessionJenny[Session]


@pytest.fixture
def jenny(engine: Engine) -> Jenny:
    """A jenny for the engine."""
    return SessionJenny(sessionmaker(engine))


def use(session: Session) -> Session:
    """Have the session check out a connection."""
    session.execute(text("SELECT 1"))
    return session


def errors_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what our logger has said of level ERROR."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "rope_middleware" and record.levelno >= logging.ERROR
    ]


def in_thread(function: Callable[[], Any]) -> Any:
    """Run `function` in another thread with this context, and return or raise its outcome."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, function).result(60)


def no_scope_here() -> bool:
    """Tell whether no scope is current."""
    try:
        current_scope()
    except NoScopeError:
        return True
    return False


# Each way to open a scope around sync code: a function that calls `body` in a new scope. (The
# sessions of sync code in an async scope are ended in a thread.)


def by_with(body: Callable[[], Any], **options: Any) -> Any:
    with open_scope(**options):
        return body()


def by_decorator(body: Callable[[], Any], **options: Any) -> Any:
    return open_scope(**options)(lambda: body())()


def by_async_with(body: Callable[[], Any], **options: Any) -> Any:
    async def main() -> Any:
        async with open_scope(**options):
            return body()

    return anyio.run(main)


def by_async_with_on_trio(body: Callable[[], Any], **options: Any) -> Any:
    async def main() -> Any:
        async with open_scope(**options):
            return await anyio.to_thread.run_sync(body)

    return anyio.run(main, backend="trio")


def by_async_decorator(body: Callable[[], Any], **options: Any) -> Any:
    @open_scope(**options)
    async def main() -> Any:
        return body()

    return anyio.run(main)


WAYS = [by_with, by_decorator, by_async_with, by_async_with_on_trio, by_async_decorator]
Way = Callable[..., Any]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request: pytest.FixtureRequest) -> Way:
    """A way to open a scope: ``way(body, **options of open_scope)``."""
    return request.param  # type: ignore[no-any-return]


# -- S1, S2 --------------------------------------------------------------------------------------


def test_S1_the_key_is_the_scope_itself() -> None:
    """Two scopes are equal only if they are one object; thirty at a time, then again."""
    with ExitStack() as stack:
        scopes = [stack.enter_context(open_scope("same name")) for _ in range(30)]
        assert len(set(scopes)) == 30
        assert [scopes.index(scope) for scope in scopes] == list(range(30))


def test_S1_the_session_of_a_scope_that_is_gone_never_comes_back(engine: Engine) -> None:
    """A scope at the address of an earlier one has a session of its own."""
    addresses: set[int] = set()
    made: list[int] = []
    plain = sessionmaker(engine)

    def factory() -> Session:
        made.append(1)
        return plain()

    jenny = SessionJenny(factory)
    for _ in range(200):
        with open_scope() as scope:
            addresses.add(id(scope))
            assert use(jenny.session) is jenny.session
        del scope
    assert len(addresses) < 200, "no address came again"
    assert len(made) == 200


def test_S2_inside_a_scope_the_session_is_one(jenny: Jenny, way: Way) -> None:
    """However it was opened, and from another thread: the scope has one session."""

    def body() -> Session:
        session = jenny.session
        assert jenny.session is session
        assert in_thread(lambda: jenny.session) is session
        assert current_scope() is in_thread(current_scope)
        return session

    assert way(body) is not way(body)


def test_S2_a_session_made_in_a_thread_is_closed_with_the_scope(
    jenny: Jenny, engine: Engine, way: Way
) -> None:
    """It is kept in the scope, so whoever opened the scope closes it."""

    def body() -> None:
        in_thread(lambda: use(jenny.session))
        assert checked_out(engine) == 1

    way(body)
    assert checked_out(engine) == 0


def test_S2_the_context_variable_is_undone_in_the_same_block(way: Way) -> None:
    """Before and after the block no scope is current."""
    assert no_scope_here()
    scope = way(current_scope)
    assert isinstance(scope, Scope)
    assert scope.closed
    assert no_scope_here()


def test_S2_a_thread_that_is_started_without_the_context_has_no_scope(jenny: Jenny) -> None:
    """Nothing is thread-local: what is not handed over is not there."""
    with open_scope(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(contextvars.Context().run, no_scope_here).result(30)


# -- S3 ------------------------------------------------------------------------------------------


def test_S3_a_return_gives_everything_back(jenny: Jenny, engine: Engine, way: Way) -> None:
    """The connection is back, the scope closed, and what was not committed is rolled back."""

    def body() -> Scope:
        session = use(jenny.session)
        session.add(Data(count=7))
        session.flush()
        assert checked_out(engine) == 1
        assert not current_scope().closed
        return current_scope()

    scope = way(body)
    assert scope.closed
    assert checked_out(engine) == 0
    with Session(engine) as session:
        assert session.scalars(select(Data.count)).all() == [0]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("way", [by_with, by_decorator])
def test_S3_an_exception_passes_and_everything_is_given_back(
    jenny: Jenny, engine: Engine, way: Way, error: type[BaseException]
) -> None:
    """The very exception of the block comes out."""
    raised = error("mine")

    def body() -> None:
        use(jenny.session)
        raise raised

    with pytest.raises(error) as caught:
        way(body)
    assert caught.value is raised
    assert checked_out(engine) == 0
    assert no_scope_here()


@pytest.mark.parametrize("how", ["close", "del", "throw"])
def test_S3_a_generator_that_is_left_ends_its_scope(jenny: Jenny, engine: Engine, how: str) -> None:
    """GeneratorExit, by close() or by collection, is an end like any other."""
    scopes: list[Scope] = []

    def rows() -> Iterator[int]:
        with open_scope() as scope:
            scopes.append(scope)
            use(jenny.session)
            yield 1
            yield 2

    generator = rows()
    next(generator)
    assert checked_out(engine) == 1
    if how == "close":
        generator.close()
    elif how == "throw":
        with pytest.raises(ValueError):
            generator.throw(ValueError())
    del generator
    gc.collect()
    assert scopes[0].closed
    assert checked_out(engine) == 0
    assert no_scope_here()


def test_S3_a_generator_that_is_collected_in_another_thread_ends_its_scope(
    jenny: Jenny, engine: Engine
) -> None:
    """The scope of that thread stays current there, and its session is not touched."""
    kept: list[Any] = []

    def rows() -> Iterator[Session]:
        with open_scope():
            yield use(jenny.session)

    def collect() -> None:
        with open_scope() as scope:
            mine = use(jenny.session)
            kept.clear()
            assert current_scope() is scope
            assert jenny.session is mine
            assert checked_out(engine) == 1

    def begin() -> None:
        kept.append(rows())
        next(kept[0])

    with ThreadPoolExecutor(1) as pool:
        pool.submit(contextvars.Context().run, begin).result(30)
        assert checked_out(engine) == 1
        pool.submit(contextvars.Context().run, collect).result(30)
    assert checked_out(engine) == 0


class CannotClose(Session):
    """Raises when it is closed; its connection stays out."""

    error: BaseException = RuntimeError("cannot close")

    def close(self) -> None:
        raise self.error


def test_S3_a_close_that_fails_is_logged_and_the_next_session_is_closed(
    make_engine: MakeEngine, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection of the failing one is invalidated, and nothing is raised."""
    engines = [make_engine(pool_size=1) for _ in range(3)]
    jennies = [
        SessionJenny(sessionmaker(engines[0])),
        SessionJenny(sessionmaker(engines[1], class_=CannotClose)),
        SessionJenny(sessionmaker(engines[2])),
    ]

    def body() -> Scope:
        for jenny in jennies:
            use(jenny.session)
        assert [checked_out(engine) for engine in engines] == [1, 1, 1]
        return current_scope()

    scope = way(body)
    assert scope.closed
    assert [checked_out(engine) for engine in engines] == [0, 0, 0]
    assert len(errors_in(caplog)) == 1
    assert "RuntimeError" in errors_in(caplog)[0]
    for engine in engines:
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT 1")) == 1


def test_S3_a_close_that_fails_never_replaces_the_error_of_the_application(
    engine: Engine, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """What the block raised comes out; what closing raised is in the log."""
    jenny = SessionJenny(sessionmaker(engine, class_=CannotClose))

    def body() -> None:
        use(jenny.session)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        way(body)
    assert len(errors_in(caplog)) == 1
    assert checked_out(engine) == 0


def test_S3_a_rollback_that_fails_in_the_driver_invalidates_the_connection(
    jenny: Jenny, engine: Engine, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """`Session.close()` has forgotten its connection by then; the scope has not."""
    broken: list[Any] = []

    def fail(connection: Connection) -> None:
        if not broken:
            broken.append(connection)
            raise RuntimeError("the database is gone")

    def body() -> None:
        use(jenny.session)
        event.listen(engine, "rollback", fail)

    try:
        way(body)
    finally:
        event.remove(engine, "rollback", fail)
    assert broken
    assert len(errors_in(caplog)) == 1
    assert checked_out(engine) == 0


@pytest.mark.parametrize("way", [by_with, by_decorator])
def test_S3_an_interrupt_while_closing_is_raised_when_everything_is_closed(
    make_engine: MakeEngine, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """KeyboardInterrupt is nobody's to swallow; it comes out at the end."""
    engines = [make_engine(), make_engine()]
    interrupted = type("Interrupted", (CannotClose,), {"error": KeyboardInterrupt()})
    first = SessionJenny(sessionmaker(engines[0], class_=interrupted))
    second = SessionJenny(sessionmaker(engines[1]))

    def body() -> None:
        use(first.session)
        use(second.session)

    with pytest.raises(KeyboardInterrupt):
        way(body)
    assert [checked_out(engine) for engine in engines] == [0, 0]
    assert no_scope_here()


def test_S3_a_connection_that_the_application_lent_is_not_taken(engine: Engine, way: Way) -> None:
    """A session bound to the application's own connection leaves it open."""
    with engine.connect() as connection:
        jenny = SessionJenny(sessionmaker(connection))
        way(lambda: use(jenny.session))
        assert not connection.closed
        assert connection.scalar(text("SELECT 1")) == 1


def test_S3_a_removed_session_that_is_used_on_is_closed_with_its_scope(
    jenny: Jenny, engine: Engine, way: Way
) -> None:
    """After `remove()` a captured session still belongs to its scope."""

    def body() -> None:
        session = use(jenny.session)
        jenny.remove()
        assert checked_out(engine) == 0
        use(session)
        use(jenny.session)
        assert checked_out(engine) == 2

    way(body)
    assert checked_out(engine) == 0


# -- S4 ------------------------------------------------------------------------------------------

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
        with pytest.raises(ScopeClosedError, match=r"'the job'.*with open_scope") as caught:
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


def test_S4_a_thread_that_outlived_its_scope_is_told_so(jenny: Jenny, engine: Engine) -> None:
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
                with pytest.raises(ScopeClosedError, match=r"'the job'.*with open_scope\(\):"):
                    enter()
        with open_scope("cure"):
            use(jenny.session)
        assert checked_out(engine) == 0

    with ThreadPoolExecutor(1) as pool:
        with open_scope("the job"):
            future = pool.submit(contextvars.copy_context().run, late)
            assert before.wait(30)
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


def test_S4_a_call_under_way_when_the_scope_ends_leaves_nothing_behind(
    make_engine: MakeEngine,
) -> None:
    """A thread that waits for its connection while the scope ends may fail; nothing stays out."""
    engine = make_engine(pool_size=1)
    jenny = SessionJenny(sessionmaker(engine))
    waiting = threading.Event()

    def late() -> None:
        session = jenny.session
        waiting.set()
        with suppress(ScopeClosedError):
            use(session)

    with ThreadPoolExecutor(1) as pool:
        with engine.connect():
            with open_scope():
                future = pool.submit(contextvars.copy_context().run, late)
                assert waiting.wait(30)
        future.result(60)
    assert checked_out(engine) == 0


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


# -- S5 ------------------------------------------------------------------------------------------


def test_S5_info_is_empty_at_the_start_and_the_users_own(way: Way) -> None:
    """A dict that is the scope's, also afterwards."""

    def body() -> Scope:
        scope = current_scope()
        assert scope.info == {}
        scope.info["key"] = 1
        assert in_thread(current_scope).info == {"key": 1}
        return scope

    scope = way(body)
    assert scope.info == {"key": 1}
    with open_scope() as other:
        assert other.info == {}


def test_S5_on_close_runs_once_newest_first_when_the_sessions_are_closed(
    jenny: Jenny, engine: Engine, way: Way
) -> None:
    """When the functions run nothing of the scope is open any more."""
    calls: list[Any] = []

    def body() -> Scope:
        scope = current_scope()
        session = use(jenny.session)

        def closed() -> None:
            calls.append((checked_out(engine), session.in_transaction()))

        scope.on_close(partial(calls.append, "first"))
        scope.on_close(closed)
        scope.on_close(lambda: calls.append("last"))
        scope.on_close(partial(calls.append, "twice"))
        scope.on_close(partial(calls.append, "twice"))
        assert calls == []
        return scope

    assert way(body).closed
    assert calls == ["twice", "twice", "last", (0, False), "first"]


def test_S5_on_close_runs_in_a_scope_that_touched_no_database(way: Way) -> None:
    """A scope without any session has an end, too."""
    calls: list[str] = []
    way(lambda: current_scope().on_close(lambda: calls.append("closed")))
    assert calls == ["closed"]


def test_S5_on_close_runs_after_an_error(jenny: Jenny, way: Way) -> None:
    """Also after a failed block, and before its error comes out."""
    calls: list[str] = []

    def body() -> None:
        current_scope().on_close(lambda: calls.append("closed"))
        raise ValueError

    with pytest.raises(ValueError):
        way(body)
    assert calls == ["closed"]


def test_S5_an_on_close_that_fails_is_logged_and_the_others_run(
    way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error goes nowhere else."""
    calls: list[str] = []

    def fail() -> None:
        raise ValueError("mine")

    def body() -> Scope:
        scope = current_scope()
        scope.on_close(lambda: calls.append("first"))
        scope.on_close(fail)
        scope.on_close(lambda: calls.append("last"))
        return scope

    scope = way(body, name="the job")
    assert scope.closed
    assert calls == ["last", "first"]
    assert len(errors_in(caplog)) == 1
    assert "fail" in errors_in(caplog)[0]
    assert "'the job'" in errors_in(caplog)[0]


def test_S5_an_on_close_that_fails_never_replaces_the_error_of_the_application(way: Way) -> None:
    """What the block raised comes out."""

    def fail() -> None:
        raise RuntimeError("not mine")

    def body() -> None:
        current_scope().on_close(fail)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        way(body)


def test_S5_in_on_close_the_scope_is_over(jenny: Jenny, way: Way) -> None:
    """It is the current one still, so its session is refused; a new scope is the way."""
    outcomes: list[object] = []

    def after() -> None:
        with pytest.raises(ScopeClosedError):
            _ = jenny.session
        with open_scope() as inner:
            outcomes.append(use(jenny.session))
        outcomes.append(inner.closed)

    way(lambda: current_scope().on_close(after))
    assert len(outcomes) == 2
    assert outcomes[1] is True


def test_S5_async_functions_are_refused_in_a_sync_scope() -> None:
    """Nothing could await them; the error says so at registration."""

    async def fn() -> None:
        raise AssertionError("never called")

    class Callable_:  # noqa: N801
        async def __call__(self) -> None:
            raise AssertionError("never called")

    with open_scope("the job") as scope:
        for bad in (fn, partial(fn), Callable_(), Callable_().__call__):
            with pytest.raises(RopeError, match="'the job' is a sync one"):
                scope.on_close(bad)


def test_S5_async_functions_run_in_an_async_scope() -> None:
    """Sync and async ones in one order; a lambda around an async one is awaited."""
    calls: list[str] = []

    async def fn(name: str) -> None:
        await asyncio.sleep(0)
        calls.append(name)

    async def main() -> None:
        async with open_scope() as scope:
            scope.on_close(partial(fn, "first"))
            scope.on_close(lambda: calls.append("second"))
            scope.on_close(lambda: fn("third"))

    asyncio.run(main())
    assert calls == ["third", "second", "first"]


@pytest.mark.parametrize("bad", [None, 1, "name"])
def test_S5_what_is_not_callable_is_refused(bad: Any) -> None:
    """A TypeError at registration, not a log line at the end."""
    with open_scope(commit_on_success=True) as scope:
        with pytest.raises(TypeError, match="on_close"):
            scope.on_close(bad)
        with pytest.raises(TypeError, match="on_commit"):
            scope.on_commit(bad)


def test_S5_after_the_end_nothing_can_be_registered(way: Way) -> None:
    """It would never run, so it is refused."""
    scope = way(current_scope)
    with pytest.raises(ScopeClosedError):
        scope.on_close(print)


def test_S5_on_close_functions_of_a_scope_are_registered_from_threads(way: Way) -> None:
    """Each of many threads' functions runs, once."""
    calls: list[int] = []

    def body() -> None:
        scope = current_scope()
        with ThreadPoolExecutor(8) as pool:
            for number in range(200):
                pool.submit(scope.on_close, partial(calls.append, number))

    way(body)
    assert sorted(calls) == list(range(200))


# -- S6, S7 --------------------------------------------------------------------------------------


def test_S6_an_inner_scope_has_sessions_of_its_own(jenny: Jenny, engine: Engine, way: Way) -> None:
    """The outer one is untouched, and current again afterwards."""

    def body() -> None:
        outer, session = current_scope(), use(jenny.session)
        row = session.get(Data, 1)
        assert row is not None
        row.count = 5
        with open_scope() as inner:
            assert current_scope() is inner
            assert inner is not outer
            assert use(jenny.session) is not session
            assert checked_out(engine) == 2
        assert inner.closed
        assert not outer.closed
        assert checked_out(engine) == 1
        assert current_scope() is outer
        assert jenny.session is session
        assert row in session.dirty
        with pytest.raises(ValueError), open_scope():
            raise ValueError
        assert current_scope() is outer
        session.commit()

    way(body)
    assert checked_out(engine) == 0
    with Session(engine) as session:
        assert session.scalar(select(Data.count)) == 5


def test_S6_scopes_nest_as_deep_as_one_likes(jenny: Jenny) -> None:
    """Each level has its own session, and each comes back."""
    seen: list[Session] = []

    def level(depth: int) -> None:
        with open_scope() as scope:
            session = jenny.session
            seen.append(session)
            if depth:
                level(depth - 1)
            assert current_scope() is scope
            assert jenny.session is session

    level(30)
    assert len(set(seen)) == 31


def test_S6_an_outer_session_can_be_used_in_an_inner_scope(jenny: Jenny, engine: Engine) -> None:
    """A captured session belongs to the scope that made it, whichever is current."""
    with open_scope():
        session = jenny.session
        with open_scope():
            use(session)
        assert checked_out(engine) == 1
        use(session)
    assert checked_out(engine) == 0


def test_S6_the_decorator_opens_a_scope_for_each_call(jenny: Jenny, engine: Engine) -> None:
    """Calls within calls, and calls of several threads, have a scope each."""
    scopes: list[Scope] = []

    @open_scope()
    def work(depth: int) -> Session:
        """Has a docstring."""
        scopes.append(current_scope())
        session = use(jenny.session)
        if depth:
            assert work(depth - 1) is not session
        assert jenny.session is session
        return session

    work(2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [0] * 8))
    assert len(set(scopes)) == 11
    assert all(scope.closed for scope in scopes)
    assert scopes[0].name.endswith("work")
    assert work.__doc__ == "Has a docstring."
    assert work.__name__ == "work"
    assert checked_out(engine) == 0


def test_S6_the_decorator_works_on_methods(jenny: Jenny) -> None:
    """Plain, class and static methods, and callables that are no functions."""

    class Service:
        @open_scope()
        def method(self) -> tuple[Any, Scope]:
            return self, current_scope()

        @classmethod
        @open_scope("named")
        def class_method(cls) -> tuple[Any, Scope]:
            return cls, current_scope()

        @staticmethod
        @open_scope()
        def static_method() -> Scope:
            return current_scope()

    service = Service()
    assert service.method()[0] is service
    assert service.method()[1].closed
    assert service.class_method()[0] is Service
    assert service.class_method()[1].name == "named"
    assert service.static_method().closed
    assert open_scope()(partial(current_scope))().closed


def test_S6_generator_functions_are_refused(jenny: Jenny) -> None:
    """Their body would run after the scope's end; the error names the way that works."""

    def rows() -> Iterator[int]:
        yield 1

    async def async_rows() -> Any:
        yield 1

    for function in (rows, async_rows):
        with pytest.raises(TypeError, match='Use "with open_scope'):
            open_scope()(function)


def test_S6_the_decorator_without_its_brackets_is_refused() -> None:
    """`@open_scope` would take the function for its name."""
    with pytest.raises(TypeError, match=r"@open_scope\(\)"):

        @open_scope  # type: ignore[arg-type]
        def work() -> None:
            pass


def test_S6_one_open_scope_object_can_be_entered_again(jenny: Jenny) -> None:
    """One after the other, and within itself: each time a new scope."""
    again = open_scope("again")
    with again as first, again as second:
        assert first is not second
        assert current_scope() is second
    assert no_scope_here()
    with again as third:
        assert third.name == "again"
        assert third not in (first, second)
    assert first.closed
    assert second.closed


def test_S6_one_open_scope_object_in_several_threads(jenny: Jenny, engine: Engine) -> None:
    """Threads that share the object leave the scopes that they entered."""
    shared = open_scope("shared")
    entered, left = threading.Barrier(2, timeout=30), threading.Event()

    def first() -> None:
        with shared as scope:
            session = use(jenny.session)
            entered.wait()
            assert left.wait(30)
            assert not scope.closed
            assert jenny.session is session
            assert session.in_transaction()

    def second() -> None:
        entered.wait()
        with shared as scope:
            use(jenny.session)
        assert scope.closed
        left.set()

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(contextvars.Context().run, work) for work in (first, second)]
        try:
            futures[1].result(60)
        finally:
            left.set()
        futures[0].result(60)
    assert checked_out(engine) == 0


def test_S6_the_first_of_two_threads_leaves_first(jenny: Jenny, engine: Engine) -> None:
    """Scopes that are left in the order in which they were entered, on one shared object."""
    shared = open_scope("shared")
    inside, left = threading.Event(), threading.Event()
    scopes: dict[str, Scope] = {}

    def first() -> None:
        with shared as scope:
            scopes["first"] = scope
            use(jenny.session)
            assert inside.wait(30)

    def second() -> None:
        with shared as scope:
            scopes["second"] = scope
            session = use(jenny.session)
            inside.set()
            assert left.wait(30)
            assert scopes["first"].closed
            assert not scope.closed
            assert jenny.session is session

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(contextvars.Context().run, first)
        two = pool.submit(contextvars.Context().run, second)
        try:
            one.result(60)
        finally:
            left.set()
        two.result(60)
    assert checked_out(engine) == 0


def test_S6_names(way: Way) -> None:
    """The name given, or one that says where it comes from; it is in the repr and the errors."""
    assert way(lambda: current_scope().name, name="import") == "import"
    scope = way(current_scope, name="import")
    assert repr(scope) == "<Scope 'import' closed>"
    with open_scope() as scope:
        assert scope.name == "open_scope()"
        assert repr(scope) == "<Scope 'open_scope()' open>"


def test_S7_several_jennies_and_databases_side_by_side(make_engine: MakeEngine, way: Way) -> None:
    """Each jenny has a session of its own in the scope, on its own database."""
    engines = [make_engine(), make_engine()]
    jennies = [SessionJenny(sessionmaker(engine)) for engine in engines]
    again = SessionJenny(jennies[0].session_factory)

    def body() -> None:
        sessions = [use(jenny.session) for jenny in (*jennies, again)]
        assert len(set(sessions)) == 3
        assert [checked_out(engine) for engine in engines] == [2, 1]
        jennies[0].remove()
        assert [checked_out(engine) for engine in engines] == [1, 1]
        assert jennies[1].session is sessions[1]
        assert again.session is sessions[2]

    way(body)
    assert [checked_out(engine) for engine in engines] == [0, 0]


def test_S7_outside_of_any_scope_there_is_no_current_one() -> None:
    """`current_scope()` raises NoScopeError, a LookupError that names both cures."""
    with pytest.raises(NoScopeError, match=r"RopeMiddleware.*open_scope") as caught:
        current_scope()
    assert isinstance(caught.value, LookupError)
    assert isinstance(caught.value, RopeError)


def test_S7_threads_at_work_in_scopes_of_their_own(make_engine: MakeEngine) -> None:
    """A thousand scopes in eight threads: every increment is there, nothing is left out."""
    engine = make_engine(pool_size=2, writer=True)
    jenny = SessionJenny(sessionmaker(engine))

    def work(_: int) -> None:
        with open_scope():
            row = jenny.session.get(Data, 1)
            assert row is not None
            row.count += 1
            jenny.session.commit()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(400)))
    assert checked_out(engine) == 0
    with Session(engine) as session:
        assert session.scalar(select(Data.count)) == 400
