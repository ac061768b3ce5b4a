"""A5: at most `max_active` requests are served at a time; the others wait in line, in order."""

from __future__ import annotations

import asyncio
import gc
import io
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from wsgiref.util import FileWrapper

import anyio
import pytest
from sqlalchemy import Engine
from starlette.middleware.base import BaseHTTPMiddleware

from rope_middleware import ASGIRopeMiddleware, RopeMiddleware, WSGIRopeMiddleware, open_scope
from tests.kit.asgi import ASGIClient, answer, ask, http_scope, into_nothing, websocket_scope
from tests.kit.leaks import checked_out
from tests.kit.sessions import Jenny, run_threads, touch
from tests.kit.stores import Lock, Store, open_store
from tests.kit.waiting import PATIENCE, eventually, never, poll
from tests.kit.wsgi import make_environ

pytestmark = pytest.mark.anyio

BOTH_BACKENDS = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])


class Served:
    """An ASGI app that serves a request until it is told to end it; who has come, in order."""

    def __init__(self) -> None:
        self.came: list[str] = []
        self.may_end = anyio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.came.append(scope["path"])
        await self.may_end.wait()
        await answer(send)


async def settle() -> None:
    """Let everybody come as far as they get."""
    for _ in range(20):
        await anyio.sleep(0)


# -- ASGI ------------------------------------------------------------------------------------------


@BOTH_BACKENDS
@pytest.mark.parametrize("size", [1, 3])
async def test_A5_at_most_so_many_at_a_time_in_the_order_they_came(size: int) -> None:
    """30 requests; of those that have their turn in one instant trio runs any one first."""
    active, most, order = 0, 0, []
    may_go = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal active, most
        active += 1
        most = max(most, active)
        order.append(int(scope["path"]))
        await may_go.wait()
        active -= 1
        await answer(send)

    wrapped = RopeMiddleware(app, max_active=size)
    async with anyio.create_task_group() as group:
        for n in range(30):
            group.start_soon(wrapped, http_scope(str(n)), never, into_nothing)
            await settle()
        may_go.set()
    assert sorted(order) == list(range(30))
    assert size > 1 or order == list(range(30))
    assert most == size


@BOTH_BACKENDS
async def test_A5_one_that_is_cancelled_in_line_leaves_nothing_behind() -> None:
    """Nor one that is cancelled just when its turn has come: the next one has it."""
    app = Served()
    wrapped = RopeMiddleware(app, max_active=1)
    async with anyio.create_task_group() as group:
        scopes = [anyio.CancelScope() for _ in range(4)]

        async def request(n: int) -> None:
            with scopes[n]:
                await wrapped(http_scope(str(n)), never, into_nothing)

        for n in range(4):
            group.start_soon(request, n)
            await settle()
        assert app.came == ["0"]
        scopes[1].cancel()  # in line
        await settle()
        scopes[0].cancel()  # served: its turn goes to the next one
        scopes[2].cancel()  # that is this one
        await settle()
        assert app.came == ["0", "3"]
        app.may_end.set()
    await ask(wrapped)
    assert len(app.came) == 3


async def to_nobody(_: Any) -> None:
    """A server may raise so once its client has gone, says ASGI."""
    raise BrokenPipeError


@BOTH_BACKENDS
@pytest.mark.parametrize("is_within", [True, False])
async def test_A5_a_client_that_goes_away_in_line_is_not_served(is_within: bool) -> None:
    """Its request never reaches the application, and the one behind it moves up.

    What is around hears a response: Starlette's BaseHTTPMiddleware would raise for nobody.
    """
    app = Served()
    wrapped = RopeMiddleware(app, max_active=1)
    around = BaseHTTPMiddleware(wrapped, lambda request, call_next: call_next(request))
    asked, send = (around, into_nothing) if is_within else (wrapped, to_nobody)
    gone = anyio.Event()
    left: list[str] = []

    async def receive() -> Any:
        if not first:
            await gone.wait()
            return {"type": "http.disconnect"}
        return first.pop()

    first = [{"type": "http.request", "body": b"", "more_body": False}]

    async def leaver() -> None:
        await asked(http_scope("/leaver"), receive, send)
        left.append("left")

    async with anyio.create_task_group() as group:
        group.start_soon(wrapped, http_scope("/first"), never, into_nothing)
        await settle()
        group.start_soon(leaver)
        await settle()
        group.start_soon(wrapped, http_scope("/last"), never, into_nothing)
        await settle()
        assert not left
        gone.set()
        await poll(lambda: left == ["left"])
        app.may_end.set()
    assert app.came == ["/first", "/last"]


