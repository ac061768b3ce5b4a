"""J2-J4, J6: when sessions are made, removed and replaced, outside of scopes, too."""

from __future__ import annotations

import contextvars
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from rope_middleware import (
    NoScopeError,
    RopeError,
    ScopeClosedError,
    SessionJenny,
    current_scope,
    holders,
    open_scope,
)
from rope_middleware.scope.scope import session_of
from rope_middleware.session import registry
from rope_middleware.session.tie import Tie, tie_of
from tests.kit.engines import MakeEngine
from tests.kit.leaks import checked_out
from tests.kit.models import Data
from tests.kit.ropes import Seen, is_over, ropes_in, variables
from tests.kit.sessions import Around, Jenny, touch, use
from tests.kit.ways import Way
from tests.kit.wsgi import Probe, Wrap, make_environ


def test_J2_a_session_is_made_on_first_use(engine: Engine, way: Way) -> None:
    """A scope that does not touch the jenny makes none."""
    made: list[Session] = []

    def factory() -> Session:
        made.append(Session(engine))
        return made[-1]

    jenny = SessionJenny(factory)
    way(jenny.remove)
    assert way(jenny.registry.has) is False
    assert made == []
    assert way(lambda: touch(jenny) is touch(jenny))
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


def test_J3_remove_closes_and_the_next_use_makes_a_new_one(
    jenny: Jenny, engine: Engine, way: Way
) -> None:
    """Without what was not committed; the removed one may be used on, and ends with the scope."""

    def body() -> Session:
        first = jenny.session
        first.add(Data(count=3))
        first.flush()
        assert checked_out(engine) == 1
        jenny.remove()
        assert checked_out(engine) == 0
        jenny.remove()
        second = jenny.session
        assert second is not first
        assert second.scalars(select(Data.count)).all() == [0]
        use(first)
        assert checked_out(engine) == 2
        second.close()  # the user's own close() breaks nothing later
        assert use(jenny.session) is second
        assert not current_scope().closed
        return first

    first = way(body)
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


def test_J2_what_only_looks_at_the_jenny_makes_no_session(jenny: Jenny) -> None:
    """Methods that need none make none."""
    with open_scope():
        assert jenny.session_factory is not None
        assert jenny.registry.has() is False
        jenny.query_property()
        jenny.remove()
        assert jenny.rope is not None
        assert jenny.registry.has() is False


def test_J4_with_a_scopefunc_it_is_keyed_as_sqlalchemy_does(engine: Engine) -> None:
    """Outside of scopes the key tells whose session it is; nothing ends it but `remove()`."""
    key = "a"
    jenny = SessionJenny(sessionmaker(engine), scopefunc=lambda: key)
    plain = scoped_session(sessionmaker(engine), scopefunc=lambda: key)
    a, plain_a = use(jenny.session), use(plain())
    key = "b"
    assert jenny.registry.has() is plain.registry.has() is False
    b = use(jenny.session)
    assert b is not a
    assert plain() is not plain_a
    jenny.remove()
    plain.remove()
    assert not b.in_transaction()
    key = "a"
    assert jenny.session is a
    assert plain() is plain_a
    assert a.in_transaction()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(contextvars.Context().run, lambda: jenny.session).result(30) is a
    jenny.remove()
    plain.remove()
    assert checked_out(engine) == 0


def test_J4_inside_a_scope_the_scopefunc_is_not_asked(engine: Engine) -> None:
    """The scope's session is another one, and the key's comes back after it."""

    def scopefunc() -> str:
        asked.append(1)
        return "key"

    asked: list[int] = []
    jenny = SessionJenny(sessionmaker(engine), scopefunc)
    keyed = use(jenny.session)
    asked.clear()
    with open_scope():
        assert jenny.session is not keyed
        use(jenny.session)
        jenny.remove()
    assert asked == []
    assert jenny.session is keyed
    assert keyed.in_transaction()
    jenny.remove()
    assert checked_out(engine) == 0


def test_J4_a_scopefunc_that_raises(engine: Engine) -> None:
    """Its error comes out; inside a scope there is none."""

    def scopefunc() -> object:
        raise KeyError("no request")

    jenny = SessionJenny(sessionmaker(engine), scopefunc)
    with pytest.raises(KeyError, match="no request"):
        _ = jenny.session
    with open_scope():
        use(jenny.session)


