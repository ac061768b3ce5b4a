"""C3: `on_commit_error(error)` may answer in place of the default."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial, wraps
from inspect import Signature
from types import FunctionType
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy.exc import IntegrityError
from starlette.responses import JSONResponse
from werkzeug.wrappers import Response

from rope_middleware import ASGIRopeMiddleware, WSGIRopeMiddleware, current_scope
from tests.kit.asgi import asgi_app
from tests.kit.models import Row
from tests.kit.stores import Lock
from tests.kit.web import Exchange, Web
from tests.kit.wsgi import make_environ


class Conflict:
    """An `on_commit_error` that answers 409; it notes what it was asked."""

    def __init__(self, web: Web) -> None:
        self.web = web
        self.asked: list[Exception] = []

    def __call__(self, error: Exception) -> Any:
        self.asked.append(error)
        if self.web.wsgi:
            return Response('{"detail":"exists already"}', 409)
        return JSONResponse({"detail": "exists already"}, 409)


async def orphan(web: Web) -> None:
    await web.store.add(1)
    await web.store.add_orphan(1)


@pytest.mark.parametrize("lazily", [False, True])
def test_C3_on_commit_error_answers(web: Web, lazily: bool) -> None:
    """Asked once; its answer is whole and alone, no row is there, and `send` returns."""
    conflict, after = Conflict(web), []

    async def handler(exchange: Exchange) -> None:
        await orphan(web)
        await exchange.answer(201, b"of the app")
        after.append(1)

    answer = web.ask(handler, lazily=lazily, commit_on_success=True, on_commit_error=conflict)
    assert (answer.seen, answer.body) == (409, b'{"detail":"exists already"}')
    assert answer.whole
    assert answer.error is None
    assert [type(error) for error in conflict.asked] == [IntegrityError]
    assert after or web.wsgi
    assert web.store.rows() == []


def test_C3_none_is_the_default(web: Web) -> None:
    """Not asked for: as without the option."""

    async def handler(exchange: Exchange) -> None:
        await orphan(web)
        await exchange.answer(201, b"of the app")

    answer = web.ask(handler, commit_on_success=True, on_commit_error=lambda error: None)
    assert answer.seen == 500
    assert b"of the app" not in answer.body
    assert web.store.rows() == []


class TellError(Exception):
    """Raised by the tests' `on_commit_error`."""


@pytest.mark.parametrize("swallows", [False, True])
@pytest.mark.parametrize("lazily", [False, True])
def test_C3_what_it_raises_comes_out_of_the_middleware(
    web: Web, swallows: bool, lazily: bool
) -> None:
    """Also where the app swallows it; nothing of the app's response is sent."""

    def tell(error: Exception) -> None:
        raise TellError from error

    async def handler(exchange: Exchange) -> None:
        await orphan(web)
        try:
            await exchange.answer(201, b"of the app")
        except TellError:
            if not swallows:
                raise
            await exchange.answer(200, b"swallowed")

    answer = web.ask(handler, lazily=lazily, commit_on_success=True, on_commit_error=tell)
    assert isinstance(answer.error, TellError)
    assert (answer.status, answer.body) == (0, b"")
    assert web.store.rows() == []


@pytest.mark.parametrize("wrong", ["a string", 409, {}, JSONResponse, asyncio.sleep(0)])
def test_C3_a_wrong_result_is_an_error_in_words(web: Web, wrong: Any) -> None:
    """What is no application says so."""

    async def handler(exchange: Exchange) -> None:
        await orphan(web)
        await exchange.answer(201)

    answer = web.ask(handler, commit_on_success=True, on_commit_error=lambda error: wrong)
    assert isinstance(answer.error, TypeError)
    assert "on_commit_error" in str(answer.error)
    assert "application" in str(answer.error)
    if asyncio.iscoroutine(wrong):
        wrong.close()


def test_C3_nothing_later_commits(web: Web) -> None:
    """The app goes on and writes: that is rolled back."""

    async def handler(exchange: Exchange) -> None:
        await orphan(web)
        await exchange.answer(201)
        await web.store.add(2)

    web.ask(handler, commit_on_success=True, on_commit_error=Conflict(web))
    assert web.store.rows() == []


def test_C3_a_head_request_gets_no_body(web: Web) -> None:
    """Its headers, and nothing after them: the connection goes on."""

    async def handler(exchange: Exchange) -> None:
        await orphan(web)
        await exchange.answer(200)

    answer = web.ask(handler, method="HEAD", commit_on_success=True, on_commit_error=Conflict(web))
    assert (answer.seen, answer.body) == (409, b"")


def test_C3_it_is_asked_after_the_last_try(web: Web, lock: Lock) -> None:
    """A refusal that another try mends is nobody's matter; one that remains is asked for once."""
    conflict, tries = Conflict(web), []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        web.store.jenny.session.add(Row(n=1))  # flushed by the commit
        await exchange.answer(201)

    answer = web.ask(handler, commit_on_success=True, retries=2, on_commit_error=conflict)
    assert (answer.seen, len(tries), len(conflict.asked)) == (409, 3, 1)
    lock.release()
    answer = web.ask(handler, commit_on_success=True, retries=2, on_commit_error=conflict)
    assert (answer.seen, len(tries), len(conflict.asked)) == (201, 4, 1)


def test_C3_the_scope_is_current_when_it_is_asked(web: Web) -> None:
    """So it can say which request it was."""
    names: list[str] = []

    def tell(error: Exception) -> None:
        names.append(current_scope().name)

    async def handler(exchange: Exchange) -> None:
        await orphan(web)
        await exchange.answer(201)

    web.ask(handler, commit_on_success=True, on_commit_error=tell)
    assert names == ["GET /thing"]


async def not_plain(error: Exception) -> None: ...


