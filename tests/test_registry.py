"""The registry between the scope and its sessions: SQLAlchemy's ScopedRegistry interface."""

from __future__ import annotations

import contextvars
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine, event, select, text
from sqlalchemy.exc import IllegalStateChangeError
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util import ScopedRegistry

from rope_middleware import (
    NoScopeError,
    RopeMiddleware,
    ScopeClosedError,
    SessionJenny,
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


# -- the interface -------------------------------------------------------------------------------


def test_J1_it_is_a_scoped_registry(jenny: Jenny) -> None:
    """With every public name of SQLAlchemy's."""
    registry = jenny.registry
    assert isinstance(registry, ScopedRegistry)
    names = {name for name in dir(ScopedRegistry) if not name.startswith("_")}
    plain: Any = ScopedRegistry(Session, threading.get_ident)
    for name in names - {"registry"}:  # the dictionary of SQLAlchemy's own implementation
        assert callable(getattr(registry, name)) == callable(getattr(plain, name)), name


def test_J1_has_tells_without_making_a_session(jenny: Jenny) -> None:
    """It is true from the first use to the removal, in each scope for itself."""
    registry = jenny.registry
    with open_scope():
        assert registry.has() is False
        session = registry()
        assert registry.has() is True
        with open_scope():
            assert registry.has() is False
        assert registry() is session
        jenny.remove()
        assert registry.has() is False


def test_J1_a_session_that_is_set_is_the_scopes(jenny: Jenny, engine: Engine) -> None:
    """It is closed with the scope, as the one that it replaces is."""
    with open_scope():
        first = use(jenny.session)
        mine = Session(engine)
        jenny.registry.set(mine)
        jenny.registry.set(mine)
        assert jenny.session is mine
        use(mine)
        use(first)
        assert checked_out(engine) == 2
    assert checked_out(engine) == 0
    for session in (first, mine):
        with pytest.raises(ScopeClosedError):
            use(session)


def test_J1_a_session_with_an_open_transaction_can_be_set(jenny: Jenny, engine: Engine) -> None:
    """The connection that it has already goes back with the scope."""
    mine = use(Session(engine))
    with open_scope():
        jenny.registry.set(mine)
        assert checked_out(engine) == 1
    assert checked_out(engine) == 0


def test_J1_a_session_that_is_cleared_is_not_closed_at_once(jenny: Jenny, engine: Engine) -> None:
    """As in SQLAlchemy; but what is used on belongs to its scope, and ends with it."""
    with open_scope():
        session = use(jenny.session)
        jenny.registry.clear()
        jenny.registry.clear()
        assert jenny.registry.has() is False
        assert session.in_transaction()
        assert jenny.session is not session
        session.rollback()
        use(session)
    assert checked_out(engine) == 0


def test_J1_a_call_with_arguments_makes_the_session_with_them(jenny: Jenny) -> None:
    """`jenny(autoflush=False)` is as in SQLAlchemy, and the session is the scope's."""
    with open_scope():
        session = jenny(autoflush=False)
        assert session.autoflush is False
        assert jenny.session is session
    with pytest.raises(ScopeClosedError):
        use(session)


# -- first use -----------------------------------------------------------------------------------


def test_J2_a_session_is_made_on_first_use(engine: Engine) -> None:
    """A scope that does not touch the jenny makes none."""
    made: list[Session] = []

    def factory() -> Session:
        made.append(Session(engine))
        return made[-1]

    jenny = SessionJenny(factory)
    with open_scope():
        jenny.remove()
        assert jenny.registry.has() is False
    assert made == []
    with open_scope():
        assert jenny.session is jenny.session
        assert len(made) == 1


def test_J6_threads_that_race_for_the_first_use_get_one_session(engine: Engine) -> None:
    """Whoever comes second gets the first one's, and its own is closed before it is seen."""
    barrier = threading.Barrier(4, timeout=30)
    made: list[Session] = []
    closed: list[Session] = []

    class Closing(Session):
        def close(self) -> None:
            closed.append(self)
            super().close()

    def factory() -> Session:
        session = Closing(engine)
        barrier.wait()  # all of them are in here before the first one gets out
        made.append(session)
        return session

    jenny = SessionJenny(factory)

    def work() -> Session:
        return jenny.session

    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            made.clear()
            closed.clear()
            with open_scope():
                futures = [pool.submit(contextvars.copy_context().run, work) for _ in range(4)]
                sessions = {future.result(60) for future in futures}
                assert len(sessions) == 1
                assert len(made) == 4
                assert set(closed) == set(made) - sessions
                assert {jenny.session} == sessions
            assert set(closed) == set(made)


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


def test_J6_the_race_without_a_barrier(jenny: Jenny) -> None:
    """Many scopes, each with threads that come as they come."""
    with ThreadPoolExecutor(4) as pool:
        for _ in range(100):
            with open_scope():
                futures = [
                    pool.submit(contextvars.copy_context().run, lambda: jenny.session)
                    for _ in range(4)
                ]
                assert len({future.result(30) for future in futures}) == 1


def test_J3_remove_closes_and_the_next_use_makes_a_new_one(jenny: Jenny, engine: Engine) -> None:
    """Inside the same scope; the removed one may be used on and still ends with the scope."""
    with open_scope() as scope:
        first = use(jenny.session)
        jenny.remove()
        assert checked_out(engine) == 0
        jenny.remove()
        second = use(jenny.session)
        assert second is not first
        use(first)
        assert checked_out(engine) == 2
        assert not scope.closed
    assert checked_out(engine) == 0
    with pytest.raises(ScopeClosedError):
        use(first)


def test_J3_remove_after_the_end_of_the_scope_is_silent(jenny: Jenny) -> None:
    """There is nothing to remove, and that is no error: clean-up code may come late."""
    with open_scope():
        use(jenny.session)
        context = contextvars.copy_context()
    context.run(jenny.remove)
    assert context.run(jenny.registry.has) is False


# -- what factories make -------------------------------------------------------------------------


def test_S3_a_session_that_the_factory_has_begun_is_given_back(engine: Engine) -> None:
    """A transaction that was open before the scope knew the session ends with the scope."""
    jenny = SessionJenny(lambda: use(Session(engine)))
    with open_scope():
        assert jenny.session.in_transaction()
        assert checked_out(engine) == 1
    assert checked_out(engine) == 0


def test_S3_a_begun_session_whose_close_fails_is_given_back(engine: Engine) -> None:
    """Also its connection is known to the scope."""

    class CannotClose(Session):
        def close(self) -> None:
            raise RuntimeError("cannot close")

    jenny = SessionJenny(lambda: use(CannotClose(engine)))
    with open_scope():
        session = jenny.session
        assert session.in_transaction()
    out = checked_out(engine)
    Session.close(session)
    assert out == 0


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


def test_S3_nested_transactions_are_given_back(make_engine: MakeEngine) -> None:
    """Savepoints that are open at the end go with the rest."""
    engine = make_engine(writer=True)
    jenny = SessionJenny(sessionmaker(engine))
    with open_scope():
        session = jenny.session
        with session.begin_nested():
            session.add(Data(count=1))
        session.begin_nested()
        session.add(Data(count=2))
        session.flush()
    assert checked_out(engine) == 0
    with Session(engine) as session:
        assert session.scalars(select(Data.count)).all() == [0]


def test_S3_a_session_on_several_databases_gives_all_back(make_engine: MakeEngine) -> None:
    """Every connection of one session goes back to its own pool."""
    engines = [make_engine(), make_engine()]
    jenny = SessionJenny(sessionmaker())
    with open_scope():
        for engine in engines:
            jenny.session.execute(text("SELECT 1"), bind_arguments={"bind": engine})
        assert [checked_out(engine) for engine in engines] == [1, 1]
    assert [checked_out(engine) for engine in engines] == [0, 0]


def test_S3_a_connection_that_was_invalidated_is_no_trouble(jenny: Jenny, engine: Engine) -> None:
    """The application may have given up its connection itself."""
    with open_scope():
        jenny.session.connection().invalidate()
    with open_scope():
        use(jenny.session)
        jenny.session.invalidate()
    assert checked_out(engine) == 0


@pytest.mark.parametrize("phase", ["close", "rollback", "commit"])
def test_S3_a_session_event_that_raises_leaves_nothing_out(
    make_engine: MakeEngine, phase: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Listeners of the application may fail at the end; the connection is back all the same."""
    engine = make_engine(pool_size=1)
    jenny = SessionJenny(sessionmaker(engine))

    def fail(*_: object) -> None:
        raise RuntimeError("mine")

    names = {
        "close": "after_transaction_end",
        "rollback": "after_rollback",
        "commit": "before_commit",
    }
    with open_scope():
        session = use(jenny.session)
        event.listen(session, names[phase], fail)
        if phase == "commit":
            with pytest.raises(RuntimeError):
                session.commit()
    assert checked_out(engine) == 0
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1


def test_S4_a_session_in_use_by_another_thread_when_the_scope_ends(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
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


# -- strict --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "do",
    [
        lambda jenny: jenny.session,
        lambda jenny: jenny(),
        lambda jenny: jenny.registry(),
        lambda jenny: jenny.registry.set(Session()),
        lambda jenny: jenny.query(Data),
        lambda jenny: jenny(autoflush=False),
    ],
    ids=["session", "call", "registry", "set", "query", "call with arguments"],
)
def test_J4_strict_refuses_outside_of_scopes(engine: Engine, do: Callable[[Jenny], object]) -> None:
    """The error names the middleware and `open_scope`; inside a scope all is well."""
    jenny = SessionJenny(sessionmaker(engine), strict=True)
    for _ in range(2):
        with pytest.raises(NoScopeError, match=r"RopeMiddleware.*open_scope"):
            do(jenny)
    jenny.remove()
    jenny.registry.clear()
    assert jenny.registry.has() is False
    with open_scope():
        do(jenny)


# -- registries= ---------------------------------------------------------------------------------


def asgi_app(scope: Any, receive: Any, send: Any) -> Any:
    raise AssertionError("never called")


@pytest.mark.parametrize("bad", [[object()], ["Session"], [None], [Session]])
def test_registries_that_are_no_scoped_sessions_are_refused(bad: Any) -> None:
    """At once, and by a TypeError that says what is asked for."""
    with pytest.raises(TypeError, match="scoped_session"):
        RopeMiddleware(asgi_app, registries=bad)


def test_registries_is_a_list(jenny: Jenny) -> None:
    """A single one that is not in a list is refused in words."""
    with pytest.raises(TypeError, match="list"):
        RopeMiddleware(asgi_app, registries=jenny)
