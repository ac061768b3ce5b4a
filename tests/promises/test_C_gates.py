"""C2, C3, W1: how a response passes the gate, in the orders in which real applications send it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import logging
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session, scoped_session

from rope_middleware import ASGIRopeMiddleware, WSGIRopeMiddleware, current_scope, open_scope
from tests.kit.asgi import ASGIClient, answer, http_scope
from tests.kit.engines import rows
from tests.kit.leaks import checked_out
from tests.kit.models import Row
from tests.kit.programs import ROOT
from tests.kit.sessions import Jenny
from tests.kit.waiting import PATIENCE, never
from tests.kit.wsgi import HEADERS, Server, make_environ
from tests.servers.asgi import HOST, free_port, run_command


def refuse_commits(jenny: Jenny) -> None:
    @event.listens_for(jenny.session_factory, "before_commit")
    def no(session: Session) -> None:
        raise RuntimeError("a constraint says no")


# -- ASGI ----------------------------------------------------------------------------------------


def asked(app: Any, method: str = "POST") -> list[Any]:
    """Return the messages that the server gets, whatever the app raises."""
    client = ASGIClient()
    with contextlib.suppress(RuntimeError):
        asyncio.run(client(app, "/thing", method))
    return client.messages


def test_A2_start_and_body_sent_from_two_tasks_come_in_order(jenny: Jenny, engine: Engine) -> None:
    """What is sent while the commit is under way waits for it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        jenny.session.add(Row(name="x"))
        await asyncio.gather(
            send({"type": "http.response.start", "status": 201, "headers": []}),
            send({"type": "http.response.body", "body": b"a", "more_body": True}),
            send({"type": "http.response.body", "body": b"b"}),
        )

    messages = asked(ASGIRopeMiddleware(app, commit_on_success=True))
    assert [m.get("status", m.get("body")) for m in messages] == [201, b"a", b"b"]
    assert rows(engine) == 1


