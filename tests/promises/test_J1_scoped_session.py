"""J1: SessionJenny is a scoped_session, proven against SQLAlchemy's own list of names."""

from __future__ import annotations

import contextvars
import copy
import inspect
import threading
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import factory
import pytest
import transaction
import zope.sqlalchemy
from factory.alchemy import SQLAlchemyModelFactory
from sqlalchemy import Engine, event, func, select, text
from sqlalchemy.exc import InvalidRequestError, SAWarning
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Query, Session, scoped_session, sessionmaker
from sqlalchemy.util import ScopedRegistry

from rope_middleware import AsyncSessionJenny, ScopeClosedError, SessionJenny, open_scope
from tests.kit.engines import MakeEngine, counts
from tests.kit.leaks import checked_out
from tests.kit.models import Data
from tests.kit.sessions import Around, Jenny, use


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


SPECIAL = ("__call__", "__contains__", "__iter__")


NAMES = [name for name in dir(scoped_session) if not name.startswith("_") or name in SPECIAL]


OWN = {"__call__", "configure", "query_property", "remove"}


PROXIED = [name for name in NAMES if hasattr(Session, name) and name not in OWN]


# Instance attributes of Session are no attributes of the class.
PROXIED += [
    name
    for name in NAMES
    if name not in PROXIED and isinstance(inspect.getattr_static(scoped_session, name), property)
]


def test_J1_every_name_of_scoped_session_is_accounted_for() -> None:
    """A name that SQLAlchemy adds is either proxied to the session or tested by hand below."""
    assert set(NAMES) - set(PROXIED) == OWN
    assert len(PROXIED) > 40
    assert set(NAMES) <= set(dir(SessionJenny))


@pytest.mark.parametrize("name", NAMES)
def test_J1_the_signature_is_that_of_scoped_session(name: str) -> None:
    """Arguments, their names and their defaults are the same; `remove` takes one more."""
    theirs, ours = getattr(scoped_session, name), getattr(SessionJenny, name)
    if isinstance(theirs, property):
        assert isinstance(ours, property)
        return
    parameters = dict(inspect.signature(ours).parameters)
    if name == "remove":
        assert parameters.pop("rope_name").default is None
    assert list(parameters) == list(inspect.signature(theirs).parameters)
    assert [p.default for p in parameters.values()] == [
        p.default for p in inspect.signature(theirs).parameters.values()
    ]


INSTANCE_NAMES = [
    name
    for name in PROXIED
    if not isinstance(inspect.getattr_static(scoped_session, name), classmethod)
]


class Recorder:
    """Makes sessions that write down what reaches them under one name."""

    def __init__(self, name: str) -> None:
        self.calls: list[tuple[object, ...]] = []
        nothing_in_it = SimpleNamespace(_modified=())
        self.result: Any = iter([1]) if name == "__iter__" else nothing_in_it
        # What the end of a session looks at: it was never begun, and has no objects.
        self._insides: dict[str, Any] = {
            **dict.fromkeys(["_transaction", "_nested_transaction", "_new", "_deleted"]),
            "identity_map": nothing_in_it,
        }
        is_property = isinstance(inspect.getattr_static(scoped_session, name), property)
        named = property(self._read, self._write) if is_property else self._method()
        self._class = type("Recording", (Session,), {name: named})

    def __call__(self, **kw: object) -> Session:
        """Make a session without __init__, which would read and write what is recorded."""
        session = self._class.__new__(self._class)
        session.__dict__.update(self._insides)
        return session

    def _read(self, session: Session) -> object:
        self.calls.append(("get", session))
        return self.result

    def _write(self, session: Session, value: object) -> None:
        self.calls.append(("set", session, value))

    def _method(self) -> Any:
        def call(session: Session, *args: object, **kw: object) -> object:
            self.calls.append(("call", session, args, tuple(kw.items())))
            return self.result

        return call

    def seen(self, session: Session) -> list[tuple[object, ...]]:
        """Return the calls, with a word for the session."""
        return [tuple("it" if x is session else x for x in call) for call in self.calls]


