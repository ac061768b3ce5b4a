"""The WSGI boundary: opens a scope for each request and ends it when the body is closed.

PEP 3333 lets a server take its time between two chunks and serve another request on the same
thread meanwhile. So the scope is current only while code of the application runs: in its call,
in each chunk, and in the body's `close()`.
"""

from __future__ import annotations

import io
import time
from itertools import chain
from types import GeneratorType, SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from rope_middleware.middleware import REPLAY_LIMIT, SERVER_ERROR, RopeMiddleware
from rope_middleware.refusal import backoff
from rope_middleware.scope import (
    OPEN,
    SCOPE_KEY,
    Scope,
    class_of,
    current,
    drive,
    log_retry,
    logger,
    note_shared_session,
    unbind,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self, Unpack

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from rope_middleware.middleware import Options

__all__ = ["WSGIRopeMiddleware"]

# Bound once: this is the way of every request.
_bind = current.set
_reset = current.reset


class _RequestScope(Scope):
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
        return f"{method} {decoded}"


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
            self, app: WSGIApplication, registries: Iterable[Any] = (), **options: Unpack[Options]
        ) -> None: ...

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request within a scope of its own."""
        if self._has_options or SCOPE_KEY in environ or "asgi.scope" in environ:
            return self._serve_otherwise(environ, start_response)
        get = environ.get
        if type(get("wsgi.file_wrapper")) not in _CLASS_OR_NONE:
            _note_files(environ)
        scope = _RequestScope()
        scope._name = get("REQUEST_METHOD"), get("SCRIPT_NAME"), get("PATH_INFO")
        scope._sessions = None
        scope._state = OPEN
        scope._commits = self._commit
        environ[SCOPE_KEY] = scope
        token = _bind(scope)
        try:
            if scope._commits:
                return _Gate(self, scope, start_response).serve(self.app, environ)
            body = self.app(environ, start_response)
            kind = type(body)
            if kind is list or kind is tuple:
                return _ListBody(body, scope)
            return _hand_on(body, environ, scope)
        except BaseException as error:
            _end_failed(scope, error)
            raise
        finally:
            try:  # `unbind`, without the price of a call
                _reset(token)
            except ValueError:
                pass

    def _serve_otherwise(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        """Serve what is not the plain case."""
        outer = _outer_scope(environ)
        if outer is not None:
            # Another RopeMiddleware around this one has opened it, and will end it.
            return self._serve_within(outer, environ, start_response)
        replay = _Replay(environ) if self._retries else None
        if replay is not None and replay.is_whole:
            for tried in range(self._retries):
                scope, response = self._serve_try(replay.environ(), start_response, is_last=False)
                if response is not _AGAIN:
                    return response
                log_retry(scope, tried + 1, self._retries)
                time.sleep(backoff(tried))
        return self._serve_try(replay.environ() if replay else environ, start_response)[1]

    def _serve_within(
        self, outer: Scope, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        environ[SCOPE_KEY] = outer
        token = current.set(outer)
        try:
            body = self.app(environ, start_response)
            if type(body) in (list, tuple) or _is_file(body, environ) or _is_odd(body):
                return body
            return _Body(body, outer, owns=False)
        finally:
            unbind(token)

    def _serve_try(
        self, environ: WSGIEnvironment, start_response: StartResponse, is_last: bool = True
    ) -> tuple[Scope, Iterable[bytes]]:
        """Serve one try of a request; the response is _AGAIN where there should be another."""
        if type(environ.get("wsgi.file_wrapper")) not in _CLASS_OR_NONE:
            _note_files(environ)
        scope = _RequestScope()
        name = tuple(map(environ.get, ("REQUEST_METHOD", "SCRIPT_NAME", "PATH_INFO")))
        scope._open(name, self._commit)
        self._configure(scope)
        environ[SCOPE_KEY] = scope
        token = current.set(scope)
        try:
            if self._commit or self._retries:
                return scope, _Gate(self, scope, start_response, is_last).serve(self.app, environ)
            return scope, _hand_on(self.app(environ, start_response), environ, scope)
        except BaseException as error:
            _end_failed(scope, error)
            raise
        finally:
            unbind(token)


def _outer_scope(environ: WSGIEnvironment) -> Scope | None:
    """Return the open scope that another RopeMiddleware has made for this request, or None."""
    # Bridges from ASGI (a2wsgi, asgiref) hand the ASGI scope on as "asgi.scope".
    for mapping in (environ, environ.get("asgi.scope") or {}):
        scope: Scope | None = mapping.get(SCOPE_KEY)
        if scope is not None and not scope._state:
            return scope
    return None


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


def _is_file(body: object, environ: WSGIEnvironment) -> bool:
    """Tell whether ``wsgi.file_wrapper`` made the body: then servers want that very object."""
    wrapper = environ.get("wsgi.file_wrapper")
    if isinstance(wrapper, _FileWrapper):
        return any(body is made for made in wrapper.made)
    return isinstance(wrapper, type) and isinstance(body, wrapper)


_CLASS_OR_NONE = frozenset({type, type(None)})


class _FileWrapper:
    """Knows what a ``wsgi.file_wrapper`` made that is a function, as uWSGI's is."""

    def __init__(self, wrapper: Callable[..., Any]) -> None:
        self._wrapper = wrapper
        self.made: list[object] = []

    def __call__(self, *args: Any) -> Any:
        made = self._wrapper(*args)
        self.made.append(made)
        return made


