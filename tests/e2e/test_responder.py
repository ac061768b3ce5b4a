"""Responder, corner by corner, on real servers: every part of it sees the request's session."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from socket import SHUT_RDWR
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import responder
from sqlalchemy import Engine, event, text
from sqlalchemy.orm import Session, sessionmaker
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from websockets.sync.client import connect

from rope_middleware import RopeMiddleware, Scope, ScopeClosedError, SessionJenny, current_scope
from tests.kit.engines import MakeEngine
from tests.kit.leaks import checked_out, nothing_checked_out
from tests.kit.models import Data
from tests.kit.sessions import Jenny, run_threads
from tests.kit.waiting import PATIENCE, eventually
from tests.servers.asgi import ASYNCIO_SERVERS, serve


class App(SimpleNamespace):
    """An API, its jenny, and what its handlers have noted down."""

    api: responder.API
    jenny: Jenny
    engine: Engine
    notes: list[tuple[str, Session, Scope]]

    def note(self, who: str) -> None:
        """Use the session as any handler does, and write down which one it was."""
        data = self.jenny.session.query(Data).first()
        assert data is not None
        self.notes.append((who, self.jenny.session, current_scope()))

    def serve_and_get(self, server: str, path: str) -> httpx.Response:
        with serve(self.api, server) as running:
            return running.get(path)

    def all_noted_one_session(self, *who: str) -> None:
        """All of `who`, and nobody else, saw the same session and scope, which has ended."""
        eventually(lambda: len(self.notes) >= len(who), f"{self.notes}")
        assert sorted(name for name, _, _ in self.notes) == sorted(who)
        assert len({id(session) for _, session, _ in self.notes}) == 1
        assert len({scope for _, _, scope in self.notes}) == 1
        _, session, scope = self.notes[0]
        eventually(lambda: scope.closed, f"{scope} is closed")
        nothing_checked_out(self.engine)
        with pytest.raises(ScopeClosedError, match=scope.name):
            session.query(Data).first()


def make_app(engine: Engine, **options: Any) -> App:
    api = responder.API(**options)
    api.add_middleware(RopeMiddleware)
    jenny = SessionJenny(sessionmaker(engine, expire_on_commit=False))
    return App(api=api, jenny=jenny, engine=engine, notes=[])


@pytest.fixture
def app(engine: Engine) -> App:
    return make_app(engine)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> str:
    """What Responder does between request and response is the same on every server."""
    return str(getattr(request, "param", "uvicorn"))


# Of a client that leaves, a response that breaks off or a time-out each server tells in its way.
each_server = pytest.mark.parametrize("server", ASYNCIO_SERVERS, indirect=True)


def count_of(engine: Engine) -> int:
    with Session(engine) as session:
        return session.query(Data).one().count


# -- views -------------------------------------------------------------------------------------


@each_server
def test_C1_a_sync_view_counts(app: App, server: str) -> None:
    """The documented view, line by line, commits by itself and answers with its number."""
    jenny = app.jenny

    @app.api.route("/")
    def view(req, resp):
        data = jenny.session.query(Data).first()
        data.count += 1
        jenny.session.commit()
        resp.content = str(data.count)

    with serve(app.api, server) as running:
        answers = [running.get().text for _ in range(3)]
    assert answers == ["1", "2", "3"]
    assert count_of(app.engine) == 3


def test_S2_an_async_view_sees_the_session(app: App, server: str) -> None:
    """An async view and what it calls in a worker thread use one session."""
    import anyio.to_thread

    @app.api.route("/")
    async def view(req, resp):
        app.note("view")
        await anyio.to_thread.run_sync(app.note, "thread")
        resp.text = "done"

    assert app.serve_and_get(server, "/").text == "done"
    app.all_noted_one_session("view", "thread")


def test_S2_a_class_based_view_sees_the_session(app: App, server: str) -> None:
    """`on_request` and `on_get` of one request use one session."""

    @app.api.route("/")
    class View:
        def on_request(self, req, resp):
            app.note("on_request")

        async def on_get(self, req, resp):
            app.note("on_get")

    assert app.serve_and_get(server, "/").status_code == 200
    app.all_noted_one_session("on_request", "on_get")


@pytest.mark.told
def test_C1_what_a_view_has_not_committed_is_rolled_back(app: App, server: str) -> None:
    """A view that writes and does not commit leaves no trace."""

    @app.api.route("/")
    def view(req, resp):
        app.note("view")
        app.jenny.session.query(Data).first().count += 1
        app.jenny.session.flush()

    assert app.serve_and_get(server, "/").status_code == 200
    app.all_noted_one_session("view")
    assert count_of(app.engine) == 0


def test_S3_a_view_that_raises_gives_everything_back(app: App, server: str) -> None:
    """Responder answers 500 with its own error page, and the session is closed."""

    @app.api.route("/")
    def view(req, resp):
        app.note("view")
        raise ValueError("the view's own error")

    answer = app.serve_and_get(server, "/")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    app.all_noted_one_session("view")


# -- hooks and dependencies --------------------------------------------------------------------


def test_S2_hooks_and_view_share_the_session(app: App, server: str) -> None:
    """Sync and async hooks before and after the view all see the view's session."""

    @app.api.before_request()
    def before(req, resp):
        app.note("before")

    @app.api.before_request()
    async def before_async(req, resp):
        app.note("before_async")

    @app.api.after_request
    def after(req, resp):
        app.note("after")

    @app.api.after_request
    async def after_async(req, resp):
        app.note("after_async")

    @app.api.route("/")
    def view(req, resp):
        app.note("view")
        resp.text = "done"

    assert app.serve_and_get(server, "/").text == "done"
    app.all_noted_one_session("before", "before_async", "view", "after", "after_async")


