"""The benchmark's lower bound does what it says: a bound that did less would prove nothing."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from math import inf
from typing import Any

import pytest
from sqlalchemy import create_engine, event, insert, inspect, text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, make_transient_to_detached, sessionmaker

from benchmarks import __main__ as bench
from benchmarks import database, least, sites
from benchmarks.check import rows
from benchmarks.database import POOL, Database, Item, Note
from benchmarks.drivers import ENVIRON, SCOPE, receive
from benchmarks.least import Holder, KnownInThread, holders
from benchmarks.measure import Spread
from benchmarks.sites import COROUTINES, LEAST, LEAST_COMMIT, THREADS, WAYS, WSGI
from tests.kit.waiting import eventually

KINDS = [WSGI, THREADS, COROUTINES]


@pytest.fixture(scope="module")
def where() -> Iterator[Database]:
    with database.sqlite() as made:
        yield made


async def serve(kind: str, app: Any, path: str, at_start: Any) -> None:
    """Serve one request to its end, and call `at_start` when its response starts."""
    if kind == WSGI:
        app(ENVIRON | {"PATH_INFO": path}, lambda *args: at_start()).close()
        return

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            at_start()

    await app(SCOPE | {"path": path}, receive, send)


async def holders_at_the_start(kind: str, app: Any, path: str) -> list[Holder]:
    seen: list[Holder] = []
    await serve(kind, app, path, lambda: seen.extend(holders()))
    return seen


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
async def test_H1_the_least_that_knows_lists_an_open_transaction(
    kind: str, where: Database
) -> None:
    """Whose it is, by which line of the handler, in which thread or task; nothing after its end."""
    code = (sites._async_select if kind == COROUTINES else sites._select).__code__
    line = f"sites.py:{code.co_firstlineno + 1}"
    async with AsyncExitStack() as stack:
        app = WAYS[LEAST](kind, where, stack)
        (one,) = await holders_at_the_start(kind, app, "/select")
        assert (one.began, one.has_connection, one.waits) == (line, True, False)
        assert one.scope.get("PATH_INFO", one.scope.get("path")) == "/select"
        assert one.engine == (where.async_url if kind == COROUTINES else where.url)
        assert one.now
        for path in ("/closed", "/touch", "/none"):
            assert await holders_at_the_start(kind, app, path) == []
        app = WAYS[LEAST_COMMIT](kind, where, stack)
        assert await holders_at_the_start(kind, app, "/select") == []
    assert holders() == []


@pytest.fixture
def sessions(where: Database) -> Iterator[sessionmaker[KnownInThread]]:
    """Sessions of the least that knows, over two connections."""
    engine = create_engine(where.url, **POOL | {"pool_size": 2})
    yield least.sessions(engine, is_async=False)
    engine.dispose()


def test_H3_the_least_that_knows_sees_who_waits_and_refuses_a_deadlock(
    sessions: sessionmaker[KnownInThread],
) -> None:
    """One thread holds all connections: another waits, and that one must not wait for itself."""

    def wait() -> None:
        with sessions() as session:
            session.connection()

    with sessions() as first, sessions() as second, sessions() as third:
        line = sys._getframe().f_lineno + 1
        first.begin()
        assert holders()[0].began == f"test_benchmarks.py:{line}"
        first.connection()
        second.connection()
        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: [one.waits for one in holders()] == [False, False, True], "it waits")
        assert "test_benchmarks.py" in holders()[2].now
        with pytest.raises(PoolTimeout, match="deadlock"):
            third.connection()
    thread.join()
    assert holders() == []


def _core(session: Session) -> None:
    session.execute(insert(Note).values(text="lost"))


def _text(session: Session) -> None:
    session.execute(text("INSERT INTO note (text) VALUES ('lost')"))


def _flushed(session: Session) -> None:
    session.add(Note(text="lost"))
    session.flush()


def _pending(session: Session) -> None:
    session.add(Note(text="lost"))


@pytest.mark.parametrize("write", [_core, _text, _flushed, _pending])
@pytest.mark.parametrize("end", ["close", "commit", "rollback"])
def test_L1_the_least_that_knows_notices_what_is_lost(
    sessions: sessionmaker[KnownInThread],
    caplog: pytest.LogCaptureFixture,
    write: Any,
    end: str,
) -> None:
    """By the ORM, Core and text, flushed and pending; not what the application has ended itself."""
    with caplog.at_level(logging.WARNING, "benchmarks.least"), sessions() as session:
        write(session)
        getattr(session, end)()
    line = f"test_benchmarks.py:{write.__code__.co_firstlineno + 1}"
    assert [line in told for told in caplog.messages] == ([True] if end == "close" else [])


def test_S3_the_least_that_knows_invalidates_what_it_cannot_give_back(
    sessions: sessionmaker[KnownInThread],
) -> None:
    """Its rollback fails: the error comes out, and the pool has its place back."""
    session = sessions()
    session.execute(text("DELETE FROM note"))
    engine: Any = session.get_bind()
    event.listen(engine, "rollback", _fail)
    with pytest.raises(RuntimeError, match="it fails"):
        session.close()
    event.remove(engine, "rollback", _fail)
    assert engine.pool.checkedout() == 0
    with sessions() as other:  # it is not locked
        other.execute(text("DELETE FROM note"))
        other.commit()


def _fail(*args: object) -> None:
    raise RuntimeError("it fails")


@pytest.mark.anyio
@pytest.mark.parametrize("kind", KINDS)
async def test_S3_S4_the_least_that_knows_refuses_what_comes_too_late(
    kind: str, where: Database
) -> None:
    """A session of a request that has ended is closed, and begins nothing, however often."""
    kept: list[Any] = []

    def keep_an_item() -> None:
        scope, item = least.current.get(), Item(id=1)
        session = scope.session.sync_session if kind == COROUTINES else scope.session
        make_transient_to_detached(item)
        session.add(item)
        session.rollback()  # of nothing: it is still idle
        kept.extend((scope, session, item))

    async with AsyncExitStack() as stack:
        await serve(kind, WAYS[LEAST](kind, where, stack), "/touch", keep_an_item)
        scope, session, item = kept
        assert inspect(item).detached
        for _ in range(2):
            with pytest.raises(RuntimeError, match="its request has ended"):
                session.connection()
        assert session.get_bind().pool.checkedout() == 0
    token = least.current.set(scope)
    with pytest.raises(RuntimeError, match="its request has ended"):
        least.opener(sessionmaker(), is_async=False)()
    least.current.reset(token)


def test_S4_the_least_that_knows_refuses_a_statement_on_what_is_given_back(
    sessions: sessionmaker[KnownInThread],
) -> None:
    """The request ends while a thread is on its way from the connection to the statement."""
    session = sessions()
    connection = session.connection()
    with pytest.raises(RuntimeError, match="its request has ended"):
        event.listen(connection, "before_cursor_execute", lambda *args: session.close())
        connection.execute(text("SELECT 1"))
    assert holders() == []


def test_W2_W3_the_least_that_knows_is_current_only_within_and_ends_once(where: Database) -> None:
    """Nothing of it shows while the body waits; a body that nobody closes ends all the same."""
    app = least.wsgi(lambda *args: [b"%d" % least.current.get().is_over], commit=False)
    body: Any = app({}, None)
    scope = body.scope
    assert list(body) == [b"0"]
    assert least.current.get(None) is None
    assert not scope.is_over
    del body
    assert scope.is_over
    assert least.current.get(None) is None


def test_P2_the_page_says_which_aims_are_out_of_reach() -> None:
    """Only what is above by more than the error of the measurement."""
    for runs, told in (
        ([1.02, 1.03, 1.04], "in reach"),
        ([1.02, 1.04, 1.06], "unclear"),
        ([1.07, 1.08, 1.08], "out of reach"),
    ):
        assert bench.reach(Spread.of(runs), 1.03) == told


def test_P2_the_short_check_asks_for_all_that_is_promised() -> None:
    """It leaves out only what the least that knows takes, which fails nothing."""
    short, full = ([row.title for row in rows(is_short)] for is_short in (True, False))
    assert [title for title in full if LEAST not in title] == short
    assert all(row.bound == inf for row in rows() if LEAST in row.title)
