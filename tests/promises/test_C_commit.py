"""C1, C2, C4, C7: which outcome commits, when, and in which order."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, insert
from sqlalchemy.exc import IntegrityError

from rope_middleware import ASGIRopeMiddleware, WSGIRopeMiddleware, current_scope, open_scope
from tests.kit.asgi import into_nothing, serve, websocket_scope
from tests.kit.engines import rows
from tests.kit.models import Child, Row
from tests.kit.sessions import Jenny
from tests.kit.waiting import PATIENCE, never
from tests.kit.ways import BLOCKS, Way
from tests.kit.web import Exchange, Web
from tests.kit.wsgi import Server, make_environ


def test_C10_the_commit_does_not_wait_for_a_statement_that_failed(web: Web) -> None:
    """A row that is there already, and the application goes on: the answer comes at once."""
    asked: list[float] = []

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        with pytest.raises(IntegrityError):
            await web.store.execute(insert(Row).values(n=1))
        asked.append(time.monotonic())
        await exchange.answer(201)

    gc.disable()  # it would find the failed statement, sooner or later
    try:
        answer = web.ask(handler, commit_on_success=True)
    finally:
        gc.enable()
    assert (answer.seen, web.store.rows()) == (201, [1])
    assert time.monotonic() - asked[0] < 5, "it waited for close_timeout, 10 seconds"


@pytest.mark.told
def test_C1_what_is_committed_stays_and_the_rest_is_rolled_back(web: Web) -> None:
    """Without the option the application's own commit counts, and nothing after it."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await web.store.commit()
        await web.store.add(2)
        await exchange.answer(200)
        await web.store.add(3)

    answer = web.ask(handler)
    assert (answer.status, answer.complete, answer.error) == (200, True, None)
    assert web.store.rows() == [1]


@pytest.mark.parametrize("status", [200, 201, 204, 302, 304, 399, 400, 404, 422, 500, 503])
def test_C2_a_status_under_400_commits_and_any_other_rolls_back(web: Web, status: int) -> None:
    """The row of a successful request is there, that of another one is not; the answer passes."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(status, b"" if status < 400 else b"sorry")

    answer = web.ask(handler, commit_on_success=True)
    assert (answer.status, answer.complete) == (status, True)
    assert answer.body == (b"" if status < 400 else b"sorry")
    assert web.store.rows() == ([1] if status < 400 else [])


@pytest.mark.parametrize("lazily", [False, True])
def test_C2_the_commit_comes_before_the_client_can_see_a_success(web: Web, lazily: bool) -> None:
    """When the status goes out on the wire, another connection already reads the row."""
    seen: list[list[int]] = []

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)

    answer = web.ask(
        handler,
        at_start=lambda status: seen.append(web.store.rows()),
        lazily=lazily,
        commit_on_success=True,
    )
    assert answer.status == 200
    assert seen == [[1]]


def test_C2_what_is_written_between_start_and_body_is_committed_too(web: Web) -> None:
    """An application may start its response first and write afterwards."""

    async def handler(exchange: Exchange) -> None:
        await exchange.start(200)
        await web.store.add(1)
        await exchange.chunk(b"x")

    answer = web.ask(handler, commit_on_success=True)
    assert (answer.status, answer.complete) == (200, True)
    assert web.store.rows() == [1]


@pytest.mark.parametrize("vetoed", [False, True])
def test_C2_the_veto_gets_an_int_and_pairs_of_str_and_decides(web: Web, vetoed: bool) -> None:
    """`commit_veto(status, headers)` is asked with plain values in both protocols."""
    asked: list[tuple[int, list[tuple[str, str]]]] = []

    def veto(status: int, headers: list[tuple[str, str]]) -> bool:
        asked.append((status, headers))
        return vetoed

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200, b"x", ("x-commit", "no"))

    answer = web.ask(handler, commit_on_success=True, commit_veto=veto)
    assert (answer.status, answer.body) == (200, b"x")
    assert asked == [(200, [("content-type", "text/plain"), ("x-commit", "no")])]
    assert type(asked[0][0]) is int
    assert web.store.rows() == ([] if vetoed else [1])


def test_C2_a_veto_that_raises_commits_nothing(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    """A broken veto is no permission: one error response, no row, and its error is told."""

    def veto(status: int, headers: list[tuple[str, str]]) -> bool:
        raise LookupError("broken veto")

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True, commit_veto=veto)
    assert answer.seen == 500
    assert answer.whole
    assert "broken veto" in f"{answer.error} {caplog.text}"
    assert web.store.rows() == []


def test_C2_a_doomed_scope_does_not_commit(web: Web) -> None:
    """After `Scope.doom()` a success is sent and nothing is written."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        current_scope().doom()
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True)
    assert (answer.status, answer.body, answer.complete) == (200, b"x", True)
    assert web.store.rows() == []


