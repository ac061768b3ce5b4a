"""R1: a read-only scope reads, and writes nothing; what would write is named, with its line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, delete, insert, select, text, update
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.schema import CreateTable, DropTable

from rope_middleware import (
    ASGIRopeMiddleware,
    ReadOnlyError,
    RopeError,
    RopeMiddleware,
    SessionJenny,
    WSGIRopeMiddleware,
    open_scope,
)
from tests.kit.models import Base, Row
from tests.kit.sessions import Jenny
from tests.kit.waiting import eventually
from tests.kit.web import Exchange, Web
from tests.kit.wsgi import HEADERS, Server

READS: Any = {"read_only": ("GET", "HEAD")}
TABLE = Row.__table__


def _changed(session: Session) -> Row:
    row = session.scalars(select(Row)).one()
    row.name = "changed"
    return row


WRITES: dict[str, tuple[Callable[[Session], Any], str]] = {
    "new": (lambda s: (s.add(Row(n=2)), s.flush()), "a flush of 1 new Row"),
    "new, found by autoflush": (lambda s: (s.add(Row(n=2)), s.get(Row, 1)), "1 new Row"),
    "all new": (lambda s: (s.add_all([Row(n=2), Row(n=3)]), s.flush()), "2 new Row"),
    "changed": (lambda s: (_changed(s), s.flush()), "1 changed Row"),
    "deleted": (lambda s: (s.delete(s.get(Row, 1)), s.flush()), "1 deleted Row"),
    "committed": (lambda s: (s.add(Row(n=2)), s.commit()), "1 new Row"),
    "merged": (lambda s: (s.merge(Row(n=2)), s.flush()), "1 new Row"),
    "bulk": (lambda s: s.bulk_insert_mappings(Row, [{"n": 2}, {"n": 3}]), "INSERT"),
    "insert": (lambda s: s.execute(insert(Row).values(n=2)), "INSERT"),
    "many": (lambda s: s.execute(insert(Row), [{"n": 2}, {"n": 3}]), "INSERT"),
    "returning": (lambda s: s.scalars(insert(Row).values(n=2).returning(Row)), "INSERT"),
    "update": (lambda s: s.execute(update(Row).values(name="x")), "UPDATE"),
    "delete": (lambda s: s.execute(delete(Row)), "DELETE"),
    "core": (lambda s: s.execute(TABLE.insert().values(n=2)), "INSERT"),
    "query": (lambda s: s.query(Row).delete(), "DELETE"),
    "create": (lambda s: s.execute(CreateTable(TABLE, if_not_exists=True)), "CREATE"),
    "drop": (lambda s: s.execute(DropTable(TABLE)), "DROP"),
    "metadata": (lambda s: Base.metadata.drop_all(s.connection()), "DROP"),
    "text": (lambda s: s.execute(text("/* a */ insert into row (n) values (2)")), "INSERT"),
    "cte": (
        lambda s: s.execute(text("WITH x AS (SELECT 2 AS n) INSERT INTO row (n) SELECT n FROM x")),
        "INSERT INTO",
    ),
    "driver": (lambda s: s.connection().exec_driver_sql("DELETE FROM row"), "DELETE"),
    "lock": (lambda s: s.execute(text("SELECT n FROM row FOR UPDATE")), "FOR UPDATE"),
    "savepoint": (lambda s: s.begin_nested(), "SAVEPOINT"),
    "nested": (lambda s: s.begin(nested=True), "SAVEPOINT"),
}


@pytest.mark.told
@pytest.mark.parametrize("what", WRITES)
def test_R1_what_would_write_is_refused(web: Web, what: str) -> None:
    """The error says what would write, where, and how to write; no row is there."""
    write, words = WRITES[what]
    met: list[str] = []

    async def prepare(exchange: Exchange) -> None:
        await web.store.add(1)
        await web.store.commit()
        await exchange.answer(200)

    async def handler(exchange: Exchange) -> None:
        session = web.store.jenny.session
        with pytest.raises(ReadOnlyError) as caught:
            if web.store.is_async:
                await session.run_sync(write)
            else:
                write(session)
        met.append(str(caught.value))
        await exchange.answer(200)

    assert web.ask(prepare, method="POST", **READS).status == 200
    answer = web.ask(handler, **READS)
    assert (answer.status, answer.error) == (200, None)
    assert words in met[0]
    assert "'GET /thing' is read-only" in met[0]
    assert re.search(r"at test_R1_read_only\.py:\d+", met[0])
    assert "open_scope()" in met[0]
    assert web.store.rows() == [1]


@pytest.mark.told
def test_R1_the_error_names_the_line_that_added(web: Web) -> None:
    """A flush happens anywhere; what helps is the line that made the change."""
    met: list[str] = []

    async def handler(exchange: Exchange) -> None:
        session = web.store.jenny.session
        session.add(Row(n=2))  # this line
        with pytest.raises(ReadOnlyError) as caught:
            await web.store.commit()
        met.append(str(caught.value))
        await exchange.answer(200)

    assert web.ask(handler, **READS).error is None
    lines = enumerate(Path(__file__).read_text().splitlines(), 1)
    number = next(n for n, line in lines if line.endswith("# this line"))
    assert f"test_R1_read_only.py:{number}" in met[0]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH"])
def test_R1_the_method_decides(web: Web, method: str) -> None:
    """Requests of the methods given read only, all others write."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await web.store.commit()
        await exchange.answer(200)

    answer = web.ask(handler, method=method, **READS)
    reads = method in ("GET", "HEAD")
    assert isinstance(answer.error, ReadOnlyError) is reads
    assert web.store.rows() == ([] if reads else [1])


