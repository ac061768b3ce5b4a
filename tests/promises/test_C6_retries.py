"""C6: a transaction that the database refuses is run again."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from contextvars import Context
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError, OperationalError

from rope_middleware import ASGIRopeMiddleware, Scope, WSGIRopeMiddleware, current_scope, open_scope
from tests.kit.asgi import http_scope, into_nothing
from tests.kit.models import Row
from tests.kit.stores import Lock, open_store
from tests.kit.waiting import never
from tests.kit.web import Exchange, Web


@pytest.mark.parametrize("commits", [False, True])
@pytest.mark.parametrize("frame", ["raises", "answers 500"])
def test_C6_a_refused_transaction_is_run_again(
    web: Web, lock: Lock, frame: str, commits: bool
) -> None:
    """SQLite says busy once; the client sees one success, and the row is there once."""
    tries: list[Scope] = []
    closed: list[int] = []

    async def handler(exchange: Exchange) -> None:
        scope = current_scope()
        assert all(scope is not earlier for earlier in tries), "a fresh scope each time"
        assert scope.info == {}
        assert exchange.carrier["rope_middleware.scope"] is scope
        scope.info["try"] = len(tries)
        tries.append(scope)
        number = len(tries)
        scope.on_close(lambda: closed.append(number))
        if number == 2:
            assert closed == [1], "the failed try has been closed"
            assert tries[0].closed
            lock.release()
        try:
            await web.store.add(1)
        except OperationalError:
            if frame == "raises":
                raise
            await exchange.answer(500, b"as a framework does")
            return
        if not commits:
            await web.store.commit()
        await exchange.answer(201, str(number).encode())

    answer = web.ask(handler, commit_on_success=commits, retries=3)
    assert (answer.status, answer.body, answer.complete) == (201, b"2", True)
    assert answer.error is None
    assert web.store.rows() == [1]
    assert closed == [1, 2]


@pytest.mark.parametrize("begun", [True, False])
def test_C6_a_refusal_of_code_without_the_scope_is_run_again(
    web: Web, lock: Lock, begun: bool
) -> None:
    """A task or a thread of an empty context uses the request's session, and swallows the error."""
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(len(tries))
        if len(tries) == 2:
            lock.release()
        session = web.store.jenny.session
        if begun:
            await web.store.read()
        session.add(Row(n=1))
        try:
            if web.store.is_async:
                await asyncio.create_task(session.flush(), context=Context())
            else:
                Context().run(session.flush)
        except OperationalError:
            await exchange.answer(500)
        else:
            await exchange.answer(201)

    assert web.ask(handler, commit_on_success=True, retries=3).status == 201
    assert (len(tries), web.store.rows()) == (2, [1])