@pytest.mark.parametrize("why", ["status", "veto", "doom"])
def test_C2_after_a_refusal_nothing_later_commits(web: Web, why: str) -> None:
    """What the stream writes after a 4xx, a veto or a doom is rolled back as well."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        if why == "doom":
            current_scope().doom()
        await exchange.answer(404 if why == "status" else 200)
        await web.store.add(2)
        await exchange.chunk(b"y")
        await web.store.add(3)

    answer = web.ask(
        handler, commit_on_success=True, commit_veto=lambda status, headers: why == "veto"
    )
    assert (answer.body, answer.complete) == (b"xy", True)
    assert web.store.rows() == []


def test_C2_work_after_the_start_is_a_second_transaction(web: Web) -> None:
    """What a stream writes is committed when the scope ends."""
    seen: list[list[int]] = []

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)
        await web.store.add(2)
        seen.append(web.store.rows())
        await exchange.chunk(b"y")
        await web.store.add(3)

    answer = web.ask(handler, commit_on_success=True)
    assert (answer.body, answer.complete, answer.error) == (b"xy", True, None)
    assert seen == [[1]]
    assert web.store.rows() == [1, 2, 3]


@pytest.mark.parametrize("why", ["error", "doom"])
def test_C2_work_after_the_start_is_rolled_back_if_it_raises_or_is_doomed(
    web: Web, why: str
) -> None:
    """The first transaction stands; the second one, of a stream that breaks, does not."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)
        await web.store.add(2)
        if why == "doom":
            current_scope().doom()
        await exchange.chunk(b"y")
        if why == "error":
            raise LookupError("in the stream")

    answer = web.ask(handler, commit_on_success=True)
    assert isinstance(answer.error, LookupError) is (why == "error")
    assert answer.complete is (why == "doom")
    assert web.store.rows() == [1]


def test_C2_without_a_response_nothing_is_committed(web: Web) -> None:
    """An application that raises before it answers has written nothing; its error passes."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        raise LookupError("no answer")

    answer = web.ask(handler, commit_on_success=True)
    assert answer.seen == 500
    assert answer.whole
    if answer.error is not None:
        assert isinstance(answer.error, LookupError)
    assert web.store.rows() == []


def test_C2_a_session_first_used_after_the_start_commits_at_the_end(web: Web) -> None:
    """A session need not exist when the response starts."""

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(200)
        await web.store.add(1)

    assert web.ask(handler, commit_on_success=True).status == 200
    assert web.store.rows() == [1]


@pytest.mark.told
def test_C2_a_removed_session_is_not_committed(web: Web) -> None:
    """`remove()` closes, and so rolls back, what it removes; the next session is committed."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        removed = web.store.jenny.remove()
        if web.store.is_async:
            await removed
        await web.store.add(2)
        await exchange.answer(200)

    assert web.ask(handler, commit_on_success=True).status == 200
    assert web.store.rows() == [2]


