"""C3: the commit of a transaction that the database has aborted is a failed commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import Context
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from rope_middleware import (
    AsyncSessionJenny,
    RopeError,
    RopeMiddleware,
    SessionJenny,
    current_scope,
    open_scope,
)
from tests.kit.asgi import ASGIClient, answer
from tests.kit.engines import small_engine
from tests.kit.models import Row
from tests.kit.shop import SHOPS, Answer, Work, ask_once
from tests.servers.postgres import Database


@pytest.fixture
def database(emptied: Callable[[], Database]) -> Database:
    found = emptied()
    found.query("INSERT INTO row VALUES (0)")
    return found


def ask(kind: str, database: Database, work: Work, **options: object) -> Answer:
    url = database.url(SHOPS[kind])
    return ask_once(kind, url, work, commit_on_success=True, **options)


def rows(database: Database) -> list[int]:
    return [n for (n,) in database.query("SELECT n FROM row WHERE n > 0 ORDER BY n")]


def duplicate(session: Session) -> None:
    session.execute(text("INSERT INTO row VALUES (0)"))


def swallow(session: Session, n: int) -> int:
    session.add(Row(n=n))
    session.flush()
    try:
        duplicate(session)
    except IntegrityError:
        pass
    return 201


def swallow_at_the_commit(session: Session, n: int) -> int:
    session.add(Row(n=n))
    session.flush()

    @event.listens_for(session, "before_commit")
    def _(session: Session) -> None:
        try:
            duplicate(session)
        except IntegrityError:
            pass

    return 201


@pytest.mark.parametrize("retries", [0, 1])
@pytest.mark.parametrize("work", [swallow, swallow_at_the_commit])
def test_C3_a_swallowed_error_is_no_success(
    kind: str, database: Database, work: Work, retries: int
) -> None:
    """PostgreSQL would answer COMMIT with ROLLBACK: 5xx, no row, and nothing waits for it."""
    ran: list[int] = []

    def with_callback(session: Session, n: int) -> int:
        current_scope().on_commit(lambda: ran.append(n))
        return work(session, n)

    answer = ask(kind, database, with_callback, retries=retries)
    assert answer.status == 500
    assert (rows(database), ran) == ([], [])
    if kind != "wsgi":
        assert isinstance(answer.error, RopeError)
        assert "begin_nested" in str(answer.error)
        assert "uplicate" in str(answer.error.__cause__)


@pytest.mark.parametrize("inside", ["error", "start"])
def test_C3_a_swallowed_error_is_no_success_of_an_inner_scope(
    database: Database, inside: str
) -> None:
    """An open_scope() is around the error or the start: the transaction is the request's."""
    engine = create_async_engine(database.url("asyncpg"))
    jenny = AsyncSessionJenny(async_sessionmaker(engine))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = jenny.session
        async with open_scope() if inside == "error" else nullcontext():
            await session.run_sync(swallow, 1)
        async with open_scope() if inside == "start" else nullcontext():
            await answer(send)

    async def serve() -> None:
        with pytest.raises(RopeError, match="begin_nested"):
            await ASGIClient()(RopeMiddleware(app, commit_on_success=True), "/")
        await engine.dispose()

    asyncio.run(serve())


@pytest.mark.parametrize("is_plain", [False, True])
def test_C3_a_swallowed_error_of_a_task_without_the_scope_is_no_success(
    database: Database, is_plain: bool
) -> None:
    """A task of an empty context, or of one that was there before, uses the request's session."""
    engine = create_async_engine(database.url("asyncpg"))
    maker = async_sessionmaker(engine)
    plain = async_scoped_session(maker, scopefunc=current_scope)
    jenny: Any = plain if is_plain else AsyncSessionJenny(maker)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = jenny()
        await session.run_sync(lambda session: session.connection())
        await asyncio.create_task(session.run_sync(swallow, 1), context=Context())
        await answer(send)

    async def serve() -> None:
        registries = [plain] if is_plain else []
        try:
            with pytest.raises(RopeError, match="begin_nested"):
                await ASGIClient()(RopeMiddleware(app, registries, commit_on_success=True), "/")
        finally:
            await engine.dispose()

    asyncio.run(serve())


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_C3_no_other_session_is_committed_before_one_that_is_aborted(
    database: Database, driver: str
) -> None:
    """What can be known is known before the first of several sessions is committed."""
    engines = [create_async_engine(database.url(driver)) for _ in range(2)]
    first, second = [AsyncSessionJenny(async_sessionmaker(engine)) for engine in engines]

    async def serve() -> None:
        with pytest.raises(RopeError, match="begin_nested"):
            async with open_scope(commit_on_success=True):
                first.add(Row(n=1))
                await first.flush()
                await second.session.run_sync(swallow, 2)
        for engine in engines:
            await engine.dispose()

    asyncio.run(serve())
    assert rows(database) == []


