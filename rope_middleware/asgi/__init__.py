"""The ASGI boundary: opens a scope for each request and ends it when the app's call returns.

`ASGIRopeMiddleware.__call__` is the way of every request. What commit_on_success and retries need
stands apart: a `Gate` watches the response of one try, and a `Replay` hands the request's body to
the next one.
"""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING, Any

from rope_middleware.asgi.commit import Gate
from rope_middleware.asgi.handshake import Handshake
from rope_middleware.asgi.line import Ahead, Leaving, answer_nobody, wait_for_turn
from rope_middleware.asgi.position import Telling, carried_by
from rope_middleware.asgi.replay import Replay, copy_scope
from rope_middleware.middleware import RopeMiddleware
from rope_middleware.position import Carried, following
from rope_middleware.protocols import ASGIApp, ASGIScope, Receive, Send
from rope_middleware.running.finish import pause
from rope_middleware.running.line import Line, Place
from rope_middleware.scope.async_ending import aend, aend_at_once, aend_failed
from rope_middleware.scope.context import SCOPE_KEY, current, printable, unbind
from rope_middleware.scope.reading import carried_of, carry
from rope_middleware.scope.response import (
    count,
    doom_rest,
    end_gate,
    gate_of,
    is_accepted,
    is_counted,
    is_doomed,
    is_watched,
    log_retry,
    open_as,
    options_now,
    set_gate,
    shared_scope,
)
from rope_middleware.scope.scope import CLOSED, ENDED, OPEN, AsyncScope, Scope
from rope_middleware.session.committing import aresolve_doubts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable
    from typing import Self, Unpack

    from rope_middleware.middleware import GivenOptions

__all__ = ["ASGIApp", "ASGIRopeMiddleware"]

# Bound once: this is the way of every request.
_set_current = current.set
_reset_current = current.reset