@BOTH_BACKENDS
@pytest.mark.parametrize("pieces", [1, 3], ids=["whole", "in pieces"])
async def test_A5_what_was_read_in_line_comes_to_the_application(pieces: int) -> None:
    """Every message once and in order: those read ahead, one that was being read, all others."""
    got: list[Any] = []
    may_end = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/first":
            await may_end.wait()
        else:
            while True:
                got.append(await receive())
                if got[-1]["type"] == "http.disconnect":
                    break
        await answer(send)

    messages = [
        {"type": "http.request", "body": b"%d" % n, "more_body": n < pieces - 1}
        for n in range(pieces)
    ]
    sent = [*messages, {"type": "http.disconnect"}]
    more = anyio.Event()

    async def receive() -> Any:
        if len(sent) == 1:
            await more.wait()
        return sent.pop(0)

    wrapped = RopeMiddleware(app, max_active=1)
    async with anyio.create_task_group() as group:
        group.start_soon(wrapped, http_scope("/first"), never, into_nothing)
        await settle()
        group.start_soon(wrapped, http_scope("/second"), receive, into_nothing)
        await settle()
        may_end.set()
        await poll(lambda: len(got) == pieces)
        more.set()
    assert got == [*messages, {"type": "http.disconnect"}]


async def test_A5_a_stream_gives_its_place_back_when_it_has_started_and_holds_nothing(
    store: Store,
) -> None:
    """It goes on beside the others; one that holds a connection keeps its place until it ends."""
    may_end = anyio.Event()
    started: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await store.read()
        if scope["path"] != "/holds":
            await store.jenny.release()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        started.append(scope["path"])
        await may_end.wait()
        await send({"type": "http.response.body", "body": b""})

    wrapped = RopeMiddleware(app, max_active=1)
    async with anyio.create_task_group() as group:
        for n in range(3):
            group.start_soon(ask, wrapped, None)
            await poll(lambda n=n: len(started) == n + 1)
        group.start_soon(wrapped, http_scope("/holds"), never, into_nothing)
        await poll(lambda: "/holds" in started)
        group.start_soon(ask, wrapped, None)
        await settle()
        assert len(started) == 4, "the one that holds a connection has its place"
        may_end.set()
    assert len(started) == 5


async def test_A5_a_stream_that_releases_later_gives_its_place_back_then(store: Store) -> None:
    """With the next message that it sends."""
    released, started = anyio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await store.read()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        started.append(1)
        await released.wait()
        await store.jenny.release()
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await never()

    wrapped = RopeMiddleware(app, max_active=1)
    async with anyio.create_task_group() as group:
        group.start_soon(ask, wrapped, None)
        await poll(lambda: len(started) == 1)
        group.start_soon(ask, wrapped, None)
        await settle()
        assert len(started) == 1
        released.set()
        await poll(lambda: len(started) == 2)
        group.cancel_scope.cancel()


async def test_A5_1000_viewers_of_a_stream_beside_the_line(store: Store) -> None:
    """They wait for their turn, start, and need no place any more; nor a connection."""
    viewers = [ASGIClient(reads=1) for _ in range(1000)]
    other = ASGIClient()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await store.read()
        await store.jenny.release()
        if scope["path"] == "/number":
            await answer(send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"tick", "more_body": True})

    wrapped = RopeMiddleware(app, max_active=2)
    async with anyio.create_task_group() as group:
        for viewer in viewers:
            group.start_soon(viewer, wrapped, "/events")
        await poll(lambda: all(len(viewer.messages) == 2 for viewer in viewers), 4 * PATIENCE)
        assert store.held() == 0
        await other(wrapped, "/number")
        group.cancel_scope.cancel()
    assert other.status == 200


async def test_A5_with_commit_on_success_a_stream_holds_nothing_once_it_has_started(
    store: Store,
) -> None:
    """The commit comes before, as everywhere, and the next one begins after it."""
    may_end, seen = anyio.Event(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await store.read())
        await store.add(len(seen))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await may_end.wait()
        await send({"type": "http.response.body", "body": b""})

    wrapped = RopeMiddleware(app, max_active=1, commit_on_success=True)
    async with anyio.create_task_group() as group:
        for n in range(3):
            group.start_soon(ask, wrapped, None)
            await poll(lambda n=n: len(seen) == n + 1)
        may_end.set()
    assert seen == [0, 1, 2]


