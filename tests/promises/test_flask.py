"""`rope_middleware.flask`: the drop-in."""

from __future__ import annotations

import contextvars
import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flask
import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from rope_middleware import RopeMiddleware, Scope, SessionJenny, current_scope, open_scope
from rope_middleware.flask import current_session, flask_scoped_session
from tests.kit.engines import MakeEngine, begin_as_writer
from tests.kit.leaks import checked_out
from tests.kit.models import Data, Row
from tests.kit.said import Said

Made = flask_scoped_session[Session]


@pytest.fixture
def app() -> flask.Flask:
    """A Flask application that shows its errors to the test."""
    app = flask.Flask("application")
    app.testing = True
    return app


@pytest.fixture
def session(app: flask.Flask, engine: Engine) -> Made:
    """The application's session."""
    return flask_scoped_session(sessionmaker(engine), app)


def use(session: Any) -> Any:
    """Have the session check out a connection; return the Session proper."""
    session.execute(text("SELECT 1"))
    return session()


def assert_over(session: Session, engine: Engine) -> None:
    assert not session.in_transaction()
    assert checked_out(engine) == 0


def test_flask_it_is_a_scoped_session_and_a_jenny(session: Made) -> None:
    """Whoever asks for one of them gets one."""
    assert isinstance(session, scoped_session)
    assert isinstance(session, SessionJenny)


def test_flask_a_request_has_one_session(app: flask.Flask, session: Made, engine: Engine) -> None:
    """Two views' sessions differ; within one they are the same by every way."""
    seen: list[Session] = []

    @app.before_request
    def before() -> None:
        seen.append(use(session))

    @app.route("/")
    def view() -> str:
        assert session() is seen[-1]
        assert session.session is seen[-1]
        assert session.registry() is seen[-1]
        assert current_session() is seen[-1]  # type: ignore[operator]
        assert flask.current_app.scoped_session is session  # type: ignore[attr-defined]
        assert checked_out(engine) == 1
        row = session.get(Data, 1)
        assert row is not None
        row.count = 5
        session.commit()
        assert current_session.scalar(select(Data.count)) == 5
        return str(current_session.query(Data).one().count)

    client = app.test_client()
    for _ in range(2):
        assert client.get("/").text == "5"
        assert checked_out(engine) == 0
    assert seen[0] is not seen[1]
    for each in seen:
        assert_over(each, engine)


def test_flask_init_app_later(app: flask.Flask, engine: Engine) -> None:
    """The application may come after the session."""
    session = flask_scoped_session(sessionmaker(engine))
    session.init_app(app)
    assert app.scoped_session is session  # type: ignore[attr-defined]
    with app.app_context():
        mine = use(session)
        assert current_session() is mine  # type: ignore[operator]
    assert_over(mine, engine)


def test_flask_current_session_outside_of_a_context(session: Made) -> None:
    """A RuntimeError, as that package raises."""
    with pytest.raises(RuntimeError, match="when outside of an application context"):
        current_session.query(Data)
    with pytest.raises(RuntimeError):
        bool(current_session.registry)


def test_flask_current_session_of_an_app_that_has_none(app: flask.Flask) -> None:
    """An AttributeError that names the app and the cure."""
    with (
        app.app_context(),
        pytest.raises(AttributeError, match=r"<Flask 'application'> has no 'scoped_session'.*"),
    ):
        current_session.query(Data)


def test_flask_current_session_is_a_scoped_session(app: flask.Flask, session: Made) -> None:
    """In a context it is the app's own: attributes, methods, `in` and iteration."""
    with app.app_context():
        assert isinstance(current_session, flask_scoped_session)
        row = Data(count=2)
        current_session.add(row)
        assert row in current_session
        assert list(current_session) == [row]
        current_session.remove()
        assert row not in current_session


@pytest.mark.told
def test_flask_an_application_context_by_hand(
    app: flask.Flask, session: Made, engine: Engine
) -> None:
    """Outside of requests, too; what was not committed is rolled back."""
    with app.app_context():
        first = use(session)
        first.add(Data(count=3))
        first.flush()
        assert checked_out(engine) == 1
    assert_over(first, engine)
    with app.app_context():
        assert session() is not first
        assert session.scalars(select(Data.count)).all() == [0]


