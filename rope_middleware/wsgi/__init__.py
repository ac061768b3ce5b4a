"""The WSGI boundary: opens a scope for each request and ends it when the body is closed.

PEP 3333 lets a server take its time between two chunks and serve another request on the same
thread meanwhile. So the scope is current only while code of the application runs: in its call,
in each chunk, and in the body's `close()`.
"""

from __future__ import annotations

import time
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from rope_middleware.errors import ScopeClosedError
from rope_middleware.middleware import RopeMiddleware
from rope_middleware.position import Carried, following
from rope_middleware.running.line import wait_in_thread
from rope_middleware.scope.context import SCOPE_KEY, current, printable, unbind
from rope_middleware.scope.ending import end_failed
from rope_middleware.scope.reading import carried_of, carry
from rope_middleware.scope.response import (
    count,
    end_gate,
    is_counted,
    is_watched,
    log_retry,
    open_as,
    set_gate,
    shared_scope,
)
from rope_middleware.scope.scope import OPEN, Scope, SyncScope
from rope_middleware.wsgi.body import SHORT, hand_on
from rope_middleware.wsgi.commit import AGAIN, Gate
from rope_middleware.wsgi.files import KINDS, WITHOUT_FILES, kinds_by
from rope_middleware.wsgi.position import Telling, carried_by
from rope_middleware.wsgi.replay import Replay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self, Unpack

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from rope_middleware.middleware import GivenOptions

__all__ = ["WSGIRopeMiddleware"]

# Bound once: this is the way of every request.
_set_current = current.set
_reset_current = current.reset

_name_of: Callable[[WSGIEnvironment], Any] = itemgetter(
    "REQUEST_METHOD", "SCRIPT_NAME", "PATH_INFO"
)


def _name_by(environ: WSGIEnvironment) -> tuple[Any, ...]:
    """`_name_of`, where something is missing: PEP 3333 lets what is empty be absent."""
    return environ.get("REQUEST_METHOD"), environ.get("SCRIPT_NAME"), environ.get("PATH_INFO")


class _RequestScope(SyncScope):
    """The scope of a WSGI request."""

    __slots__ = ()

    @property
    def name(self) -> str:
        # Put together only where somebody wants to know.
        method, script, path = self._name
        # PEP 3333 hands bytes over as latin-1.
        decoded = f"{script or ''}{path or ''}".encode("latin-1", "replace").decode(
            errors="replace"
        )
        return printable(f"{method} {decoded}")