async def test_A5_what_comes_before_the_start_is_no_start() -> None:
    """An early hint does not give the place back."""
    app = Served()

    async def hinting(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.early_hint", "links": []})
        await app(scope, receive, send)

    wrapped = RopeMiddleware(hinting, max_active=1)
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(ask, wrapped, None)
        await settle()
        assert len(app.came) == 1
        app.may_end.set()
    assert len(app.came) == 2


async def test_A5_websockets_and_lifespan_are_not_counted() -> None:
    """They come beside a line that is full."""
    app = Served()

    async def any_app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await app(scope, receive, send)
        else:
            app.came.append(scope["type"])

    wrapped = RopeMiddleware(any_app, max_active=1)
    async with anyio.create_task_group() as group:
        group.start_soon(ask, wrapped, None)
        await settle()
        for _ in range(2):
            await wrapped(websocket_scope(), never, into_nothing)
            await wrapped({"type": "lifespan"}, never, into_nothing)
        app.may_end.set()
    assert app.came[1:] == ["websocket", "lifespan"] * 2


@pytest.mark.parametrize("between", [False, True], ids=["nested", "open_scope between"])
async def test_A5_nested_middlewares_count_a_request_once(between: bool) -> None:
    """Both with one place: a request that were counted twice would wait for itself."""
    seen: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(1)
        await answer(send)

    inner = ASGIRopeMiddleware(app, max_active=1)

    async def around(scope: Any, receive: Any, send: Any) -> None:
        async with open_scope():
            await inner(scope, receive, send)

    outer = ASGIRopeMiddleware(around if between else inner, max_active=1)
    with anyio.fail_after(10):
        for _ in range(3):
            await ask(outer)
    assert len(seen) == 3


async def test_A5_an_inner_ones_option_counts_where_the_outer_one_has_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is the outermost one's: what is dropped is told (S6)."""
    app = Served()
    wrapped = ASGIRopeMiddleware(ASGIRopeMiddleware(app, max_active=1))
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(ask, wrapped, None)
        await settle()
        assert len(app.came) == 2
        app.may_end.set()
    assert "max_active=1" in caplog.text


async def test_A5_a_request_that_is_run_again_keeps_its_place(tmp_path: Path) -> None:
    """One place for all tries, and it comes back after the last."""
    tries = 0
    async with open_store(tmp_path / "busy.db", patience=0.01) as store:
        lock = Lock(store.path)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal tries
            tries += 1
            if tries == 3:
                lock.release()
            await store.add(tries)
            await store.commit()
            await answer(send)

        wrapped = RopeMiddleware(app, max_active=1, retries=3)
        statuses: list[int] = []
        with anyio.fail_after(30):
            await ask(wrapped, statuses)
            await ask(wrapped, statuses)
        lock.close()
    assert statuses == [200, 200]
    assert tries == 4


@pytest.mark.parametrize("error", [RuntimeError("app"), asyncio.CancelledError()])
async def test_A5_an_application_that_fails_gives_its_place_back(error: BaseException) -> None:
    """Whatever comes out of it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    wrapped = RopeMiddleware(app, max_active=1)
    with anyio.fail_after(10):
        for _ in range(3):
            with pytest.raises(type(error)):
                await ask(wrapped)


def test_A5_several_event_loops_stand_in_one_line() -> None:
    """The limit is the middleware's, not the loop's."""
    active, most, served, lock = 0, 0, 0, threading.Lock()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal active, most, served
        with lock:
            active += 1
            most = max(most, active)
        await anyio.sleep(0.001)
        with lock:
            active -= 1
            served += 1
        await answer(send)

    wrapped = RopeMiddleware(app, max_active=2)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(ask, wrapped, None)

    backends: list[Any] = ["asyncio", "trio", "asyncio", "trio"]
    run_threads([lambda backend=backend: anyio.run(main, backend=backend) for backend in backends])
    assert served == 40
    assert most <= 2


# -- WSGI ------------------------------------------------------------------------------------------


def call(app: Any, **extra: Any) -> Any:
    """Ask for a response and do not close it."""
    return app(make_environ(**extra), lambda *_: into_nothing)


def others_wait(app: Any, seen: list[Any]) -> Callable[[], None]:
    """Send a request from another thread; check that it waits, and return how to join it."""
    before = len(seen)
    thread = threading.Thread(target=lambda: call(app).close())
    thread.start()
    line = app._line
    eventually(lambda: line._waiting or not thread.is_alive(), "it has come into the line")
    assert len(seen) == before

    def join() -> None:
        thread.join(30)
        assert not thread.is_alive()
        assert len(seen) == before + 1

    return join


BODIES: dict[str, Callable[[], Any]] = {
    "list": lambda: [b"x"],
    "generator": lambda: (chunk for chunk in [b"x", b"y"]),
    "iterator": lambda: iter([b"x"]),
    "file": lambda: FileWrapper(io.BytesIO(b"x")),
}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("options", [{}, {"commit_on_success": True}, {"retries": 1}], ids=str)
def test_A5_wsgi_a_request_counts_from_its_call_to_the_bodys_close(
    kind: str, options: dict[str, Any]
) -> None:
    """Whatever the body is, and whatever else the middleware does."""
    seen: list[int] = []

    def app(environ: Any, start_response: Any) -> Any:
        seen.append(1)
        start_response("200 OK", [])
        return BODIES[kind]()

    wrapped = RopeMiddleware(app, max_active=1, **options)
    for _ in range(2):
        body = call(wrapped, **{"wsgi.file_wrapper": FileWrapper})
        join = others_wait(wrapped, seen)
        assert b"".join(body)[:1] == b"x"
        body.close()
        join()


def test_A5_wsgi_threads_are_served_in_order(engine: Engine, jenny: Jenny) -> None:
    """20 threads, a pool of 5 and as many places: nobody waits for a connection."""
    order: list[str] = []
    may_go = threading.Event()

    def app(environ: Any, start_response: Any) -> Any:
        order.append(environ["PATH_INFO"])
        touch(jenny)
        may_go.wait(30)
        assert checked_out(engine) <= 5
        start_response("200 OK", [])
        return [b""]

    wrapped = WSGIRopeMiddleware(app, max_active=5)
    threads = []
    line: Any = wrapped._line
    for n in range(20):
        threads.append(threading.Thread(target=lambda n=n: call(wrapped, path=str(n)).close()))
        threads[-1].start()
        eventually(lambda n=n: len(line._served) + len(line._waiting) == n + 1, "it has come")
    may_go.set()
    for thread in threads:
        thread.join(30)
    assert set(order[:5]) == {"0", "1", "2", "3", "4"}
    assert len(order) == 20
    assert checked_out(engine) == 0


def test_A5_wsgi_a_body_that_the_server_drops_gives_its_place_back() -> None:
    """W3: it is collected some time."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"x"

    wrapped = WSGIRopeMiddleware(app, max_active=1)
    body = call(wrapped)
    del body
    gc.collect()
    call(wrapped).close()


def test_A5_wsgi_an_application_that_fails_gives_its_place_back() -> None:
    """In its call, while its body is read, and in its body's close()."""

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            yield b"x"

        def close(self) -> None:
            raise RuntimeError("close")

    def app(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] == "/call":
            raise RuntimeError("call")
        start_response("200 OK", [])
        return Body()

    wrapped = WSGIRopeMiddleware(app, max_active=1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="call"):
            call(wrapped, path="/call")
        with pytest.raises(RuntimeError, match="close"):
            call(wrapped).close()


def test_A5_wsgi_nested_middlewares_count_a_request_once() -> None:
    """Also with an `open_scope()` between them."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])
        return [b""]

    inner = WSGIRopeMiddleware(app, max_active=1)

    def around(environ: Any, start_response: Any) -> Any:
        with open_scope():
            body = inner(environ, start_response)
            with suppress(AttributeError):
                body.close()  # type: ignore[attr-defined]
            return [b""]

    for between in (inner, around):
        outer = WSGIRopeMiddleware(between, max_active=1)
        for _ in range(2):
            call(outer).close()


# -- telling, options ------------------------------------------------------------------------------


@BOTH_BACKENDS
async def test_A5_a_line_that_is_full_for_long_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """How many wait and how long, once a minute."""
    for module in ("rope_middleware.running.line", "rope_middleware.asgi.line"):
        monkeypatch.setattr(f"{module}.LONG", 0.05)
    app = Served()
    wrapped = RopeMiddleware(app, max_active=1)
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(ask, wrapped, None)
        await poll(lambda: "in line" in caplog.text)
        app.may_end.set()
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(told) == 1
    assert told[0].startswith("max_active=1: 3 requests wait in line, the first one for 0.")
    assert len(app.came) == 4


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "15"])
def test_A5_a_wrong_number_is_refused(value: Any) -> None:
    """When the middleware is made."""
    with pytest.raises((TypeError, ValueError), match="max_active"):
        RopeMiddleware(Served(), max_active=value)


def test_A5_is_no_option_of_open_scope() -> None:
    """It is the boundary's."""
    with pytest.raises(TypeError):
        open_scope(max_active=1)  # type: ignore[call-arg]