def test_C6_sqlalchemys_recipe_for_sqlite_is_run_again(web: Web, lock: Lock) -> None:
    """Its BEGIN, sent before there is a transaction, is no statement that stands at once."""

    @event.listens_for(web.store.engine, "connect")
    def _(connection: Any, record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(web.store.engine, "begin")
    def _(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(len(tries))
        if len(tries) == 2:
            lock.release()
        await web.store.add(1)
        await exchange.answer(201)

    web.store.engine.dispose()
    assert web.ask(handler, commit_on_success=True, retries=3).status == 201
    assert (len(tries), web.store.rows()) == (2, [1])


@pytest.mark.parametrize("options", [{}, {"retries": 2}], ids=str)
def test_C6_it_gives_up_after_n_tries(web: Web, lock: Lock, options: dict[str, int]) -> None:
    """The last error is the answer: `retries=2` is three tries in all, and the default is one."""
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        await web.store.add(1)
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True, **options)
    assert len(tries) == 1 + options.get("retries", 0)
    assert answer.seen == 500
    assert answer.whole
    if answer.error is not None:
        assert isinstance(answer.error, OperationalError)
    assert web.store.rows() == []


def test_C6_the_last_answer_of_the_framework_is_sent_when_the_tries_are_used_up(
    web: Web, lock: Lock
) -> None:
    """A held 5xx is not lost: it is sent whole."""

    async def handler(exchange: Exchange) -> None:
        try:
            await web.store.add(1)
        except OperationalError:
            await exchange.start(503, ("retry-after", "1"))
            await exchange.chunk(b"one ")
            await exchange.chunk(b"two")

    answer = web.ask(handler, retries=2)
    assert (answer.status, answer.body, answer.complete) == (503, b"one two", True)
    assert ("retry-after", "1") in answer.headers
    assert answer.error is None


@pytest.mark.parametrize("status", [200, 302, 409, 429])
def test_C6_an_answer_under_500_stands(web: Web, lock: Lock, status: int) -> None:
    """An application that dealt with the refusal itself is not run again."""
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        try:
            await web.store.add(1)
        except OperationalError:
            await web.store.rollback()
        await exchange.answer(status, b"dealt with")

    answer = web.ask(handler, retries=3)
    assert (answer.status, answer.body, len(tries)) == (status, b"dealt with", 1)


@pytest.mark.parametrize("frame", ["raises", "answers 500"])
def test_C6_another_error_is_not_tried_again(web: Web, frame: str) -> None:
    """A broken constraint would break again."""
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        try:
            await web.store.add(1)
            web.store.jenny.session.expunge_all()
            await web.store.add(1)
        except IntegrityError:
            if frame == "raises":
                raise
            await exchange.answer(500)

    answer = web.ask(handler, retries=3)
    assert (answer.seen, len(tries)) == (500, 1)


@pytest.mark.told
def test_C6_a_plain_500_is_not_tried_again(web: Web) -> None:
    """Without a refused transaction a 5xx is the application's own business."""
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        await web.store.add(1)
        await exchange.answer(500, b"mine")

    answer = web.ask(handler, retries=3)
    assert (answer.status, answer.body, len(tries)) == (500, b"mine", 1)


def test_C6_the_body_is_replayed(web: Web, lock: Lock) -> None:
    """Each try reads the same body from its start."""
    bodies: list[bytes] = []

    async def handler(exchange: Exchange) -> None:
        bodies.append(await exchange.body())
        if len(bodies) == 3:
            lock.release()
        await web.store.add(1)
        await exchange.answer(200, bodies[-1])

    pieces = [b"a" * 1000, b"", b"b" * 50_000, b"c"]
    answer = web.ask(handler, method="POST", body=pieces, commit_on_success=True, retries=3)
    assert bodies == [b"".join(pieces)] * 3
    assert (answer.status, answer.body) == (200, b"".join(pieces))
    assert web.store.rows() == [1]


def test_C6_a_body_read_in_part_is_replayed_whole(web: Web, lock: Lock) -> None:
    """A first try that failed before it had read all leaves the rest for the second."""
    tries: list[bytes] = []

    async def handler(exchange: Exchange) -> None:
        if not tries:
            tries.append(b"")
            await web.store.add(1)
        lock.release()
        tries.append(await exchange.body())
        await web.store.add(1)
        await exchange.answer(200)

    answer = web.ask(
        handler, method="POST", body=[b"one", b"two", b"three"], commit_on_success=True, retries=1
    )
    assert answer.status == 200
    assert tries == [b"", b"onetwothree"]


@pytest.mark.parametrize(("size", "again"), [(2**20, True), (2**20 + 1, False)])
def test_C6_a_body_over_the_replay_limit_is_not_tried_again(
    web: Web, lock: Lock, size: int, again: bool
) -> None:
    """The limit is 1 MiB; a larger body reaches the application whole, once."""
    seen: list[int] = []

    async def handler(exchange: Exchange) -> None:
        seen.append(len(await exchange.body()))
        if len(seen) == 2:
            lock.release()
        await web.store.add(1)
        await exchange.answer(200)

    half = size // 2
    answer = web.ask(
        handler,
        method="POST",
        body=[b"a" * half, b"b" * (size - half)],
        commit_on_success=True,
        retries=1,
    )
    assert seen == ([size, size] if again else [size])
    assert answer.seen == (200 if again else 500)
    assert answer.whole


def test_C6_never_after_the_response_started(web: Web, lock: Lock) -> None:
    """A stream that meets a busy database is not run again under a started response."""
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        await exchange.answer(200, b"x")
        await web.store.add(1)
        await exchange.chunk(b"y")

    answer = web.ask(handler, retries=3)
    assert len(tries) == 1
    assert (answer.status, answer.body, answer.complete) == (200, b"x", False)
    assert isinstance(answer.error, OperationalError)


@pytest.mark.parametrize("writes", [True, False])
def test_C6_never_after_a_session_committed(web: Web, writes: bool) -> None:
    """What is committed cannot be taken back: nothing is run twice, whatever the commit wrote."""
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        await (web.store.add(len(tries)) if writes else web.store.read())
        await web.store.commit()
        lock = Lock(web.store.path)
        try:
            await web.store.add(100)
        finally:
            lock.close()

    answer = web.ask(handler, retries=3)
    assert len(tries) == 1
    assert answer.seen == 500
    assert web.store.rows() == ([1] if writes else [])


def test_C6_never_after_a_commit_that_the_application_has_cut_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A time-out of its own has cut off its commit, which may stand: it is in doubt, and told."""
    tries: list[int] = []

    async def main() -> list[int]:
        async with open_store(tmp_path / "cut.db", patience=0.01) as store:

            async def app(scope: Any, receive: Any, send: Any) -> None:
                tries.append(1)
                await store.add(len(tries))
                commit = asyncio.create_task(store.commit())
                event.listen(store.engine, "commit", lambda _: commit.cancel(), once=True)
                with suppress(asyncio.CancelledError):
                    await commit
                await store.rollback()
                lock = Lock(store.path)
                try:
                    await store.add(100)
                finally:
                    lock.close()

            with pytest.raises(OperationalError):
                await ASGIRopeMiddleware(app, retries=3)(http_scope(), never, into_nothing)
            return store.rows()

    assert asyncio.run(main()) == [1]
    assert len(tries) == 1
    assert (
        "by the application itself, is in doubt: asyncio.exceptions.CancelledError" in caplog.text
    )


def test_C6_another_scopes_commit_does_not_forbid_a_retry(web: Web, lock: Lock) -> None:
    """Only sessions of the request's own scope count."""
    tries: list[int] = []
    web_of_inner = web.other_store(web.store.path.with_name("inner.db"))

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        if web.store.is_async:
            async with open_scope():
                await web_of_inner.add(len(tries))
                await web_of_inner.commit()
        else:
            with open_scope():
                await web_of_inner.add(len(tries))
                await web_of_inner.commit()
        if len(tries) == 2:
            lock.release()
        await web.store.add(1)
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True, retries=2)
    assert (answer.status, len(tries)) == (200, 2)
    assert web_of_inner.rows() == [1, 2]
    if web_of_inner.is_async:
        web.loop.run(web_of_inner.async_engine.dispose())
    else:
        web_of_inner.engine.dispose()


