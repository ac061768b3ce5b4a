"""`SandboxMiddleware`: requests to a live server say which sandbox they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from inspect import Parameter
from typing import TYPE_CHECKING, Any, ClassVar, cast, overload

from rope_middleware.asgi import ASGIRopeMiddleware
from rope_middleware.middleware import RopeMiddleware
from rope_middleware.running.threads import in_thread
from rope_middleware.scope.context import logger
from rope_middleware.signature import SignatureOf, explained
from rope_middleware.testing.desk import Desk, Reply, Visit
from rope_middleware.testing.routes import named
from rope_middleware.testing.sandbox import NAME, Sandbox
from rope_middleware.wsgi import WSGIRopeMiddleware

if TYPE_CHECKING:
    from typing import Self
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from rope_middleware.protocols import ASGIApp, ASGIScope, Message, Receive, Send

__all__ = ["SandboxMiddleware"]


class SandboxMiddleware:
    """Goes around the finished app of a server under test, ASGI or WSGI. Never in production.

    Requests, WebSockets and streams name their sandbox by the header or the cookie
    ``Rope-Sandbox``; the header wins. One that is not open is answered with 410. With jennies, a
    client without Python opens a sandbox by ``POST /rope-sandbox`` and ends it by ``DELETE``::

        app = SandboxMiddleware(RopeMiddleware(app), jenny)

    Args:
        app: the application that is served, RopeMiddleware and all.
        jennies: those of the sandboxes that requests open; without any, requests open none.
        path: where they are opened and ended.
        idle: seconds without a request after which one that a request has opened ends by itself.

    Raises:
        TypeError: `app` is no application, or cannot be told apart (as for `RopeMiddleware`); a
            jenny is none; another argument is of a wrong type.
        ValueError: `path` does not begin with a slash, or `idle` is not more than 0.
    """

    app: Any
    _desk: Desk
    __signature__: ClassVar[SignatureOf] = SignatureOf(
        lambda: [
            Parameter("app", Parameter.POSITIONAL_OR_KEYWORD),
            Parameter("jennies", Parameter.VAR_POSITIONAL),
            Parameter("path", Parameter.KEYWORD_ONLY, default="/rope-sandbox"),
            Parameter("idle", Parameter.KEYWORD_ONLY, default=60.0),
        ]
    )

    @overload
    def __new__(
        cls, app: ASGIApp, *jennies: Any, path: str = ..., idle: float = ...
    ) -> _SandboxASGI: ...
    @overload
    def __new__(
        cls, app: WSGIApplication, *jennies: Any, path: str = ..., idle: float = ...
    ) -> _SandboxWSGI: ...
    def __new__(cls, app: Any = None, *_: Any, **__: Any) -> Any:
        """Choose the class by the protocol of `app`."""
        if cls is SandboxMiddleware:
            # As RopeMiddleware does, whose error says what to do.
            told: Any = cast("Any", RopeMiddleware).__new__(RopeMiddleware, app)
            classes: dict[type, Any] = {
                ASGIRopeMiddleware: _SandboxASGI,
                WSGIRopeMiddleware: _SandboxWSGI,
            }
            cls = classes[type(told)]
        return object.__new__(cls)

    if not TYPE_CHECKING:
        # For type checkers `__new__` alone tells the class, as of RopeMiddleware.
        @explained("app = SandboxMiddleware(app, jenny)")
        def __init__(self, app, *jennies, path="/rope-sandbox", idle=60.0):
            self.app = app
            self._desk = Desk(jennies, path, idle)
            logger.warning(
                "SandboxMiddleware is around the app%s. It is for tests, and must not go to "
                "production.",
                f": whoever reaches {path} opens transactions that stay open" if jennies else "",
            )


class _SandboxASGI(SandboxMiddleware):
    """The one for ASGI applications."""

    app: ASGIApp

    if TYPE_CHECKING:

        def __new__(cls, *_: Any, **__: Any) -> Self: ...

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve one request in its sandbox."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        visit = _visit_of(scope)
        if scope["type"] == "http" and self._desk.is_asked(visit):
            await _answer(send, await in_thread(self._desk.answer, visit))
            return
        found = self._desk.find(visit)
        if isinstance(found, Reply):
            await (_close if scope["type"] == "websocket" else _refuse)(receive, send, found)
        elif found is None:
            await self.app(scope, receive, send)
        else:
            leave = self._desk.come_in(found)
            token = named.set(found)
            try:
                await self.app(scope, receive, send)
            finally:
                named.reset(token)
                leave()


def _visit_of(scope: ASGIScope) -> Visit:
    headers = {name.lower(): value.decode("latin-1") for name, value in scope.get("headers", ())}
    return Visit(
        method=scope.get("method", ""),
        path=scope["path"],
        query=scope.get("query_string", b"").decode("latin-1"),
        header=headers.get(NAME.lower().encode()),
        cookie=headers.get(b"cookie"),
    )


async def _answer(send: Send, reply: Reply) -> None:
    headers = [(n.lower().encode(), v.encode("latin-1")) for n, v in reply.all_headers()]
    start: Message = {
        "type": "http.response.start",
        "status": reply.status.value,
        "headers": headers,
    }
    await send(start)
    await send({"type": "http.response.body", "body": reply.body})


async def _refuse(_: Receive, send: Send, reply: Reply) -> None:
    await _answer(send, reply)


async def _close(receive: Receive, send: Send, reply: Reply) -> None:
    # Before it is accepted: https://asgi.readthedocs.io/en/latest/specs/www.html#close-send-event
    await receive()
    reason = str((reply.content or {}).get("detail", ""))[:120]
    await send({"type": "websocket.close", "code": 1008, "reason": reason})


class _SandboxWSGI(SandboxMiddleware):
    """The one for WSGI applications."""

    app: WSGIApplication

    if TYPE_CHECKING:

        def __new__(cls, *_: Any, **__: Any) -> Self: ...

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request in its sandbox."""
        visit = Visit(
            method=environ["REQUEST_METHOD"],
            path=environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", ""),
            query=environ.get("QUERY_STRING", ""),
            header=environ.get("HTTP_" + NAME.upper().replace("-", "_")),
            cookie=environ.get("HTTP_COOKIE"),
        )
        if self._desk.is_asked(visit):
            return _answer_wsgi(start_response, self._desk.answer(visit))
        found = self._desk.find(visit)
        if isinstance(found, Reply):
            return _answer_wsgi(start_response, found)
        if found is None:
            return self.app(environ, start_response)
        leave = self._desk.come_in(found)
        token = named.set(found)
        try:
            body = self.app(environ, start_response)
        except BaseException:
            leave()
            raise
        finally:
            named.reset(token)
        return _Body(body, found, leave)


def _answer_wsgi(start_response: StartResponse, reply: Reply) -> list[bytes]:
    start_response(f"{reply.status.value} {reply.status.phrase}", reply.all_headers())
    return [reply.body]


class _Body:
    """The response's body: the sandbox is named while each chunk is made, and at the close."""

    def __init__(self, body: Iterable[bytes], sandbox: Sandbox, leave: Callable[[], None]) -> None:
        self._body = body
        self._chunks: Iterator[bytes] | None = None
        self._sandbox = sandbox
        self._leave: Callable[[], None] | None = leave

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        token = named.set(self._sandbox)
        try:
            if self._chunks is None:
                self._chunks = iter(self._body)
            return next(self._chunks)
        finally:
            named.reset(token)

    def close(self) -> None:
        """Close the app's body."""
        leave, self._leave = self._leave, None
        if leave is None:
            return
        token = named.set(self._sandbox)
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            named.reset(token)
            leave()

    def __del__(self) -> None:
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()  # the body itself hears of it by its own end