def test_R1_pending_changes_at_the_middlewares_commit_raise(web: Web) -> None:
    """What a handler leaves to commit_on_success is not lost in silence: it is an error."""

    async def handler(exchange: Exchange) -> None:
        web.store.jenny.session.add(Row(n=1))
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True, **READS)
    assert answer.seen == 500
    assert web.store.rows() == []
    if not web.wsgi:  # there the server's log has it
        assert isinstance(answer.error, ReadOnlyError)
        assert "1 new Row" in str(answer.error)


@pytest.mark.parametrize("commits", [False, True])
def test_R1_reading_and_committing_nothing_is_harmless(web: Web, commits: bool) -> None:
    """`commit()`, `rollback()` and a `begin()` block do what they do: nothing, here."""
    seen: list[int] = []

    async def prepare(exchange: Exchange) -> None:
        await web.store.add(1)
        await web.store.commit()
        await exchange.answer(200)

    async def handler(exchange: Exchange) -> None:
        session = web.store.jenny.session
        for _ in range(3):
            seen.append(await web.store.read())
            await web.store.commit()
        await web.store.rollback()
        if web.store.is_async:
            async with session.begin():
                seen.append(await web.store.read())
        else:
            with session.begin():
                seen.append(await web.store.read())
        row = await _get(web, 1)
        row.name = row.name  # touched, and not changed
        await web.store._do("flush")
        await exchange.answer(200)

    web.ask(prepare, method="POST", **READS)
    answer = web.ask(handler, commit_on_success=commits, **READS)
    assert (answer.status, answer.error, seen) == (200, None, [1, 1, 1, 1])


async def _get(web: Web, n: int) -> Any:
    found = web.store.jenny.session.get(Row, n)
    return await found if web.store.is_async else found


@pytest.mark.told
def test_R1_an_inner_open_scope_writes(web: Web) -> None:
    """It is a scope of its own, and writes unless it says otherwise; the outer one still reads."""

    async def handler(exchange: Exchange) -> None:
        assert await web.store.read() == 0
        if web.store.is_async:
            async with open_scope():
                await web.store.add(1)
                await web.store.commit()
        else:
            with open_scope():
                await web.store.add(1)
                await web.store.commit()
        assert await web.store.read() == 1
        with pytest.raises(ReadOnlyError):
            await web.store.add(2)
        await exchange.answer(200)

    answer = web.ask(handler, **READS)
    assert (answer.status, answer.error) == (200, None)
    assert web.store.rows() == [1]


def test_R1_open_scope_reads_only_where_it_says_so(jenny: Jenny) -> None:
    """`open_scope(read_only=True)`, as a block and as a decorator; the one around it writes."""

    @open_scope(read_only=True)
    def read() -> int:
        with pytest.raises(ReadOnlyError, match=r"read' is read-only"):
            jenny.session.execute(delete(Row))
        return len(jenny.session.scalars(select(Row)).all())

    with open_scope():
        jenny.session.add(Row(n=1))
        with open_scope("report", read_only=True):
            assert jenny.session.scalars(select(Row)).all() == []
            with pytest.raises(ReadOnlyError, match="'report' is read-only"):
                jenny.session.execute(delete(Row))
        assert read() == 0
        jenny.session.commit()
    assert read() == 1


