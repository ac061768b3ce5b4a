"""The lanes of P1, P3 and H1: no middleware, a minimal one, and ours."""

from collections.abc import Iterator
from contextlib import AsyncExitStack
from contextvars import ContextVar
from time import thread_time
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from benchmarks.drivers import Lane, answer, asgi_lane, wsgi_lane
from benchmarks.lanes import Lanes
from benchmarks.sites import FLASK, HAND, HEADERS, OURS, START, WAYS

LEAST = "the least with a scope"
BODY = {"type": "http.response.body", "body": b"ok"}


async def bare_asgi(scope: Any, receive: Any, send: Any) -> None:
    await send(START)
    await send(BODY)


def bare_wsgi(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", HEADERS)
    return [b"ok"]


def bare_wsgi_generator(environ: Any, start_response: Any) -> Iterator[bytes]:
    start_response("200 OK", HEADERS)
    yield b"ok"


minimal: ContextVar[object] = ContextVar("minimal")


class MinimalASGI:
    """By hand: sets and resets a ContextVar, no more."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        token = minimal.set(object())
        try:
            await self.app(scope, receive, send)
        finally:
            minimal.reset(token)


class MinimalWSGI:
    """By hand: sets a ContextVar, and wraps the body to reset it in its ``close()``."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, environ: Any, start_response: Any) -> Any:
        token = minimal.set(object())
        try:
            return MinimalBody(self.app(environ, start_response), token)
        except BaseException:
            minimal.reset(token)
            raise


class MinimalBody:
    def __init__(self, body: Any, token: Any) -> None:
        self.body = body
        self.token = token

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.body)

    def close(self) -> None:
        try:
            close = getattr(self.body, "close", None)
            if close is not None:
                close()
        finally:
            minimal.reset(self.token)


class LeastWSGI:
    """By hand: the least of what W2 and W3 ask for, with nothing in the scope and nothing to end.

    The scope lies in the environ, and is current while the application, each chunk and `close()`
    run; not in between. It ends once, also where the server forgets to close the body.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, environ: Any, start_response: Any) -> Any:
        environ["least"] = scope = object()
        token = minimal.set(scope)
        try:
            chunks = self.app(environ, start_response)
            body = LeastBody()
            body.chunks, body.scope = chunks, scope
            return body
        finally:
            minimal.reset(token)


class LeastBody:
    __slots__ = ("chunks", "scope")

    chunks: Any
    scope: Any

    def __iter__(self) -> Iterator[bytes]:
        scope = self.scope
        token: Any = minimal.set(scope)
        try:
            for chunk in self.chunks:
                minimal.reset(token)
                token = None
                yield chunk
                token = minimal.set(scope)
        finally:
            if token is not None:
                minimal.reset(token)

    def close(self) -> None:
        scope, self.scope = self.scope, None
        if scope is None:
            return
        token = minimal.set(scope)
        try:
            close = getattr(self.chunks, "close", None)
            if close is not None:
                close()
        finally:
            minimal.reset(token)

    def __del__(self) -> None:
        if self.scope is not None:
            self.close()


async def untouched(where: Any, stack: AsyncExitStack, body: str) -> Lanes:
    """Side by side: nothing, a minimal middleware, ours, and ours with commit_on_success."""
    from rope_middleware import RopeMiddleware

    is_asgi, path = body == "ASGI", "/none" if body == FLASK else "/"
    theirs: dict[str, Any] = {}
    bare: Any = {"ASGI": bare_asgi, "WSGI, list body": bare_wsgi}.get(body, bare_wsgi_generator)
    if body == FLASK:
        bare = WAYS[HAND](FLASK, where, stack).wsgi_app
        theirs[LEAST] = LeastWSGI(bare)
        theirs["Flask-SQLAlchemy"] = WAYS["Flask-SQLAlchemy"](FLASK, where, stack).wsgi_app
    apps = {
        "bare": bare,
        "minimal": MinimalASGI(bare) if is_asgi else MinimalWSGI(bare),
        "ours": RopeMiddleware(bare),
        "commit": RopeMiddleware(bare, commit_on_success=True),
    } | theirs
    for app in apps.values():
        assert await answer(app, path, is_asgi=is_asgi) == (200, path[1:].encode() or b"ok")
    lane: Any = asgi_lane if is_asgi else wsgi_lane
    return {name: lane(app, path, thread_time) for name, app in apps.items()}


async def lookup(where: None, stack: AsyncExitStack) -> Lanes:
    """``jenny.session`` in a scope, and ``scoped_session.registry()``."""
    from rope_middleware import SessionJenny, open_scope

    jenny, scoped = SessionJenny(sessionmaker()), scoped_session(sessionmaker())
    stack.enter_context(open_scope("P3"))
    names = {"jenny": jenny, "scoped": scoped}
    return {"ours": _timed("jenny.session", names), "theirs": _timed("scoped.registry()", names)}


async def transaction(where: None, stack: AsyncExitStack) -> Lanes:
    """One transaction after the other in one session with no statement, by hand and ours.

    In one process. Where another process has its turn in between, each batch begins with cold
    caches: 3 us become 5.
    """
    from rope_middleware import SessionJenny, open_scope

    stack.enter_context(open_scope("H1"))
    sessions = {HAND: _factory()(), OURS: SessionJenny(_factory()).session}
    code = "session.connection(); session.rollback()"
    return {by: _timed(code, {"session": session}) for by, session in sessions.items()}


def _factory() -> "sessionmaker[Session]":
    return sessionmaker(create_engine("sqlite://", poolclass=StaticPool))


LOOP = """
def lane(times):
    started = thread_time()
    for _ in range(times):
        {code}
    return thread_time() - started
"""


def _timed(code: str, names: dict[str, Any]) -> Lane:
    """Return the lane that runs `code`; no call of a function, which would take longer than it.

    It stands in a function of this file's, as an application's code does: a file of no name, as
    timeit's, would be passed over in the search for the line that began a transaction (H1).
    """
    names = {**names, "thread_time": thread_time}
    exec(compile(LOOP.format(code=code), __file__, "exec"), names)

    async def lane(times: int) -> float:
        seconds: float = names["lane"](times)
        return seconds

    return lane
