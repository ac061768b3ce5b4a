"""The ASGI boundary: opens a scope for each request and ends it when the app's call returns.

`ASGIRopeMiddleware.__call__` is the way of every request. What commit_on_success and retries
need stands apart: a `_Gate` watches the response of one try, and a `_Replay` hands the
request's body to the next one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from rope_middleware.finish import running_loop
from rope_middleware.middleware import REPLAY_LIMIT, SERVER_ERROR, RopeMiddleware
from rope_middleware.refusal import backoff
from rope_middleware.scope import (
    SCOPE_KEY,
    AsyncScope,
    class_of,
    current,
    logger,
    note_shared_session,
    unbind,
)

__all__ = ["ASGIApp", "ASGIRopeMiddleware"]

# The shapes of https://asgi.readthedocs.io/en/latest/specs/main.html
ASGIScope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[ASGIScope, Receive, Send], Awaitable[None]]


class ASGIRopeMiddleware(RopeMiddleware, protocol="asgi"):
    """`RopeMiddleware` for ASGI applications: Responder, Starlette, FastAPI and any other.

    ``http`` and ``websocket`` get a scope; everything else passes through untouched.
    """

    app: ASGIApp

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve one request within a scope of its own."""
        kind = scope["type"]
        if kind != "http" and kind != "websocket":
            await self.app(scope, receive, send)
            return
        outer = scope.get(SCOPE_KEY)
        if outer is not None and not outer._ended:
            # Another RopeMiddleware around this one has opened it, and will end it.
            token = current.set(outer)
            try:
                await self.app(scope, receive, send)
            finally:
                unbind(token)
            return
        if self._has_options:
            await self._serve_with_options(scope, receive, send)
            return
        own = AsyncScope(f"{scope.get('method', 'WEBSOCKET')} {scope['path']}", running_loop())
        scope[SCOPE_KEY] = own
        token = current.set(own)
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            await _end_failed(own, error)
            raise
        else:
            if not own._end_unused():
                await own._aend()
        finally:
            unbind(token)

    async def _serve_with_options(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not (self._commit or self._retries):
            await self._serve_call(scope, receive, send)
            return
        if not self._retries:
            await self._serve_try(scope, receive, _Gate(self, send))
            return
        import anyio

        replay = _Replay(receive)
        for tried in range(self._retries):
            gate = _Gate(self, send, replay)
            await self._serve_try(dict(scope), replay, gate)
            if not gate.again:
                return
            logger.warning("trying %r again: %s", gate.scope.name, class_of(gate.scope._refused))
            await anyio.sleep(backoff(tried))
            replay.rewind()
        await self._serve_try(dict(scope), replay, _Gate(self, send))

    def _open(self, scope: ASGIScope) -> AsyncScope:
        own = AsyncScope(f"{scope.get('method', 'WEBSOCKET')} {scope['path']}", running_loop())
        self._configure(own)
        scope[SCOPE_KEY] = own
        return own

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

    async def _serve_try(self, scope: ASGIScope, receive: Receive, gate: _Gate) -> None:
        """Serve one try of a request; `gate.again` tells whether there should be another."""
        gate.scope = own = self._open(scope)
        token = current.set(own)
        try:
            await self.app(scope, receive, gate.send)
            await gate.close()
            await own._aend(gate.commits and not own._doomed, gate.why or "doomed")
        except BaseException as error:
            if isinstance(error, Exception) and gate.may_try_again():
                gate.again = True
            await _end_failed(own, error)
            if not gate.again:
                raise
        finally:
            unbind(token)


async def _end_failed(scope: AsyncScope, error: BaseException) -> None:
    """End the scope of a call that `error` has left; it commits nothing any more."""
    note_shared_session(error)
    if scope.closed:
        return  # the error came from its end
    if isinstance(error, GeneratorExit):
        scope._abandon()
    else:
        await scope._aend(why=class_of(error))


class _Gate:
    """Stands between the app and the server's `send`: commits before a success can start.

    Args:
        options: the middleware.
        send: the server's.
        replay: the request's body for another try; None where there is none to come.
    """

    # What has become of the response of this try.
    WAITING, STARTED, COMMIT_FAILED, REPLACED, HELD = range(5)

    scope: AsyncScope

    def __init__(
        self, options: ASGIRopeMiddleware, send: Send, replay: _Replay | None = None
    ) -> None:
        self._options = options
        self._send = send
        self._replay = replay
        self._state = self.WAITING
        self.commits = False
        self.why = "no response"
        self.again = False

    def send(self, message: Message) -> Awaitable[None]:
        """Take a message from the app."""
        if self._state == self.STARTED:
            return self._send(message)
        return self._before_start(message)

    def may_try_again(self) -> bool:
        """Tell whether this try may be run again (C6)."""
        return (
            self._state in (self.WAITING, self.COMMIT_FAILED, self.HELD)
            and self._replay is not None
            and self._replay.is_whole
            and self.scope._refused is not None
            and not self.scope._committed
        )

    async def close(self) -> None:
        """The app has returned: see to it that there is a response where a commit failed."""
        if self._state == self.HELD or (
            self._state == self.COMMIT_FAILED and self.may_try_again()
        ):
            self.again = True
        elif self._state == self.COMMIT_FAILED:
            await self._replace()

    async def _before_start(self, message: Message) -> None:
        if self._state in (self.REPLACED, self.HELD):
            return  # of a response that the client does not get
        if message["type"] == "http.response.start":
            await self._start(message)
        elif self._state == self.COMMIT_FAILED and message["type"] == "http.response.body":
            # The app has swallowed the error and goes on with the response that never started.
            await self._replace()
        else:
            await self._send(message)

    async def _start(self, message: Message) -> None:
        status: int = message["status"]
        failed = self._state == self.COMMIT_FAILED
        if (status >= 500 or (failed and status < 400)) and self.may_try_again():
            self.why = f"status {status}"
            self._state = self.HELD
        elif failed and status < 400:
            await self._replace()
        else:
            if self._options._commit and not failed:
                await self._settle(status, message)
            self._state = self.STARTED
            await self._send(message)

    async def _settle(self, status: int, message: Message) -> None:
        """Commit or roll back, before the client can see the status."""
        self._state = self.COMMIT_FAILED  # until it has not
        self.why = self._options._why_not(self.scope, status, lambda: _headers(message))
        if self.why:
            self.scope._doomed = True  # nothing later in the scope commits, either
            await self.scope._afinish(self.scope._rollback_steps(self.why))
        else:
            await self.scope._afinish(self.scope._commit_steps())
            self.commits = True

    async def _replace(self) -> None:
        """Answer a plain 500 instead of a success whose commit failed."""
        self._state = self.REPLACED
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(SERVER_ERROR)).encode()),
        ]
        await self._send({"type": "http.response.start", "status": 500, "headers": headers})
        await self._send({"type": "http.response.body", "body": SERVER_ERROR})


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
