"""L1 says what is lost, and nothing of what stands without a commit: by each driver."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from inspect import isawaitable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Engine, func, select
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from rope_middleware import (
    AsyncSessionJenny,
    RopeError,
    RopeMiddleware,
    SessionJenny,
    WSGIRopeMiddleware,
    current_scope,
    open_scope,
)
from tests.kit.asgi import http_scope, into_nothing
from tests.kit.either import ONE, Either
from tests.kit.engines import is_async_driver, rows, small_async_engine, small_engine
from tests.kit.leaks import checked_out
from tests.kit.models import Row
from tests.kit.said import Said
from tests.kit.waiting import never
from tests.kit.web import Exchange, Web
from tests.kit.wsgi import make_environ

pytestmark = [pytest.mark.anyio, pytest.mark.told]


@pytest.mark.parametrize("where", ["driver", "engine"])
async def test_L1_nothing_is_said_of_what_stands_without_a_commit(
    driver_url: URL, where: str, said: Said
) -> None:
    """AUTOCOMMIT: what was flushed is there, and what is pending is lost."""
    is_async = is_async_driver(driver_url)
    level = {"isolation_level": "AUTOCOMMIT"}
    options = ONE | (level if where == "driver" else {"execution_options": level})
    async with Either([driver_url], is_async=is_async, engine=options) as either:
        async with either.scope():
            either.jenny.add(Row(n=1))
            await either.do("flush")
        assert said.warnings == []
        async with either.scope():
            assert await either.do("scalar", select(func.count()).select_from(Row)) == 1
            either.jenny.add(Row(n=2))
        (warning,) = said.warnings
        assert "1 Row added" in warning


@pytest.mark.parametrize(
    ("mode", "is_lost"),
    [
        ("conditional_savepoint", False),
        ("rollback_only", False),
        ("create_savepoint", True),
        ("control_fully", True),
    ],
)
def test_L1_nothing_is_said_of_rows_in_the_applications_own_transaction(
    tmp_path: Path, said: Said, mode: Any, is_lost: bool
) -> None:
    """On a lent connection they are the application's to commit, unless the session ends it."""
    engine = small_engine(tmp_path / "x.db")
    with engine.begin() as connection:
        jenny = SessionJenny(sessionmaker(connection, join_transaction_mode=mode))
        with open_scope():
            jenny.add(Row(n=1))
            jenny.flush()
    assert (rows(engine), len(said.warnings)) == ((0, 1) if is_lost else (1, 0))
    engine.dispose()


# -- close() in a scope that commits ---------------------------------------------------------------

CLOSES: dict[str, str] = {
    "close": "close()",
    "remove": "remove()",
    "reset": "reset()",
    "with": "close()",
}


async def closed(web: Web, how: str) -> None:
    jenny: Any = web.store.jenny
    if how == "with" and web.store.is_async:
        async with jenny.session:
            await web.store.add(1)
    elif how == "with":
        with jenny.session:
            await web.store.add(1)
    else:
        await web.store.add(1)
        await close(jenny, how)


async def close(jenny: Any, how: str) -> None:
    await done(jenny if how == "remove" else jenny.session, how)


async def done(what: Any, name: str) -> None:
    found = getattr(what, name)()
    if isawaitable(found):
        await found