def test_R1_sessions_of_others_stay_as_they_are(engine: Engine) -> None:
    """The factory, its class, its engine: whoever uses them beside a read-only scope writes."""
    factory = sessionmaker(engine)
    jenny = SessionJenny(factory)
    with open_scope(read_only=True):
        session = jenny.session
        session.scalars(select(Row)).all()
        assert isinstance(session, factory.class_)
        with factory() as other:
            assert type(other) is factory.class_
            other.add(Row(n=1))
            other.commit()
        with engine.begin() as connection:
            connection.execute(insert(Row).values(n=2))
        assert len(session.scalars(select(Row)).all()) == 2
    with open_scope():
        jenny.session.add(Row(n=3))
        jenny.session.commit()
    with Session(engine) as session:
        assert session.scalars(select(Row.n)).all() == [1, 2, 3]


class Both(Session):
    """Chooses its engine itself."""

    engines: dict[str, Engine]

    def get_bind(self, mapper: Any = None, **kw: Any) -> Any:
        return self.engines["row" if mapper is not None and mapper.class_ is Row else "rest"]


@pytest.mark.parametrize("how", ["binds", "get_bind"])
def test_R1_several_engines_read_only(make_engine: Any, how: str) -> None:
    """`binds=` and an overridden get_bind() go on choosing; what they choose reads only."""
    first, second = make_engine(), make_engine()
    Both.engines = {"row": first, "rest": second}
    factory: Any = sessionmaker(class_=Both)
    if how == "binds":
        factory = sessionmaker(binds={Row: first, Base: second})
    jenny = SessionJenny(factory)
    with Session(first) as session:
        session.add(Row(n=1))
        session.commit()
    with open_scope(read_only=True):
        assert jenny.session.scalars(select(Row.n)).all() == [1]
        with pytest.raises(ReadOnlyError):
            jenny.session.execute(update(Row).values(name="x"))
        with pytest.raises(ReadOnlyError):
            jenny.session.execute(text("DELETE FROM data"), bind_arguments={"bind": second})


@pytest.mark.told
def test_R1_a_connection_that_is_lent_stays_in_its_transaction(engine: Engine) -> None:
    """A read-only scope reads in the application's transaction, and refuses all the same."""
    with engine.connect() as connection, connection.begin():
        jenny = SessionJenny(sessionmaker(connection))
        connection.execute(insert(Row).values(n=1))
        with open_scope(read_only=True):
            assert jenny.session.scalars(select(Row.n)).all() == [1]
            for write in (insert(Row).values(n=2), text("DELETE FROM row")):
                with pytest.raises(ReadOnlyError):
                    jenny.session.execute(write)
            jenny.session.add(Row(n=3))
            with pytest.raises(ReadOnlyError):
                jenny.session.flush()
        assert connection.in_transaction()
        assert connection.scalars(select(Row.n)).all() == [1]


def test_R1_what_has_no_session_is_left_alone() -> None:
    """A factory may return anything that has a close(): nothing is promised of it."""

    class Client:
        def close(self) -> None: ...

    jenny: Any = SessionJenny(Client)  # type: ignore[type-var, arg-type]
    with open_scope(read_only=True):
        assert type(jenny.session) is Client


def test_R1_a_read_only_session_that_was_used_leaves_no_cycle(jenny: Jenny) -> None:
    """It goes with its scope, without the garbage collector."""
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        with open_scope(read_only=True):
            jenny.session.scalars(select(Row)).all()
            session = weakref.ref(jenny.session)
        eventually(lambda: session() is None, "the session is alive", 1)
    finally:
        gc.enable()


def test_S6_read_only_of_two_middlewares_adds_up(jenny: Jenny) -> None:
    """A request reads only where one of the two says so."""
    met: list[str] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        try:
            jenny.session.execute(insert(Row).values(n=1))
        except ReadOnlyError:
            met.append(environ["REQUEST_METHOD"])
        start_response("200 OK", HEADERS)
        return [b"x"]

    both = WSGIRopeMiddleware(WSGIRopeMiddleware(app, read_only=("head",)), read_only=["GET"])
    for method in ("GET", "HEAD", "POST"):
        Server()(both, REQUEST_METHOD=method)
    assert met == ["GET", "HEAD"]


@pytest.mark.parametrize("wrong", ["GET", True, 1, None, [1], ("GET, HEAD",), ("",), b"GET"])
def test_L4_a_wrong_read_only_is_refused(wrong: Any) -> None:
    """A middleware takes methods, a scope by hand a flag; the error says which."""

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    for make in (RopeMiddleware, ASGIRopeMiddleware):
        with pytest.raises(TypeError, match=r'read_only is a collection of methods, as \("GET"'):
            make(app, read_only=wrong)
    if wrong is not True:
        with pytest.raises(TypeError, match="read_only is True or False"):
            open_scope(read_only=wrong)


def test_R1_the_error_is_one_of_ours() -> None:
    """Whoever catches RopeError catches it."""
    assert issubclass(ReadOnlyError, RopeError)
