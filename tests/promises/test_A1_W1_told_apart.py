"""A1, W1: `RopeMiddleware` tells ASGI and WSGI applications apart."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import scoped_session, sessionmaker

from rope_middleware import (
    ASGIRopeMiddleware,
    RopeMiddleware,
    WSGIRopeMiddleware,
    current_scope,
    open_scope,
)
from tests.kit.asgi import ASGIClient
from tests.kit.frameworks import FRAMEWORKS, View
from tests.kit.programs import ROOT
from tests.kit.waiting import PATIENCE
from tests.kit.wsgi import Server, make_environ
from tests.servers.asgi import HOST, free_port, run_command

pytestmark = pytest.mark.anyio

App = Callable[..., Any]


def wsgi_function(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [current_scope().name.encode()]


def wsgi_generator(environ: Any, start_response: Any) -> Iterator[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield current_scope().name.encode()


def wsgi_with_option(environ: Any, start_response: Any, prefix: bytes = b"") -> Any:
    return wsgi_function(environ, start_response)


def wsgi_with_keyword(environ: Any, start_response: Any, *, prefix: bytes = b"") -> Any:
    return wsgi_function(environ, start_response)


def wsgi_bound_by_partial(prefix: bytes, environ: Any, start_response: Any) -> Any:
    return wsgi_function(environ, start_response)


class WSGIObject:
    def __call__(self, environ: Any, start_response: Any) -> Any:
        return wsgi_function(environ, start_response)

    def method(self, environ: Any, start_response: Any) -> Any:
        return wsgi_function(environ, start_response)

    @classmethod
    def class_method(cls, environ: Any, start_response: Any) -> Any:
        return wsgi_function(environ, start_response)

    @staticmethod
    def static_method(environ: Any, start_response: Any) -> Any:
        return wsgi_function(environ, start_response)


def wsgi_decorated() -> App:
    @wraps(wsgi_function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return wsgi_function(*args, **kwargs)

    return wrapper


async def asgi_function(scope: Any, receive: Any, send: Any) -> None:
    body = current_scope().name.encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def asgi_bound_by_partial(prefix: bytes, scope: Any, receive: Any, send: Any) -> None:
    await asgi_function(scope, receive, send)


def asgi_plain_function(scope: Any, receive: Any, send: Any) -> Any:
    return asgi_function(scope, receive, send)


class ASGIObject:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await asgi_function(scope, receive, send)

    async def method(self, scope: Any, receive: Any, send: Any) -> None:
        await asgi_function(scope, receive, send)


class ASGIPlainCall:
    """Its `__call__` is no coroutine function; it returns what can be awaited."""

    def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        return asgi_function(scope, receive, send)


class ASGIProxy:
    """As lazy proxies are: everything is looked up in what it stands for."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def __getattr__(self, name: str) -> Any:
        return getattr(self._app, name)

    def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        return self._app(scope, receive, send)