def test_flask_a_context_that_is_pushed_again(
    app: flask.Flask, session: Made, engine: Engine
) -> None:
    """The second time it has another session."""
    context = app.app_context()
    with context:
        first = use(session)
    with context:
        second = use(session)
        assert second is not first
    assert_over(first, engine)
    assert_over(second, engine)


def test_flask_nested_contexts_have_their_own(
    app: flask.Flask, session: Made, engine: Engine
) -> None:
    """The inner one's end leaves the outer session alone, and it is current again."""
    with app.app_context():
        outer = use(session)
        with app.app_context():
            inner = use(session)
            assert inner is not outer
            assert checked_out(engine) == 2
        assert not inner.in_transaction()
        assert outer.in_transaction()
        assert session() is outer
    assert_over(outer, engine)


def test_flask_a_test_request_context(app: flask.Flask, session: Made, engine: Engine) -> None:
    """What tests and shells push is a context, too."""
    with app.test_request_context("/"):
        mine = use(current_session)
        assert session() is mine
    assert_over(mine, engine)


def test_flask_a_client_that_preserves_its_context(
    app: flask.Flask, session: Made, engine: Engine
) -> None:
    """`with client:` pushes the request's context again, with another session, until its end."""

    @app.route("/")
    def view() -> str:
        flask.g.mine = use(session)
        return ""

    with app.test_client() as client:
        client.get("/")
        assert_over(flask.g.mine, engine)
        mine = use(session)
        assert mine is not flask.g.mine
        assert checked_out(engine) == 1
    gc.collect()
    assert_over(mine, engine)


def test_flask_a_command_line(app: flask.Flask, session: Made, engine: Engine) -> None:
    """CLI commands run in an application context."""
    seen: list[Session] = []

    @app.cli.command("count")
    def count() -> None:
        seen.append(use(session))
        flask.current_app.logger.debug("counted")

    result = app.test_cli_runner().invoke(args=["count"])
    assert result.exit_code == 0, result.output
    assert len(seen) == 1
    assert_over(seen[0], engine)


def test_flask_a_view_that_raises(app: flask.Flask, session: Made, engine: Engine) -> None:
    """The session goes with the context, whatever became of the request."""
    seen: list[Session] = []

    @app.route("/")
    def view() -> str:
        seen.append(use(session))
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        app.test_client().get("/")
    gc.collect()
    assert_over(seen[0], engine)
    app.testing = False
    assert app.test_client().get("/").status_code == 500
    assert_over(seen[1], engine)