def test_S3_a_hook_that_answers_itself_leaks_nothing(app: App, server: str) -> None:
    """A before hook that sets a status is the answer; what it opened is closed."""

    @app.api.before_request()
    def deny(req, resp):
        app.note("hook")
        resp.status_code = 401

    @app.api.route("/")
    def view(req, resp):
        app.note("view")

    assert app.serve_and_get(server, "/").status_code == 401
    app.all_noted_one_session("hook")


def test_S2_dependencies_and_view_share_the_session(app: App, server: str) -> None:
    """Dependencies of all four kinds, and their ends after the response, see one session."""

    @app.api.dependency()
    def plain():
        app.note("plain")
        return 1

    @app.api.dependency()
    async def awaited():
        app.note("awaited")
        return 2

    @app.api.dependency()
    def generated():
        app.note("generated")
        yield 3
        app.note("generated, end")

    @app.api.dependency()
    async def agenerated():
        app.note("agenerated")
        yield 4
        app.note("agenerated, end")

    @app.api.route("/")
    def view(req, resp, *, plain, awaited, generated, agenerated):
        app.note("view")
        resp.text = str([plain, awaited, generated, agenerated])

    assert app.serve_and_get(server, "/").text == "[1, 2, 3, 4]"
    kinds = ("plain", "awaited", "generated", "agenerated")
    app.all_noted_one_session(*kinds, "generated, end", "agenerated, end", "view")


def test_S2_the_session_itself_as_a_dependency(app: App, server: str) -> None:
    """A dependency that hands out `jenny.session` hands out the request's own."""
    app.api.add_dependency("session", lambda: app.jenny.session)

    @app.api.route("/")
    def view(req, resp, *, session):
        app.note("view")
        resp.text = str(session is app.jenny.session)

    assert app.serve_and_get(server, "/").text == "True"
    app.all_noted_one_session("view")


# -- WebSockets --------------------------------------------------------------------------------


