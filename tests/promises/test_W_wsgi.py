"""W2-W4: while the body runs, dropped bodies, threads and greenlets."""

from __future__ import annotations

import contextvars
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import greenlet
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from rope_middleware import (
    RopeMiddleware,
    Scope,
    SessionJenny,
    WSGIRopeMiddleware,
    current_scope,
    open_scope,
    wsgi,
)
from rope_middleware.scope.scope import ENDED
from rope_middleware.session.sql import notes
from tests.kit.engines import MakeEngine, rows
from tests.kit.flask_app import flask_app
from tests.kit.leaks import checked_out, no_scope_here
from tests.kit.models import Row
from tests.kit.said import Said
from tests.kit.sessions import Jenny, run_threads, touch
from tests.kit.waiting import PATIENCE
from tests.kit.wsgi import (
    BODIES,
    FILE_WRAPPERS,
    HEADERS,
    Probe,
    Seen,
    Server,
    Wrap,
    make_environ,
    scope_of,
    served,
)


@pytest.mark.parametrize("wrapper", FILE_WRAPPERS, ids=["class", "function"])
def test_W2_a_body_that_can_be_read_is_no_file_of_the_servers(
    wrap: Wrap, wrapper: Any, jenny: Jenny, engine: Engine
) -> None:
    """An app's own body with a read() makes its chunks within the scope, as any other does."""
    sessions: list[Session] = []

    class Export:
        def read(self, size: int = -1) -> bytes:
            raise AssertionError("the server iterates")

        def __iter__(self) -> Iterator[bytes]:
            for number in range(3):
                sessions.append(touch(jenny))
                yield b"%d" % number

    def app(environ: Any, start_response: Any) -> Any:
        sessions.append(touch(jenny))
        start_response("200 OK", HEADERS)
        return Export()

    environ = make_environ(**{"wsgi.file_wrapper": wrapper})
    seen = Server()(wrap(app), environ)
    assert (seen.error, seen.body) == (None, b"012")
    assert len(sessions) == 4
    assert all(session is sessions[0] for session in sessions)
    assert scope_of(environ).closed
    assert checked_out(engine) == 0


@pytest.mark.parametrize("kind", BODIES)
def test_W2_the_scope_shows_in_the_app_its_chunks_and_its_close_only(
    wrap: Wrap, kind: str, jenny: Jenny
) -> None:
    """The server's thread sees nothing before, between and after."""
    probe = Probe(jenny, kind)
    assert no_scope_here()
    result = wrap(probe)(make_environ(), lambda *args: print)
    assert no_scope_here()
    chunks = iter(result)
    for number in (1, 2):
        assert next(chunks) == b"%d" % number
        assert no_scope_here()
    result.close()
    assert no_scope_here()
    assert len(probe.scopes) == 5  # twice in the app, twice in the body, once in close()
    assert probe.scope.closed


@pytest.mark.parametrize("where", ["before start", "chunk 1", "close"])
def test_W2_nothing_shows_after_an_error(wrap: Wrap, where: str, jenny: Jenny) -> None:
    """An error anywhere undoes the ContextVar on its way out."""
    probe = Probe(jenny, fail=where)
    Server(take=1)(wrap(probe))
    assert no_scope_here()


@pytest.mark.parametrize("kind", BODIES)
def test_W2_two_bodies_advanced_in_turn_on_one_thread(
    wrap: Wrap, kind: str, jenny: Jenny, engine: Engine
) -> None:
    """Each sees its own session, whichever was advanced or closed last."""
    one, two = Probe(jenny, kind), Probe(jenny, kind)
    first = wrap(one)(make_environ("/1"), lambda *args: print)
    second = wrap(two)(make_environ("/2"), lambda *args: print)
    a, b = iter(first), iter(second)
    assert [next(a), next(b), next(b), next(a), next(a)] == [b"1", b"1", b"2", b"2", b"3"]
    assert one.scope is not two.scope
    assert one.sessions[0] is not two.sessions[0]
    assert checked_out(engine) == 2
    first.close()
    assert one.scope.closed and not two.scope.closed
    assert checked_out(engine) == 1
    assert next(b) == b"3"
    second.close()
    assert two.scope.closed
    assert one.closes == two.closes == 1
    assert checked_out(engine) == 0


