"""The WSGI boundary: opens a scope for each request and ends it when the body is closed.

PEP 3333 lets a server take its time between two chunks and serve another request on the same
thread meanwhile. So the scope is current only while code of the application runs: in its call,
in each chunk, and in the body's `close()`.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from rope_middleware.middleware import REPLAY_LIMIT, SERVER_ERROR, RopeMiddleware
from rope_middleware.refusal import backoff
from rope_middleware.scope import (
    SCOPE_KEY,
    Scope,
    class_of,
    current,
    drive,
    logger,
    note_shared_session,
    unbind,
)

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["WSGIRopeMiddleware"]

class WSGIRopeMiddleware(RopeMiddleware, protocol="wsgi"):
    """`RopeMiddleware` for WSGI applications: Flask, Django, Pyramid and any other.

    The scope lives until the server closes the body. The body of the wrapped application is
    told apart only where a server does so: lists keep their length, and what
    ``wsgi.file_wrapper`` made stays the server's own object.
    """

    app: WSGIApplication

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request within a scope of its own."""
        outer = _outer_scope(environ)
        if outer is not None:
            # Another RopeMiddleware around this one has opened it, and will end it.
            return self._serve_within(outer, environ, start_response)
        if self._has_options:
            return self._serve_with_options(environ, start_response)
        scope = _open(environ)
        token = current.set(scope)
        try:
            return _hand_on(self.app(environ, start_response), environ, scope)
        except BaseException as error:
            _end_failed(scope, error)
            raise
        finally:
            unbind(token)

    def _serve_within(
        self, outer: Scope, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        token = current.set(outer)
        try:
            body = self.app(environ, start_response)
            if type(body) in (list, tuple) or _is_file(body, environ) or _is_odd(body):
                return body
            return _Body(body, outer, owns=False)
        finally:
            unbind(token)

    def _serve_with_options(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        if not self._retries:
            return self._serve_try(environ, _Gate(self, start_response))
        body = _Replay(environ)
        tries = self._retries if body.is_whole else 0
        for tried in range(tries):
            gate = _Gate(self, start_response, is_last=False)
            response = self._serve_try(body.environ(), gate)
            if not gate.again:
                return response
            logger.warning("trying %r again: %s", gate.scope.name, class_of(gate.scope._refused))
            time.sleep(backoff(tried))
        return self._serve_try(body.environ(), _Gate(self, start_response))

    def _serve_try(self, environ: WSGIEnvironment, gate: _Gate) -> Iterable[bytes]:
        """Serve one try of a request; `gate.again` tells whether there should be another."""
        gate.scope = scope = _open(environ)
        self._configure(scope)
        token = current.set(scope)
        body: Iterable[bytes] = ()
        try:
            try:
                body = self.app(environ, gate.start_response)
                body = gate.settle(body)
            except Exception as error:
                gate.why = class_of(error)
                gate.again = gate.may_try_again()
                if not gate.again and not gate.commit_failed:
                    _close(body)
                    raise
            if gate.lets_pass and not gate.again:
                return _hand_on(body, environ, scope, gate.commits)
            _close(body)
            scope._end(why=gate.why)
            return () if gate.again else gate.plain_error()
        except BaseException as error:
            _end_failed(scope, error)
            raise
        finally:
            unbind(token)


def _outer_scope(environ: WSGIEnvironment) -> Scope | None:
    scope: Scope | None = environ.get(SCOPE_KEY)
    if scope is None:
        # Where bridges from ASGI (a2wsgi, asgiref) put the ASGI scope.
        outer = environ.get("asgi.scope")
        if outer is None:
            return None
        scope = outer.get(SCOPE_KEY)
    return None if scope is None or scope._ended else scope


def _open(environ: WSGIEnvironment) -> Scope:
    path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    if not path.isascii():
        # PEP 3333 hands bytes over as latin-1.
        path = path.encode("latin-1", "replace").decode("utf-8", "replace")
    scope = environ[SCOPE_KEY] = Scope(f"{environ.get('REQUEST_METHOD')} {path}")
    wrapper = environ.get("wsgi.file_wrapper")
    if wrapper is not None and not isinstance(wrapper, type):
        environ["wsgi.file_wrapper"] = _FileWrapper(wrapper)
    return scope


def _end_failed(scope: Scope, error: BaseException) -> None:
    """End the scope of a request that `error` has left; it commits nothing any more."""
    note_shared_session(error)
    if not scope.closed:
        scope._end(why=class_of(error))


def _close(body: object) -> None:
    """Close a body that the server does not get to see (PEP 3333: exactly once)."""
    close = getattr(body, "close", None)
    if close is not None:
        try:
            close()
        except Exception:
            logger.exception("close() of a response that was not sent failed")


class _FileWrapper:
    """Tells what a ``wsgi.file_wrapper`` made where that is a function (uWSGI), no class."""

    def __init__(self, wrapper: Callable[..., Any]) -> None:
        self._wrapper = wrapper
        self.made: object = None

    def __call__(self, *args: Any) -> Any:
        self.made = self._wrapper(*args)
        return self.made


def _is_file(body: object, environ: WSGIEnvironment) -> bool:
    """Tell whether ``wsgi.file_wrapper`` made the body: then servers want that very object."""
    wrapper = environ.get("wsgi.file_wrapper")
    if isinstance(wrapper, _FileWrapper):
        return body is wrapper.made
    return isinstance(wrapper, type) and isinstance(body, wrapper)


def _is_odd(body: object) -> bool:
    """Tell whether the server has to see the body as it is, to complain about it."""
    return isinstance(body, (str, bytes)) or not hasattr(body, "__iter__")


def _hand_on(
    body: Iterable[bytes], environ: WSGIEnvironment, scope: Scope, commit: bool = False
) -> Iterable[bytes]:
    """Return what the server gets for `body`: something whose close() ends the scope."""
    kind = type(body)
    if kind is list or kind is tuple:
        return _ListBody(body, scope, commit)
    if _is_file(body, environ):
        return _end_with_file(body, scope, commit)
    if _is_odd(body):
        scope._end(commit and not scope._doomed, "doomed")
        return body
    if hasattr(kind, "__len__"):
        return _SizedBody(body, scope, commit)
    return _Body(body, scope, commit)


class _Ending:
    """Ends the scope of a response, once, and closes the application's body before.

    Args:
        body: the application's.
        scope: the request's.
        commit: commit at the end what was done since the response started.
        owns: False where another middleware ends the scope.
    """

    __slots__ = ("__weakref__", "_body", "_commit", "_owns", "_scope")

    def __init__(
        self, body: Iterable[bytes], scope: Scope, commit: bool = False, owns: bool = True
    ) -> None:
        self._body = body
        self._scope: Scope | None = scope  # None once it has ended
        self._commit = commit
        self._owns = owns

    def _app_close(self) -> Callable[[], object] | None:
        # PEP 3333: close() of the iterable, not of its iterator.
        return getattr(self._body, "close", None)

    def _why_not(self) -> str:
        """Tell why the end must not commit; "" where it may."""
        return ""

    def close(self) -> None:
        """Close the application's body, then end the scope. Called again it does nothing."""
        scope, self._scope = self._scope, None
        if scope is None:
            return
        token = current.set(scope)
        try:
            try:
                close = self._app_close()
                if close is not None:
                    close()
            except BaseException as error:
                if self._owns:
                    _end_failed(scope, error)
                raise
            if self._owns and not scope._end_unused():
                why = self._why_not() or ("doomed" if scope._doomed else "")
                scope._end(self._commit and not why, why)
        finally:
            unbind(token)

    def __del__(self) -> None:
        # A server that drops the body without closing it: nothing is committed.
        if self._scope is not None:
            self._commit = False
            try:
                self.close()
            except Exception:
                logger.exception("close() of a response that was never closed failed")


class _ListBody(_Ending):
    """A body that is there already: no code of the application runs between its chunks."""

    __slots__ = ()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def __len__(self) -> int:
        # Servers make a Content-Length of the one chunk of a body of length 1.
        return len(cast("list[bytes]", self._body))


class _Body(_Ending):
    """A body whose chunks are made as they are asked for, each with the scope current."""

    __slots__ = ("_failed", "_finished", "_iterator")

    def __init__(
        self, body: Iterable[bytes], scope: Scope, commit: bool = False, owns: bool = True
    ) -> None:
        super().__init__(body, scope, commit, owns)
        self._iterator: Iterator[bytes] | None = None
        self._failed = ""
        self._finished = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        scope = self._scope
        if scope is None:  # closed
            return next(self._iterator or iter(self._body))
        token = current.set(scope)
        try:
            if self._iterator is None:
                self._iterator = iter(self._body)
            return next(self._iterator)
        except StopIteration:
            self._finished = True
            raise
        except BaseException as error:
            note_shared_session(error)
            self._failed = class_of(error)
            raise
        finally:
            unbind(token)

    def _why_not(self) -> str:
        return self._failed or ("" if self._finished else "the body was not read to its end")


class _SizedBody(_Body):
    """A `_Body` that knows its length."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(cast("list[bytes]", self._body))


class _FileEnding(_Ending):
    """The end of a response whose body is the server's own file wrapper."""

    __slots__ = ("_closes",)

    def __init__(self, body: Iterable[bytes], scope: Scope, commit: bool) -> None:
        super().__init__(body, scope, commit)
        self._closes: Callable[[], object] | None = getattr(body, "close", None)

    def _app_close(self) -> Callable[[], object] | None:
        return self._closes


def _end_with_file(body: Iterable[bytes], scope: Scope, commit: bool) -> Iterable[bytes]:
    ending = _FileEnding(body, scope, commit)
    try:
        body.close = ending.close  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        ending._closes = None  # the server will call it
        ending.close()
    return body


class _Gate:
    """Stands between the app and the server's `start_response`: commits before a success starts.

    The call is held back until the app has returned its body, so that a success whose commit
    fails was never announced. PEP 3333 sends nothing before the first chunk anyway. Where the
    app starts the response only while its body is read, the gate opens at once.

    Args:
        options: the middleware.
        start_response: the server's.
        is_last: whether there is no further try.
    """

    # What has become of the response of this try.
    WAITING, STARTED, COMMIT_FAILED, HELD = range(4)

    scope: Scope

    def __init__(
        self, options: WSGIRopeMiddleware, start_response: StartResponse, is_last: bool = True
    ) -> None:
        self._options = options
        self._start_response = start_response
        self._is_last = is_last
        self._state = self.WAITING
        self._call: tuple[Any, ...] | None = None  # the app's, while it is held back
        self._late = False
        self._server_write: Callable[[bytes], object] | None = None
        self.commits = False
        self.why = "no response"
        self.again = False

    @property
    def lets_pass(self) -> bool:
        """Whether the client gets the app's own response."""
        return self._state in (self.WAITING, self.STARTED)

    @property
    def commit_failed(self) -> bool:
        """Whether the commit failed, and the app has not answered anything else since."""
        return self._state == self.COMMIT_FAILED

    def may_try_again(self) -> bool:
        """Tell whether this try may be run again (C6)."""
        return (
            self._state != self.STARTED
            and not self._is_last
            and self.scope._refused is not None
            and not self.scope._committed
        )

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        """Take the app's call."""
        call = (status, headers) if exc_info is None else (status, headers, exc_info)
        if self._call is not None and exc_info is None and self._state == self.WAITING:
            self._open()  # called twice: the server shall say so
        if self._state == self.STARTED:
            return self._start_response(*call)
        if self._state != self.HELD:
            self._call = call
            if self._late:
                self._open()
        return self._write

    def settle(self, body: Iterable[bytes]) -> Iterable[bytes]:
        """Let the response start, now that the app has returned `body`; return the body."""
        self._late = True
        if self._call is not None:
            self._open()
        elif self._state == self.WAITING and not _is_odd(body):
            # The app calls start_response while its first chunk is made.
            return self._begin(body)
        elif self._state == self.COMMIT_FAILED and self.may_try_again():
            self.again = True
        return body

    def _begin(self, body: Iterable[bytes]) -> Iterable[bytes]:
        chunks = iter(body)
        begun = _Begun(body, chunks)
        try:
            for chunk in chunks:
                begun.first.append(chunk)
                if chunk or self._state != self.WAITING:
                    break
        except BaseException:
            if not self.may_try_again() and not self.commit_failed:
                _close(body)
            raise
        return begun

    def _open(self) -> None:
        """Decide on the response that the app has announced."""
        call, self._call = self._call, None
        assert call is not None  # noqa: S101 - our own callers
        status, failed = _code(call[0]), self.commit_failed
        if (status >= 500 or (failed and status < 400)) and self.may_try_again():
            self.why = f"status {status}"
            self._state = self.HELD
            self.again = True
        elif not (failed and status < 400):
            if self._options._commit and not failed:
                self._commit_or_roll_back(status, call[1])
            self._state = self.STARTED
            self._server_write = self._start_response(*call)

    def _commit_or_roll_back(self, status: int, headers: list[tuple[str, str]]) -> None:
        self._state = self.COMMIT_FAILED  # until it has not
        self.why = self._options._why_not(self.scope, status, lambda: list(headers))
        if self.why:
            self.scope._doomed = True  # nothing later in the scope commits, either
            drive(self.scope._rollback_steps(self.why))
        else:
            drive(self.scope._commit_steps())
            self.commits = True

    def _write(self, data: bytes) -> object:
        """Be the `write` of the app."""
        if self._call is not None and data:
            self._open()
        if self._server_write is None:
            return None  # of a response that the client does not get
        return self._server_write(data)

    def plain_error(self) -> list[bytes]:
        """Answer a plain 500 instead of a success whose commit failed; return its body."""
        self._start_response(
            "500 Internal Server Error",
            [
                ("Content-Type", "text/plain; charset=utf-8"),
                ("Content-Length", str(len(SERVER_ERROR))),
            ],
        )
        return [SERVER_ERROR]


class _Begun:
    """A body whose first chunks have been made already."""

    def __init__(self, body: Iterable[bytes], chunks: Iterator[bytes]) -> None:
        self._body = body
        self._chunks = chunks
        self.first: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        return chain(self.first, self._chunks)

    def close(self) -> None:
        close = getattr(self._body, "close", None)
        if close is not None:
            close()


def _code(status: object) -> int:
    """Return the number in a status line; 500 for what the server is going to refuse."""
    try:
        return int(str(status)[:3])
    except ValueError:
        return 500


class _Replay:
    """Keeps the body of a request for another try."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        self._environ = environ
        stream = environ["wsgi.input"]
        length = environ.get("CONTENT_LENGTH") or "0"
        self._input: Callable[[], Any] = lambda: stream
        self.is_whole = False
        """False where the body outgrows REPLAY_LIMIT, or its length is unknown."""
        if environ.get("wsgi.input_terminated"):
            kept = stream.read(REPLAY_LIMIT + 1)
            self.is_whole = len(kept) <= REPLAY_LIMIT
            if self.is_whole:
                self._input = lambda: io.BytesIO(kept)
            else:
                self._input = lambda: io.BufferedReader(cast("Any", _Chained(kept, stream)))
        elif length.isdecimal() and int(length) <= REPLAY_LIMIT:
            if "HTTP_TRANSFER_ENCODING" not in environ:
                body = stream.read(int(length)) if int(length) else b""
                self._input = lambda: io.BytesIO(body)
                self.is_whole = True

    def environ(self) -> WSGIEnvironment:
        """Return a copy of the environ for the next try, its input at the beginning."""
        return {**self._environ, "wsgi.input": self._input()}


class _Chained(io.RawIOBase):
    """What was read of a stream already, then the rest of it."""

    def __init__(self, first: bytes, rest: Any) -> None:
        self._first = io.BytesIO(first)
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data: bytes = self._first.read(len(buffer)) or self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