def _note_files(environ: WSGIEnvironment) -> None:
    wrapper = environ["wsgi.file_wrapper"]
    if not isinstance(wrapper, (type, _FileWrapper)):
        environ["wsgi.file_wrapper"] = _FileWrapper(wrapper)


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
    if kind is GeneratorType:
        return _Body(body, scope, commit)
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

    __slots__ = ("__weakref__", "_body", "_commit", "_owns", "_read", "_scope")

    def __init__(self, body: Any, scope: Scope, commit: bool = False, owns: bool = True) -> None:
        self._body = body
        self._scope: Scope | None = scope  # None once it has ended
        self._commit = commit
        self._owns = owns
        self._read = False  # to its end

    def close(self) -> None:
        """Close the application's body, then end the scope. Called again it does nothing."""
        scope, self._scope = self._scope, None
        if scope is None:
            return
        token = _bind(scope)
        try:
            # PEP 3333: close() of the iterable, not of its iterator.
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
            if self._owns:
                why = self._why_not(scope) if scope._commits else ""
                scope._end(scope._commits and not why, why)
        except BaseException as error:
            if self._owns:
                _end_failed(scope, error)
            raise
        finally:
            try:  # `unbind`, without the price of a call
                _reset(token)
            except ValueError:
                pass

    def _why_not(self, scope: Scope) -> str:
        """Tell why the end does not commit; "" where it does."""
        if not self._commit:
            return "the response was no success"
        if scope._doomed:
            return "doomed"
        return "" if self._read else "the body was not read to its end"

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
        return len(self._body)

    def close(self) -> None:
        """End the scope. Called again it does nothing."""
        scope = self._scope
        if scope is not None and scope._end_unused():
            self._scope = None
        else:
            self._read = True
            super().close()


class _Body(_Ending):
    """A body whose chunks are made as they are asked for, each with the scope current."""

    __slots__ = ()

    def __iter__(self) -> Iterator[bytes]:
        scope = self._scope
        if scope is None:  # closed
            yield from self._body
            return
        chunks = None
        inner: Scope | None = scope
        while True:
            # An open_scope() around several chunks is current for each of them.
            token = _bind(scope if inner is None or inner._state else inner)
            try:
                if chunks is None:
                    chunks = iter(self._body)
                chunk = next(chunks)
                inner = current.get(None)
            except StopIteration:
                self._read = True
                return
            except BaseException as error:
                note_shared_session(error)
                raise
            finally:
                try:  # `unbind`, without the price of a call
                    _reset(token)
                except ValueError:
                    pass
            yield chunk


class _SizedBody(_Body):
    """A `_Body` that knows its length."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)


def _end_with_file(body: Any, scope: Scope, commit: bool) -> Iterable[bytes]:
    """Have the close() of the server's own file wrapper end the scope; return the wrapper."""
    ending = _Ending(SimpleNamespace(close=getattr(body, "close", None)), scope, commit)
    ending._read = True  # the server reads it by itself
    try:
        body.close = ending.close
    except (AttributeError, TypeError):
        ending._body = None  # the server will close it
        ending.close()
    return cast("Iterable[bytes]", body)


# What has become of the response of one try.
_WAITING, _STARTED, _COMMIT_FAILED, _HELD = range(4)

_AGAIN: list[bytes] = []  # no response: the request is to be tried again