@each_server
def test_A1_a_websocket_has_one_scope_for_its_connection(app: App, server: str) -> None:
    """Hook and handler of a WebSocket see one session, which ends with the connection."""

    @app.api.before_request(websocket=True)
    async def before(ws):
        app.note("before")

    @app.api.websocket_route("/ws")
    async def handler(ws):
        await ws.accept()
        while (word := await ws.receive_text()) != "end":
            app.note(word)
            await ws.send_text(word)
        await ws.close()

    with serve(app.api, server) as running:
        with connect(running.ws_url + "/ws") as socket:
            for word in ("one", "two"):
                socket.send(word)
                assert socket.recv(timeout=PATIENCE) == word
            assert checked_out(app.engine) == 1
            assert not app.notes[0][2].closed
            assert app.notes[0][2].name.endswith("/ws")
            socket.send("end")
        app.all_noted_one_session("before", "one", "two")


@each_server
def test_S3_a_websocket_whose_client_vanishes_leaks_nothing(app: App, server: str) -> None:
    """The connection is torn down without a closing handshake in the middle of the talk."""

    @app.api.websocket_route("/ws")
    async def handler(ws):
        await ws.accept()
        while True:
            app.note(await ws.receive_text())
            await ws.send_text("noted")

    with serve(app.api, server) as running, connect(running.ws_url + "/ws") as socket:
        socket.send("one")
        assert socket.recv(timeout=PATIENCE) == "noted"
        assert checked_out(app.engine) == 1
        socket.socket.shutdown(SHUT_RDWR)
        app.all_noted_one_session("one")


@each_server
def test_S3_a_websocket_handler_that_raises_leaks_nothing(app: App, server: str) -> None:
    """The client is told that the server failed, and the session is closed."""

    @app.api.websocket_route("/ws")
    async def handler(ws):
        await ws.accept()
        app.note("handler")
        raise ValueError("the handler's own error")

    with serve(app.api, server) as running:
        with connect(running.ws_url + "/ws") as socket, pytest.raises(Exception, match="1011"):
            socket.recv(timeout=PATIENCE)
        app.all_noted_one_session("handler")


# -- streams -----------------------------------------------------------------------------------


@each_server
def test_A4_a_stream_uses_the_session_to_its_last_chunk(app: App, server: str) -> None:
    """The body is made after the view has returned, with the view's session."""

    @app.api.route("/")
    async def view(req, resp):
        app.note("view")

        @resp.stream
        async def body():
            for number in range(5):
                app.note(f"chunk {number}")
                yield f"{app.jenny.session.query(Data).one().count} "

    assert app.serve_and_get(server, "/").text == "0 " * 5
    app.all_noted_one_session("view", *(f"chunk {number}" for number in range(5)))


@each_server
def test_A4_a_sync_generator_streams_with_the_session(app: App, server: str) -> None:
    """A route that streams lines is stepped in worker threads, each with the same session."""

    @app.api.ndjson("/")
    def lines(req, resp) -> Iterator[dict[str, int]]:
        for number in range(5):
            app.note(f"line {number}")
            yield {"number": number}

    answer = app.serve_and_get(server, "/")
    assert [json.loads(line)["number"] for line in answer.text.splitlines()] == list(range(5))
    app.all_noted_one_session(*(f"line {number}" for number in range(5)))


@each_server
def test_A4_server_sent_events_use_the_session(app: App, server: str) -> None:
    """Each event is made with the view's session."""

    @app.api.route("/")
    async def view(req, resp):
        @resp.sse
        async def events():
            for number in range(3):
                app.note(f"event {number}")
                yield {"data": number}

    assert app.serve_and_get(server, "/").text.count("data: ") == 3
    app.all_noted_one_session(*(f"event {number}" for number in range(3)))


@each_server
def test_S3_a_stream_that_raises_in_the_middle_leaks_nothing(app: App, server: str) -> None:
    """The response breaks off for the client, and the session is closed."""

    @app.api.route("/")
    async def view(req, resp):
        @resp.stream
        async def body():
            app.note("body")
            yield "x" * 10_000
            raise ValueError("the body's own error")

    with pytest.raises(httpx.RemoteProtocolError):
        app.serve_and_get(server, "/")
    app.all_noted_one_session("body")


# -- after the response ------------------------------------------------------------------------