def arguments_for(name: str) -> tuple[list[object], dict[str, object]]:
    """Return distinct values for every parameter that scoped_session's method has."""
    args: list[object] = []
    kw: dict[str, object] = {}
    parameters = list(inspect.signature(getattr(scoped_session, name)).parameters.values())
    static = inspect.getattr_static(scoped_session, name)
    for parameter in parameters if isinstance(static, classmethod) else parameters[1:]:
        value = f"<{parameter.name}>"
        if parameter.kind is parameter.KEYWORD_ONLY:
            kw[parameter.name] = value
        elif parameter.kind is parameter.VAR_KEYWORD:
            kw["more"] = value
        else:
            args.append(value)
    return args, kw


@pytest.mark.parametrize("name", INSTANCE_NAMES)
def test_J1_every_proxied_name_goes_to_the_current_session(around: Around, name: str) -> None:
    """What reaches the session, and what comes back, is what SQLAlchemy's own proxy does."""

    def exercise(proxy: Any, recorder: Recorder) -> tuple[object, object]:
        session = proxy()
        recorder.calls.clear()
        static = inspect.getattr_static(scoped_session, name)
        if isinstance(static, property):
            result = getattr(proxy, name)
            if static.fset is not None:
                setattr(proxy, name, "value")
        else:
            args, kw = arguments_for(name)
            result = getattr(proxy, name)(*args, **kw)
        seen = recorder.seen(session)
        return seen, result is recorder.result

    theirs, ours = Recorder(name), Recorder(name)
    plain: Any = scoped_session(theirs)  # type: ignore[arg-type]
    expected = exercise(plain, theirs)
    assert expected[0], "SQLAlchemy's own proxy reaches the session"
    jenny: Any = SessionJenny(ours)
    with around():
        assert exercise(jenny, ours) == expected
        jenny.registry.clear()  # it cannot be closed: it has no insides
    plain.registry.clear()