@pytest.mark.parametrize("web", ["asgi-async", "asgi-sync"], indirect=True)
@pytest.mark.parametrize("fails", [False, True])
def test_C2_a_websocket_commits_when_its_call_ends_without_an_error(fails: bool, web: Web) -> None:
    """The scope of a WebSocket has one transaction: its call."""
    sent: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await web.store.add(1)
        assert web.store.rows() == []
        await send({"type": "websocket.send", "text": "hello"})
        assert web.store.rows() == []
        if fails:
            raise LookupError("in the socket")

    async def send(message: Any) -> None:
        sent.append(message["type"])

    wrapped = ASGIRopeMiddleware(app, commit_on_success=True)
    with pytest.raises(LookupError, match="in the socket") if fails else nullcontext():
        web.loop.run(wrapped(websocket_scope(), never, send))
    assert sent == ["websocket.accept", "websocket.send"]
    assert web.store.rows() == ([] if fails else [1])


@pytest.mark.parametrize("around", ["a request", "open_scope"])
def test_C2_a_session_class_with_a_close_of_its_own_is_committed_once(
    web: Web, around: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its close() is called once, off the event loop, and it is not asked for a second commit."""
    closed: list[bool] = []
    session_class: Any = type(web.store.jenny.session_factory())
    original = session_class.close

    if web.store.is_async:

        async def close(session: Any) -> None:
            closed.append(False)
            await original(session)
    else:

        def close(session: Any) -> None:  # type: ignore[misc]
            closed.append(threading.current_thread() is threading.main_thread())
            original(session)

    monkeypatch.setattr(session_class, "close", close)

    async def handler(exchange: Exchange) -> None:
        if around == "a request":
            await web.store.add(1)
        else:
            async with open_scope(commit_on_success=True):
                await web.store.add(1)
        await exchange.answer(201)

    if around == "open_scope" and web.wsgi:
        with open_scope(commit_on_success=True):
            web.store.jenny.add(Row(n=1))
    else:
        assert web.ask(handler, commit_on_success=around == "a request").seen == 201
    assert web.store.rows() == [1]
    assert web.store.commits == [web.store.path.stem]
    assert closed == [web.wsgi]


@pytest.mark.parametrize("method", ["commit", "flush"])
@pytest.mark.parametrize("of", ["its class", "itself"])
def test_C2_a_commit_or_flush_of_the_applications_own_is_called(
    web: Web, of: str, method: str
) -> None:
    """Of the session that the factory makes: what it does besides is not passed over."""
    called: list[str] = []
    factory = web.store.jenny.session_factory
    session_class: Any = type(factory())
    original = getattr(session_class, method)

    def own(session: Any, *told: Any) -> Any:
        called.append(method)
        return original(session, *told)

    def make() -> Any:
        session = factory()
        target = session if of == "itself" else session_class
        patch.setattr(target, method, partial(own, session) if of == "itself" else own)
        return session

    async def handler(exchange: Exchange) -> None:
        web.store.jenny.add(Row(n=1))
        await exchange.answer(200)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web.store.jenny, "session_factory", make)
        assert web.ask(handler, commit_on_success=True).status == 200
    assert called == [method]
    assert web.store.rows() == [1]


DENIALS: dict[str, list[dict[str, Any]]] = {
    "closed before it was accepted": [{"type": "websocket.close", "code": 1008}],
    "denied by a response": [
        {"type": "websocket.http.response.start", "status": 403, "headers": []},
        {"type": "websocket.http.response.body", "body": b"no"},
    ],
    "never answered": [],
}


@pytest.mark.parametrize("denial", DENIALS)
@pytest.mark.parametrize("inner", [False, True], ids=["one", "an inner one commits"])
@pytest.mark.parametrize("web", ["asgi-async", "asgi-sync"], indirect=True)
def test_C2_a_websocket_that_is_not_accepted_commits_nothing(
    inner: bool, denial: str, web: Web
) -> None:
    """Its client has been told no."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await web.store.add(1)
        for message in DENIALS[denial]:
            await send(message)

    wrapped = ASGIRopeMiddleware(app, commit_on_success=True)
    if inner:
        wrapped = ASGIRopeMiddleware(wrapped)
    web.loop.run(wrapped(websocket_scope(), into_nothing, into_nothing))
    assert web.store.rows() == []


@pytest.mark.parametrize("web", ["asgi-async"], indirect=True)
def test_C2_a_cancelled_request_commits_nothing(web: Web) -> None:
    """A client that goes away before the answer leaves no row."""
    reached = asyncio.Event()

    async def handler() -> None:
        await web.store.add(1)
        reached.set()
        await never()

    async def run() -> None:
        task = asyncio.ensure_future(serve(handler, commit_on_success=True))
        await asyncio.wait_for(reached.wait(), PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert web.store.held() == 0

    web.loop.run(run())
    assert web.store.rows() == []


@pytest.mark.parametrize("web", ["wsgi"], indirect=True)
def test_C2_a_wsgi_body_that_is_closed_early_keeps_its_first_transaction(web: Web) -> None:
    """A client that leaves in the middle of a stream does not undo what its status told."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        web.store.jenny.session.add(Row(n=1))
        start_response("200 OK", [])
        yield b"x"
        yield b"y"

    assert Server(take=1)(WSGIRopeMiddleware(app, commit_on_success=True)).body == b"x"
    assert web.store.rows() == [1]


@pytest.mark.parametrize("web", ["wsgi"], indirect=True)
def test_C2_the_write_callable_commits_before_it_writes(web: Web) -> None:
    """PEP 3333's `write()` is a way to show a success, so the commit stands before it."""
    seen: list[list[int]] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        web.store.jenny.session.add(Row(n=1))
        write = start_response("200 OK", [])
        write(b"x")
        return []

    def write(data: bytes) -> None:
        seen.append(web.store.rows())

    body: Any = WSGIRopeMiddleware(app, commit_on_success=True)(make_environ(), lambda *_: write)
    assert b"".join(body) == b""
    if hasattr(body, "close"):
        body.close()
    assert seen == [[1]]


@pytest.mark.told
@pytest.mark.parametrize("way", BLOCKS)
def test_C2_open_scope_commits_when_the_block_ends_without_an_error(
    jenny: Jenny, engine: Engine, way: Way
) -> None:
    """With `commit_on_success` a block, or each call of a function, is one transaction."""

    def work(ends: Any = lambda: None) -> None:
        before = rows(engine)
        jenny.session.add(Row(name="x"))
        jenny.session.flush()
        assert rows(engine) == before
        ends()

    def fail() -> None:
        raise LookupError

    way(work, commit_on_success=True)
    way(work, commit_on_success=True)
    with pytest.raises(LookupError):
        way(lambda: work(fail), commit_on_success=True)
    way(lambda: work(current_scope().doom), commit_on_success=True)
    way(work)
    assert rows(engine) == 2


@pytest.mark.told
@pytest.mark.parametrize("web", ["asgi-async"], indirect=True)
def test_C2_async_open_scope_commits_when_the_block_ends_without_an_error(web: Web) -> None:
    """`async with open_scope(commit_on_success=True)` is one transaction, as a call of `@` is."""

    async def run() -> None:
        async with open_scope(commit_on_success=True):
            await web.store.add(1)
            assert web.store.rows() == []
        assert web.store.rows() == [1]
        with pytest.raises(LookupError):
            async with open_scope(commit_on_success=True):
                await web.store.add(2)
                raise LookupError
        assert [await added(5), await added(6)] == [5, 6]
        async with open_scope(commit_on_success=True) as scope:
            await web.store.add(3)
            scope.doom()
        async with open_scope():
            await web.store.add(4)
        assert web.store.rows() == [1, 5, 6]
        assert web.store.held() == 0

    @open_scope(commit_on_success=True)
    async def added(n: int) -> int:
        await web.store.add(n)
        return n

    web.loop.run(run())


@pytest.mark.parametrize("web", ["asgi-async", "wsgi"], indirect=True)
def test_C2_a_commit_that_fails_in_open_scope_raises_out_of_the_block(web: Web) -> None:
    """The caller of a block whose commit failed is told so."""
    closed: list[bool] = []

    async def run_async() -> None:
        async with open_scope(commit_on_success=True) as scope:
            scope.on_close(lambda: closed.append(scope.closed))
            await web.store.add_orphan(1)

    def run() -> None:
        with open_scope(commit_on_success=True) as scope:
            scope.on_close(lambda: closed.append(scope.closed))
            web.store.jenny.session.add(Child(n=1, parent=99))

    with pytest.raises(IntegrityError):
        run() if web.wsgi else web.loop.run(run_async())
    assert web.store.orphans() == 0
    assert web.store.held() == 0
    assert len(closed) == 1


@pytest.mark.parametrize("web", ["wsgi"], indirect=True)
def test_C2_an_inner_scope_commits_for_itself(web: Web) -> None:
    """The inner scope's commit stands when the outer one is rolled back."""
    with pytest.raises(LookupError), open_scope(commit_on_success=True):
        assert web.store.jenny.session.get(Row, 1) is None
        with open_scope(commit_on_success=True):
            web.store.jenny.session.add(Row(n=1))
        assert web.store.rows() == [1]
        web.store.jenny.session.add(Row(n=2))
        raise LookupError
    assert web.store.rows() == [1]


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("writes", [True, False])
def test_C4_a_stream_holds_no_connection(web: Web, status: int, writes: bool) -> None:
    """When the response has started, the session's connection is back in the pool."""
    held: list[int] = []

    async def handler(exchange: Exchange) -> None:
        await (web.store.add(1) if writes else web.store.read())
        held.append(web.store.held())
        await exchange.answer(status)
        held.append(web.store.held())
        await exchange.chunk(b"y")
        held.append(web.store.held())

    web.ask(handler, commit_on_success=True)
    assert held == [1, 0, 0]


def test_C7_sessions_commit_in_the_order_they_were_made(web: Web, tmp_path: Path) -> None:
    """The order of first use decides, not the order of the jennies' birth."""
    second = web.other_store(tmp_path / "second.db")
    third = web.other_store(tmp_path / "third.db")
    order: list[str] = []
    web.store.commits = second.commits = third.commits = order

    async def handler(exchange: Exchange) -> None:
        await third.add(1)
        await web.store.add(1)
        await second.add(1)
        await exchange.answer(200)

    assert web.ask(handler, commit_on_success=True).status == 200
    assert order == ["third", "first", "second"]
    for store in (second, third):
        assert store.rows() == [1]
        assert store.held() == 0
        web.loop.run(store.dispose())


def test_C7_after_a_commit_that_fails_the_later_sessions_are_rolled_back(
    web: Web, tmp_path: Path
) -> None:
    """What can still be undone is undone, and the client is told of the failure."""
    second = web.other_store(tmp_path / "second.db")

    async def handler(exchange: Exchange) -> None:
        await web.store.add_orphan(1)
        await second.add(1)
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True)
    assert answer.seen == 500
    assert answer.whole
    assert web.store.orphans() == 0
    assert second.rows() == []
    assert second.held() == 0
    web.loop.run(second.dispose())


def test_C7_sync_and_async_sessions_of_one_scope_commit_together(tmp_path: Path) -> None:
    """Two jennies of two colours side by side under ASGI."""
    web = Web("asgi-async", tmp_path / "async.db")
    sync = Web("asgi-sync", tmp_path / "sync.db")
    order: list[str] = []
    web.store.commits = sync.store.commits = order

    async def handler(exchange: Exchange) -> None:
        await sync.store.add(1)
        await web.store.add(1)
        await exchange.answer(200)

    assert web.ask(handler, commit_on_success=True).status == 200
    assert order == ["sync", "async"]
    assert web.store.rows() == sync.store.rows() == [1]
    assert web.store.held() == sync.store.held() == 0
    web.close()
    sync.close()