class _Gate:
    """Stands between the app and the server's `start_response`: commits before a success starts.

    The app's call is held back until the app has returned its body, so that a success whose
    commit fails was never announced. PEP 3333 sends nothing before the first chunk anyway.
    Where the app starts the response only while its body is read, the gate opens at once.

    Args:
        options: the middleware.
        scope: the request's.
        start_response: the server's.
        is_last: whether there is no further try.
    """

    __slots__ = (
        "_call",
        "_commits",
        "_is_last",
        "_options",
        "_response",
        "_returned",
        "_scope",
        "_start_response",
        "_why",
        "_write_on",
    )

    def __init__(
        self,
        options: WSGIRopeMiddleware,
        scope: Scope,
        start_response: StartResponse,
        is_last: bool = True,
    ) -> None:
        self._options = options
        self._scope = scope
        self._start_response = start_response
        self._is_last = is_last
        self._response = _WAITING
        self._returned = False
        self._call: Any = None  # the app's call of start_response, while it is held back
        self._write_on: Callable[[bytes], object] | None = None
        self._commits = False
        self._why = ""

    def serve(self, app: WSGIApplication, environ: WSGIEnvironment) -> Iterable[bytes]:
        """Call the app; return what the server gets, or _AGAIN for another try.

        Raises:
            BaseException: what the app raised, unless a commit failed or another try follows.
        """
        body: Iterable[bytes] = ()
        try:
            body = app(environ, self.start_response)
            self._returned = True
            if self._call is not None:
                self._open()
            elif self._response == _WAITING and not _is_odd(body):
                body = _begin(body, self)
        except BaseException as error:
            self._why = class_of(error)
            if not isinstance(error, Exception) or not (
                self._response == _COMMIT_FAILED or self._may_try_again()
            ):
                _close(body)
                raise
            if self._response == _WAITING:
                self._response = _HELD
        if self._response < _COMMIT_FAILED:
            return _hand_on(body, environ, self._scope, self._commits)
        _close(body)
        if self._may_try_again():
            self._response = _HELD
        self._scope._end(why=self._why)
        return _AGAIN if self._response == _HELD else self._plain_error()

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        """Take the app's call."""
        if self._call is not None and exc_info is None and self._response == _WAITING:
            self._open()  # called twice: the server shall say so
        call: Any = (status, headers) if exc_info is None else (status, headers, exc_info)
        if self._response == _STARTED:
            write = self._start_response(*call)
            if _code(status) >= 400:
                self._scope._doomed = True  # the server has taken it instead of the success
            return write
        if self._response != _HELD:
            self._call = call
            if self._returned:
                self._open()
        return self._write

    def _write(self, data: bytes) -> object:
        """Be the `write` of the app."""
        if self._call is not None and data:
            self._open()
        # None: of a response that the client does not get.
        return None if self._write_on is None else self._write_on(data)

    @property
    def is_waiting(self) -> bool:
        """Whether the app has not called start_response yet."""
        return self._response == _WAITING

    def _may_try_again(self) -> bool:
        """Tell whether this try may be run again (C6)."""
        return (
            not self._is_last
            and self._response != _STARTED
            and self._scope._refused is not None
            and not self._scope._committed
        )

    def _open(self) -> None:
        """Decide on the response that the app has announced."""
        call, self._call = self._call, None
        if (
            self._scope._sessions is None  # nothing to commit, nor to roll back
            and type(call[0]) is str
            and call[0] < "4"
            and self._response == _WAITING
            and not self._options._has_options
        ):
            self._commits = self._scope._commits  # later, what may come yet
            self._response = _STARTED
            self._write_on = self._start_response(*call)
            return
        status, failed = _code(call[0]), self._response == _COMMIT_FAILED
        if (status >= 500 or (failed and status < 400)) and self._may_try_again():
            self._why = call[0]
            self._response = _HELD
        elif not (failed and status < 400):
            if self._scope._commits and not failed:
                self._settle(status, call[1])
            self._response = _STARTED
            self._write_on = self._start_response(*call)

    def _settle(self, status: int, headers: list[tuple[str, str]]) -> None:
        """Commit or roll back, before the client can see the status."""
        self._response = _COMMIT_FAILED  # until it has not
        self._why = self._options._why_not(self._scope, status, lambda: list(headers))
        if self._why:
            self._scope._doomed = True  # nothing later in the scope commits, either
            drive(self._scope._rollback_steps(self._why))
        else:
            drive(self._scope._commit_steps())
            self._commits = True

    def _plain_error(self) -> list[bytes]:
        """Answer a plain 500 instead of a success whose commit failed; return its body."""
        self._start_response(
            "500 Internal Server Error",
            [
                ("Content-Type", "text/plain; charset=utf-8"),
                ("Content-Length", str(len(SERVER_ERROR))),
            ],
        )
        return [SERVER_ERROR]


def _begin(body: Iterable[bytes], gate: _Gate) -> Iterable[bytes]:
    """Make chunks of `body` until the app has called start_response, and return all of them.

    PEP 3333 has the app call it before the first chunk that is not empty.
    """
    begun = _Begun(body)
    for chunk in begun.rest:
        begun.first.append(chunk)
        if chunk or not gate.is_waiting:
            break
    return begun


class _Begun:
    """A body whose first chunks have been made already."""

    def __init__(self, body: Iterable[bytes]) -> None:
        self._body = body
        self.first: list[bytes] = []
        self.rest = iter(body)

    def __iter__(self) -> Iterator[bytes]:
        return chain(self.first, self.rest)

    def close(self) -> None:
        """Close the app's body."""
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
        elif (
            length.isdecimal()
            and int(length) <= REPLAY_LIMIT
            and "HTTP_TRANSFER_ENCODING" not in environ
        ):
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