@each_server
def test_A4_resp_background_runs_in_the_scope(app: App, server: str) -> None:
    """Sync and async tasks after the response use, and may commit, the request's session."""

    def later(number: int) -> None:
        app.note(f"later {number}")
        app.jenny.session.query(Data).first().count += number
        app.jenny.session.commit()

    async def later_async() -> None:
        app.note("later_async")

    @app.api.route("/")
    def view(req, resp):
        app.note("view")
        resp.text = "done"
        resp.background(later, 7)
        resp.background(later_async)

    assert app.serve_and_get(server, "/").text == "done"
    app.all_noted_one_session("view", "later 7", "later_async")
    assert count_of(app.engine) == 7


@each_server
def test_S3_a_background_task_that_raises_leaks_nothing(app: App, server: str) -> None:
    """The client has its answer, the task's error goes its way, the session is closed."""

    def later() -> None:
        app.note("later")
        raise ValueError("the task's own error")

    @app.api.route("/")
    def view(req, resp):
        resp.text = "done"
        resp.background(later)

    assert app.serve_and_get(server, "/").text == "done"
    app.all_noted_one_session("later")


def test_J4_api_background_task_has_a_session_of_its_own(app: App, server: str) -> None:
    """A task in Responder's own thread pool knows no request: its session hangs by a rope.

    It is another one than the request's, works after the request has ended, and goes when the
    task's function returns.
    """
    request_ended = threading.Event()
    sessions: list[Session] = []

    @app.api.background.task
    def task(number: int) -> None:
        assert request_ended.wait(PATIENCE)
        sessions.append(app.jenny.session)
        data = app.jenny.session.query(Data).first()
        data.count += number
        app.jenny.session.commit()
        app.jenny.session.query(Data).first()  # open again when the task returns
        assert app.jenny.session is sessions[0]

    futures = []

    @app.api.route("/")
    def view(req, resp):
        app.note("view")
        futures.append(task(5))
        resp.text = "started"

    with serve(app.api, server) as running:
        assert running.get().text == "started"
        app.all_noted_one_session("view")
        request_ended.set()
        futures[0].result(PATIENCE)
        assert sessions[0] is not app.notes[0][1]
        nothing_checked_out(app.engine)
    assert count_of(app.engine) == 5


@pytest.mark.told
def test_J4_many_background_tasks_leave_nothing_behind(app: App, server: str) -> None:
    """Forty tasks on a few threads, one in three failing: each its own session, none left."""
    seen: list[int] = []
    failed: list[str] = []

    def task(number: int) -> None:
        session = app.jenny.session
        assert not session.new  # nothing of the task before
        assert not session.identity_map.values()
        session.add(Data(count=1000 + number))
        session.flush()
        seen.append(number)
        if number % 3 == 0:
            raise ValueError("the task's own error")
        time.sleep(0.002)

    def gather(future: Any) -> None:
        if (error := future.exception()) is not None:
            failed.append(str(error))  # its traceback holds the task's frame, and so its rope

    @app.api.route("/")
    def view(req, resp):
        for number in range(40):
            app.api.background.run(task, number).add_done_callback(gather)
        resp.text = "started"

    with serve(app.api, server) as running:
        assert running.get().text == "started"
        eventually(lambda: len(seen) == 40 and len(failed) == 14, f"{len(seen)} {failed}")
        assert set(failed) == {"the task's own error"}
        nothing_checked_out(app.engine)
    with Session(app.engine) as session:
        assert session.query(Data).count() == 1


# -- mounts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "with a middleware of its own"])
def test_S6_a_mounted_asgi_app_shares_the_scope(app: App, server: str, wrapped: bool) -> None:
    """A mounted app sees the outer session, also where it brings a middleware of its own."""

    def endpoint(request):
        app.note("mounted")
        return PlainTextResponse(current_scope().name)

    mounted: Any = Starlette(routes=[Route("/inner", endpoint)])
    app.api.mount("/sub", RopeMiddleware(mounted) if wrapped else mounted)

    @app.api.after_request
    def after(req, resp):
        app.note("after")

    assert app.serve_and_get(server, "/sub/inner").text == "GET /sub/inner"
    app.all_noted_one_session("mounted")