def test_C6_each_retry_is_logged_and_on_commit_runs_for_the_try_that_committed(
    web: Web, lock: Lock, caplog: pytest.LogCaptureFixture
) -> None:
    """A line with the request and the error's class; callbacks of a failed try are gone with it."""
    caplog.set_level(logging.DEBUG, "rope_middleware")
    called: list[int] = []
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        number = len(tries)
        current_scope().on_commit(lambda: called.append(number))
        if number == 3:
            lock.release()
        await web.store.add(1)
        await exchange.answer(200)

    assert web.ask(handler, commit_on_success=True, retries=5).status == 200
    assert called == [3]
    lines = [
        record.getMessage()
        for record in caplog.records
        if record.name == "rope_middleware" and "OperationalError" in record.getMessage()
    ]
    assert len([line for line in lines if "GET /thing" in line]) >= 2, caplog.text


def test_C6_the_carrier_is_a_copy_for_each_try(web: Web, lock: Lock) -> None:
    """What the first try put into `scope` or `environ` is not there in the second."""
    carriers: list[dict[str, Any]] = []

    async def handler(exchange: Exchange) -> None:
        assert "mine" not in exchange.carrier
        exchange.carrier["mine"] = True
        carriers.append(exchange.carrier)
        if len(carriers) == 2:
            lock.release()
        await web.store.add(1)
        await exchange.answer(200)

    assert web.ask(handler, commit_on_success=True, retries=2).status == 200
    assert len(carriers) == 2
    assert carriers[0] is not carriers[1]


def test_C6_a_stream_is_not_held_back(web: Web) -> None:
    """With `retries` a success that streams reaches the client chunk by chunk."""
    seen: list[int] = []

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)
        assert seen == [200] or web.wsgi
        await exchange.chunk(b"y")
        assert seen == [200]

    answer = web.ask(handler, commit_on_success=True, retries=3, at_start=seen.append)
    assert (answer.body, answer.error) == (b"xy", None)


def test_C6_a_disconnect_reaches_an_app_behind_the_replay() -> None:
    """After the body `receive` still tells that the client has gone."""
    messages = [
        {"type": "http.request", "body": b"a", "more_body": False},
        {"type": "http.disconnect"},
    ]
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((await receive())["type"])
        seen.append((await receive())["type"])

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    asyncio.run(ASGIRopeMiddleware(app, retries=2)(http_scope(), receive, into_nothing))
    assert seen == ["http.request", "http.disconnect"]


def test_C6_negative_retries_are_refused() -> None:
    """A number of tries that makes no sense is an error at once."""

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    def wsgi_app(environ: Any, start_response: Any) -> list[bytes]:
        return []

    with pytest.raises((ValueError, TypeError)):
        ASGIRopeMiddleware(app, retries=-1)
    with pytest.raises((ValueError, TypeError)):
        WSGIRopeMiddleware(wsgi_app, retries=-1)