class WSGIRopeMiddleware(RopeMiddleware, protocol="wsgi"):
    """`RopeMiddleware` for WSGI applications: Flask, Django, Pyramid and any other.

    The scope lives until the server closes the body. What a server looks at stays as it is:
    a list keeps its length, and what ``wsgi.file_wrapper`` made is the server's own object.
    Arguments and errors are those of `RopeMiddleware`, whose choice this one saves where an
    application cannot be told apart.

    See https://peps.python.org/pep-3333/
    """

    app: WSGIApplication

    if TYPE_CHECKING:
        # `RopeMiddleware.__new__` chooses; here there is nothing to choose.
        def __new__(cls, *_: Any, **__: Any) -> Self: ...
        def __init__(
            self,
            app: WSGIApplication,
            registries: Iterable[Any] = (),
            **options: Unpack[GivenOptions],
        ) -> None: ...

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request within a scope of its own."""
        if (
            self._has_more
            or SCOPE_KEY in environ
            or "asgi.scope" in environ
            or (self._reads and following.is_on)
        ):
            return self._serve_otherwise(environ, start_response)
        kinds = WITHOUT_FILES
        if "wsgi.file_wrapper" in environ:
            try:  # `kinds_by`, without the price of a call
                kinds = KINDS[environ["wsgi.file_wrapper"]]
            except (KeyError, TypeError):  # it may be an object that has no hash
                kinds = kinds_by(environ)
        # The slots are set by hand and the ContextVar is reset without `unbind`: a call for
        # each would cost 0.1 us and 0.04 us of the 1.4 us that a request pays here.
        scope = _RequestScope()
        try:
            scope._name = _name_of(environ)
        except KeyError:
            scope._name = _name_by(environ)
        scope._options = options = self._options
        scope._sessions = None
        scope._state = OPEN
        environ[SCOPE_KEY] = scope
        token = _set_current(scope)
        try:
            if options.commit_on_success:
                return Gate().serve(self.app, environ, scope, start_response)
            body = self.app(environ, start_response)
            try:
                kind = kinds[type(body)]
            except KeyError:
                kind = None
            if kind is None:
                return hand_on(body, environ, scope)
            # `made`, without the price of a call: 3 % of what a request pays here.
            ours = SHORT[kind]()
            ours._body, ours._scope = body, scope
            ours._owns = True
            ours._commits = ours._read = False
            return ours
        except BaseException as error:
            end_failed(scope, error)
            raise
        finally:
            try:
                _reset_current(token)
            except ValueError:
                pass

    def _serve_otherwise(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve what is not the plain case."""
        self._check_set_up()
        # A bridge from ASGI (a2wsgi) hands the ASGI scope on as "asgi.scope".
        outer = shared_scope(environ, environ.get("asgi.scope") or {})
        if outer is not None:
            return self._serve_within(outer, environ, start_response)
        if self._line is None or is_counted(environ, environ.get("asgi.scope") or {}):
            return self._serve_request(environ, start_response)[1]
        place = wait_in_thread(self._line)
        try:
            scope, response = self._serve_request(environ, start_response)
        except BaseException:
            place.give_back()
            raise
        count(scope)
        try:
            scope.on_close(place.give_back)
        except ScopeClosedError:  # the body needs no more of it
            place.give_back()
        return response

    def _serve_request(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> tuple[Scope, Iterable[bytes]]:
        """Serve a request, in as many tries as it may have; return the scope of the last one."""
        carried = None
        if self._reads and following.is_on:
            carried = carried_by(environ)
            start_response = Telling(carried, start_response)
        replay = Replay(environ) if self._options.retries else None
        if replay is not None:
            for tried in range(self._options.retries):
                scope, response = self._serve_try(replay.environ(), start_response, carried, replay)
                if response is not AGAIN:
                    return scope, response
                log_retry(scope, tried + 1, self._options.retries)
                from rope_middleware.session.failures.refusal import wait_before_retry

                time.sleep(wait_before_retry(scope, tried))
        return self._serve_try(replay.environ() if replay else environ, start_response, carried)

    def _serve_within(
        self, outer: Scope, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve a request whose scope another RopeMiddleware around this one will end."""
        self._check_order()
        if self._reads and following.is_on and carried_of(outer) is None:
            carried = carried_by(environ)
            carry(outer, carried, is_watched(outer))
            start_response = Telling(carried, start_response)
        watches = self._take_in(outer)
        environ[SCOPE_KEY] = outer
        token = current.set(outer)
        try:
            if watches:
                gate = set_gate(outer, Gate())
                try:
                    return gate.serve(self.app, environ, outer, start_response, owns=False)
                finally:
                    end_gate(outer, gate)
            return hand_on(self.app(environ, start_response), environ, outer, owns=False)
        finally:
            unbind(token)

    def _serve_try(
        self,
        environ: WSGIEnvironment,
        start_response: StartResponse,
        carried: Carried | None,
        replay: Replay | None = None,
    ) -> tuple[Scope, Iterable[bytes]]:
        """Serve one try of a request; the response is AGAIN where there should be another."""
        kinds_by(environ)
        scope = _RequestScope()
        open_as(scope, _name_by(environ), self._options, self._registries)
        if carried is not None:
            carry(scope, carried)
        environ[SCOPE_KEY] = scope
        token = current.set(scope)
        try:
            # A position is told with the response's start: that waits for the first chunk.
            if self._options.commit_on_success or self._options.retries or carried is not None:
                served = Gate().serve(self.app, environ, scope, start_response, replay)
                return scope, served
            return scope, hand_on(self.app(environ, start_response), environ, scope)
        except BaseException as error:
            end_failed(scope, error)
            raise
        finally:
            unbind(token)


# Python's own error has this name where an ASGI server calls it: "...() missing 1 required
# positional argument". A check in `__call__` would cost every request.
WSGIRopeMiddleware.__call__.__qualname__ = (
    "WSGIRopeMiddleware.__call__ [an instance is a WSGI application by now, for WSGI servers]"
)
