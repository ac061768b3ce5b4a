"""J7: `release()` gives the connection back, keeps what is loaded, and loses nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, delete, event, insert, inspect, select, text, update
from sqlalchemy.orm import Session, sessionmaker

from rope_middleware import (
    ASGIRopeMiddleware,
    NoScopeError,
    RopeError,
    ScopeClosedError,
    SessionJenny,
    open_scope,
)
from tests.kit.asgi import into_nothing, websocket_scope
from tests.kit.engines import MakeEngine
from tests.kit.leaks import checked_out
from tests.kit.models import Base, Child, Data, Row
from tests.kit.sessions import SELECT, Around, Jenny, in_thread, touch, use
from tests.kit.stores import Store
from tests.kit.waiting import PATIENCE, cancel_again_and_again, never, poll

pytestmark = pytest.mark.anyio


@pytest.fixture
def rows(engine: Engine) -> Engine:
    """The engine, with rows 1 to 3 in its database."""
    with Session(engine) as session:
        session.add_all([Row(n=n, name=f"name {n}") for n in (1, 2, 3)])
        session.commit()
    return engine


def is_as_loaded(row: Row, session: Session) -> bool:
    """Tell whether an object is the session's, with all that was loaded."""
    state = inspect(row)
    assert state is not None
    return state.session is session and state.persistent and not state.expired_attributes


# -- what it does ----------------------------------------------------------------------------------


def test_J7_the_connection_goes_back_and_objects_stay_as_they_are(
    rows: Engine, jenny: Jenny, around: Around
) -> None:
    """Nothing is expired, detached or forgotten; the session is the same."""
    with around():
        session = jenny.session
        row = session.get_one(Row, 1)
        assert checked_out(rows) == 1
        jenny.release()
        assert checked_out(rows) == 0
        assert jenny.session is session
        assert is_as_loaded(row, session)
        assert row.name == "name 1"
        assert session.get(Row, 1) is row  # from the identity map
        assert checked_out(rows) == 0, "reading what is loaded needs no connection"
        jenny.remove()


def test_J7_the_next_use_begins_a_transaction_of_its_own(
    rows: Engine, jenny: Jenny, around: Around
) -> None:
    """The session reads, writes and commits as before."""
    with around():
        row = jenny.session.get_one(Row, 1)
        for name in ("once", "twice"):
            jenny.release()
            row.name = name
            jenny.session.commit()
            assert row.name == name  # read again
        jenny.release()
        assert jenny.session.scalar(select(Row.name).where(Row.n == 1)) == "twice"
        jenny.release()
        assert checked_out(rows) == 0
        jenny.remove()


def test_J7_an_object_that_was_expired_before_is_loaded_in_the_next_transaction(
    rows: Engine, jenny: Jenny
) -> None:
    """What the application has expired stays so."""
    with open_scope():
        row = jenny.session.get_one(Row, 1)
        jenny.session.expire(row)
        jenny.release()
        assert row.name == "name 1"
        assert checked_out(rows) == 1


def test_J7_without_a_session_or_a_connection_there_is_nothing_to_do(
    rows: Engine, around: Around
) -> None:
    """It is silent, makes no session, and can be called again."""
    made: list[Session] = []
    counted = SessionJenny(lambda: made.append(Session(rows)) or made[-1])
    with around():
        counted.release()
        assert not made
        assert counted.session.get_transaction() is None
        counted.release()
        touch(counted)
        counted.release()
        counted.release()
        assert len(made) == 1
        counted.remove()
        counted.release()


def test_J7_what_was_committed_or_rolled_back_is_no_hindrance(rows: Engine, jenny: Jenny) -> None:
    """Only what was written since the last commit counts."""
    with open_scope():
        jenny.session.add(Row(n=10))
        jenny.session.commit()
        jenny.release()
        jenny.session.add(Row(n=11))
        jenny.session.flush()
        jenny.session.rollback()
        touch(jenny)
        jenny.release()
        assert checked_out(rows) == 0
        assert jenny.session.get(Row, 10) is not None
        assert jenny.session.get(Row, 11) is None


