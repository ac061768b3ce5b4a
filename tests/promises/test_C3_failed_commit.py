"""C3: a commit that fails is one complete error response, and no row."""

from __future__ import annotations

import asyncio
import gc
import logging
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy.util import await_only

from rope_middleware import (
    ASGIRopeMiddleware,
    AsyncSessionJenny,
    SessionJenny,
    WSGIRopeMiddleware,
    open_scope,
)
from tests.kit.asgi import asgi_app, ask
from tests.kit.engines import MakeEngine
from tests.kit.leaks import checked_out
from tests.kit.models import Row
from tests.kit.waiting import PATIENCE
from tests.kit.web import Exchange, Web
from tests.kit.wsgi import Server, make_environ


class Stop(StopIteration):
    """What a future takes for a result, where it is not looked at."""


@pytest.mark.parametrize("error", [StopIteration, Stop])
@pytest.mark.parametrize("commit", [False, True])
def test_C3_a_listener_that_raises_stop_iteration_fails_as_any_other(
    make_engine: MakeEngine, error: type[Exception], commit: bool
) -> None:
    """No success without its row, and no request that waits for ever."""
    engine = make_engine()
    jenny = SessionJenny(sessionmaker(engine))

    @event.listens_for(engine, "commit" if commit else "rollback")
    def fail(connection: Any) -> None:
        raise error

    app = ASGIRopeMiddleware(
        asgi_app(lambda: jenny.execute(text("SELECT 1"))), commit_on_success=commit
    )
    statuses: list[int] = []

    async def main() -> None:
        await asyncio.wait_for(ask(app, statuses), PATIENCE)

    if commit:
        with pytest.raises(RuntimeError, match="StopIteration"):
            asyncio.run(main())
        assert statuses == []
    else:
        asyncio.run(main())
        assert statuses == [200]
    assert checked_out(engine) == 0


@pytest.mark.parametrize("lazily", [False, True])
def test_C3_a_commit_that_fails_is_one_complete_error_response(web: Web, lazily: bool) -> None:
    """A deferred constraint shows at the commit: a 500, whole and alone, and no row."""
    raised: list[BaseException] = []

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await web.store.add_orphan(1)
        try:
            await exchange.answer(200, b"done")
        except Exception as error:
            raised.append(error)
            raise

    answer = web.ask(handler, commit_on_success=True, lazily=lazily)
    assert answer.seen == 500
    assert answer.whole
    assert b"done" not in answer.body
    if not web.wsgi:
        assert len(raised) == 1, "the error is raised inside the app's send"
        assert isinstance(raised[0], IntegrityError)
    assert web.store.rows() == []
    assert web.store.orphans() == 0


@pytest.mark.parametrize("later", ["goes on", "another success", "another failure"])
def test_C3_an_app_that_swallows_the_error_cannot_turn_it_into_a_success(
    later: str, tmp_path: Path
) -> None:
    """Body that belongs to the refused start is dropped; a new 2xx becomes a 500; a 4xx passes."""
    for kind in ("asgi-async", "asgi-sync"):
        web = Web(kind, tmp_path / f"{kind}.db")

        async def handler(exchange: Exchange, web: Web = web) -> None:
            await web.store.add(1)
            await web.store.add_orphan(1)
            with pytest.raises(IntegrityError):
                await exchange.start(200)
            if later == "another success":
                await exchange.start(201)
            elif later == "another failure":
                await exchange.start(409)
            await exchange.chunk(b"text of the app")

        answer = web.ask(handler, commit_on_success=True)
        assert answer.whole
        if later == "another failure":
            assert (answer.seen, answer.body) == (409, b"text of the app")
        else:
            assert answer.seen == 500
            assert b"text of the app" not in answer.body
        assert web.store.rows() == []
        assert web.store.orphans() == 0
        assert web.store.held() == 0
        web.close()