CLASS_NAMES = [name for name in PROXIED if name not in INSTANCE_NAMES]


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_J1_every_class_method_goes_to_the_session_class(
    jenny: Jenny, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Those need no session, and none is made for them."""
    seen: list[object] = []

    def record(cls: type, *args: object, **kw: object) -> object:
        seen.append((args, kw))
        return "result"

    monkeypatch.setattr(Session, name, classmethod(record))
    args, kw = arguments_for(name)
    for proxy in (scoped_session, SessionJenny, jenny):
        assert getattr(proxy, name)(*args, **kw) == "result"
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
    assert jenny.registry.has() is False


def test_J1_isinstance_and_generic(jenny: Jenny) -> None:
    """Whoever asks for a scoped_session gets one."""
    assert isinstance(jenny, scoped_session)
    assert issubclass(SessionJenny, scoped_session)
    assert Jenny is not None


def program(proxy: Any) -> list[object]:
    """A little program on a scoped_session; returns all that it has seen."""
    seen: list[object] = []
    row = Data(count=1)
    proxy.add(row)
    seen += [row in proxy, len(proxy.new), list(proxy) == [row], proxy.is_modified(row)]
    proxy.flush()
    seen += [row.id, proxy.get(Data, row.id) is row, len(proxy.identity_map)]
    row.count = 5
    seen += [row in proxy.dirty, proxy.is_active, proxy.autoflush]
    proxy.commit()
    with proxy.no_autoflush:
        seen.append(proxy.scalar(select(func.sum(Data.count))))
    seen.append(sorted(proxy.scalars(select(Data.count))))
    seen.append(proxy.query(Data).filter_by(count=5).count())
    proxy.expire(row)
    proxy.refresh(row)
    with proxy.begin_nested():
        proxy.merge(Data(id=row.id, count=6))
    seen.append(row.count)
    proxy.rollback()
    seen.append(row.count)
    proxy.bulk_insert_mappings(Data, [{"count": 10}, {"count": 11}])
    proxy.bulk_save_objects([Data(count=12)])
    seen.append(proxy.execute(select(func.count()).select_from(Data)).scalar())
    seen.append(proxy.connection().closed)
    proxy.expunge(row)
    seen.append(row in proxy)
    seen.append(proxy.object_session(row))
    seen.append(proxy.identity_key(Data, 1)[1])
    row.count = 3
    proxy.add_all([row])
    proxy.delete(row)
    seen.append(len(proxy.deleted))
    proxy.flush()
    proxy.expunge_all()
    proxy.info["key"] = 1
    seen += [proxy.info["key"], proxy.get_bind() is proxy.bind]
    proxy.rollback()
    proxy.close()
    proxy.reset()
    seen.append(proxy.registry.has())
    proxy.remove()
    seen.append(proxy.registry.has())
    return seen


def test_J1_a_program_on_a_scoped_session_runs_unchanged(
    make_engine: MakeEngine, around: Around
) -> None:
    """It sees the same on a SessionJenny, in a scope and outside."""
    plain = scoped_session(sessionmaker(make_engine()))
    jenny = SessionJenny(sessionmaker(make_engine()))
    with around():
        assert program(jenny) == program(plain)


class WithExec(Session):
    """A session with a name of its own, as SQLModel's."""

    def exec(self, statement: str) -> Any:
        return self.execute(text(statement))


class AsyncWithExec(AsyncSession):
    """Its twin."""

    async def exec(self, statement: str) -> Any:
        return await self.execute(text(statement))


def test_J1_a_name_of_the_session_class_alone(engine: Engine) -> None:
    """`jenny.session` has it, and the error of `jenny` says so."""
    jenny = SessionJenny(sessionmaker(engine, class_=WithExec))
    with open_scope():
        assert jenny.session.exec("SELECT 7").scalar() == 7
    twin = AsyncSessionJenny(async_sessionmaker(class_=AsyncWithExec))
    for one in jenny, twin:
        with pytest.raises(AttributeError, match=r"'exec'\. .* write jenny\.session\.exec$"):
            one.exec  # noqa: B018
        with pytest.raises(AttributeError, match=r"has no attribute 'exek'$"):
            one.exek  # noqa: B018
        assert not hasattr(copy.copy(one), "exek")


@pytest.mark.parametrize("make", [lambda _: WithExec, lambda bind: partial(WithExec, bind)])
def test_J1_a_name_of_the_session_class_alone_of_any_factory(make: Any, engine: Engine) -> None:
    """A class and a partial tell it, too; any other function does so by its first session."""
    known = SessionJenny[Any](make(engine))
    unknown = SessionJenny[Any](lambda: WithExec(engine))
    with pytest.raises(AttributeError, match=r"If your session class has it, write"):
        unknown.exec  # noqa: B018
    with open_scope():
        assert unknown.session.exec("SELECT 7").scalar() == 7
    for one in known, unknown:
        with pytest.raises(
            AttributeError, match=r"'exec'\. .* has it: write jenny\.session\.exec$"
        ):
            one.exec  # noqa: B018


def test_J1_an_attribute_error_of_the_factory_is_what_comes(jenny: Jenny) -> None:
    """It is not taken for a name that the jenny does not have."""

    def broken() -> Session:
        raise AttributeError("of the factory")

    jenny.session_factory = broken  # type: ignore[assignment]
    with open_scope(), pytest.raises(AttributeError, match=r"^of the factory$"):
        jenny.session  # noqa: B018


def test_J1_query_property(jenny: Jenny, around: Around) -> None:
    """A model's `query` attribute asks the current session, also with a class of one's own."""

    class MyQuery(Query[Any]):
        pass

    class Model:
        pass

    Data.query = jenny.query_property()  # type: ignore[attr-defined]
    Data.my_query = jenny.query_property(MyQuery)  # type: ignore[attr-defined]
    model: Any = Data
    try:
        with around():
            assert model.query.session is jenny.session
            assert model.query.one().count == 0
            assert type(model.my_query) is MyQuery
            assert model.my_query.session is jenny.session
        with open_scope():
            assert model.query.session is jenny.session
    finally:
        del model.query, model.my_query


def test_J1_configure(jenny: Jenny, make_engine: MakeEngine, around: Around) -> None:
    """It reconfigures the sessionmaker, and warns where a session is there already."""
    with around():
        jenny.configure(autoflush=False)
        assert jenny.session.autoflush is False
        with pytest.warns(SAWarning, match="already present"):
            jenny.configure(autoflush=True)
        assert jenny.session.autoflush is False
        jenny.remove()
        assert jenny.session.autoflush is True
        jenny.remove()


def test_J1_a_call_with_arguments(jenny: Jenny, around: Around) -> None:
    """They go to the session factory; where a session is there already they are an error."""
    with around():
        session = jenny(autoflush=False)
        assert session.autoflush is False
        assert jenny() is session
        assert jenny.session is session
        with pytest.raises(InvalidRequestError, match="already present"):
            jenny(autoflush=True)
        jenny.remove()
        assert jenny(expire_on_commit=False).expire_on_commit is False


def test_J1_the_session_factory_may_be_replaced(
    jenny: Jenny, make_engine: MakeEngine, around: Around
) -> None:
    """The next session is made by the new one: tests put another database in that way."""
    other = make_engine()
    with around():
        jenny.session_factory = sessionmaker(other)
        assert jenny.session.get_bind() is other
        use(jenny.session)
        assert checked_out(other) == 1
        jenny.remove()


def test_J1_events_of_a_scoped_session(jenny: Jenny, around: Around) -> None:
    """`event.listen(jenny, ...)` listens on all sessions of its factory."""
    seen: list[Session] = []
    event.listen(jenny, "before_commit", seen.append)
    with around():
        use(jenny.session)
        jenny.session.commit()
        assert seen == [jenny.session]


@pytest.mark.parametrize("persistence", [None, "flush", "commit"])
def test_J1_factory_boy(
    jenny: Jenny, engine: Engine, around: Around, persistence: str | None
) -> None:
    """A factory makes rows in the current session."""

    class DataFactory(SQLAlchemyModelFactory):
        class Meta:
            model = Data
            sqlalchemy_session = jenny
            sqlalchemy_session_persistence = persistence

        count = factory.Sequence(lambda n: n + 100)

    def test() -> None:
        session = jenny.session
        rows = DataFactory.create_batch(3)
        assert all(row in session for row in rows)
        assert DataFactory(count=7).count == 7
        session.commit()

    with around():
        test()
    assert checked_out(engine) == 0
    with Session(engine) as session:
        assert session.scalar(select(func.count()).select_from(Data)) == 5


@pytest.mark.told
def test_J1_factory_boy_get_or_create(jenny: Jenny, around: Around) -> None:
    """Its options that ask the database work, too."""

    class DataFactory(SQLAlchemyModelFactory):
        class Meta:
            model = Data
            sqlalchemy_session_factory = lambda: jenny  # noqa: E731
            sqlalchemy_get_or_create = ("count",)
            sqlalchemy_session_persistence = "flush"

    with around():
        session = jenny.session
        row = DataFactory(count=9)
        assert DataFactory(count=9) is row
        assert row in session


@pytest.fixture
def manager() -> Iterator[Any]:
    """The thread's transaction manager, in the end without a transaction."""
    yield transaction.manager
    transaction.abort()


def test_J1_zope_sqlalchemy(make_engine: MakeEngine, around: Around, manager: Any) -> None:
    """`zope.sqlalchemy.register(jenny)`: the transaction manager commits and aborts."""
    engine = make_engine()
    jenny = SessionJenny(sessionmaker(engine))
    zope.sqlalchemy.register(jenny)

    def request(count: int) -> None:
        jenny.session.add(Data(count=count))
        jenny.session.flush()

    with around():
        _ = jenny.session
        with manager:
            request(1)
        assert checked_out(engine) == 0
        with pytest.raises(ValueError), manager:
            request(2)
            raise ValueError
        manager.begin()
        request(3)
        manager.commit()
        manager.begin()
        request(4)
        manager.abort()
    assert counts(engine) == [0, 1, 3]


def test_S4_every_name_refuses_code_that_outlived_its_scope(jenny: Jenny) -> None:
    """Whichever name of the facade is used: no session, and no rope instead of one."""
    with open_scope():
        context = contextvars.copy_context()

    def late() -> None:
        for name in INSTANCE_NAMES:
            static = inspect.getattr_static(scoped_session, name)
            args, kw = ([], {}) if isinstance(static, property) else arguments_for(name)
            with pytest.raises(ScopeClosedError):
                value = getattr(jenny, name)
                value(*args, **kw)
        assert not jenny._ropes

    context.run(late)


@pytest.mark.parametrize("name", ["class_", "kw"])
def test_J1_what_a_sessionmaker_has_is_asked_of_the_factory(engine: Engine, name: str) -> None:
    """sqladmin's ``session_maker=`` looks for it: the error says what to pass."""
    for jenny in SessionJenny(sessionmaker(engine)), AsyncSessionJenny(async_sessionmaker()):
        assert not hasattr(jenny, name)
        with pytest.raises(AttributeError, match=rf"'{name}'\. .* pass jenny\.session_factory$"):
            getattr(jenny, name)
        assert hasattr(jenny.session_factory, name)