def test_J7_a_value_that_was_set_to_what_it_was_is_no_change(rows: Engine, jenny: Jenny) -> None:
    """`session.dirty` alone would say so."""
    with open_scope():
        row = jenny.session.get_one(Row, 1)
        row.name = str(row.name)
        assert row in jenny.session.dirty
        jenny.release()
        assert checked_out(rows) == 0


def test_J7_it_commits_nothing_and_tells_no_listener_so(rows: Engine, jenny: Jenny) -> None:
    """The application's listeners hear of no commit and no rollback of a session."""
    heard: list[str] = []
    for name in ("before_commit", "after_commit", "after_rollback", "after_soft_rollback"):
        event.listen(jenny.session_factory, name, lambda *_, name=name: heard.append(name))
    with open_scope():
        touch(jenny)
        jenny.release()
        assert heard == []


# -- what it refuses -------------------------------------------------------------------------------


def flushed(session: Session, numbers: Iterable[int] = (20,)) -> None:
    session.add_all([Row(n=n) for n in numbers])
    session.flush()


def long_ago(session: Session) -> None:
    session.execute(update(Row).values(name="changed"))
    for n in range(500):
        session.execute(text(f"SELECT {n}"))


def in_a_savepoint(session: Session) -> None:
    session.get(Row, 1)
    with session.begin_nested():
        session.add(Row(n=20))


TABLE: Any = Row.__table__
TWO = [{"n": 20}, {"n": 21}]
WRITES: dict[str, tuple[Callable[[Session], object], str]] = {
    "new": (lambda it: it.add(Row(n=20)), "1 new Row"),
    "changed": (lambda it: setattr(it.get_one(Row, 1), "name", "x"), "1 changed Row"),
    "deleted": (lambda it: it.delete(it.get_one(Row, 1)), "1 deleted Row"),
    "flushed": (flushed, "INSERT INTO row"),
    "many": (lambda it: flushed(it, range(100, 1200)), "INSERT INTO row"),
    "ORM update": (lambda it: it.execute(update(Row).values(name="x")), "UPDATE row"),
    "ORM delete": (lambda it: it.execute(delete(Row).where(Row.n == 1)), "DELETE FROM row"),
    "ORM insert": (lambda it: it.scalars(insert(Row).returning(Row), TWO).all(), "INSERT INTO row"),
    "Core": (lambda it: it.execute(insert(TABLE).values(n=20)), "INSERT INTO row"),
    "connection": (lambda it: it.connection().execute(insert(TABLE), TWO), "INSERT INTO row"),
    "bulk": (lambda it: it.bulk_insert_mappings(inspect(Row), TWO), "INSERT INTO row"),
    "long ago": (long_ago, "UPDATE row"),
    "in a savepoint": (in_a_savepoint, "INSERT INTO row"),
}


@pytest.mark.parametrize(("write", "told"), WRITES.values(), ids=WRITES)
def test_J7_what_is_not_committed_is_named_and_kept(
    rows: Engine, jenny: Jenny, around: Around, write: Callable[[Session], object], told: str
) -> None:
    """The error names it and `commit()`; nothing has become of it, and a commit keeps it."""
    with Session(rows) as other:
        before = other.execute(select(Row.n, Row.name).order_by(Row.n)).all()
    with around():
        write(jenny.session)
        with pytest.raises(RopeError, match=r"release\(\) would lose .* commit\(\)") as caught:
            jenny.release()
        assert told in str(caught.value)
        jenny.session.commit()
        jenny.release()
        assert checked_out(rows) == 0
        jenny.remove()
    with Session(rows) as other:
        assert other.execute(select(Row.n, Row.name).order_by(Row.n)).all() != before