@pytest.mark.parametrize("how", CLOSES)
@pytest.mark.parametrize("flushed", [True, False], ids=["flushed", "pending"])
def test_L1_a_close_before_the_commit_says_what_it_has_rolled_back(
    web: Web, said: Said, how: str, flushed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A success without its rows: once for each line, with both lines and the cure."""

    async def pending(n: int) -> None:
        web.store.jenny.session.add(Row(n=n))

    if not flushed:
        monkeypatch.setattr(web.store, "add", pending)

    async def handler(exchange: Exchange) -> None:
        await closed(web, how)
        await exchange.answer(201)

    for _ in range(2):
        assert web.ask(handler, commit_on_success=True).seen == 201
    assert web.store.rows() == []
    (warning,) = said.warnings
    assert (
        "'GET /thing' was a success, and changes are lost: 1 Row added, rolled back by" in warning
    )
    assert CLOSES[how] in warning and "call rollback()" in warning
    assert warning.count(".py:") == (1 if web.store.is_async else 2)


@pytest.mark.parametrize("how", CLOSES)
@pytest.mark.parametrize(
    "why", ["status", "veto", "doom", "error", "rollback", "commit", "no commit", "read"]
)
def test_L1_a_close_is_silent_where_nothing_is_missed(
    web: Web, said: Said, how: str, why: str
) -> None:
    """The outcome was a rollback anyway, or the application has said so, or nothing was written."""

    async def handler(exchange: Exchange) -> None:
        if why in ("rollback", "commit"):
            await web.store.add(2)
            await done(web.store.jenny.session, why)
        if why in ("rollback", "commit", "read"):
            await web.store.read()
            await close(web.store.jenny, "close" if how == "with" else how)
        else:
            await closed(web, how)
        if why == "doom":
            current_scope().doom()
        if why == "error":
            raise RopeError
        await exchange.answer(404 if why == "status" else 200)

    options: dict[str, Any] = {"commit_on_success": True, "commit_veto": lambda *_: why == "veto"}
    web.ask(handler, **({} if why == "no commit" else options))
    assert web.store.rows() == ([2] if why == "commit" else [])
    assert said.warnings == []


@pytest.mark.parametrize("how", CLOSES)
@pytest.mark.parametrize("where", ["except", "finally"])
def test_L1_a_close_by_an_error_is_silent(web: Web, said: Said, how: str, where: str) -> None:
    """It is being handled, or leaves ``with jenny.session:``: a rollback is what was meant."""
    jenny: Any = web.store.jenny

    async def fail() -> None:
        await web.store.add(1)
        raise LookupError

    async def fail_and_close() -> None:
        if how == "with" and web.store.is_async:
            async with jenny.session:
                await fail()
        elif how == "with":
            with jenny.session:
                await fail()
        elif where == "finally":
            try:
                await fail()
            finally:
                await close(jenny, how)
        else:
            try:
                await fail()
            except LookupError:
                await close(jenny, how)

    async def handler(exchange: Exchange) -> None:
        with suppress(LookupError):
            await fail_and_close()
        await exchange.answer(200)

    assert web.ask(handler, commit_on_success=True).seen == 200
    assert (web.store.rows(), said.warnings) == ([], [])


def test_L1_a_close_after_an_error_is_told(web: Web, said: Said) -> None:
    """What is written after an error has been handled, and closed then, is missed."""

    async def handler(exchange: Exchange) -> None:
        for n in (1, 2):
            await web.store.add(n)
            try:
                if n == 1:
                    raise LookupError
            except LookupError:
                await close(web.store.jenny, "close")
        await close(web.store.jenny, "close")
        await exchange.answer(200)

    assert web.ask(handler, commit_on_success=True).seen == 200
    (warning,) = said.warnings
    assert "1 Row added" in warning


def test_L1_a_close_in_a_block_that_commits(tmp_path: Path, said: Said) -> None:
    """`open_scope(commit_on_success=True)` says the same when it ends."""
    engine = small_engine(tmp_path / "x.db")
    jenny = SessionJenny(sessionmaker(engine))
    with open_scope("job", commit_on_success=True):
        jenny.add(Row(n=1))
        jenny.close()
        assert said.warnings == []
        jenny.add(Row(n=2))
    assert rows(engine) == 1
    (warning,) = said.warnings
    assert "'job' was a success, and changes are lost: 1 Row added" in warning
    engine.dispose()


@pytest.mark.parametrize("starts", [True, False])
def test_L1_the_cure_is_not_an_option_that_is_set(tmp_path: Path, said: Said, starts: bool) -> None:
    """A body that the server closes before its end, and an app that starts no response."""
    engine = small_engine(tmp_path / "x.db")
    jenny = SessionJenny(sessionmaker(engine))

    def app(_: Any, start_response: Any) -> Any:
        if starts:
            start_response("200 OK", [])
        jenny.add(Row(n=1))
        jenny.flush()
        yield b"a"
        jenny.add(Row(n=2))
        jenny.flush()
        yield b"b"

    body: Any = WSGIRopeMiddleware(app, commit_on_success=True)(make_environ(), lambda *_: None)
    assert list(islice(body, 2)) == [b"a", b"b"]
    body.close()
    assert rows(engine) == starts  # what was written before the start is committed
    (warning,) = said.warnings
    assert "ended without its commit" in warning and "commit_on_success" not in warning
    assert ("1" if starts else "2") + " Row added" in warning
    engine.dispose()


def test_L1_what_a_thread_writes_in_the_instant_of_the_end_is_told(
    tmp_path: Path, said: Said
) -> None:
    """Between the look that finds nothing open and the end, which that look allows."""
    engine = small_engine(tmp_path / "x.db", connect_args={"check_same_thread": False})
    ending: list[bool] = []

    class Watched(Session):
        @property
        def identity_map(self) -> Any:
            if ending and ending.pop():  # by now it is known that nothing has begun
                pool.submit(write, self).result(30)
            return self.__dict__["kept"]

        @identity_map.setter
        def identity_map(self, kept: Any) -> None:
            self.__dict__["kept"] = kept

    def write(session: Session) -> None:
        session.add(Row(n=1))
        session.flush()

    def app(_: Any, start_response: Any) -> Any:
        jenny.scalar(select(func.count()).select_from(Row))
        start_response("200 OK", [])
        return [b""]

    jenny = SessionJenny(sessionmaker(engine, class_=Watched))
    with ThreadPoolExecutor(1) as pool:
        body: Any = WSGIRopeMiddleware(app, commit_on_success=True)(make_environ(), lambda *_: None)
        ending.append(True)
        body.close()
    assert not ending
    (warning,) = said.warnings
    assert "changes are lost: 1 Row added" in warning
    assert rows(engine) == checked_out(engine) == 0
    engine.dispose()


# -- expunge_all() and its like --------------------------------------------------------------------


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("then", ["", "rollback", "status", "error"])
@pytest.mark.parametrize("how", ["expunge_all", "expunge", "invalidate", "flush, expunge_all"])
def test_L1_what_expunge_all_drops_is_told(
    web: Web, said: Said, how: str, then: str, commits: bool
) -> None:
    """A flush() was forgotten; not where the application says what it means, or rolls back."""

    async def handler(exchange: Exchange) -> None:
        session = web.store.jenny.session
        session.add(Row(n=1))
        try:
            if then == "error":
                raise LookupError
        except LookupError:
            await drop(session)
        else:
            await drop(session)
        if then == "rollback":
            await done(session, "rollback")
        await exchange.answer(404 if then == "status" else 200)

    async def drop(session: Any) -> None:
        if how == "expunge":
            session.expunge(*session.new)
            return
        for method in how.split(", "):
            await done(session, method)

    web.ask(handler, commit_on_success=commits)
    is_written = how == "flush, expunge_all" and then != "rollback"
    assert web.store.rows() == ([1] if is_written and commits and then != "status" else [])
    is_told = how == "expunge_all" and then not in ("rollback", "error")
    if commits and then == "status":
        is_told = False
    assert sum("1 Row dropped by expunge_all()" in one for one in said.warnings) == is_told
    assert len(said.warnings) == (is_told or (is_written and not commits))


@pytest.mark.told
def test_L1_what_is_dropped_counts_once_where_a_base_class_is_listened_to_as_well(
    engine: Engine, said: Said
) -> None:
    class Base(Session):
        """Of a jenny of its own, made later."""

    class Sub(Base):
        """Its class is listened to by then."""

    jennies = [SessionJenny(partial(cls, engine)) for cls in (Sub, Base)]
    for jenny in jennies:
        with open_scope():
            assert jenny.session.scalar(select(1)) == 1
    with open_scope():
        for _ in range(2):
            jennies[0].session.add(Row(n=1))
            jennies[0].session.expunge_all()
    (warning,) = said.warnings
    assert "2 Row dropped by expunge_all()" in warning


# -- what a library begins ------------------------------------------------------------------------

LIBRARY = """
async def asgi(scope, receive, send):
    if scope["path"] == "/one": jenny.add(Row(n=1))
    if scope["path"] == "/two": jenny.add(Row(n=1))
    await jenny.flush()

def wsgi(environ, start_response):
    if environ["PATH_INFO"] == "/one": jenny.add(Row(n=1))
    if environ["PATH_INFO"] == "/two": jenny.add(Row(n=1))
    jenny.flush()
    return []
"""


@pytest.mark.parametrize("protocol", ["asgi", "wsgi"])
async def test_L1_the_line_of_a_library_is_its_own(
    tmp_path: Path, said: Said, protocol: str
) -> None:
    """Not that of a middleware around ours, or of what runs the loop: they began nothing."""
    is_async = protocol == "asgi"
    engine, twin = small_engine(tmp_path / "x.db"), small_async_engine(tmp_path / "x.db")
    maker = async_sessionmaker(twin) if is_async else sessionmaker(engine)
    jenny: Any = AsyncSessionJenny(maker) if is_async else SessionJenny(maker)
    library: dict[str, Any] = {"jenny": jenny, "Row": Row}
    exec(compile(LIBRARY, "/env/site-packages/notes/views.py", "exec"), library)
    app = RopeMiddleware(library[protocol])

    async def outer(path: str) -> None:
        if is_async:
            await asyncio.create_task(app(http_scope(path), never, into_nothing))
            await app(http_scope(path), never, into_nothing)
        else:
            body: Any = app(make_environ(path), lambda *_: print)
            body.close()

    for path in ("/one", "/two", "/one"):
        await outer(path)
    one, two = said.warnings
    first = 3 if is_async else 8
    assert f"(transaction begun at notes/views.py:{first})" in one
    assert f"(transaction begun at notes/views.py:{first + 1})" in two
    engine.dispose()
    await twin.dispose()