@pytest.mark.told
def test_flask_a_forgotten_commit_is_told(app: flask.Flask, session: Made, said: Said) -> None:
    """L1: once for each line, with the classes and the cure; a view that fails says nothing."""

    @app.post("/<int:number>")
    def view(number: int) -> str:
        session.add(Row(n=number))
        session.flush()
        return str(1 // number)

    @app.post("/done")
    def done() -> str:
        session.add(Row(n=7))
        session.commit()
        return ""

    @app.post("/removed")
    def removed() -> str:
        session.add(Row(n=8))
        session.remove()
        return ""

    client = app.test_client()
    client.post("/done")
    client.post("/removed")
    with pytest.raises(ZeroDivisionError):
        client.post("/0")
    app.testing = False
    assert client.post("/0").status_code == 500
    assert said.warnings == []
    for _ in range(3):
        client.post("/1")
    (warning,) = said.warnings
    assert "ended without a commit" in warning and "1 Row added" in warning
    assert f"{Path(__file__).name}:{view.__code__.co_firstlineno + 2}" in warning


def test_flask_a_streamed_response(app: flask.Flask, session: Made, engine: Engine) -> None:
    """With `stream_with_context` the body has a session, which goes when it is read."""
    seen: list[Session] = []

    @app.route("/")
    def view() -> flask.Response:
        def body() -> Iterator[str]:
            for _ in range(3):
                seen.append(use(session))
                yield "x"

        return flask.Response(flask.stream_with_context(body()))

    assert app.test_client().get("/").text == "xxx"
    assert len(set(seen)) == 1
    gc.collect()
    assert_over(seen[0], engine)


def test_flask_teardown_functions_may_use_the_session(app: flask.Flask, engine: Engine) -> None:
    """Those that run before it see the request's; what later ones use is closed, too."""
    seen: dict[str, Session] = {}

    @app.teardown_appcontext
    def registered_before(_: object) -> None:
        seen["after"] = use(session)

    session = flask_scoped_session(sessionmaker(engine), app)

    @app.teardown_appcontext
    def registered_after(_: object) -> None:
        seen["before"] = session()

    with app.app_context():
        mine = use(session)
    assert seen["before"] is mine
    assert seen["after"] is not mine
    gc.collect()
    assert_over(mine, engine)
    assert_over(seen["after"], engine)


def test_flask_a_teardown_function_that_raises(app: flask.Flask, engine: Engine) -> None:
    """Flask may call no other after it; the session goes with the context all the same."""
    session = flask_scoped_session(sessionmaker(engine), app)

    @app.teardown_appcontext
    def fail(_: object) -> None:
        raise RuntimeError("mine")

    def request() -> Session:
        mine: list[Session] = []
        try:
            with app.app_context():
                mine.append(use(session))
        except RuntimeError:
            pass
        return mine[0]

    mine = request()
    gc.collect()
    assert_over(mine, engine)


def test_flask_a_close_that_fails(
    app: flask.Flask, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged; the response is not touched, and the connection is back."""

    class CannotClose(Session):
        def close(self) -> None:
            raise RuntimeError("cannot close")

    session = flask_scoped_session(sessionmaker(engine, class_=CannotClose), app)

    @app.route("/")
    def view() -> str:
        use(session)
        return "fine"

    assert app.test_client().get("/").text == "fine"
    assert checked_out(engine) == 0
    messages = [r.getMessage() for r in caplog.records if r.name == "rope_middleware"]
    assert len(messages) == 1
    assert "application context of application" in messages[0]


def test_flask_several_sessions_in_one_app(app: flask.Flask, make_engine: MakeEngine) -> None:
    """Each has a session of its own and all of them are removed, not the last one's only."""
    engines = [make_engine(), make_engine()]
    first = flask_scoped_session(sessionmaker(engines[0]), app)
    second = flask_scoped_session(sessionmaker(engines[1]), app)
    with app.app_context():
        mine = [use(first), use(second)]
        assert mine[0] is not mine[1]
        assert current_session() is mine[1]  # type: ignore[operator]
        first.remove()
        assert [checked_out(engine) for engine in engines] == [0, 1]
        use(first)
    assert [checked_out(engine) for engine in engines] == [0, 0]


def test_flask_one_session_in_several_apps(engine: Engine) -> None:
    """Applications do not share their sessions, also one inside the other's context."""
    session = flask_scoped_session(sessionmaker(engine))
    apps = [flask.Flask("one"), flask.Flask("two")]
    for app in apps:
        session.init_app(app)
        session.init_app(app)
    with apps[0].app_context():
        outer = use(session)
        with apps[1].app_context():
            inner = use(current_session)
            assert inner is not outer
        assert not inner.in_transaction()
        assert session() is outer
    assert_over(outer, engine)


def test_flask_apps_with_a_session_each(make_engine: MakeEngine) -> None:
    """`current_session` is that of the current application."""
    engines = [make_engine(), make_engine()]
    apps = [flask.Flask("one"), flask.Flask("two")]
    sessions = [
        flask_scoped_session(sessionmaker(engine), app)
        for engine, app in zip(engines, apps, strict=True)
    ]
    for app, session in zip(apps, sessions, strict=True):
        with app.app_context():
            assert use(current_session) is session()
    assert [checked_out(engine) for engine in engines] == [0, 0]


def test_flask_threads_serve_requests_side_by_side(make_engine: MakeEngine) -> None:
    """Two hundred increments by eight threads are all there."""
    engine = make_engine(pool_size=2)
    begin_as_writer(engine)
    app = flask.Flask("application")
    session = flask_scoped_session(sessionmaker(engine), app)

    @app.route("/")
    def view() -> str:
        row = session.get(Data, 1)
        assert row is not None
        row.count += 1
        session.commit()
        return ""

    def request(_: int) -> int:
        return app.test_client().get("/").status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(request, range(200))) == {200}
    assert checked_out(engine) == 0
    with Session(engine) as check:
        assert check.scalar(select(Data.count)) == 200


def test_flask_a_thread_that_shares_the_context_shares_the_session(
    app: flask.Flask, session: Made, engine: Engine
) -> None:
    """Whichever of them is first, the context has one session."""
    with ThreadPoolExecutor(4) as pool:
        for _ in range(30):
            barrier = threading.Barrier(4, timeout=30)

            def work(barrier: threading.Barrier = barrier) -> Session:
                barrier.wait()
                return session()

            with app.app_context():
                futures = [pool.submit(contextvars.copy_context().run, work) for _ in range(4)]
                assert len({future.result(30) for future in futures}) == 1
                assert session() is futures[0].result()
    assert checked_out(engine) == 0


def test_flask_threads_that_race_for_the_context_share_the_session(engine: Engine) -> None:
    """Two threads are at the same time where the context's scope is made; it is one scope."""
    both = threading.Barrier(2, timeout=30)

    class Slow(flask.Flask):
        waits = False

        @property
        def name(self) -> str:  # type: ignore[override]
            if self.waits:
                both.wait()
            return "slow"

    app = Slow("application")
    session = flask_scoped_session(sessionmaker(engine), app)
    with app.app_context(), ThreadPoolExecutor(2) as pool:
        app.waits = True
        futures = [pool.submit(contextvars.copy_context().run, session) for _ in range(2)]
        assert futures[0].result(60) is futures[1].result(60)
        app.waits = False
        assert use(session) is futures[0].result()
    assert checked_out(engine) == 0


def test_flask_a_thread_without_the_context_has_none(app: flask.Flask, session: Made) -> None:
    """Nothing is thread-local."""

    def work() -> str:
        with pytest.raises(RuntimeError):
            current_session.query(Data)
        return "done"

    with app.app_context(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(contextvars.Context().run, work).result(30) == "done"


def test_flask_outside_of_a_context_it_hangs_by_a_rope(session: Made, engine: Engine) -> None:
    """Scripts and shells need no context."""

    def script() -> Session:
        mine = session()
        assert use(session) is mine
        assert session.rope.session is mine
        assert session._ropes
        return mine

    assert_over(script(), engine)


def test_flask_inside_a_context_nothing_hangs_by_a_rope(app: flask.Flask, session: Made) -> None:
    """The rope's names mean the context's session."""
    with app.app_context():
        assert session.rope.session is session()
        session.set_rope()
        assert not session._ropes


def test_flask_remove_inside_a_context(app: flask.Flask, session: Made, engine: Engine) -> None:
    """The next use makes another session in the same context."""
    with app.app_context():
        first = use(session)
        session.remove()
        assert_over(first, engine)
        second = use(session)
        assert second is not first
        assert session.registry.has() is True
    assert_over(second, engine)


def test_flask_without_a_context_the_scope_is_the_next_best(
    app: flask.Flask, session: Made, engine: Engine
) -> None:
    """It shares the core's scope; a context within one has its own session all the same."""
    with open_scope() as scope:
        mine = use(session)
        assert session.registry.scope() is scope
        with app.app_context():
            assert session() is not mine
            assert current_scope() is scope
        assert session() is mine
    assert_over(mine, engine)


def test_flask_beside_the_middleware(app: flask.Flask, session: Made, engine: Engine) -> None:
    """A jenny and a flask_scoped_session serve the same request, each its own session."""
    jenny = SessionJenny(sessionmaker(engine))
    scopes: list[Scope] = []

    @app.route("/")
    def view() -> str:
        scopes.append(current_scope())
        assert use(jenny) is not use(session)
        assert checked_out(engine) == 2
        return "both"

    app.wsgi_app = RopeMiddleware(app.wsgi_app)  # type: ignore[assignment,method-assign,arg-type]
    assert app.test_client().get("/").text == "both"
    assert scopes[0].closed
    assert checked_out(engine) == 0


def test_flask_the_factory_must_be_callable() -> None:
    """As for every jenny."""
    with pytest.raises(TypeError, match="session_factory must be callable"):
        flask_scoped_session("factory")  # type: ignore[arg-type]