def test_J4_current_scope_as_the_scopefunc(engine: Engine) -> None:
    """It raises NoScopeError outside, as strict does."""
    jenny = SessionJenny(sessionmaker(engine), scopefunc=current_scope)
    with pytest.raises(NoScopeError):
        _ = jenny.session
    with open_scope():
        use(jenny.session)


def test_J4_strict_wins_over_the_scopefunc(engine: Engine) -> None:
    """Outside of scopes nothing may happen, whatever the key."""
    jenny = SessionJenny(sessionmaker(engine), threading.get_ident, strict=True)
    with pytest.raises(NoScopeError, match=r"RopeMiddleware.*open_scope"):
        _ = jenny.session
    jenny.remove()
    with open_scope():
        use(jenny.session)


def test_J4_strict_and_scopefunc_are_as_documented() -> None:
    """`scopefunc` may be given by place as in SQLAlchemy, `strict` and `replicas` by name only."""
    parameters = inspect.signature(SessionJenny).parameters
    assert list(parameters) == ["session_factory", "scopefunc", "strict", "replicas"]
    for name in ("strict", "replicas"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    with pytest.raises(TypeError):
        SessionJenny(sessionmaker(), None, True)  # type: ignore[misc]


class Flaky:
    """A session factory that raises at first."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.calls = 0

    def __call__(self, **kw: Any) -> Session:
        self.calls += 1
        if self.calls < 3:
            raise OSError(f"call {self.calls}")
        return Session(self.engine, **kw)


def test_a_factory_that_raises_is_asked_again(engine: Engine, around: Around) -> None:
    """Its error comes out as it is, and nothing is kept of the try."""
    jenny = SessionJenny(Flaky(engine))
    with around():
        with pytest.raises(OSError, match="call 1"):
            _ = jenny.session
        assert jenny.registry.has() is False
        with pytest.raises(OSError, match="call 2"):
            jenny(autoflush=False)
        assert jenny.registry.has() is False
        use(jenny.session)
        jenny.remove()
    assert checked_out(engine) == 0


@pytest.mark.parametrize(
    "made",
    [None, object(), Session, "session", sessionmaker()],
    ids=["None", "object", "class", "str", "sessionmaker"],
)
@pytest.mark.parametrize("kw", [{}, {"autoflush": False}], ids=["", "with arguments"])
@pytest.mark.parametrize("scopefunc", [None, threading.get_ident])
def test_a_factory_that_returns_no_session_is_told_so(
    around: Around, made: object, kw: dict[str, Any], scopefunc: Any
) -> None:
    """A RopeError names the factory, what it gave and what it should."""

    def my_factory(**_: object) -> Any:
        return made

    jenny = SessionJenny(my_factory, scopefunc)
    with around():
        for _ in range(2):
            with pytest.raises(RopeError, match=r"my_factory.*must return.*Session"):
                jenny(**kw)
            assert jenny.registry.has() is False


def test_a_factory_of_async_sessions_is_told_so(around: Around) -> None:
    """An AsyncSession in a SessionJenny could not be closed."""
    made: list[AsyncSession] = []

    def my_factory() -> Any:
        made.append(async_sessionmaker()())
        return made[-1]

    jenny = SessionJenny(my_factory)
    with around(), pytest.raises(RopeError, match="AsyncSession"):
        _ = jenny.session


@pytest.mark.parametrize("bad", [None, "factory", 3])
def test_a_factory_must_be_callable(bad: Any) -> None:
    """At the start, not at the first request."""
    with pytest.raises(TypeError, match="session_factory must be callable"):
        SessionJenny(bad)


@pytest.mark.parametrize("bad", ["scope", 3])
def test_a_scopefunc_must_be_callable(bad: Any) -> None:
    """At the start, too."""
    with pytest.raises(TypeError, match="scopefunc must be a callable"):
        SessionJenny(sessionmaker(), bad)


def test_any_callable_makes_sessions(engine: Engine, around: Around) -> None:
    """A class, a function, a partial: not only a sessionmaker."""

    class MySession(Session):
        def __init__(self, **kw: Any) -> None:
            super().__init__(engine, **kw)

    for each in (MySession, lambda **kw: MySession(**kw)):
        jenny = SessionJenny(each)
        with around():
            assert isinstance(use(jenny.session), MySession)
            jenny.remove()
    assert checked_out(engine) == 0


def test_a_factory_that_uses_the_jenny_of_another_database(make_engine: MakeEngine) -> None:
    """The database for a tenant may be looked up in another one."""
    engines = [make_engine(), make_engine()]
    directory = SessionJenny(sessionmaker(engines[0]))

    def for_tenant() -> Session:
        assert directory.session.scalar(select(Data.count)) == 0
        return Session(engines[1])

    jenny = SessionJenny(for_tenant)
    with open_scope():
        use(jenny.session)
        assert [checked_out(engine) for engine in engines] == [1, 1]
    assert [checked_out(engine) for engine in engines] == [0, 0]


def test_J4_with_a_scopefunc_or_strict_there_are_no_ropes(engine: Engine) -> None:
    """The session belongs to the key; strict refuses the rope's names as it refuses `session`."""
    keyed = SessionJenny(sessionmaker(engine, class_=Seen), lambda: "key")

    def view() -> Session:
        keyed.set_rope()
        assert keyed.rope.session is keyed.session
        assert ropes_in({k: v for k, v in variables().items() if k != "rope"}) == []
        return use(keyed.session)

    session = view()
    assert not is_over(session)
    assert keyed.session is session
    keyed.rope.remove()
    assert is_over(session)

    strict = SessionJenny(sessionmaker(engine), strict=True)
    with pytest.raises(NoScopeError, match="open_scope"):
        _ = strict.rope
    with pytest.raises(NoScopeError, match="open_scope"):
        strict.set_rope()


def test_J4_a_strict_jenny_works_in_a_request_and_not_between_chunks(
    wrap: Wrap, engine: Engine
) -> None:
    """The server's thread is outside of the scope between chunks, as W2 says."""
    jenny = SessionJenny(sessionmaker(engine), strict=True)
    probe = Probe(jenny)
    result = wrap(probe)(make_environ(), lambda *args: print)
    with pytest.raises(NoScopeError, match="RopeMiddleware"):
        _ = jenny.session
    assert b"".join(result) == b"123"
    with pytest.raises(NoScopeError, match="open_scope"):
        _ = jenny.session
    result.close()
    assert probe.scope.closed


class Made(Session):
    """Notes what it was made with, and takes an argument of its own."""

    def __init__(self, bind: Any = None, *, tenant: str = "", **kw: Any) -> None:
        self.made_with = {"bind": bind, "tenant": tenant, **kw}
        kw.pop("autoflush")  # it is this session's own dictionary
        super().__init__(bind, **kw)


class Other(Made):
    pass


class Counting(sessionmaker[Any]):
    """A sessionmaker whose call does something else."""

    def __call__(self, **local_kw: Any) -> Any:
        return super().__call__(tenant="called", **local_kw)


def _plain(engine: Engine) -> Any:
    return sessionmaker(engine, class_=Made)


def _with_info(engine: Engine) -> Any:
    return sessionmaker(engine, class_=Made, info={"a": 1}, tenant="x", expire_on_commit=False)


def _configured(engine: Engine) -> Any:
    maker = sessionmaker(class_=Made)
    maker.configure(bind=engine, tenant="later", info={"b": 2})
    return maker


def _with_another_class(engine: Engine) -> Any:
    maker: Any = sessionmaker(engine, class_=Made)
    maker.class_ = Other
    return maker


def _with_a_function(engine: Engine) -> Any:
    maker: Any = sessionmaker(engine, class_=Made)
    maker.class_ = lambda **kw: Other(tenant="by a function", **kw)
    return maker


def _subclass(engine: Engine) -> Any:
    return Counting(engine, class_=Made)


@pytest.mark.parametrize(
    "make",
    [_plain, _with_info, _configured, _with_another_class, _with_a_function, _subclass],
)
def test_J1_a_sessionmaker_makes_what_it_makes_when_it_is_called(
    engine: Engine, make: Callable[[Engine], Any]
) -> None:
    """The jenny saves the call, in each request, and none of what the call does."""
    maker = make(engine)
    by_call = maker()
    jenny: SessionJenny[Any] = SessionJenny(maker)
    for _ in range(2):  # nothing of the maker's is used up
        with open_scope():
            session = jenny.session
            assert type(session) is type(by_call)
            assert session.made_with == by_call.made_with
            assert session.info == by_call.info
            assert session.info is not maker.kw.get("info")
    maker.configure(expire_on_commit=False)  # later
    with open_scope():
        assert jenny.session.made_with == maker().made_with
        assert not jenny.session.expire_on_commit


def test_J1_a_sessionmakers_class_may_make_something_else(engine: Engine) -> None:
    """At any time, and not only at first: it is kept and closed like what any factory makes."""
    mocks = [Mock(spec=["close"]) for _ in range(2)]
    makes: list[Any] = [None, mocks[0], None, mocks[1], None]

    class Odd(Session):
        def __new__(cls, *args: Any, **kw: Any) -> Any:
            return makes.pop(0) or super().__new__(cls)

    jenny = SessionJenny(sessionmaker(engine, class_=Odd))
    for expected in tuple(makes):
        with open_scope():
            assert jenny.session is jenny.session
            assert expected in (None, jenny.session)
            if expected is None:
                assert use(jenny.session).in_transaction()
        assert checked_out(engine) == 0
    assert [mock.close.call_count for mock in mocks] == [1, 1]


def test_J1_whoever_replaces_the_call_of_sessionmakers_is_heard(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracer, say: the call is saved only where it is SQLAlchemy's own."""
    called: list[object] = []
    original = sessionmaker.__call__

    def traced(self: Any, **kw: Any) -> Any:
        called.append(self)
        return original(self, **kw)

    maker = sessionmaker(engine)
    jenny = SessionJenny(maker)
    monkeypatch.setattr(sessionmaker, "__call__", traced)
    with open_scope():
        assert jenny.session is jenny.session
    assert called == [maker]


def test_J1_what_a_session_is_made_with_goes_through_the_call(engine: Engine) -> None:
    """``jenny(info=...)``: the sessionmaker puts its own info and the given one together."""
    maker = sessionmaker(engine, info={"a": 1})
    jenny = SessionJenny(maker)
    with open_scope():
        assert jenny(info={"b": 2}).info == maker(info={"b": 2}).info == {"a": 1, "b": 2}


@pytest.mark.parametrize("commit", [False, True])
def test_J2_each_session_knows_as_much_of_its_scope(engine: Engine, commit: bool) -> None:
    """The first of a class is tied to its scope step by step, later ones in one go."""
    jenny = SessionJenny(sessionmaker(engine))

    def known() -> tuple[type, dict[str, object]]:
        with open_scope(commit_on_success=commit) as scope:
            session = jenny.session
            tie = tie_of(session)
            assert tie is not None
            assert tie.scope is scope
            assert session_of(scope, jenny.registry) is session
            names = [name for name in Tie.__slots__ if name not in ("__weakref__", "scope")]
            return type(session), {name: getattr(tie, name, "not yet") for name in names}

    first = known()
    assert known() == known() == first


def test_J2_what_is_known_of_a_class_stays_known(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where some requests only read, the others still take the short way."""
    jenny = SessionJenny(sessionmaker(engine))
    asked: list[type[Session]] = []

    def listen_to(session: Session) -> bool:
        asked.append(type(session))
        return True  # the class of a sessionmaker is listened to from the start

    monkeypatch.setattr(registry, "listen_to", listen_to)
    for _ in range(3):
        for reads in (False, True):
            with open_scope(read_only=reads):
                use(jenny.session)
    assert len(asked) == len(set(asked)) == 2


class Begun(Session):
    """A session that has begun before anybody gets it."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.begun_by = use(self)


def test_J2_a_session_may_have_begun_when_its_scope_gets_it(engine: Engine) -> None:
    """Its connection counts for its scope, from the first session on to the last."""
    jenny = SessionJenny(sessionmaker(engine, class_=Begun))
    for _ in range(3):
        with open_scope() as scope:
            assert jenny.session.in_transaction()
            assert [(one.scope, one.connection) for one in holders()] == [(scope.name, "held")]
            session = jenny.session
        with pytest.raises(ScopeClosedError):
            use(session)
        assert checked_out(engine) == 0