class _RequestScope(AsyncScope):
    """The scope of an ASGI request."""

    __slots__ = ()

    @property
    def name(self) -> str:
        # Put together only where somebody wants to know.
        method, path = self._name
        return printable(f"{method or 'WEBSOCKET'} {path}")


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
            self, app: ASGIApp, registries: Iterable[Any] = (), **options: Unpack[GivenOptions]
        ) -> None: ...

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve one request within a scope of its own."""
        if (
            scope["type"] != "http"
            or self._has_more
            or SCOPE_KEY in scope
            or (self._reads and following.is_on)
        ):
            await self._serve_otherwise(scope, receive, send)
            return
        # The slots are set by hand and the ContextVar is reset without `unbind`: a call for
        # each would cost 0.1 us and 0.04 us of the 0.8 us that a request pays here.
        scope[SCOPE_KEY] = own = _RequestScope()
        own._name = scope.get("method"), scope["path"]
        own._options = options = self._options
        own._sessions = None
        own._state = OPEN
        own._thread = get_ident()
        gate = None
        if options.commit_on_success:
            gate = Gate(own, send, (scope, receive))
            send = gate.send
        token = _set_current(own)
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            await aend_failed(own, error)
            raise
        else:
            if own._sessions is None:  # not even a callback: there is nothing to end
                own._state = ENDED
            if own._sessions is None:  # still, now that nobody can add one
                own._state = CLOSED
            elif gate is not None:  # type: ignore[unreachable]  # by the app
                if not gate.ends_at_once():
                    await gate.end()
            elif (rest := aend_at_once(own) if own._gate is None else _end(own)) is not None:
                await rest
        finally:
            try:
                _reset_current(token)
            except ValueError:
                pass

    async def _serve_otherwise(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve what is not the plain case."""
        self._check_set_up()
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif (outer := shared_scope(scope)) is not None:
            await self._serve_within(outer, scope, receive, send)
        elif scope["type"] == "websocket":
            await self._serve_websocket(scope, receive, send)
        elif self._line is not None and not is_counted(scope):
            await self._serve_in_turn(self._line, scope, receive, send)
        else:
            await self._serve_request(scope, receive, send)

    async def _serve_in_turn(
        self, line: Line, scope: ASGIScope, receive: Receive, send: Send
    ) -> None:
        """Serve a request when it has its turn, and not at all where its client has gone."""
        place = line.enter()
        if place is not None:
            with place:
                await self._serve_request(scope, receive, send, place)
            return
        ahead = Ahead(receive)
        try:
            place = await wait_for_turn(line, ahead)
            if place is not None:
                with place:
                    await self._serve_request(scope, ahead, send, place)
            else:
                await answer_nobody(send)
        finally:
            ahead.stop()

    async def _serve_request(
        self, scope: ASGIScope, receive: Receive, send: Send, place: Place | None = None
    ) -> None:
        carried = None
        if self._reads and following.is_on:
            carried = carried_by(scope)
            send = Telling(carried, send)
        if self._options.retries:
            await self._serve_tries(scope, receive, send, place, carried)
        else:
            await self._serve_try(scope, receive, send, None, place, carried)

    async def _serve_within(
        self, outer: Scope, scope: ASGIScope, receive: Receive, send: Send
    ) -> None:
        """Serve a request whose scope another RopeMiddleware around this one will end."""
        self._check_order()
        if self._reads and following.is_on and carried_of(outer) is None:
            carried = carried_by(scope)
            carry(outer, carried, is_watched(outer))
            if scope["type"] == "http":
                send = Telling(carried, send)
        gate = None
        if self._take_in(outer) and scope["type"] == "http":
            gate = set_gate(outer, Gate(outer, send, (scope, receive)))
            send = gate.send
        token = current.set(outer)
        try:
            await self.app(scope, receive, send)
        finally:
            unbind(token)
            end_gate(outer, gate)

    async def _serve_websocket(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Serve what commits, if at all, when the call ends: accepted, and without an error."""
        own = self._open(scope)
        if self._reads and following.is_on:
            carry(own, carried_by(scope))
        token = current.set(own)
        try:
            await self.app(scope, receive, Handshake(own, send))
            commits = options_now(own).commit_on_success
            why = "doomed" if is_doomed(own) else "" if is_accepted(own) else "not accepted"
            if commits and why:
                doom_rest(own)
            await aend(own, commits and not why, why)
        except BaseException as error:
            await aend_failed(own, error)
            raise
        finally:
            unbind(token)

    async def _serve_tries(
        self,
        scope: ASGIScope,
        receive: Receive,
        send: Send,
        place: Place | None,
        carried: Carried | None,
    ) -> None:
        """Serve a request that may be run again."""
        replay = Replay(receive)
        retries = self._options.retries
        for tried in range(retries):
            failed = await self._serve_try(copy_scope(scope), replay, send, replay, place, carried)
            if failed is None:
                return
            log_retry(failed, tried + 1, retries)
            from rope_middleware.session.failures.refusal import wait_before_retry

            await pause(wait_before_retry(failed, tried))
            replay.rewind()
        await self._serve_try(copy_scope(scope), replay, send, None, place, carried)

    async def _serve_try(
        self,
        scope: ASGIScope,
        receive: Receive,
        send: Send,
        replay: Replay | None,
        place: Place | None,
        carried: Carried | None = None,
    ) -> Scope | None:
        """Serve one try of a request; return its scope where there should be another try."""
        own = self._open(scope)
        if carried is not None:
            carry(own, carried)
        if place is not None:
            count(own)
            send = Leaving(place, own, send)
        gate = set_gate(own, Gate(own, send, (scope, receive), replay))  # also for one inside
        token = current.set(own)
        try:
            await self.app(scope, receive, gate.send)
            await gate.end()
        except BaseException as error:
            again = False
            if isinstance(error, Exception):
                await aresolve_doubts(own)
                again = gate.may_try_again()
            await aend_failed(own, error)
            if again:
                return own
            raise
        finally:
            unbind(token)
            set_gate(own, None)  # they refer to each other
        return own if gate.holds_back else None

    def _open(self, scope: ASGIScope) -> _RequestScope:
        scope[SCOPE_KEY] = own = _RequestScope()
        open_as(own, (scope.get("method"), scope["path"]), self._options, self._registries)
        return own


# Where an instance is given in place of the class, Python's own error has this name: "...() missing
# 2 required positional arguments". A check in `__call__` would cost every request.
ASGIRopeMiddleware.__call__.__qualname__ = (
    "ASGIRopeMiddleware.__call__ [an instance is an application by now; add_middleware() takes the "
    "class: add_middleware(RopeMiddleware)]"
)


def _end(own: AsyncScope) -> Awaitable[None] | None:
    """End the scope of a call whose response a middleware inside has watched."""
    gate = gate_of(own)
    if isinstance(gate, Gate):
        return None if gate.ends_at_once() else gate.end()
    return aend(own, not (why := gate.why_not()), why)