@pytest.mark.parametrize("kind", ["list", *BODIES])
def test_W2_a_first_use_in_the_instant_of_the_end_is_ended_too(
    kind: str, jenny: Jenny, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that goes on keeps its session just when the end has found none."""
    late: list[Session] = []

    class Raced(wsgi._RequestScope):
        __slots__ = ()

        @property
        def _state(self) -> int:  # type: ignore[override]
            return Scope._state.__get__(self)  # type: ignore[attr-defined,no-any-return]

        @_state.setter
        def _state(self, state: int) -> None:
            Scope._state.__set__(self, state)  # type: ignore[attr-defined]
            if state == ENDED and not late:
                session = jenny.registry.createfunc()
                session.execute(text("SELECT 1"))
                late.append(session)
                self._sessions = {jenny.registry: session}  # type: ignore[dict-item]

    class Untouching(Probe):
        def use(self, where: str) -> None:
            self.scopes.append(current_scope())

    def app(environ: Any, start_response: Any) -> Any:
        if kind == "list":
            probe.use("app")
            start_response("200 OK", HEADERS)
            return [b"1", b"2", b"3"]
        return probe(environ, start_response)

    monkeypatch.setattr(wsgi, "_RequestScope", Raced)
    for _ in range(2):  # the second time the body's class is known
        probe = Untouching(jenny, "iterable" if kind == "list" else kind)
        late.clear()
        seen = Server()(WSGIRopeMiddleware(app))
        assert (seen.error, seen.close_error, seen.body) == (None, None, b"123")
        assert probe.scopes[0].closed
        assert len(late) == 1 and not late[0].in_transaction()
        assert checked_out(engine) == 0


def test_W2_each_chunk_may_come_from_another_thread(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """A server may call the app, take each chunk and close the body in different threads."""
    probe = Probe(jenny)
    results: list[Any] = []

    def in_thread(step: Callable[[], Any]) -> Any:
        def run() -> None:
            try:
                results.append(step())
            except BaseException as error:
                results.append(error)
            assert no_scope_here()

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(15)
        return results.pop()

    middleware = wrap(probe)
    result = in_thread(lambda: middleware(make_environ(), lambda *args: print))
    chunks = in_thread(lambda: iter(result))
    assert [in_thread(lambda: next(chunks)) for _ in range(3)] == [b"1", b"2", b"3"]
    assert isinstance(in_thread(lambda: next(chunks)), StopIteration)
    assert in_thread(result.close) is None
    probe.is_over(engine)


def test_W2_each_chunk_may_come_from_another_context(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """As a bridge does that copies the context for each step."""
    probe = Probe(jenny)
    run = contextvars.copy_context().run
    result = run(wrap(probe), make_environ(), lambda *args: print)
    chunks = contextvars.copy_context().run(iter, result)
    for number in (b"1", b"2", b"3"):
        assert contextvars.copy_context().run(next, chunks) == number
    contextvars.copy_context().run(result.close)
    probe.is_over(engine)


def test_W2_the_server_has_a_scope_of_its_own(wrap: Wrap, jenny: Jenny) -> None:
    """What was current before is current again after each step, and is not taken for ours."""
    probe = Probe(jenny)
    with open_scope("the server's") as outer:
        mine = touch(jenny)
        result = wrap(probe)(make_environ(), lambda *args: print)
        assert current_scope() is outer
        chunks = iter(result)
        next(chunks)
        assert current_scope() is outer
        result.close()
        assert current_scope() is outer
        assert probe.scope is not outer
        assert probe.sessions[0] is not mine
        assert not outer.closed
        assert touch(jenny) is mine


def test_W2_the_apps_own_context_variables_are_left_alone(wrap: Wrap, jenny: Jenny) -> None:
    """What the app sets in its call is there in its chunks, as without the middleware."""
    mark: contextvars.ContextVar[str] = contextvars.ContextVar("mark", default="nothing")

    def app(environ: Any, start_response: Any) -> Any:
        mark.set("called")
        start_response("200 OK", HEADERS)
        return chunks()

    def chunks() -> Iterator[bytes]:
        yield mark.get().encode()
        mark.set("streaming")
        yield mark.get().encode()

    def serve(app: Any) -> tuple[bytes, str]:
        return Server()(app).body, mark.get()

    bare = contextvars.copy_context().run(serve, app)
    served = contextvars.copy_context().run(serve, wrap(app))
    assert served == bare == (b"calledstreaming", "streaming")


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("take", [1, None])
@pytest.mark.parametrize("options", [{}, {"commit_on_success": True}], ids=["plain", "commit"])
def test_W3_a_dropped_body_is_closed_once(
    kind: str, take: int | None, options: dict[str, Any], jenny: Jenny, engine: Engine
) -> None:
    """A server that forgets close(): on collection it is called once, inside the scope."""
    probe = Probe(jenny, kind)
    seen = Server(take=take, close=0)(WSGIRopeMiddleware(probe, **options))
    # Nobody may have closed it yet but the generator's own end.
    assert probe.closes == (kind == "generator" and take is None)
    del seen
    gc.collect()
    probe.is_over(engine)


@served("commit")  # which gives the connection back before the body
def test_W3_a_dropped_list_gives_back_the_connection(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """A body without a close() of its own."""

    def app(environ: Any, start_response: Any) -> Any:
        touch(jenny)
        start_response("200 OK", HEADERS)
        return [b"a", b"b"]

    environ = make_environ()
    result = wrap(app)(environ, lambda *args: print)
    assert checked_out(engine) == 1
    del result
    gc.collect()
    assert scope_of(environ).closed
    assert checked_out(engine) == 0


def test_W3_a_body_in_a_cycle_is_closed_when_collected(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """The collector finds it, in whatever state it is."""
    probe = Probe(jenny)
    result = wrap(probe)(make_environ(), lambda *args: print)
    chunks = iter(result)
    next(chunks)
    cycle: list[Any] = [result, chunks]
    cycle.append(cycle)
    del result, chunks, cycle
    gc.collect()
    probe.is_over(engine)


def test_W3_an_exhausted_body_kept_without_close_ends_when_dropped(
    wrap: Wrap, jenny: Jenny
) -> None:
    """The last chunk is no close(): the scope waits for the one or for the collector."""
    probe = Probe(jenny)
    seen = Server(close=0)(wrap(probe))
    assert seen.body == b"123"
    assert probe.closes == 0
    assert not probe.scope.closed
    del seen
    gc.collect()
    assert probe.closes == 1
    assert probe.scope.closed


def test_W3_collection_while_the_thread_is_in_the_middle_of_a_statement(
    wrap: Wrap, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector comes at any time; what the body executes then does not wait for its thread."""
    jenny, other = (SessionJenny(sessionmaker(make_engine())) for _ in range(2))

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", HEADERS)
        try:
            yield b"a"
        finally:
            touch(other)

    touched = threading.Event()

    class Notes(notes.Notes):
        def __new__(cls) -> Notes:
            if kept:
                kept.clear()
                touched.set()
            return super().__new__(cls)

    def drop() -> None:
        with open_scope():
            touch(jenny)

    body = iter(wrap(app)(make_environ(), lambda *args: print))
    next(body)
    kept = [body]
    del body
    monkeypatch.setattr(notes, "Notes", Notes)
    thread = threading.Thread(target=drop, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert touched.is_set() and not thread.is_alive()


@pytest.mark.told
@pytest.mark.parametrize("take", [2, None])
def test_W3_nothing_is_committed_on_collection(
    take: int | None, jenny: Jenny, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """With commit_on_success late work is committed by close(), and never by the collector."""
    caplog.set_level(logging.INFO, "rope_middleware")

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", HEADERS)
        yield b"a"
        jenny.session.add(Row(name="late"))
        jenny.session.flush()
        yield b"b"

    middleware = WSGIRopeMiddleware(app, commit_on_success=True)
    seen = Server(take, close=0)(middleware)
    assert seen.body == b"ab"
    del seen
    gc.collect()
    assert checked_out(engine) == 0
    assert rows(engine) == 0
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(told) == 1
    assert "the body was not read to its end and closed" in told[0]
    assert Server()(middleware).body == b"ab"
    assert rows(engine) == 1


@pytest.mark.told
def test_W3_what_is_lost_of_a_body_that_is_left_early_is_told(jenny: Jenny, said: Said) -> None:
    """The client has gone: the application has not failed, and what it wrote is missed (L1)."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", HEADERS)
        jenny.session.add(Row(name="lost"))
        yield b"a"
        yield b"b"

    seen = Server(take=1)(WSGIRopeMiddleware(app))
    assert (seen.body, seen.error, seen.close_error) == (b"a", None, None)
    assert len(said.warnings) == 1
    assert "1 Row" in said.warnings[0]


def test_W3_collection_in_another_thread(wrap: Wrap, jenny: Jenny, engine: Engine) -> None:
    """The last reference may go anywhere; that thread's own scope is untouched."""
    probe = Probe(jenny)
    held = [wrap(probe)(make_environ(), lambda *args: print)]
    next(iter(held[0]))
    found: list[bool] = []

    def drop() -> None:
        with open_scope("another") as other:
            session = touch(jenny)
            held.clear()
            gc.collect()
            found.append(current_scope() is other and not other.closed)
            found.append(touch(jenny) is session)

    run_threads([drop])
    assert found == [True, True]
    probe.is_over(engine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_W3_a_close_that_fails_on_collection(wrap: Wrap, jenny: Jenny, engine: Engine) -> None:
    """Nobody is there to hear of it; the scope has ended all the same."""
    probe = Probe(jenny, fail="close")
    seen = Server(take=1, close=0)(wrap(probe))
    del seen
    gc.collect()
    assert probe.closes == 1
    assert probe.scopes[0].closed
    assert checked_out(engine) == 0


def test_W4_each_thread_has_a_scope_of_its_own(wrap: Wrap, make_engine: MakeEngine) -> None:
    """Eight requests at once, each with its own session from the first call to close()."""
    engine = make_engine(pool_size=8)
    jenny = SessionJenny(sessionmaker(engine))
    barrier = threading.Barrier(8)

    class Meeting(Probe):
        def use(self, where: str) -> None:
            super().use(where)
            barrier.wait(15)  # all eight are inside, at the same step

    probes = [Meeting(jenny, kind) for kind in ("iterable", "generator") for _ in range(4)]
    errors: list[BaseException | None] = []

    def run(probe: Probe) -> None:
        seen = Server(take=2)(wrap(probe))
        errors.append(seen.raised)
        assert seen.close_error is None

    run_threads([partial(run, probe) for probe in probes])
    assert errors == [None] * 8
    assert len({id(probe.scope) for probe in probes}) == 8
    assert len({id(probe.sessions[0]) for probe in probes}) == 8
    assert all(probe.scope.closed for probe in probes)
    assert checked_out(engine) == 0


def test_W4_greenlets_switched_in_the_middle_of_everything(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """Two greenlets of one thread that switch inside the app, inside a chunk, inside close()."""

    class Switching(Probe):
        def use(self, where: str) -> None:
            super().use(where)
            parent = greenlet.getcurrent().parent
            assert parent is not None
            parent.switch()
            super().use(where)  # another request ran meanwhile

    probes = [Switching(jenny, "iterable"), Switching(jenny, "iterable")]
    done: list[Seen] = []
    workers = [
        greenlet.greenlet(lambda probe=probe: done.append(Server()(wrap(probe))))
        for probe in probes
    ]
    turns = 0
    while not all(worker.dead for worker in workers):
        for worker in workers:
            if not worker.dead:
                worker.switch()
                turns += 1
                assert no_scope_here()
    assert turns >= 12
    assert [seen.error for seen in done] == [None, None]
    assert [seen.body for seen in done] == [b"123", b"123"]
    assert probes[0].scope is not probes[1].scope
    assert probes[0].sessions[0] is not probes[1].sessions[0]
    assert [probe.closes for probe in probes] == [1, 1]
    assert all(probe.scope.closed for probe in probes)
    assert checked_out(engine) == 0


def test_W4_a_killed_greenlet_leaves_nothing(wrap: Wrap, jenny: Jenny, engine: Engine) -> None:
    """GreenletExit in mid-request ends the scope as any other error does."""
    probe = Probe(jenny)

    def app(environ: Any, start_response: Any) -> Any:
        probe.use("app")
        parent = greenlet.getcurrent().parent
        assert parent is not None
        parent.switch()
        raise AssertionError("never reached")

    worker = greenlet.greenlet(lambda: wrap(app)(make_environ(), lambda *args: print))
    worker.switch()
    assert checked_out(engine) == 1
    worker.throw()
    assert probe.scope.closed
    assert checked_out(engine) == 0


def test_W2_flask_streams_with_the_requests_session(jenny: Jenny, engine: Engine) -> None:
    """Flask's own teardown comes too early for a stream; the scope lasts as long as the body."""
    app = flask_app(jenny)
    app.wsgi_app = RopeMiddleware(app.wsgi_app)
    client = app.test_client()
    # buffered: the client reads the body and closes it; else it waits for response.close().
    for path, status, text_ in [
        ("/count", 200, "1"),
        ("/count", 200, "2"),
        ("/stream", 200, "xxx"),
        ("/fail", 500, None),
        ("/scope", 200, "GET /scope"),
    ]:
        response = client.get(path, buffered=True)
        assert response.status_code == status
        assert text_ is None or response.text == text_
        assert checked_out(engine) == 0
    response = client.get("/stream")
    assert next(iter(response.iter_encoded())) == b"x"
    assert checked_out(engine) == 1
    response.close()
    assert checked_out(engine) == 0
