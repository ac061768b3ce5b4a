"""S6: scopes in scopes, two middlewares, and applications mounted in others."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from rope_middleware import (
    ASGIRopeMiddleware,
    NoScopeError,
    RopeMiddleware,
    Scope,
    WSGIRopeMiddleware,
    current_scope,
    open_scope,
)
from tests.kit.asgi import ASGIClient, answer, client, http_scope, into_nothing, serve
from tests.kit.engines import rows
from tests.kit.flask_app import flask_app
from tests.kit.leaks import checked_out, no_scope_here
from tests.kit.models import Data, Row
from tests.kit.sessions import Jenny, touch, use
from tests.kit.stores import Store
from tests.kit.waiting import never
from tests.kit.ways import BLOCKS, Way
from tests.kit.wsgi import BODIES, HEADERS, KEY, Probe, Server, Wrap, make_environ, scope_of

pytestmark = pytest.mark.anyio


def test_S6_an_inner_scope_has_sessions_of_its_own(jenny: Jenny, engine: Engine, way: Way) -> None:
    """The outer one is untouched, and current again afterwards."""

    def body() -> None:
        outer, session = current_scope(), use(jenny.session)
        row = session.get(Data, 1)
        assert row is not None
        row.count = 5
        with open_scope() as inner:
            assert current_scope() is inner
            assert inner is not outer
            assert use(jenny.session) is not session
            assert checked_out(engine) == 2
        assert inner.closed
        assert not outer.closed
        assert checked_out(engine) == 1
        assert current_scope() is outer
        assert jenny.session is session
        assert row in session.dirty
        with pytest.raises(ValueError), open_scope():
            raise ValueError
        assert current_scope() is outer
        session.commit()

    way(body)
    assert checked_out(engine) == 0
    with Session(engine) as session:
        assert session.scalar(select(Data.count)) == 5


def test_S6_scopes_nest_as_deep_as_one_likes(jenny: Jenny) -> None:
    """Each level has its own session, and each comes back."""
    seen: list[Session] = []

    def level(depth: int) -> None:
        with open_scope() as scope:
            session = jenny.session
            seen.append(session)
            if depth:
                level(depth - 1)
            assert current_scope() is scope
            assert jenny.session is session

    level(30)
    assert len(set(seen)) == 31


def test_S6_an_outer_session_can_be_used_in_an_inner_scope(jenny: Jenny, engine: Engine) -> None:
    """A captured session belongs to the scope that made it, whichever is current."""
    with open_scope():
        session = jenny.session
        with open_scope():
            use(session)
        assert checked_out(engine) == 1
        use(session)
    assert checked_out(engine) == 0


def test_S6_the_decorator_opens_a_scope_for_each_call(jenny: Jenny, engine: Engine) -> None:
    """Calls within calls, and calls of several threads, have a scope each."""
    scopes: list[Scope] = []

    @open_scope()
    def work(depth: int) -> Session:
        """Has a docstring."""
        scopes.append(current_scope())
        session = use(jenny.session)
        if depth:
            assert work(depth - 1) is not session
        assert jenny.session is session
        return session

    work(2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [0] * 8))
    assert len(set(scopes)) == 11
    assert all(scope.closed for scope in scopes)
    assert scopes[0].name.endswith("work")
    assert work.__doc__ == "Has a docstring."
    assert work.__name__ == "work"
    assert checked_out(engine) == 0


def test_S6_the_decorator_works_on_methods(jenny: Jenny) -> None:
    """Plain, class and static methods, and callables that are no functions."""

    class Service:
        @open_scope()
        def method(self) -> tuple[Any, Scope]:
            return self, current_scope()

        @classmethod
        @open_scope("named")
        def class_method(cls) -> tuple[Any, Scope]:
            return cls, current_scope()

        @staticmethod
        @open_scope()
        def static_method() -> Scope:
            return current_scope()

    service = Service()
    assert service.method()[0] is service
    assert service.method()[1].closed
    assert service.class_method()[0] is Service
    assert service.class_method()[1].name == "named"
    assert service.static_method().closed
    assert open_scope()(partial(current_scope))().closed


def test_S6_generator_functions_are_refused(jenny: Jenny) -> None:
    """Their body would run after the scope's end; the error names the way that works."""

    def rows() -> Iterator[int]:
        yield 1

    async def async_rows() -> Any:
        yield 1

    for function, way in ((rows, "with"), (async_rows, "async with")):
        with pytest.raises(TypeError, match=f'Use "{way} open_scope'):
            open_scope()(function)