def asgi_decorated() -> App:
    @wraps(asgi_function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return asgi_function(*args, **kwargs)

    return wrapper


def bare(name: str) -> App:
    """Make a framework's application as it is before anybody puts the middleware around it."""
    pytest.importorskip(FRAMEWORKS[name].distribution)
    return FRAMEWORKS[name].bare(View(lambda route: current_scope().name))


def django_asgi() -> App:
    bare("django")
    return pytest.importorskip("django.core.asgi").get_asgi_application()


def a2wsgi_asgi() -> App:
    return pytest.importorskip("a2wsgi").WSGIMiddleware(wsgi_function)


def a2wsgi_wsgi() -> App:
    return pytest.importorskip("a2wsgi").ASGIMiddleware(asgi_function)


WSGI: dict[str, Callable[[], App]] = {
    "function": lambda: wsgi_function,
    "generator function": lambda: wsgi_generator,
    "function with an option": lambda: wsgi_with_option,
    "function with a keyword": lambda: wsgi_with_keyword,
    "lambda": lambda: lambda environ, start_response: wsgi_function(environ, start_response),
    "partial": lambda: partial(wsgi_bound_by_partial, b""),
    "partial with a keyword": lambda: partial(wsgi_with_keyword, prefix=b""),
    "partial of a partial": lambda: partial(partial(wsgi_bound_by_partial, b"")),
    "object": WSGIObject,
    "partial of an object": lambda: partial(WSGIObject()),
    "bound method": lambda: WSGIObject().method,
    "class method": lambda: WSGIObject.class_method,
    "static method": lambda: WSGIObject.static_method,
    "decorated function": wsgi_decorated,
    "open_scope decorator": lambda: open_scope()(wsgi_function),
    "WSGIRopeMiddleware": lambda: WSGIRopeMiddleware(wsgi_function),
    "RopeMiddleware": lambda: RopeMiddleware(wsgi_function),
    "Flask's wsgi_app": lambda: bare("flask").wsgi_app,
    "a2wsgi": a2wsgi_wsgi,
    **{name: partial(bare, name) for name, it in FRAMEWORKS.items() if it.protocol == "wsgi"},
}


ASGI: dict[str, Callable[[], App]] = {
    "function": lambda: asgi_function,
    "plain function": lambda: asgi_plain_function,
    "lambda": lambda: lambda scope, receive, send: asgi_function(scope, receive, send),
    "partial": lambda: partial(asgi_bound_by_partial, b""),
    "partial of a plain function": lambda: partial(asgi_plain_function),
    "object": ASGIObject,
    "partial of an object": lambda: partial(ASGIObject()),
    "bound method": lambda: ASGIObject().method,
    "plain __call__": ASGIPlainCall,
    "proxy": lambda: ASGIProxy(ASGIObject()),
    "decorated function": asgi_decorated,
    "ASGIRopeMiddleware": lambda: ASGIRopeMiddleware(asgi_function),
    "RopeMiddleware": lambda: RopeMiddleware(asgi_function),
    "Django": django_asgi,
    "a2wsgi": a2wsgi_asgi,
    **{name: partial(bare, name) for name, it in FRAMEWORKS.items() if it.protocol == "asgi"},
}


def serve_wsgi(app: Any) -> bytes:
    seen = Server()(app, make_environ("/name"))
    assert seen.starts[-1][0].startswith("200"), seen
    return seen.body


async def serve_asgi(app: Any) -> bytes:
    client = await ASGIClient()(app, "/name")
    assert client.status == 200, client.messages
    return client.body


@pytest.mark.parametrize("name", WSGI)
def test_W1_a_wsgi_app_gets_the_wsgi_middleware(name: str) -> None:
    """And is served by it, within a scope."""
    middleware = RopeMiddleware(WSGI[name]())
    assert type(middleware) is WSGIRopeMiddleware
    assert isinstance(middleware, RopeMiddleware)
    inner = "open_scope" in name
    assert serve_wsgi(middleware) == (b"wsgi_function" if inner else b"GET /name")


@pytest.mark.parametrize("name", ASGI)
async def test_A1_an_asgi_app_gets_the_asgi_middleware(name: str) -> None:
    """And is served by it, within a scope."""
    middleware = RopeMiddleware(ASGI[name]())
    assert type(middleware) is ASGIRopeMiddleware
    assert isinstance(middleware, RopeMiddleware)
    assert await serve_asgi(middleware) == b"GET /name"


def test_W1_the_class_stays_what_it_was_asked_for() -> None:
    """The explicit classes never choose: an app of the other protocol is refused (L4)."""
    for explicit, app in (WSGIRopeMiddleware, asgi_function), (ASGIRopeMiddleware, wsgi_function):
        with pytest.raises(TypeError, match=r"cannot be called as one.*RopeMiddleware\(app\)"):
            explicit(app)  # type: ignore[operator]

    class Mine(WSGIRopeMiddleware):
        pass

    assert type(Mine(wsgi_function)) is Mine
    assert serve_wsgi(Mine(wsgi_function)) == b"GET /name"
    assert serve_wsgi(WSGIRopeMiddleware(lambda *args: wsgi_function(*args))) == b"GET /name"


async def test_A1_an_explicit_class_takes_what_cannot_be_told_apart() -> None:
    """That is the cure which the error names."""

    def anything(*args: Any) -> Any:
        return asgi_function(*args)

    assert await serve_asgi(ASGIRopeMiddleware(anything)) == b"GET /name"


@pytest.mark.parametrize("make", [RopeMiddleware, WSGIRopeMiddleware])
def test_W1_options_are_handed_on(make: Any) -> None:
    """The app by position or by name, the options as they are documented."""
    registry = scoped_session(sessionmaker(create_engine("sqlite://")), scopefunc=current_scope)
    middleware = make(app=wsgi_function, registries=[registry], commit_on_success=True, retries=1)
    assert type(middleware) is WSGIRopeMiddleware
    assert serve_wsgi(middleware) == b"GET /name"
    assert serve_wsgi(make(wsgi_function, [registry])) == b"GET /name"


@pytest.mark.parametrize("kind", [RopeMiddleware, ASGIRopeMiddleware, WSGIRopeMiddleware])
def test_A1_W1_the_signature_tells_the_options(kind: Any) -> None:
    """For `help()`, editors and frameworks; of a subclass's `__init__` it tells that one's."""
    told = inspect.signature(kind).parameters
    assert list(told)[:2] == ["app", "registries"]
    assert {name: one.default for name, one in list(told.items())[1:]} == {
        "registries": (), "commit_on_success": False, "commit_veto": None, "on_commit_error": None,
        "retries": 0, "read_only": (), "max_active": None, "close_timeout": 10.0,
    }  # fmt: skip

    class Mine(kind):  # type: ignore[misc]
        def __init__(self, app: Any, *, mine: int = 1) -> None:
            super().__init__(app)

    assert "retries" not in inspect.signature(Mine).parameters


@pytest.mark.parametrize("name", ["starlette", "responder"])
def test_A1_frameworks_add_it_without_being_told(name: str) -> None:
    """Starlette and Responder make a middleware with the app alone, by position or by name."""
    testclient = pytest.importorskip("starlette.testclient")
    with testclient.TestClient(
        FRAMEWORKS[name].make(View(lambda route: current_scope().name))
    ) as client:
        assert client.get("/name").text == "GET /name"


async def two_arguments(scope: Any, receive: Any) -> None: ...


class OneArgument:
    def __call__(self, scope: Any) -> Any:
        return None


class FourArguments:
    def __call__(self, a: Any, b: Any, c: Any, d: Any) -> Any:
        return None


class Unreadable:
    """A callable that hides its parameters, as some made in C do."""

    def __call__(self, *args: Any) -> Any:
        return None

    @property
    def __signature__(self) -> Any:
        raise ValueError("no signature found")


BAD: dict[str, Any] = {
    "*args": lambda *args: None,
    "*args and **kwargs": lambda *args, **kwargs: None,
    "one argument": lambda scope: None,
    "no argument": lambda: None,
    "four arguments": lambda a, b, c, d: None,
    "object of one argument": OneArgument(),
    "object of four arguments": FourArguments(),
    "a class": WSGIObject,
    "an ASGI 2 class": OneArgument,
    "a class of the standard library": dict,
    "partial that binds too much": partial(wsgi_function, None),
    "partial of *args": partial(lambda *args: None, 1),
    "coroutine function of one argument": mock.AsyncMock.assert_awaited,
    "coroutine function of two arguments": two_arguments,
    "mock": mock.Mock(),
    "unreadable": Unreadable(),
    "None": None,
    "a number": 42,
    "text": "app:application",
    "a module": inspect,
    "no callable": SimpleNamespace(),
}


@pytest.mark.parametrize("name", BAD)
def test_W1_what_cannot_be_told_apart_is_refused_in_words(name: str) -> None:
    """The error names both explicit classes, which are the cure."""
    with pytest.raises(TypeError) as caught:
        RopeMiddleware(BAD[name])
    assert "ASGIRopeMiddleware" in str(caught.value)
    assert "WSGIRopeMiddleware" in str(caught.value)


def test_W1_no_app_at_all() -> None:
    """A forgotten app is the same error, not one about arguments of __init__."""
    with pytest.raises(TypeError) as caught:
        RopeMiddleware()  # type: ignore[call-overload]
    assert "ASGIRopeMiddleware" in str(caught.value)
    assert "WSGIRopeMiddleware" in str(caught.value)


@pytest.mark.parametrize("explicit", [ASGIRopeMiddleware, WSGIRopeMiddleware])
@pytest.mark.parametrize("thing", [None, 42, "app:application"])
def test_W1_the_explicit_classes_refuse_what_is_no_app(explicit: Any, thing: Any) -> None:
    """At once, and not with the first request."""
    with pytest.raises(TypeError, match=explicit.__name__):
        explicit(thing)


def test_W1_nothing_is_called_to_find_out() -> None:
    """The choice is made by looking; an app that is called would answer a request."""
    called: list[Any] = []

    class App:
        def __call__(self, environ: Any, start_response: Any) -> Any:
            called.append(environ)
            return []

    RopeMiddleware(App())
    RopeMiddleware(lambda scope, receive, send: called.append(scope))
    assert called == []


@pytest.mark.parametrize("name", ["function", "plain function", "plain __call__", "starlette"])
def test_A1_servers_recognise_the_result_as_asgi_3(name: str) -> None:
    """uvicorn, hypercorn and what inspects as granian does, without being told."""
    middleware = RopeMiddleware(ASGI[name]())

    uvicorn = pytest.importorskip("uvicorn")
    config = uvicorn.Config(middleware, interface="auto", log_config=None, lifespan="off")
    config.load()
    assert config.interface == "asgi3"

    utils = pytest.importorskip("hypercorn.utils")
    assert utils.is_asgi(middleware)
    assert type(utils.wrap_app(middleware, 1024, None)).__name__ == "ASGIWrapper"

    # What ASGI frameworks look at, asgiref's `guarantee_single_callable` among them.
    assert inspect.iscoroutinefunction(type(middleware).__call__)
    asgiref = pytest.importorskip("asgiref.compatibility")
    assert not asgiref.is_double_callable(middleware)
    assert asgiref.guarantee_single_callable(middleware) is middleware


def test_W1_servers_recognise_the_result_as_wsgi() -> None:
    """hypercorn and Responder take it for the WSGI application that it is."""
    middleware = RopeMiddleware(wsgi_function)
    utils = pytest.importorskip("hypercorn.utils")
    assert not utils.is_asgi(middleware)
    assert type(utils.wrap_app(middleware, 1024, None)).__name__ == "WSGIWrapper"
    assert not inspect.iscoroutinefunction(middleware)
    assert len(inspect.signature(middleware).parameters) == 2


@pytest.mark.parametrize("again", [copy.deepcopy, lambda app: pickle.loads(pickle.dumps(app))])
def test_A1_a_wrapped_app_can_be_copied_and_pickled(again: Any) -> None:
    """With its options: for a process that is spawned, say."""
    wrapped = again(RopeMiddleware(asgi_function, commit_on_success=True, close_timeout=3.0))
    options: Any = wrapped._options
    assert (options.commit_on_success, options.close_timeout, options.retries) == (True, 3.0, 0)


@pytest.mark.slow
def test_A1_granian_serves_the_result(tmp_path: Any) -> None:
    """granian's ASGI interface calls it as ASGI 3."""
    pytest.importorskip("granian")
    (tmp_path / "choose_app.py").write_text(
        "from rope_middleware import RopeMiddleware\n"
        "from tests.promises.test_A1_W1_told_apart import ASGIPlainCall\n"
        "app = RopeMiddleware(ASGIPlainCall())\n"
    )
    port = free_port()
    command = [
        *(sys.executable, "-m", "granian", "--interface", "asginl", "--host", HOST),
        *("--port", str(port), "choose_app:app"),
    ]
    with run_command(command, cwd=tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}") as granian:
        granian.wait_for_port(port)
        answer = httpx.get(f"http://{HOST}:{port}/", timeout=PATIENCE)
        assert (answer.status_code, answer.text) == (200, "GET /")
        granian.interrupt()