@pytest.mark.parametrize("web", ["wsgi"], indirect=True)
def test_C3_a_wsgi_app_that_swallows_the_error_cannot_turn_it_into_a_success(web: Web) -> None:
    """Whatever a WSGI app does around its start, nobody reads a 2xx without its row."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add_orphan(1)
        for _ in range(2):
            try:
                await exchange.start(200)
            except Exception:
                pass
            else:
                break
        try:
            await exchange.chunk(b"text of the app")
        except GeneratorExit:
            raise
        except Exception:
            pass

    answer = web.ask(handler, commit_on_success=True)
    assert answer.seen == 500
    assert answer.whole
    assert web.store.orphans() == 0


def test_C3_a_failed_commit_of_the_second_transaction_does_not_hide(
    web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    """After the start a failed commit cannot change the status: it is logged, no row is there."""
    caplog.set_level(logging.DEBUG, "rope_middleware")

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)
        await web.store.add_orphan(2)

    answer = web.ask(handler, commit_on_success=True)
    assert answer.status == 200
    assert web.store.rows() == [1]
    assert web.store.orphans() == 0
    assert "IntegrityError" in caplog.text


def test_C3_the_log_names_the_request_and_the_class_and_no_value(
    web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    """The line of a failed commit helps and gives nothing away: no values, no query string."""
    caplog.set_level(logging.DEBUG, "rope_middleware")

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        web.store.jenny.session.add(Row(n=77123456))
        await web.store.commit()
        web.store.jenny.session.expunge_all()
        web.store.jenny.session.add(Row(n=77123456))  # refused in the commit's own flush
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True)
    assert answer.seen == 500
    lines = [record for record in caplog.records if record.name == "rope_middleware"]
    assert any(
        "GET /thing" in record.getMessage() and "IntegrityError" in record.getMessage()
        for record in lines
    ), caplog.text
    written = "\n".join(logging.Formatter().format(record) for record in lines)
    assert "77123456" not in written
    assert "secret" not in written


def test_C3_a_rollback_is_logged_with_its_reason(
    web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    """Each rollback that undoes something says which request, and why."""
    caplog.set_level(logging.DEBUG, "rope_middleware")

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(404)

    web.ask(handler, commit_on_success=True)
    messages = [r.getMessage() for r in caplog.records if r.name == "rope_middleware"]
    assert any("GET /thing" in line and "404" in line for line in messages), messages


@pytest.mark.parametrize("retries", [0, 1])
@pytest.mark.parametrize("web", ["asgi-async"], indirect=True)
def test_C3_a_commit_that_outlives_a_timeout_is_not_answered_by_an_error(
    retries: int, web: Web
) -> None:
    """A time limit within the application ends in the middle of the commit, which stands."""
    event.listen(web.store.engine, "commit", lambda connection: await_only(asyncio.sleep(0.3)))
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        await web.store.add(len(tries))
        try:
            async with asyncio.timeout(0.1):
                await exchange.start(200)
        except TimeoutError:
            await exchange.start(504)
        await exchange.chunk(b"late")

    answer = web.ask(handler, commit_on_success=True, retries=retries)
    held = web.store.held()
    assert held == 0
    assert (web.store.rows(), answer.seen, len(tries)) in (([1], 200, 1), ([], 504, 1))


class CommitFailedError(Exception):
    """Raised by a listener: what a database raises SQLAlchemy itself keeps in a cycle."""


@pytest.mark.told
@pytest.mark.parametrize("number", [1, 2], ids=["one session", "two sessions"])
@pytest.mark.parametrize(
    ("way", "is_async"),
    [
        *(("request", False), ("request", True), ("async with", False), ("async with", True)),
        *(("with", False), ("wsgi", False)),
    ],
)
def test_C3_P4_the_error_of_a_failed_commit_is_gone_when_it_is_caught(
    tmp_path: Path, way: str, is_async: bool, number: int
) -> None:
    """Nothing of ours keeps it, and all that its traceback refers to, until a collection."""
    kept: list[ref[Exception]] = []

    async def request(served: Any) -> None:
        try:
            if way == "request":
                await ask(served)
            elif way == "async with":
                async with open_scope(commit_on_success=True):
                    await served()
            elif way == "wsgi":
                Server()(served, make_environ())
            else:
                with open_scope(commit_on_success=True):
                    await served()
        except CommitFailedError:
            pass

    async def main() -> None:
        url = f"sqlite+aiosqlite:///{tmp_path}/a.db" if is_async else f"sqlite:///{tmp_path}/a.db"
        engine: Any = (create_async_engine if is_async else create_engine)(url)
        maker: Any = (async_sessionmaker if is_async else sessionmaker)(engine)
        kind: Any = AsyncSessionJenny if is_async else SessionJenny
        jennies = [kind(maker) for _ in range(number)]

        async def work() -> None:
            for jenny in jennies:
                found = jenny.execute(text("PRAGMA user_version"))
                if is_async:
                    await found

        def wsgi_app(_: Any, start_response: Any) -> list[bytes]:
            for jenny in jennies:
                jenny.execute(text("PRAGMA user_version"))
            start_response("200 OK", [])
            return [b""]

        @event.listens_for(engine.sync_engine if is_async else engine, "commit")
        def fail(_: Any) -> None:
            error = CommitFailedError()
            kept.append(ref(error))
            try:
                raise error
            finally:
                del error

        served = {
            "request": ASGIRopeMiddleware(asgi_app(work), commit_on_success=True),
            "wsgi": WSGIRopeMiddleware(wsgi_app, commit_on_success=True),
        }.get(way, work)
        for _ in range(3):  # the first imports what an error needs
            await asyncio.create_task(request(served))
        await asyncio.sleep(0)
        assert len(kept) == 3
        assert [one() for one in kept[1:]] == [None, None]
        found = engine.dispose()
        if is_async:
            await found

    gc.collect()
    gc.disable()
    logging.disable()  # what pytest has logged it keeps
    try:
        asyncio.run(main())
    finally:
        logging.disable(logging.NOTSET)
        gc.enable()