def test_S6_the_decorator_above_that_of_a_queue_is_refused() -> None:
    """A worker would call the function below it, outside of any scope. Below it is right."""
    celery = pytest.importorskip("celery")
    queue = celery.Celery("jobs", broker="memory://", set_as_current=False)

    def work() -> str:
        return current_scope().name

    with pytest.raises(TypeError, match=r"below the decorator of a queue"):
        open_scope()(queue.task(name="above")(work))
    job = queue.task(name="below")(open_scope("job")(work))
    assert job() == job.apply().get() == "job"
    with pytest.raises(NoScopeError):
        current_scope()


def test_S6_the_decorator_without_its_brackets_is_refused() -> None:
    """`@open_scope` would take the function for its name."""
    with pytest.raises(TypeError, match=r"@open_scope\(\)"):

        @open_scope  # type: ignore[arg-type]
        def work() -> None:
            pass


def test_S6_one_open_scope_object_is_entered_once_at_a_time(jenny: Jenny) -> None:
    """One after the other it makes a new scope each time; a second entry is refused."""
    again = open_scope("again")
    with again as first:
        with pytest.raises(RuntimeError, match="once at a time"), again:
            pass
        assert current_scope() is first
    assert no_scope_here()
    with again as second:
        assert second.name == "again"
        assert second is not first
    assert first.closed
    assert second.closed


def test_S6_one_open_scope_object_in_several_threads(jenny: Jenny, engine: Engine) -> None:
    """A thread that enters what another one is in is refused, and ends nothing of that one's."""
    shared = open_scope("shared")

    def second() -> None:
        with pytest.raises(RuntimeError, match="once at a time"), shared:
            pass

    with ThreadPoolExecutor(1) as pool, shared as scope:
        session = use(jenny.session)
        pool.submit(contextvars.Context().run, second).result(60)
        assert not scope.closed
        assert jenny.session is session
        assert session.in_transaction()
    assert checked_out(engine) == 0


@pytest.mark.parametrize("way", BLOCKS)
def test_S6_names(way: Way) -> None:
    """The name given, or one that says where it comes from; it is in the repr and the errors."""
    assert way(lambda: current_scope().name, name="import") == "import"
    scope = way(current_scope, name="import")
    assert repr(scope) == "<Scope 'import' closed>"
    with open_scope() as scope:
        assert scope.name == "open_scope()"
        assert repr(scope) == "<Scope 'open_scope()' open>"


async def test_S6_async_an_inner_scope_has_sessions_of_its_own(store: Store) -> None:
    """The outer one is untouched and current again afterwards."""
    async with open_scope() as outer:
        session = store.jenny.session
        await session.execute(text("SELECT 1"))
        async with open_scope() as inner:
            assert current_scope() is inner is not outer
            assert store.jenny.session is not session
            await store.jenny.execute(text("SELECT 1"))
            assert store.held() == 2
        assert store.held() == 1
        assert current_scope() is outer
        assert store.jenny.session is session
        assert session.in_transaction()
    assert store.held() == 0


async def test_S6_two_middlewares_around_one_request_share_one_scope(store: Store) -> None:
    """The inner one finds the scope in the ASGI dict and leaves it to the outer one."""
    seen: list[Scope] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["rope_middleware.scope"] is current_scope()
        seen.append(current_scope())
        await store.jenny.execute(text("SELECT 1"))

    async def between(scope: Any, receive: Any, send: Any) -> None:
        seen.append(current_scope())
        await ASGIRopeMiddleware(app)(scope, receive, send)
        assert not seen[0].closed
        assert store.held() == 1

    await ASGIRopeMiddleware(between)(http_scope(), never, into_nothing)
    assert seen[0] is seen[1]
    assert store.held() == 0


