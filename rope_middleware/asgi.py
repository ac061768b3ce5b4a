"""The ASGI boundary: opens a scope for each request and ends it when the app's call returns.

`ASGIRopeMiddleware.__call__` is the way of every request. What commit_on_success and retries
need stands apart: a `_Gate` watches the response of one try, and a `_Replay` hands the
request's body to the next one.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Awaitable, Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeAlias

from rope_middleware.finish import finish
from rope_middleware.middleware import REPLAY_LIMIT, SERVER_ERROR, RopeMiddleware
from rope_middleware.refusal import backoff
from rope_middleware.scope import (
    CLOSED,
    ENDED,
    OPEN,
    SCOPE_KEY,
    AsyncScope,
    Scope,
    class_of,
    current,
    log_retry,
    note_shared_session,
    unbind,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self, Unpack

    from rope_middleware.middleware import Options

__all__ = ["ASGIApp", "ASGIRopeMiddleware"]

# Bound once: this is the way of every request.
_bind = current.set
_reset = current.reset

# The shapes of https://asgi.readthedocs.io/en/latest/specs/main.html. A scope and a message are
# dictionaries with keys of str. Frameworks and servers have types of their own for them, some a
# TypedDict for each kind, which do not fit one another: what stands between them takes any.
ASGIScope: TypeAlias = Any
Message: TypeAlias = Any
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[ASGIScope, Receive, Send], Awaitable[None]]


class _RequestScope(AsyncScope):
    """The scope of an ASGI request."""

    __slots__ = ()

    @property
    def name(self) -> str:
        # Put together only where somebody wants to know.
        method, path = self._name
        return f"{method or 'WEBSOCKET'} {path}"


class ASGIRopeMiddleware(RopeMiddleware, protocol="asgi"):
    """`RopeMiddleware` for ASGI applications: Responder, Starlette, FastAPI and any other.

    ``http`` and ``websocket`` get a scope; everything else passes through untouched. The scope
    lives until the application's call returns: through the last chunk of the body and
    background tasks. Arguments and errors are those of `RopeMiddleware`, whose choice this one
    saves where an application cannot be told apart.

    See https://asgi.readthedocs.io/en/latest/specs/www.html
    """

    app: ASGIApp

    if TYPE_CHECKING:
        # `RopeMiddleware.__new__` chooses; here there is nothing to choose.
        def __new__(cls, *_: Any, **__: Any) -> Self: ...
        def __init__(
            self, app: ASGIApp, registries: Iterable[Any] = (), **options: Unpack[Options]
        ) -> None: ...

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve one request within a scope of its own."""
        if scope["type"] != "http" or self._has_options or SCOPE_KEY in scope:
            await self._serve_otherwise(scope, receive, send)
            return
        scope[SCOPE_KEY] = own = _RequestScope()
        own._name = scope.get("method"), scope["path"]
        own._sessions = None
        own._state = OPEN
        own._thread = get_ident()
        own._commits = self._commit
        gate = None
        if self._commit:
            gate = _Gate(self, own, send)
            send = gate.send
        token = _bind(own)
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            await _end_failed(own, error)
            raise
        else:
            if own._sessions is None:  # not even a callback: there is nothing to end
                own._state = ENDED
            if own._sessions is None:  # still, now that nobody can add one
                own._state = CLOSED
            elif gate is None:  # type: ignore[unreachable]  # the app has set _sessions
                await own._aend()
            else:
                await gate.end()
        finally:
            try:  # `unbind`, without the price of a call
                _reset(token)
            except ValueError:
                pass

    async def _serve_otherwise(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve what is not the plain case."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif SCOPE_KEY in scope and not scope[SCOPE_KEY]._state:
            # Another RopeMiddleware around this one has opened it, and will end it.
            token = current.set(scope[SCOPE_KEY])
            try:
                await self.app(scope, receive, send)
            finally:
                unbind(token)
        elif scope["type"] != "http" or not (self._commit or self._retries):
            await self._serve_call(scope, receive, send)
        elif not self._retries:
            await self._serve_try(scope, receive, send, None)
        else:
            await self._serve_tries(scope, receive, send)

    async def _serve_call(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve what commits, if at all, when the call ends without an error."""
        own = self._open(scope)
        token = current.set(own)
        try:
            await self.app(scope, receive, send)
            await own._aend(self._commit and not own._doomed, "doomed")
        except BaseException as error:
            await _end_failed(own, error)
            raise
        finally:
            unbind(token)

    async def _serve_tries(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve a request that may be run again."""
        import anyio

        replay = _Replay(receive)
        for tried in range(self._retries):
            failed = await self._serve_try(dict(scope), replay, send, replay)
            if failed is None:
                return
            log_retry(failed, tried + 1, self._retries)
            await anyio.sleep(backoff(tried))
            replay.rewind()
        await self._serve_try(dict(scope), replay, send, None)

    async def _serve_try(
        self, scope: ASGIScope, receive: Receive, send: Send, replay: _Replay | None
    ) -> Scope | None:
        """Serve one try of a request; return its scope where there should be another try."""
        own = self._open(scope)
        gate = _Gate(self, own, send, replay)
        token = current.set(own)
        try:
            await self.app(scope, receive, gate.send)
            await gate.end()
        except BaseException as error:
            again = isinstance(error, Exception) and gate.may_try_again()
            await _end_failed(own, error)
            if again:
                return own
            raise
        finally:
            unbind(token)
        return own if gate.holds_back else None

    def _open(self, scope: ASGIScope) -> _RequestScope:
        scope[SCOPE_KEY] = own = _RequestScope()
        own._open((scope.get("method"), scope["path"]), self._commit)
        own._thread = get_ident()
        self._configure(own)
        return own


async def _end_failed(scope: AsyncScope, error: BaseException) -> None:
    """End the scope of a call that `error` has left; it commits nothing any more."""
    note_shared_session(error)
    if scope.closed:
        return  # the error came from its end
    if isinstance(error, GeneratorExit):
        scope._abandon()
    else:
        await scope._aend(why=class_of(error))


# What has become of the response of one try.
_WAITING, _STARTED, _COMMIT_FAILED, _REPLACED, _HELD = range(5)


class _Gate:
    """Stands between the app and the server's `send`: commits before a success can start.

    Args:
        options: the middleware.
        scope: the request's.
        send: the server's.
        replay: the request's body for another try; None where there is none to come.
    """

    __slots__ = ("_commits", "_options", "_replay", "_response", "_scope", "_send", "_why")

    def __init__(
        self,
        options: ASGIRopeMiddleware,
        scope: AsyncScope,
        send: Send,
        replay: _Replay | None = None,
    ) -> None:
        self._options = options
        self._scope = scope
        self._send = send
        self._replay = replay
        self._response = _WAITING
        self._commits = False
        self._why = ""

    def send(self, message: Message) -> Awaitable[None]:
        """Take a message from the app."""
        if self._response == _STARTED:
            return self._send(message)
        if (
            self._scope._sessions is None  # nothing to commit, nor to roll back
            and message["type"] == "http.response.start"
            and message["status"] < 400
            and self._response == _WAITING
            and not self._options._has_options
        ):
            self._commits = True
            self._response = _STARTED
            return self._send(message)
        return self._before_start(message)

    @property
    def holds_back(self) -> bool:
        """Whether the response was held back, for there is to be another try."""
        return self._response == _HELD

    def may_try_again(self) -> bool:
        """Tell whether this try may be run again (C6)."""
        return (
            self._replay is not None
            and self._replay.is_whole
            and self._response in (_WAITING, _COMMIT_FAILED, _HELD)
            and self._scope._refused is not None
            and not self._scope._committed
        )

    async def end(self) -> None:
        """The app has returned: end the scope."""
        try:
            # The app may have swallowed the error of a commit that failed, and kept quiet.
            if self._response == _COMMIT_FAILED:
                if self.may_try_again():
                    self._response = _HELD
                else:
                    await self._replace()
        finally:
            commit = self._commits and not self._scope._doomed
            why = self._why or ("no response" if self._response == _WAITING else "doomed")
            await self._scope._aend(commit, why)

    async def _before_start(self, message: Message) -> None:
        if self._response in (_REPLACED, _HELD):
            return  # of a response that the client does not get
        if message["type"] == "http.response.start":
            await self._start(message)
        elif self._response == _COMMIT_FAILED and message["type"] == "http.response.body":
            # The app has swallowed the error and goes on with the response that never started.
            await self._replace()
        else:
            await self._send(message)

    async def _start(self, message: Message) -> None:
        status: int = message["status"]
        failed = self._response == _COMMIT_FAILED
        if (status >= 500 or (failed and status < 400)) and self.may_try_again():
            self._why = f"status {status}"
            self._response = _HELD
        elif failed and status < 400:
            await self._replace()
        else:
            if self._options._commit and not failed:
                await self._settle(status, message)
            self._response = _STARTED
            await self._send(message)

    async def _settle(self, status: int, message: Message) -> None:
        """Commit or roll back, before the client can see the status."""
        self._response = _COMMIT_FAILED  # until it has not
        self._why = self._options._why_not(self._scope, status, lambda: _headers(message))
        if self._why:
            self._scope._doomed = True  # nothing later in the scope commits, either
            await self._scope._afinish(self._scope._rollback_steps(self._why))
        else:
            try:
                await self._scope._afinish(self._scope._commit_steps())
            except CancelledError:
                if self._scope._committed:
                    # The rows are there, so nobody may read an error: the response that was
                    # announced starts before the cancellation goes on.
                    self._commits = True
                    self._response = _STARTED
                    await finish(_sent(self._send(message)), self._options._close_timeout)
                raise
            self._commits = True

    async def _replace(self) -> None:
        """Answer a plain 500 instead of a success whose commit failed."""
        self._response = _REPLACED
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(SERVER_ERROR)).encode()),
        ]
        await self._send({"type": "http.response.start", "status": 500, "headers": headers})
        await self._send({"type": "http.response.body", "body": SERVER_ERROR})


async def _sent(sending: Awaitable[None]) -> None:
    await sending


def _headers(message: Message) -> list[tuple[str, str]]:
    # Any iterable is allowed, and a generator can be read only once.
    message["headers"] = headers = list(message.get("headers", ()))
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


class _Replay:
    """Stands between the app and the server's `receive`: keeps the body for another try."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self._size = 0
        self._next = 0
        self.is_whole = True
        """False once the body has outgrown REPLAY_LIMIT, or the client has gone."""

    async def __call__(self) -> Message:
        """Give the app the next message."""
        if self._next < len(self._kept):
            self._next += 1
            return dict(self._kept[self._next - 1])
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if message["type"] != "http.request" or self._size > REPLAY_LIMIT:
            self.is_whole = False
            self._kept.clear()
            self._next = 0
        elif self.is_whole:
            self._kept.append(dict(message))
            self._next += 1
        return message

    def rewind(self) -> None:
        """Begin again with the first message."""
        self._next = 0