START, BODY = "http.response.start", "http.response.body"
RESPONSES: dict[str, list[Any]] = {
    "bare": [{"type": START, "status": 201}, {"type": BODY}],
    "tuples": [
        {"type": START, "status": 200, "headers": ((b"a", b"1"), (b"a", b"2"))},
        {"type": BODY, "body": b"x", "more_body": True},
        {"type": BODY, "body": b"", "more_body": False},
    ],
    "extensions": [
        {"type": "http.response.early_hint", "links": [b"</a>; rel=preload"]},
        {"type": "http.response.push", "path": "/a", "headers": []},
        {"type": "http.response.debug", "info": {"template": "a"}},
        {"type": START, "status": 200, "headers": [], "trailers": True, "reason": b"own key"},
        {"type": BODY, "body": b"x", "own": 1},
        {"type": "http.response.trailers", "headers": [(b"b", b"3")], "more_trailers": False},
    ],
    "refused": [{"type": START, "status": 404, "own": 1}, {"type": BODY, "body": b"none"}],
    "path": [{"type": START, "status": 206}, {"type": "http.response.pathsend", "path": "/f"}],
}


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize(
    "options",
    [
        {"commit_on_success": True},
        {"commit_on_success": True, "commit_veto": lambda *_: False},
        {"commit_on_success": True, "commit_veto": lambda *_: True},
        {"commit_on_success": True, "retries": 1},
        {"commit_on_success": True, "max_active": 1},
    ],
    ids=["commit", "veto", "vetoed", "retries", "max_active"],
)
@pytest.mark.parametrize("writes", [True, False])
def test_A2_each_message_passes_as_it_came(
    options: dict[str, Any], name: str, writes: bool, jenny: Jenny
) -> None:
    """With every key that it has, and none that it has not; the application's own is untouched."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if writes:
            jenny.session.add(Row(name="x"))
        for message in sent:
            await send(message)

    sent = copy.deepcopy(RESPONSES[name])
    assert asked(ASGIRopeMiddleware(app, **options)) == RESPONSES[name]
    assert sent == RESPONSES[name]


@pytest.mark.parametrize("kind", ["body", "pathsend", "zerocopysend", "trailers"])
def test_C3_what_follows_a_failed_commit_is_the_plain_500(
    kind: str, jenny: Jenny, engine: Engine
) -> None:
    """An app that swallows the error may go on with any message of a response."""
    refuse_commits(jenny)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        jenny.session.add(Row(name="x"))
        with contextlib.suppress(RuntimeError):
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": f"http.response.{kind}"})

    messages = asked(ASGIRopeMiddleware(app, commit_on_success=True))
    assert [m["type"] for m in messages] == ["http.response.start", "http.response.body"]
    assert messages[0]["status"] == 500
    assert rows(engine) == 0


@pytest.mark.parametrize("outer", [{"max_active": 2}, {"retries": 1}, {"registries": True}])
def test_S6_the_response_passes_one_gate(outer: dict[str, Any], jenny: Jenny) -> None:
    """Whatever the outer middleware is for: the inner one's veto is asked once."""
    if "registries" in outer:
        outer = {"registries": [scoped_session(jenny.session_factory, scopefunc=current_scope)]}
    asked_for: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        jenny.session.add(Row(name="x"))
        with contextlib.suppress(RuntimeError):
            await send({"type": "http.response.start", "status": 200, "headers": []})

    def veto(status: int, headers: Any) -> bool:
        asked_for.append(status)
        return False

    inner = ASGIRopeMiddleware(app, commit_on_success=True, commit_veto=veto)
    both = ASGIRopeMiddleware(inner, **outer)
    assert [m["status"] for m in asked(both)] == asked_for == [200]
    refuse_commits(jenny)  # the app swallows the error and keeps quiet
    assert [m.get("status", m.get("body")) for m in asked(both)] == [500, b"Internal Server Error"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_C3_the_plain_500_of_a_head_has_no_body(method: str, jenny: Jenny) -> None:
    """RFC 9110 9.3.2: its bytes would be the beginning of the next response."""
    refuse_commits(jenny)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        jenny.session.add(Row(name="x"))
        with contextlib.suppress(RuntimeError):
            await answer(send)

    def wsgi_app(environ: Any, start_response: Any) -> Any:
        jenny.session.add(Row(name="x"))
        start_response("200 OK", HEADERS)
        return []

    body = b"Internal Server Error" if method == "GET" else b""
    messages = asked(ASGIRopeMiddleware(app, commit_on_success=True), method)
    assert [m["body"] for m in messages[1:]] == [body]
    environ = make_environ(REQUEST_METHOD=method)
    seen = Server()(WSGIRopeMiddleware(wsgi_app, commit_on_success=True), environ)
    assert seen.starts[-1][0].startswith("500")
    assert dict(seen.starts[-1][1])["Content-Length"] == "21"
    assert seen.body == body


def test_C3_a_commit_that_fails_while_a_time_limit_cancels_is_no_success(
    jenny: Jenny, engine: Engine
) -> None:
    """An earlier commit of the application says nothing of this one."""

    @event.listens_for(jenny.session_factory, "before_commit")
    def slowly(session: Session) -> None:
        if any(isinstance(row, Row) and row.name == "second" for row in session.new):
            time.sleep(0.3)
            raise RuntimeError("no")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        jenny.session.add(Row(name="first"))
        jenny.session.commit()
        jenny.session.add(Row(name="second"))
        await answer(send)

    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await ASGIRopeMiddleware(app, commit_on_success=True)(http_scope(), never, send)

    asyncio.run(main())
    assert messages == []
    assert rows(engine) == 1
    assert checked_out(engine) == 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_Y2_a_commit_that_stands_is_answered_by_its_success(
    backend: str, jenny: Jenny, engine: Engine
) -> None:
    """A time limit that is up during the commit is felt after the response's start."""

    @event.listens_for(engine, "commit")
    def slowly(connection: Any) -> None:
        time.sleep(0.3)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        jenny.session.add(Row(name="x"))
        await answer(send, 201)

    statuses: list[int] = []

    async def send(message: Any) -> None:
        await anyio.lowlevel.checkpoint()
        if "status" in message:
            statuses.append(message["status"])

    async def main() -> None:
        with anyio.move_on_after(0.1):
            await ASGIRopeMiddleware(app, commit_on_success=True)(http_scope(), never, send)

    anyio.run(main, backend=backend)
    assert (statuses, rows(engine)) == ([201], 1)


# -- WSGI ----------------------------------------------------------------------------------------


def committing(app: Any, **options: Any) -> Any:
    return WSGIRopeMiddleware(app, commit_on_success=True, **options)


@pytest.mark.parametrize("options", [{}, {"retries": 2}])
def test_C2_a_stream_whose_first_chunk_fails_is_not_committed(
    options: Any, jenny: Jenny, engine: Engine
) -> None:
    """The response starts with its first chunk, and so does the commit."""

    def app(environ: Any, start_response: Any) -> Any:
        jenny.session.add(Row(name="x"))
        start_response("200 OK", HEADERS)

        def body() -> Iterator[bytes]:
            raise ValueError("the template has a bug")
            yield b""

        return body()

    seen = Server()(committing(app, **options))
    assert seen.error == (ValueError, "the template has a bug")
    assert seen.result is None and not seen.output  # raised in the call: every server has a 500
    assert rows(engine) == 0


def test_C2_a_stream_is_committed_before_its_first_chunk(jenny: Jenny, engine: Engine) -> None:
    """What the server gets to see of a success is committed, and it started before the body."""
    there: list[int] = []

    def app(environ: Any, start_response: Any) -> Any:
        jenny.session.add(Row(name="x"))
        start_response("200 OK", HEADERS)
        return iter([b"a", b"b"])

    body = committing(app)(make_environ(), lambda *_: there.append(rows(engine)))
    assert there == [1]  # granian reads what start_response was told as soon as it has the body
    assert list(body) == [b"a", b"b"]


@pytest.mark.parametrize("is_plain", [False, True], ids=["jenny", "registries"])
def test_C2_the_commit_before_a_stream_is_of_the_requests_own_scope(
    is_plain: bool, jenny: Jenny, engine: Engine
) -> None:
    """Also where the first chunk has opened another scope, that is open around several chunks."""
    seen: list[Any] = []
    plain: Any = scoped_session(jenny.session_factory, scopefunc=current_scope)
    mine = plain if is_plain else jenny

    def app(environ: Any, start_response: Any) -> Any:
        scope = current_scope()
        scope.on_commit(lambda: seen.append(current_scope() is scope))
        mine().add(Row(name="x"))
        start_response("200 OK", HEADERS)

        def body() -> Iterator[bytes]:
            with open_scope() as inner:
                for chunk in (b"a", b"b"):
                    mine()
                    yield chunk
                    assert current_scope() is inner

        return body()

    middleware = committing(app, registries=[plain] if is_plain else [])
    body = middleware(make_environ(), lambda *_: seen.append(rows(engine)))
    assert (seen, list(body)) == ([True, 1], [b"a", b"b"])
    body.close()


@pytest.mark.told
@pytest.mark.parametrize("protocol", ["asgi", "wsgi"])
@pytest.mark.parametrize("is_plain", [False, True], ids=["jenny", "registries"])
def test_C2_a_response_that_starts_within_an_inner_scope_is_committed_before(
    is_plain: bool, protocol: str, jenny: Jenny, engine: Engine
) -> None:
    """The commit is of the request's own scope, whatever scope is open where it starts."""
    seen: list[Any] = []
    plain: Any = scoped_session(jenny.session_factory, scopefunc=current_scope)
    mine = plain if is_plain else jenny

    def work() -> None:
        scope = current_scope()
        scope.on_commit(lambda: seen.append(current_scope() is scope))
        mine().add(Row(name="x"))

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        work()
        with open_scope():
            mine()
            await answer(send)

    def wsgi(environ: Any, start_response: Any) -> Any:
        work()
        with open_scope():
            mine()
            start_response("200 OK", HEADERS)(b"a")
        return []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            seen.append(rows(engine))

    def start(*_: Any) -> Any:
        seen.append(rows(engine))
        return seen.append

    registries = [plain] if is_plain else []
    if protocol == "asgi":
        served = ASGIRopeMiddleware(asgi, registries, commit_on_success=True)
        asyncio.run(served(http_scope("/", "POST"), never, send))
    else:
        committing(wsgi, registries=registries)(make_environ(), start).close()
    assert seen[:2] == [True, 1]


@pytest.mark.parametrize("rest", [[], [b"c"], iter([b"c", b"d"])], ids=["none", "list", "stream"])
def test_C2_what_is_written_reaches_a_server_without_write(
    jenny: Jenny, engine: Engine, rest: Any
) -> None:
    """As the beginning of the body: the commit stands by then, and must not become a 500."""
    then = b"" if rest == [] else b"c" if isinstance(rest, list) else b"cd"

    def app(environ: Any, start_response: Any) -> Any:
        jenny.session.add(Row(name="x"))
        write = start_response("200 OK", HEADERS)
        write(b"a")
        write(b"b")
        return rest

    body: Any = committing(app)(make_environ(), lambda *_: None)
    assert b"".join(body) == b"ab" + then
    body.close()
    assert rows(engine) == 1


def test_W1_what_a_body_writes_as_it_is_read_is_not_dropped_in_silence(jenny: Jenny) -> None:
    """PEP 3333 forbids it; a server without write() says so, as without the middleware."""

    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", HEADERS)
        yield b"a"
        write(b"b")

    body: Any = committing(app)(make_environ(), lambda *_: None)
    with pytest.raises(TypeError, match="not callable"):
        list(body)
    body.close()


WRITES = """
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker
from rope_middleware import SessionJenny, WSGIRopeMiddleware

jenny = SessionJenny(sessionmaker(create_engine("sqlite:///written.db")), strict=True)

def writes(environ, start_response):
    if environ["REQUEST_METHOD"] == "POST":
        jenny.execute(text("CREATE TABLE t (n INTEGER)"))
        jenny.execute(text("INSERT INTO t VALUES (1)"))
    write = start_response("200 OK", [("Content-Type", "text/plain")])
    write(b"rows: ")
    return [str(jenny.scalar(text("SELECT count(*) FROM t"))).encode()]

app = WSGIRopeMiddleware(writes, commit_on_success=True)
"""


@pytest.mark.slow
def test_C2_granian_has_no_write_and_gets_what_is_written(tmp_path: Path) -> None:
    """A server of today, by its own command."""
    pytest.importorskip("granian")
    (tmp_path / "writes_app.py").write_text(WRITES)
    port = free_port()
    command = [
        *(sys.executable, "-m", "granian", "--interface", "wsgi", "--host", HOST),
        *("--port", str(port), "--blocking-threads", "2", "--workers-kill-timeout", "10"),
        "writes_app:app",
    ]
    with run_command(command, cwd=tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}") as granian:
        granian.wait_for_port(port)
        for ask in (httpx.post, httpx.get):
            answered = ask(f"http://{HOST}:{port}/", timeout=PATIENCE)
            assert (answered.status_code, answered.text) == (200, "rows: 1")
        granian.interrupt()


def test_C3_a_stream_whose_commit_fails_is_the_plain_500(
    jenny: Jenny, caplog: pytest.LogCaptureFixture
) -> None:
    """In place of the whole body; the log has the traceback, once."""
    refuse_commits(jenny)

    def app(environ: Any, start_response: Any) -> Any:
        jenny.session.add(Row(name="x"))
        start_response("200 OK", HEADERS)
        return iter([b"a", b"b"])

    with caplog.at_level(logging.ERROR, "rope_middleware"):
        seen = Server()(committing(app))
    assert (seen.starts[-1][0][:3], seen.body) == ("500", b"Internal Server Error")
    assert sum("a constraint says no" in record.getMessage() for record in caplog.records) == 1


def test_W1_a_second_start_response_commits_nothing(jenny: Jenny, engine: Engine) -> None:
    """PEP 3333 calls it a fatal error: the server says so, as without the middleware."""

    def app(environ: Any, start_response: Any) -> Any:
        jenny.session.add(Row(name="x"))
        start_response("200 OK", HEADERS)
        start_response("200 OK", HEADERS)
        return [b""]

    seen = Server()(committing(app))
    assert seen.error == (AssertionError, "Headers already set!")
    assert rows(engine) == 0


def test_W1_an_empty_chunk_passes_on_at_once(engine: Engine) -> None:
    """ "Middleware must not block iteration waiting for multiple values" (PEP 3333)."""
    made: list[int] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        for number in range(3):
            made.append(number)
            yield b""
        start_response("200 OK", HEADERS)
        yield b"done"

    body = committing(app)(make_environ(), lambda *_: None)
    assert made == [0]
    chunks = iter(body)
    for number in range(3):
        assert next(chunks) == b""
        assert made == list(range(number + 1))
    assert list(chunks) == [b"done"]
    body.close()


class _Silent(io.RawIOBase):
    """The input of a client that has announced a body and sends nothing."""

    def read(self, size: int = -1) -> bytes:
        raise AssertionError("the body was asked for")


def test_C6_a_body_that_nobody_reads_is_not_asked_for() -> None:
    """A client that sends no body holds no worker but of an app that reads it."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        return [b"ok"]

    environ = make_environ(CONTENT_LENGTH="10", REQUEST_METHOD="POST")
    environ["wsgi.input"] = _Silent()
    assert Server()(WSGIRopeMiddleware(app, retries=2), environ).body == b"ok"


def test_C6_many_empty_messages_take_no_memory() -> None:
    """The replay limit bounds what is kept in memory, not only bytes of body."""
    left = [20_000]

    async def receive() -> Any:
        left[0] -= 1
        return {"type": "http.request", "body": b"", "more_body": left[0] > 0}

    taken: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tracemalloc.start()
        while (await receive())["more_body"]:
            pass
        taken.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        await answer(send)

    client = ASGIClient()

    async def main() -> None:
        async def send(message: Any) -> None:
            client.messages.append(message)

        await ASGIRopeMiddleware(app, retries=1)(http_scope(method="POST"), receive, send)

    asyncio.run(main())
    assert client.status == 200
    assert taken[0] < 100_000  # bytes; a message takes some 500