async def test_S6_another_request_of_a_client_in_the_same_process_has_its_own_scope(
    store: Store,
) -> None:
    """An ASGI call never looks for its scope in the ContextVar."""
    seen: list[Scope] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(current_scope())
        await store.jenny.execute(text("SELECT 1"))
        await answer(send, body=b"inner")

    async def handler() -> None:
        outer = current_scope()
        await store.jenny.execute(text("SELECT 1"))
        async with client(ASGIRopeMiddleware(inner)) as other:
            assert (await other.get("/inner")).text == "inner"
        assert seen[0] is not outer
        assert seen[0].closed
        assert current_scope() is outer
        assert store.held() == 1

    await serve(handler)
    assert store.held() == 0


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("server", [Server(), Server(take=1), Server(close=2), Server(close=0)])
def test_S6_wsgi_two_middlewares_around_one_request_share_one_scope(
    wrap: Wrap, kind: str, server: Server, jenny: Jenny, engine: Engine
) -> None:
    """The outer one opens and ends it; the inner one only hands on."""
    probe = Probe(jenny, kind)
    scopes: list[Scope] = []

    def between(environ: Any, start_response: Any) -> Any:
        scopes.append(scope_of(environ))
        result = inner(environ, start_response)
        assert not scope_of(environ).closed
        return result

    inner = wrap(probe)
    seen = server(wrap(between))
    assert seen.body == (b"1" if server.take else b"123")
    del seen
    gc.collect()
    assert scopes == [probe.scope]
    probe.is_over(engine)