def test_J7_the_error_names_all_and_no_values(rows: Engine, jenny: Jenny) -> None:
    """Classes and tables, with their numbers; each of them once."""
    with open_scope():
        jenny.session.add_all([Row(n=20, name="secret"), Row(n=21, name="secret")])
        jenny.session.flush()
        jenny.session.get_one(Row, 1).name = "secret"
        jenny.session.add_all([Row(n=22), Row(n=23, name="secret"), Child(n=1, parent=1)])
        with pytest.raises(RopeError) as caught:
            jenny.release()
        text = str(caught.value)
        assert "2 new Row, 1 new Child, 1 changed Row, INSERT INTO row. Call commit()" in text
        assert "secret" not in str(caught.value)
        jenny.session.rollback()


OPEN: dict[str, Callable[[Session], Any]] = {
    "savepoint": lambda session: use(session).begin_nested(),
    "savepoint of the connection": lambda session: session.connection().begin_nested(),
    "begin": lambda session: session.begin(),
}


@pytest.mark.parametrize("block", OPEN.values(), ids=OPEN)
def test_J7_a_block_that_is_open_is_not_torn(jenny: Jenny, block: Callable[[Session], Any]) -> None:
    """A savepoint and a `begin()` block end where they are left."""
    with open_scope():
        with block(jenny.session):
            touch(jenny)
            with pytest.raises(RopeError, match=r"savepoint|begin\(\)"):
                jenny.release()
            assert touch(jenny).in_transaction()
        jenny.session.commit()
        jenny.release()