# -- time-outs ---------------------------------------------------------------------------------


@each_server
def test_S4_a_view_that_outlives_its_timeout_gets_scope_closed_error(
    engine: Engine, server: str
) -> None:
    """The client has its 504; the view's next use of a session raises, and checks out nothing."""
    app = make_app(engine, request_timeout=0.2)
    timed_out = threading.Event()
    errors: list[Exception] = []
    ended = threading.Event()

    @app.api.route("/")
    def view(req, resp):
        try:
            app.note("view")
            captured = app.jenny.session
            assert timed_out.wait(PATIENCE)
            for use in (
                lambda: app.jenny.session,
                lambda: captured.query(Data).first(),
                lambda: captured.query(Data).first(),
                current_scope,
            ):
                try:
                    use()
                except Exception as error:
                    errors.append(error)
                else:
                    errors.append(AssertionError("no error"))
        finally:
            ended.set()

    with serve(app.api, server) as running:
        assert running.get().status_code == 504
        eventually(lambda: app.notes[0][2].closed, "the scope has ended before its view")
        nothing_checked_out(engine)
        timed_out.set()
        assert ended.wait(PATIENCE)
    assert [type(error) for error in errors] == [ScopeClosedError] * 4
    for error in errors:
        assert "GET /" in str(error)
        assert "with open_scope():" in str(error)
    assert checked_out(engine) == 0


@each_server
def test_S4_a_view_timed_out_within_a_statement_leaves_nothing(
    make_engine: MakeEngine, server: str
) -> None:
    """The statement under way may succeed or fail; the pool of one connection serves on."""
    engine = make_engine(1)
    engine.dispose()  # the connection of make_engine knows no wait()

    @event.listens_for(engine, "connect")
    def _(dbapi_connection: Any, record: Any) -> None:
        dbapi_connection.create_function("wait", 1, lambda seconds: time.sleep(seconds) or 1)

    app = make_app(engine, request_timeout=0.2)
    ended = threading.Event()
    outcome: list[object] = []

    @app.api.route("/slow")
    def slow(req, resp):
        try:
            app.jenny.session.execute(text("SELECT wait(1.0)")).all()
            app.jenny.session.query(Data).first()
        except Exception as error:
            outcome.append(error)
        finally:
            ended.set()

    @app.api.route("/fast")
    def fast(req, resp):
        resp.text = str(app.jenny.session.query(Data).count())

    with serve(app.api, server) as running:
        assert running.get("/slow").status_code == 504
        assert ended.wait(PATIENCE)
        nothing_checked_out(engine)
        assert len(outcome) == 1, outcome  # in the statement, or at the latest at the next use
        assert running.get("/fast").text == "1"


@each_server
def test_S4_many_timed_out_views_leave_a_pool_of_five_whole(
    make_engine: MakeEngine, server: str
) -> None:
    """Twenty views run into their time-out, at different points; all connections come back."""
    engine = make_engine(5)
    app = make_app(engine, request_timeout=0.05)
    running_views = [0]
    lock = threading.Lock()

    @app.api.route("/{number:int}")
    def view(req, resp, *, number):
        with lock:
            running_views[0] += 1
        try:
            end = time.monotonic() + 0.02 * number
            while time.monotonic() < end:
                app.jenny.session.query(Data).first()
                app.jenny.session.rollback()
        finally:
            with lock:
                running_views[0] -= 1

    statuses: list[int] = []

    def client(number: int) -> None:
        statuses.append(running.get(f"/{number}").status_code)

    with serve(app.api, server) as running:
        run_threads([partial(client, number) for number in range(20)])
        eventually(lambda: running_views[0] == 0, "every view has ended")
        nothing_checked_out(engine)
    assert len(statuses) == 20
    assert 504 in statuses
    assert set(statuses) <= {200, 504}