def test_S6_an_inner_body_closed_early_leaves_the_scope_to_the_outer_middleware(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """A middleware between the two may read and close the inner body before it answers."""

    def between(environ: Any, start_response: Any) -> Any:
        result = inner(environ, start_response)
        body = b"".join(result)
        result.close()
        assert not scope_of(environ).closed
        assert touch(jenny) is probe.sessions[0]
        return [body.upper()]

    probe = Probe(jenny)
    inner = wrap(probe)
    environ = make_environ()
    seen = Server()(wrap(between), environ)
    assert (seen.error, seen.body) == (None, b"123")
    assert scope_of(environ).closed
    assert probe.closes == 1
    assert checked_out(engine) == 0


@pytest.mark.parametrize("outer_commits", [True, False])
def test_S6_the_options_of_two_middlewares_add_up(
    outer_commits: bool, jenny: Jenny, engine: Engine
) -> None:
    """The scope commits where either of them asks for it."""

    def app(environ: Any, start_response: Any) -> Any:
        jenny.session.add(Row(name="x"))
        start_response("200 OK", HEADERS)
        return [b""]

    inner = WSGIRopeMiddleware(app, commit_on_success=not outer_commits)
    Server()(WSGIRopeMiddleware(inner, commit_on_success=outer_commits))
    assert rows(engine) == 1


def test_S6_applications_that_are_asked_one_after_the_other(jenny: Jenny, engine: Engine) -> None:
    """Each commits by its own answer: what the first has refused is not the client's response."""

    def answering(name: str, status: str) -> WSGIRopeMiddleware:
        def app(environ: Any, start_response: Any) -> Any:
            jenny.session.add(Row(name=name))
            start_response(status, HEADERS)
            return [b""]

        return WSGIRopeMiddleware(app, commit_on_success=True)

    applications = [answering("first", "404 Not Found"), answering("second", "201 Created")]

    def cascade(environ: Any, start_response: Any) -> Any:
        applications[0]({**environ}, lambda *_: print)
        return applications[1](environ, start_response)

    seen = Server()(WSGIRopeMiddleware(cascade))
    assert seen.starts[0][0] == "201 Created"
    with engine.connect() as connection:
        assert connection.scalars(select(Row.name)).all() == ["second"]


def test_S6_a_copy_of_the_environ_shares_the_scope_too(wrap: Wrap, jenny: Jenny) -> None:
    """Dispatchers hand on a copy with another SCRIPT_NAME."""
    probe = Probe(jenny)
    inner = wrap(probe)

    def dispatcher(environ: Any, start_response: Any) -> Any:
        copy = {**environ, "SCRIPT_NAME": "/mounted", "PATH_INFO": "/"}
        return inner(copy, start_response)

    environ = make_environ("/mounted/")
    seen = Server()(wrap(dispatcher), environ)
    assert (seen.error, seen.body) == (None, b"123")
    assert probe.scope is scope_of(environ)
    assert probe.scope.closed


def test_S6_an_environ_used_again_gets_a_new_scope(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """What an earlier request left in a reused environ is closed and no scope to share."""
    probes = [Probe(jenny), Probe(jenny)]
    environ = make_environ()
    for probe in probes:
        seen = Server()(wrap(probe), environ)
        assert (seen.error, seen.body) == (None, b"123")
    assert probes[0].scope is not probes[1].scope
    assert checked_out(engine) == 0


def test_S6_a_client_in_the_same_process_makes_another_request(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """A view that calls the app through a test client: two requests, two scopes."""
    sessions: list[Session] = []

    def app(environ: Any, start_response: Any) -> Any:
        session = touch(jenny)
        sessions.append(session)
        start_response("200 OK", HEADERS)
        if environ["PATH_INFO"] == "/inner":
            return [b"inner"]
        body = Server()(middleware, make_environ("/inner")).body
        assert jenny.session is session
        assert session.in_transaction()
        assert current_scope() is scope_of(environ)
        return [body]

    middleware = wrap(app)
    seen = Server()(middleware)
    assert (seen.error, seen.body) == (None, b"inner")
    assert sessions[0] is not sessions[1]
    assert checked_out(engine) == 0


BRIDGES = ["a2wsgi", "starlette", "responder"]


def bridged(name: str, app: Any) -> Any:
    """Mount the WSGI app under /wsgi in an ASGI app, by one of the bridges that people use."""
    if name == "a2wsgi":
        bridge = pytest.importorskip("a2wsgi").WSGIMiddleware(app)
        routing = pytest.importorskip("starlette.routing")
        return routing.Router([routing.Mount("/wsgi", app=bridge)])
    if name == "responder":
        responder = pytest.importorskip("responder")
        pytest.importorskip("a2wsgi")
        api = responder.API(secret_key="only for the test", allowed_hosts=["*"])
        api.mount("/wsgi", app)
        return api
    import warnings

    with warnings.catch_warnings():
        # Starlette names a2wsgi as its replacement, and says so at import.
        warnings.simplefilter("ignore")
        bridge_module = pytest.importorskip("starlette.middleware.wsgi")
    routing = pytest.importorskip("starlette.routing")
    return routing.Router([routing.Mount("/wsgi", app=bridge_module.WSGIMiddleware(app))])


@pytest.mark.parametrize("bridge", BRIDGES)
async def test_S6_a_mounted_wsgi_app_sees_the_outer_scope(
    bridge: str, jenny: Jenny, engine: Engine
) -> None:
    """The scope that the ASGI middleware opened reaches the app in its worker thread."""
    found: list[Scope] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        found.append(current_scope())
        session = touch(jenny)
        start_response("200 OK", HEADERS)
        yield b"a"
        assert touch(jenny) is session
        found.append(current_scope())
        yield b"b"

    client = await ASGIClient()(ASGIRopeMiddleware(bridged(bridge, app)), "/wsgi/")
    assert (client.status, client.body) == (200, b"ab")
    assert found[0] is found[1]
    assert found[0].name == "GET /wsgi/"
    assert found[0].closed
    assert checked_out(engine) == 0


def wsgi_checked(probe: Probe, outer: list[Scope]) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        outer.append(environ["asgi.scope"][KEY])
        return probe(environ, start_response)

    return app


@pytest.mark.parametrize("bridge", ["a2wsgi", "responder"])
async def test_S6_both_middlewares_around_a_mounted_wsgi_app_share_one_scope(
    wrap: Wrap, bridge: str, jenny: Jenny, engine: Engine
) -> None:
    """The inner one finds it in environ['asgi.scope'], and leaves its end to the outer one."""
    probe = Probe(jenny)
    outer: list[Scope] = []
    mounted = bridged(bridge, wrap(wsgi_checked(probe, outer)))

    client = await ASGIClient()(ASGIRopeMiddleware(mounted), "/wsgi/")
    assert (client.status, client.body) == (200, b"123")
    assert probe.closes == 1
    assert outer == [probe.scope]
    assert probe.scope.closed
    assert checked_out(engine) == 0


async def test_S6_a_bridge_that_tells_nothing_gets_a_scope_of_its_own(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """Starlette's own bridge hands on no ASGI scope: two scopes, and both of them end."""
    probe = Probe(jenny, "generator")
    mounted = bridged("starlette", wrap(probe))
    client = await ASGIClient()(ASGIRopeMiddleware(mounted), "/wsgi/")
    assert (client.status, client.body) == (200, b"123")
    gc.collect()  # this bridge never calls close()
    probe.is_over(engine)


@pytest.mark.parametrize("bridge", ["a2wsgi", "responder"])
async def test_S6_mounted_flask_counts_in_the_outer_scope(
    bridge: str, jenny: Jenny, engine: Engine
) -> None:
    """A whole framework behind the bridge, with and without a middleware of its own."""
    app = flask_app(jenny)
    for number, wsgi in enumerate((app.wsgi_app, RopeMiddleware(app.wsgi_app)), 1):
        api = ASGIRopeMiddleware(bridged(bridge, wsgi))
        assert (await ASGIClient()(api, "/wsgi/count")).body == str(number).encode()
        assert (await ASGIClient()(api, "/wsgi/stream")).body == b"xxx"
        assert (await ASGIClient()(api, "/wsgi/fail")).status == 500
        assert (await ASGIClient()(api, "/wsgi/scope")).body == b"GET /wsgi/scope"
        assert checked_out(engine) == 0


@pytest.mark.parametrize("own_middleware", [False, True], ids=["outer", "both"])
@pytest.mark.parametrize("options", [{}, {"commit_on_success": True}], ids=["plain", "commit"])
async def test_S6_a_bridge_that_never_closes_the_body(
    own_middleware: bool, options: dict[str, Any], jenny: Jenny, engine: Engine
) -> None:
    """Where the client is gone a2wsgi stands still in mid-body: the ASGI scope frees everything."""
    a2wsgi = pytest.importorskip("a2wsgi")
    scopes: list[Scope] = []
    stuck, closed = threading.Event(), threading.Event()

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", HEADERS)
        scopes.append(current_scope())
        try:
            for number in range(1000):
                touch(jenny)
                if number == 5:
                    stuck.set()
                yield b"x"
        finally:
            closed.set()

    wsgi = WSGIRopeMiddleware(app, **options) if own_middleware else app
    # A queue of one chunk, so that it fills at once.
    api = ASGIRopeMiddleware(a2wsgi.WSGIMiddleware(wsgi, workers=1, send_queue_size=1), **options)
    task = asyncio.create_task(ASGIClient(reads=3)(api, "/"))
    while not stuck.is_set():
        await asyncio.sleep(0.005)
        assert not task.done(), task
    task.cancel()  # what a server does with the request of a client that is gone
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not closed.is_set()
    assert scopes[0].closed
    assert checked_out(engine) == 0


def test_S6_scopes_of_generators_may_be_left_in_any_order() -> None:
    """What was current before both is current after both."""

    def hold(name: str) -> Iterator[None]:
        with open_scope(name):
            yield

    first, second = hold("first"), hold("second")
    next(first)
    next(second)
    first.close()
    assert current_scope().name == "second"
    second.close()
    with pytest.raises(NoScopeError):
        current_scope()


def test_S6_a_scope_around_several_chunks_is_current_for_each(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """`with open_scope():` in a generator body is not lost between its chunks."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        outer = jenny.session
        with open_scope():
            inner = touch(jenny)
            for number in (b"1", b"2"):
                yield number
                assert touch(jenny) is inner is not outer
        assert touch(jenny) is outer
        yield b"3"

    seen = Server()(wrap(app))
    assert (seen.error, seen.body) == (None, b"123")
    assert checked_out(engine) == 0