RESULTS: dict[str, Callable[[Session], Any]] = {
    "rows": lambda it: it.execute(select(TABLE)),
    "text": lambda it: it.execute(text("SELECT n FROM row")),
    "driver": lambda it: it.connection().exec_driver_sql("SELECT n FROM row"),
    "objects": lambda it: it.scalars(select(Row)),
    "yield_per": lambda it: it.scalars(select(Row).execution_options(yield_per=1)),
    "query": lambda it: it.query(Row).yield_per(1),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_J7_a_result_that_is_being_read_is_not_cut_off(
    rows: Engine, jenny: Jenny, kind: str
) -> None:
    """It can be read to its end; then the connection goes back, also where it is kept."""
    with open_scope():
        result = RESULTS[kind](jenny.session)
        found = iter(result)
        if kind in ("rows", "text", "driver", "yield_per", "query"):
            next(found)
        with pytest.raises(RopeError, match="result is still being read"):
            jenny.release()
        assert list(found)
        jenny.release()
        assert checked_out(rows) == 0
        assert result is not None


def test_J7_a_result_that_nobody_has_any_more_is_no_hindrance(rows: Engine, jenny: Jenny) -> None:
    """Nor one that is closed, nor one of which only the first row was wanted."""
    with open_scope():
        jenny.session.execute(select(TABLE)).fetchone()
        closed = jenny.session.execute(select(TABLE))
        closed.close()
        first = jenny.session.execute(select(TABLE)).first()
        jenny.release()
        assert checked_out(rows) == 0
        assert first is not None


def test_J7_a_failed_transaction_is_the_applications_to_end(rows: Engine, jenny: Jenny) -> None:
    """After a failed flush SQLAlchemy asks for a rollback(), and so do we."""
    with open_scope():
        jenny.session.add(Row(n=1))
        with suppress(Exception):
            jenny.session.flush()
        touched = jenny.session
        with pytest.raises(RopeError, match=r"rollback\(\)"):
            jenny.release()
        touched.rollback()
        touch(jenny)
        jenny.release()
        assert checked_out(rows) == 0


def test_J7_inside_of_a_flush_it_is_refused(rows: Engine, jenny: Jenny) -> None:
    """A listener that waits for something else cannot give away what the flush needs."""
    caught: list[RopeError] = []

    def wait(*_: object) -> None:
        try:
            jenny.release()
        except RopeError as error:
            caught.append(error)

    event.listen(jenny.session_factory, "after_flush", wait)
    with open_scope():
        jenny.session.add(Row(n=20))
        jenny.session.commit()
    assert len(caught) == 1
    with Session(rows) as other:
        assert other.get(Row, 20) is not None


def test_J7_text_that_writes_is_rolled_back_on_sqlite_and_said(
    rows: Engine, jenny: Jenny, caplog: pytest.LogCaptureFixture
) -> None:
    """As the documentation says of every database but PostgreSQL."""
    with open_scope():
        jenny.session.execute(text("/* ours */ INSERT INTO row (n) VALUES (20)"))
        jenny.release()
        assert jenny.session.get(Row, 20) is None
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [
        "release() rolls back what was written by text: INSERT (text). Call commit() before it."
    ]


# -- several connections, lent connections ---------------------------------------------------------


def test_J7_with_several_engines_all_connections_go_back(make_engine: MakeEngine) -> None:
    """A session with binds has one for each; what one of them has written keeps all."""
    first, second = make_engine(), make_engine()
    Base.metadata.create_all(second)
    jenny = SessionJenny(sessionmaker(binds={Row: first, Child: second}))
    for n in range(2):
        with open_scope():
            jenny.session.get(Row, 1)
            jenny.session.get(Child, 1)
            jenny.release()
            assert (checked_out(first), checked_out(second)) == (0, 0)
            jenny.session.get(Row, 1)
            jenny.session.execute(insert(Child).values(n=n, parent=1))
            with pytest.raises(RopeError, match="INSERT INTO child"):
                jenny.release()


def routed(how: str, bound: Engine, other: Any, **options: Any) -> tuple[Jenny, dict[str, Any]]:
    """Return a jenny whose statements go to `other`, and what each has to be told for that."""

    class Routing(Session):
        def get_bind(self, *_: Any, **__: Any) -> Any:
            return other

    class_ = Routing if how == "get_bind" else Session
    maker = sessionmaker(other if how == "bind" else bound, class_=class_, **options)
    arguments = {"bind_arguments": {"bind": other}} if how == "bind_arguments" else {}
    return SessionJenny(maker), arguments


@pytest.mark.parametrize("how", ["get_bind", "bind_arguments"])
def test_J7_an_engine_that_comes_by_another_way_is_seen(make_engine: MakeEngine, how: str) -> None:
    """`get_bind()` of a class of one's own, and `bind_arguments` of a statement."""
    jenny, arguments = routed(how, make_engine(), make_engine())
    for _ in range(2):
        with open_scope():
            jenny.session.execute(insert(TABLE).values(n=1), **arguments)
            with pytest.raises(RopeError, match=r"commit\(\)"):
                jenny.release()


@pytest.mark.parametrize("how", ["bind", "get_bind", "bind_arguments"])
def test_J7_a_lent_connection_is_left_alone(engine: Engine, how: str) -> None:
    """Neither closed nor rolled back: the application's transaction on it goes on."""
    with engine.connect() as lent:
        transaction = lent.begin()
        lent.execute(insert(TABLE).values(n=1))
        jenny, arguments = routed(how, engine, lent, join_transaction_mode="create_savepoint")
        with open_scope():
            for _ in range(2):
                assert jenny.session.scalar(select(Row.n), **arguments) == 1
                jenny.release()
                assert transaction.is_active
                assert not lent.closed
        assert transaction.is_active
        assert lent.scalar(select(Row.n)) == 1
        transaction.rollback()


def test_J7_what_is_written_on_a_lent_connection_is_refused_as_everywhere(engine: Engine) -> None:
    """A test that lends its connection finds the mistake that production would."""
    with engine.connect() as lent, lent.begin() as transaction:
        jenny = SessionJenny(sessionmaker(lent, join_transaction_mode="create_savepoint"))
        with open_scope():
            jenny.session.add(Row(n=1))
            jenny.session.flush()
            with pytest.raises(RopeError, match="INSERT INTO row"):
                jenny.release()
            jenny.session.commit()
            assert jenny.session.scalar(select(Row.n)) == 1
            jenny.release()
        transaction.rollback()


# -- trouble ---------------------------------------------------------------------------------------


def test_J7_a_connection_that_cannot_be_given_back_is_invalidated(
    rows: Engine, jenny: Jenny, caplog: pytest.LogCaptureFixture
) -> None:
    """The session goes on with another one, and nothing stays out of the pool."""
    with open_scope():
        touch(jenny)

        def fail(_: Any) -> None:
            raise RuntimeError("the line is broken")

        event.listen(rows, "rollback", fail)
        jenny.release()
        event.remove(rows, "rollback", fail)
        assert checked_out(rows) == 0
        assert "a connection could not be given back, it is invalidated" in caplog.text
        touch(jenny)
        jenny.release()


def test_J7_after_the_scope_there_is_nothing_to_give_back(jenny: Jenny) -> None:
    """Code that has outlived its scope hears of it where it would begin something."""

    def late() -> None:
        jenny.release()
        with pytest.raises(ScopeClosedError):
            touch(jenny)

    with open_scope():
        touch(jenny)
        context = copy_context()
    context.run(late)


def test_J7_a_scopefunc_and_a_strict_jenny(rows: Engine) -> None:
    """Outside of scopes it goes where `session` goes."""
    keyed: Jenny = SessionJenny(sessionmaker(rows), scopefunc=lambda: 1)
    keyed.session.get(Row, 1)
    keyed.release()
    assert checked_out(rows) == 0
    keyed.session.execute(update(Row).values(name="x"))
    with pytest.raises(RopeError, match="UPDATE row"):
        keyed.release()
    keyed.remove()
    strict: Jenny = SessionJenny(sessionmaker(rows), strict=True)
    strict.release()
    with pytest.raises(NoScopeError):
        strict.session.get(Row, 1)


def test_J7_what_is_no_session_is_refused_in_words(rows: Engine) -> None:
    """A factory may return anything that has a close(); it has nothing to give back."""

    class Mock:
        def close(self) -> None: ...

    jenny: Any = SessionJenny(Mock)  # type: ignore[type-var]
    with open_scope():
        assert jenny.session is not None
        with pytest.raises(RopeError, match="a session of SQLAlchemy's"):
            jenny.release()


@pytest.mark.parametrize("has_replica", [False, True], ids=["primary", "replica"])
def test_J7_in_a_read_only_scope(make_engine: MakeEngine, has_replica: bool) -> None:
    """There is nothing to lose; a result that is being read is not cut off, from the first on."""
    primary, replica = make_engine(), make_engine()
    jenny: Jenny = SessionJenny(sessionmaker(primary), replicas=[replica] if has_replica else [])
    engine = replica if has_replica else primary
    for _ in range(2):
        with open_scope(read_only=True):
            result = jenny.session.execute(select(Data.__table__))
            assert checked_out(engine) == 1
            with pytest.raises(RopeError, match="result is still being read"):
                jenny.release()
            assert len(result.all()) == 1
            jenny.release()
            assert checked_out(engine) == 0


def test_J7_the_inner_scope_has_its_own(rows: Engine, jenny: Jenny) -> None:
    """What is released is the current scope's; the outer one keeps its connection."""
    with open_scope():
        touch(jenny)
        with open_scope():
            touch(jenny)
            assert checked_out(rows) == 2
            jenny.release()
            assert checked_out(rows) == 1
        jenny.release()
        assert checked_out(rows) == 0


def test_J7_from_another_thread_of_the_request(rows: Engine, jenny: Jenny) -> None:
    """The session is the scope's, whichever thread asks."""
    with open_scope():
        touch(jenny)
        in_thread(jenny.release)
        assert checked_out(rows) == 0


# -- the twin --------------------------------------------------------------------------------------


async def test_J7_async_the_connection_goes_back_and_objects_stay_as_they_are(store: Store) -> None:
    """`await jenny.release()`, and no attribute has to be loaded again."""
    jenny = store.jenny
    async with open_scope():
        jenny.session.add(Row(n=1, name="name 1"))
        await jenny.session.commit()
    async with open_scope():
        row = await jenny.session.get_one(Row, 1)
        assert store.held() == 1
        await jenny.release()
        assert store.held() == 0
        assert is_as_loaded(row, jenny.session.sync_session)
        assert row.name == "name 1"
        assert await jenny.session.get(Row, 1) is row
        assert store.held() == 0
        row.name = "changed"
        with pytest.raises(RopeError, match="1 changed Row"):
            await jenny.release()
        await jenny.session.commit()
        await jenny.release()
        await jenny.release()


@pytest.mark.parametrize(("write", "told"), WRITES.values(), ids=WRITES)
async def test_J7_async_what_is_not_committed_is_named(
    store: Store, write: Callable[[Session], object], told: str
) -> None:
    """The same of an AsyncSession."""
    jenny = store.jenny
    async with open_scope():
        jenny.session.add(Row(n=1))
        await jenny.session.commit()
        await jenny.session.run_sync(write)
        with pytest.raises(RopeError, match=r"commit\(\)") as caught:
            await jenny.release()
        assert told in str(caught.value)
        await jenny.session.rollback()


async def test_J7_async_a_stream_that_is_being_read_is_not_cut_off(store: Store) -> None:
    """`stream()` holds a cursor until its last row; `execute()` has read all rows."""
    jenny = store.jenny
    async with open_scope():
        jenny.session.add_all([Row(n=n) for n in range(5)])
        await jenny.session.commit()
        whole = await jenny.session.execute(select(Row.n))
        await jenny.release()
        assert len(whole.all()) == 5
        result = await jenny.session.stream_scalars(select(Row.n).execution_options(yield_per=1))
        assert await result.fetchmany(1) is not None
        with pytest.raises(RopeError, match="result is still being read"):
            await jenny.release()
        assert len([n async for n in result]) == 4
        await jenny.release()
        assert store.held() == 0


async def test_J7_async_a_cancelled_release_has_released(store: Store) -> None:
    """Cancelled at every turn of the loop, it comes to its end all the same."""
    jenny = store.jenny

    async def work() -> None:
        async with open_scope():
            await jenny.session.execute(SELECT)
            started.set()
            try:
                await jenny.release()
            finally:
                held.append(store.held())

    for _ in range(5):
        started, held = asyncio.Event(), []
        task = asyncio.create_task(work())
        await started.wait()
        await cancel_again_and_again(task)
        assert held == [0]


async def test_J7_async_in_a_websocket_between_its_messages(store: Store) -> None:
    """Its scope lasts as long as the connection; what it has loaded, too."""
    held: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        row = await store.jenny.session.get_one(Row, 1)
        for _ in range(3):
            await store.jenny.release()
            held.append(store.held())
            row.name += "x"
            await store.commit()
        await store.jenny.release()

    async with open_scope():
        await store.add(1)
        await store.commit()
    await ASGIRopeMiddleware(app)(websocket_scope(), never, into_nothing)
    async with open_scope():
        assert (await store.jenny.session.get_one(Row, 1)).name == "xxx"
    assert held == [0, 0, 0]


async def test_J7_async_outside_of_scopes_it_is_silent(store: Store) -> None:
    """There is no session to give anything back."""
    await store.jenny.release()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_J7_no_request_holds_a_connection_while_it_waits(
    tmp_path: Path, is_async: bool
) -> None:
    """20 requests read one row, release and wait for all the others: a pool of 2 is enough."""
    store = Store(tmp_path / "waits.db", is_async=is_async, pool_timeout=PATIENCE)
    waiting = 0

    async def request() -> None:
        nonlocal waiting
        async with open_scope():
            await store.read()
            if is_async:
                await store.jenny.release()
            else:
                store.jenny.release()
            waiting += 1
            await poll(lambda: waiting == 20)

    await asyncio.gather(*(request() for _ in range(20)))
    assert store.held() == 0
    await store.dispose()