def test_C3_an_error_in_a_savepoint_aborts_nothing(kind: str, database: Database) -> None:
    """What was rolled back to a savepoint is over: the rest is committed."""

    def work(session: Session, n: int) -> int:
        session.add(Row(n=n))
        session.flush()
        try:
            with session.begin_nested():
                duplicate(session)
        except IntegrityError:
            pass
        return 201

    assert ask(kind, database, work).status == 201
    assert rows(database) == [1]


def test_C3_after_a_rollback_of_the_applications_own_it_is_another_transaction(
    kind: str, database: Database
) -> None:
    """The application has rolled back, and written anew."""

    def work(session: Session, n: int) -> int:
        try:
            duplicate(session)
        except IntegrityError:
            session.rollback()
        session.add(Row(n=n))
        return 201

    assert ask(kind, database, work).status == 201
    assert rows(database) == [1]


def test_C3_the_drivers_own_connection_may_have_aborted_it(database: Database) -> None:
    """psycopg knows of every statement, whoever has sent it."""

    def work(session: Session, n: int) -> int:
        session.add(Row(n=n))
        session.flush()
        driver = session.connection().connection.driver_connection
        with pytest.raises(Exception, match="uplicate"):
            driver.execute("INSERT INTO row VALUES (0)")  # type: ignore[union-attr]
        return 201

    assert ask("wsgi", database, work).status == 500
    assert rows(database) == []


def test_C3_a_swallowed_refusal_is_tried_again(kind: str, database: Database) -> None:
    """A serialization failure that the application swallows: the request is run again."""
    tries: list[int] = []

    def work(session: Session, n: int) -> int:
        tries.append(n)
        session.add(Row(n=n))
        session.flush()
        if len(tries) == 1:
            try:
                session.execute(
                    text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$")
                )
            except Exception:
                pass
        return 201

    assert ask(kind, database, work, retries=2).status == 201
    assert (rows(database), len(tries)) == ([1], 2)


def test_C3_in_an_open_scope(database: Database) -> None:
    """`open_scope(commit_on_success=True)` raises, too."""
    from sqlalchemy import create_engine
    from sqlalchemy.orm import sessionmaker

    engine = create_engine(database.url("psycopg"))
    jenny = SessionJenny(sessionmaker(engine))
    with pytest.raises(RopeError, match="begin_nested"), open_scope(commit_on_success=True):
        swallow(jenny.session, 1)
    engine.dispose()
    assert rows(database) == []


def test_C3_sqlite_ends_a_transaction_at_some_errors(tmp_path: Path) -> None:
    """ON CONFLICT ROLLBACK takes with it what was written before."""
    from sqlalchemy.orm import sessionmaker

    engine = small_engine(tmp_path / "x.db")
    jenny = SessionJenny(sessionmaker(engine))
    with open_scope(commit_on_success=True):
        jenny.session.add(Row(n=1))
    with pytest.raises(RopeError, match="begin_nested"), open_scope(commit_on_success=True):
        jenny.session.add(Row(n=2))
        jenny.session.flush()
        with pytest.raises(IntegrityError):
            jenny.session.execute(text("INSERT OR ROLLBACK INTO row (n) VALUES (1)"))
        jenny.session.add(Row(n=3))
    with pytest.raises(OperationalError), jenny.session.begin():
        jenny.session.execute(text("SELECT * FROM nowhere"))
    with pytest.raises(RopeError, match="begin_nested"), open_scope(commit_on_success=True):
        jenny.session.add(Row(n=5))
        jenny.session.flush()
        with pytest.raises(IntegrityError):
            Context().run(jenny.session.execute, text("INSERT OR ROLLBACK INTO row (n) VALUES (1)"))
    with open_scope(commit_on_success=True):  # an error that ends nothing
        jenny.session.add(Row(n=4))
        jenny.session.flush()
        with pytest.raises(IntegrityError):
            jenny.session.execute(text("INSERT INTO row (n) VALUES (1)"))
    assert jenny.session.scalars(text("SELECT n FROM row")).all() == [1, 4]
    jenny.remove()
    engine.dispose()