@pytest.mark.parametrize("wrong", [409, "x", not_plain])
@pytest.mark.parametrize(
    "make",
    [
        lambda **options: ASGIRopeMiddleware(asgi_app(lambda: None), **options),
        lambda **options: WSGIRopeMiddleware(lambda environ, start_response: [], **options),
    ],
)
def test_C3_on_commit_error_is_a_plain_function(make: Callable[..., Any], wrong: Any) -> None:
    """Refused when the middleware is made."""
    with pytest.raises(TypeError, match="on_commit_error must be a plain function"):
        make(commit_on_success=True, on_commit_error=wrong)


MAKERS = [
    lambda **options: ASGIRopeMiddleware(asgi_app(lambda: None), **options),
    lambda **options: WSGIRopeMiddleware(lambda environ, start_response: [], **options),
]


class Takes:
    """Objects and methods that take as many arguments as their names say."""

    def __call__(self, first: Any) -> None: ...
    def two(self, first: Any, second: Any) -> None: ...
    @staticmethod
    def one(first: Any) -> None: ...
    @classmethod
    def of_class(cls, first: Any, second: Any) -> None: ...


class Static:
    @staticmethod
    def __call__(first: Any) -> None: ...


class Lies:
    """As a jenny does, which says that it takes nothing, for `Depends(jenny)`."""

    __signature__ = Signature()

    def __call__(self, *_: Any) -> None: ...


class Proxy:
    """As wrapt's: it says that it is the function, and calls it in its own way."""

    def __init__(self, function: Any) -> None:
        self._function = function

    @property
    def __class__(self) -> Any:
        return FunctionType

    @__class__.setter
    def __class__(self, _: Any) -> None: ...

    def __call__(self, *_: Any) -> Any:
        return self._function()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


def adapts(function: Any) -> Any:
    """Call it with one argument, whatever comes."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return function(*arguments[:1])

    return call


TAKES_ONE: list[Any] = [
    *(lambda error: None, Takes(), Takes.one, partial(Takes().two, 1), Static()),
    lambda error, more=None: None,
]
TAKES_TWO: list[Any] = [
    *(lambda status, headers: None, Takes().two, Takes().of_class, lambda a, b, c=1: None),
    partial(lambda a, b, c: None, 1),
    partial(lambda a, b, *, c: None, c=1),
    *(max, isinstance),
]
TAKES_BOTH: list[Any] = [
    *(lambda *_: None, lambda first, *_: None, Lies(), adapts(lambda error: None), Mock(), print),
    *(adapts(lambda: None), Proxy(lambda: None)),
    type("Made", (), {"__init__": lambda self, *_: None}),
]


@pytest.mark.parametrize("make", MAKERS)
def test_L4_what_cannot_be_called_so_is_refused_at_once(make: Callable[..., Any]) -> None:
    """Not at the first request that would ask it."""
    for veto in [
        lambda: None,
        lambda status: None,
        lambda status, headers, *, more: None,
        *TAKES_ONE[:4],
    ]:
        with pytest.raises(
            TypeError, match=r"commit_veto is called with \(status, headers\), and "
        ):
            make(commit_veto=veto)
    for answering in [lambda: None, lambda *, error: None, partial(Takes.one, 1), *TAKES_TWO[:5]]:
        with pytest.raises(TypeError, match=r"on_commit_error is called with \(error\), and "):
            make(on_commit_error=answering)


@pytest.mark.parametrize("make", MAKERS)
def test_L4_what_may_be_called_so_is_not_refused(make: Callable[..., Any]) -> None:
    """Whatever it is, and whatever it says of itself."""
    for veto in TAKES_TWO + TAKES_BOTH:
        make(commit_veto=veto)
    for answering in TAKES_ONE + TAKES_BOTH:
        make(on_commit_error=answering)


def test_C3_of_two_middlewares_the_innermost_answers(web: Web) -> None:
    """S6: it is nearer to the application."""
    inner, outer = Conflict(web), Conflict(web)
    kind: Any = WSGIRopeMiddleware if web.wsgi else ASGIRopeMiddleware
    if web.wsgi:
        from tests.kit.wsgi import Server

        def app(environ: Any, start_response: Any) -> list[bytes]:
            web.loop.run(orphan(web))
            start_response("201 Created", [])
            return [b"x"]

        wrapped = kind(
            kind(app, on_commit_error=inner), commit_on_success=True, on_commit_error=outer
        )
        seen = Server()(wrapped, make_environ())
        assert seen.starts[-1][0].startswith("409")
    else:
        from tests.kit.asgi import ask

        async def main() -> list[int]:
            statuses: list[int] = []
            wrapped = kind(
                kind(asgi_app(lambda: orphan(web)), on_commit_error=inner),
                commit_on_success=True,
                on_commit_error=outer,
            )
            await ask(wrapped, statuses)
            return statuses

        assert web.loop.run(main()) == [409]
    assert (len(inner.asked), len(outer.asked)) == (1, 0)


@pytest.mark.parametrize("web", ["asgi-async"], indirect=True)
def test_C3_starlette_says_nothing_untrue(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    """Where it has answered, the app hears of no error."""
    from starlette.applications import Starlette
    from starlette.routing import Route
    from starlette.testclient import TestClient

    caplog.set_level(logging.INFO)

    async def create(request: Any) -> Any:
        await orphan(web)
        return JSONResponse({}, 201)

    app = Starlette(routes=[Route("/", create, methods=["POST"])])
    app.add_middleware(ASGIRopeMiddleware, commit_on_success=True, on_commit_error=Conflict(web))
    with TestClient(app) as client:
        answer = client.post("/")
    assert (answer.status_code, answer.json()) == (409, {"detail": "exists already"})
    assert "already started" not in caplog.text
