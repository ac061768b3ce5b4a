"""S3, S8: the drop-in for Flask where Flask's context stays behind, is forked, or is torn down."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flask
import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.orm import Session, sessionmaker
from werkzeug.test import EnvironBuilder

from rope_middleware import ScopeClosedError
from rope_middleware.flask import flask_scoped_session
from tests.kit.engines import MakeEngine
from tests.kit.leaks import checked_out
from tests.kit.models import Row
from tests.kit.sessions import run_threads

ONE = text("SELECT 1")


class Served:
    """An application with a stream and a plain view, called as a server calls it."""

    def __init__(self, engine: Engine) -> None:
        self.app = app = flask.Flask("application")
        self.jenny = jenny = flask_scoped_session(sessionmaker(engine), app)
        self.seen: list[Session] = []

        @app.get("/stream")
        def stream() -> flask.Response:
            def lines() -> Iterator[str]:
                for _ in range(4):
                    jenny.execute(ONE)
                    yield "x"

            return flask.Response(flask.stream_with_context(lines()))

        @app.get("/plain")
        def plain() -> str:
            self.seen.append(jenny.session)
            return str(jenny.scalar(ONE))

    def call(self, path: str) -> Any:
        def start_response(*_: object) -> Callable[[bytes], object]:
            return lambda chunk: chunk

        environ = EnvironBuilder(path).get_environ()
        return self.app(environ, start_response)

    def begin(self) -> list[Any]:
        """Read the first chunk of the stream; return what keeps it open."""
        body = self.call("/stream")
        chunks = iter(body)
        assert next(chunks) == b"x"
        return [body, chunks]

    def plainly(self) -> bytes:
        body = self.call("/plain")
        try:
            return b"".join(body)
        finally:
            body.close()


@pytest.fixture
def served(make_engine: MakeEngine) -> Served:
    return Served(make_engine(pool_size=20))


@pytest.fixture
def engine(served: Served) -> Any:
    return served.jenny.session_factory.kw["bind"]  # type: ignore[attr-defined,unused-ignore]


# Flask's own: it takes the context of another thread for the current one.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("is_closed", [True, False])
def test_S3_a_stream_that_another_thread_ends(
    is_closed: bool, served: Served, engine: Engine
) -> None:
    """Its session ends then, and each later request of the first thread has one of its own."""
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        held = first.submit(served.begin).result(30)
        assert checked_out(engine) == 1

        def finalise() -> None:
            if is_closed:
                with pytest.raises(LookupError):
                    held[0].close()
            held.clear()
            gc.collect()

        second.submit(finalise).result(30)
        assert checked_out(engine) == 0
        for _ in range(20):
            assert first.submit(served.plainly).result(30) == b"1"
            assert checked_out(engine) == 0
    assert len({id(session) for session in served.seen}) == 20
    assert not any(session.in_transaction() for session in served.seen)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_S3_many_streams_that_another_thread_ends(served: Served, engine: Engine) -> None:
    """From the second one on Flask tells nobody of their end: the thread's next request does."""
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:

        def close(held: list[Any]) -> None:
            with pytest.raises(LookupError):
                held[0].close()

        for _ in range(5):
            second.submit(close, first.submit(served.begin).result(30)).result(30)
            assert checked_out(engine) <= 1
        assert first.submit(served.plainly).result(30) == b"1"
        assert checked_out(engine) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_S3_a_stream_that_is_still_open_shares_its_session_with_no_request(
    served: Served, engine: Engine
) -> None:
    """Flask's context of the stream is current in the thread that has begun it."""
    with ThreadPoolExecutor(1) as thread:
        held = thread.submit(served.begin).result(30)
        for _ in range(3):
            assert thread.submit(served.plainly).result(30) == b"1"
            assert checked_out(engine) == 1
        assert len({id(session) for session in served.seen}) == 3

        def finish() -> list[bytes]:
            rest = list(held[1])
            held[0].close()
            held.clear()
            return rest

        assert thread.submit(finish).result(30) == [b"x"] * 3
        assert checked_out(engine) == 0


@pytest.mark.told
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_S3_a_stream_that_is_collected_within_another_request_leaves_that_ones_session(
    served: Served, engine: Engine
) -> None:
    """The teardown runs while another context is current."""
    held: list[Any] = []
    with served.app.app_context():
        mine = served.jenny.session
        served.jenny.add(Row(name="pending"))

        with ThreadPoolExecutor(1) as thread:
            held += thread.submit(served.begin).result(30)
            held.clear()
            gc.collect()
        assert checked_out(engine) == 0
        assert served.jenny.session is mine
        assert len(mine.new) == 1


def test_S3_a_test_clients_request_shares_the_session_of_a_context_by_hand(
    served: Served, engine: Engine
) -> None:
    """As documented: the session is the application context's, which is the test's here."""
    with served.app.app_context():
        mine = served.jenny.session
        for _ in range(2):
            served.app.test_client().get("/plain")
        assert served.seen == [mine, mine]
        assert checked_out(engine) == 1
    assert checked_out(engine) == 0


class Counted(flask_scoped_session[Session]):
    """One whose remove() is somebody's own."""

    removed = 0

    def remove(self, rope_name: str | None = None) -> None:
        self.removed += 1
        super().remove(rope_name)


def test_S3_remove_is_called_once_for_each_context_and_session(engine: Engine) -> None:
    """As Flask-SQLAlchemy-Session documents it; also where no session was made."""
    app = flask.Flask("application")
    both = [Counted(sessionmaker(engine), app), Counted(sessionmaker(engine), app)]
    both[0].init_app(app)

    @app.get("/")
    def view() -> str:
        both[0].execute(ONE)
        return ""

    for count in 1, 2:
        assert app.test_client().get("/").status_code == 200
        assert [one.removed for one in both] == [count, count]
    with app.app_context():
        pass
    assert [one.removed for one in both] == [3, 3]
    assert checked_out(engine) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("in_thread", [False, True])
def test_S8_a_fork_in_a_context_leaves_the_session_to_the_parent(
    in_thread: bool, served: Served, engine: Engine
) -> None:
    """Use in the child is an error, and nothing goes over the parent's connection."""
    said: list[str] = []
    event.listen(engine, "rollback", lambda _: said.append("rollback"))

    def child() -> bytes:
        try:
            served.jenny.scalar(ONE)
        except ScopeClosedError as error:
            out = str(error)
        else:
            out = "used"
        flask.globals.app_ctx._get_current_object().pop(None)  # type: ignore[attr-defined]
        return f"{out} {said}".encode()

    def parent() -> None:
        with served.app.app_context():
            served.jenny.add(Row(name="parent's"))
            served.jenny.flush()
            read, write = os.pipe()
            pid = os.fork()
            if not pid:
                try:
                    os.write(write, child())
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)
            os.close(write)
            with os.fdopen(read, "rb") as pipe:
                answer = pipe.read().decode()
            assert "belongs to the process that this one was forked from" in answer
            assert answer.endswith(" []")
            served.jenny.commit()

    if in_thread:
        run_threads([parent])
    else:
        parent()
    with served.app.app_context():
        assert served.jenny.scalar(text("SELECT count(*) FROM row")) == 1
    assert checked_out(engine) == 0
