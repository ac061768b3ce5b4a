"""The server's side of PEP 3333, played in process, well and badly; an app that looks around."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from wsgiref.util import FileWrapper, setup_testing_defaults

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from rope_middleware import Scope, SessionJenny, WSGIRopeMiddleware, current_scope
from tests.kit.leaks import checked_out, no_scope_here
from tests.kit.sessions import touch

KEY = "rope_middleware.scope"
HEADERS = [("Content-Type", "text/plain")]


Wrap = Callable[[Any], WSGIRopeMiddleware]
WRAPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "commit": {"commit_on_success": True},
    "retries": {"retries": 2},
}
"""The options with which the tests of WSGI are served, one after the other."""


def served(*without: str, **faults: str) -> pytest.MarkDecorator:
    """Serve a test by `wrap` with other sets of options than all.

    Args:
        without: sets for which the contract says something else.
        faults: sets under which it fails today, each with the reason.
    """
    return pytest.mark.parametrize(
        "wrap",
        [
            pytest.param(name, marks=pytest.mark.xfail(reason=faults[name], strict=True))
            if name in faults
            else name
            for name in WRAPS
            if name not in without
        ],
        indirect=True,
    )


SEEN = "tests.scopes"


def wrapped(options: str, app: Any) -> WSGIRopeMiddleware:
    """Put the middleware around `app`; `scope_of` knows which scope it was called in."""

    def noting(environ: dict[str, Any], start_response: Any) -> Any:
        environ.get(SEEN, []).append(environ[KEY])
        return app(environ, start_response)

    return WSGIRopeMiddleware(noting, **WRAPS[options])


def scope_of(environ: dict[str, Any]) -> Scope:
    """Return the scope of the last try, also where each try has a copy of the environ."""
    found: Scope = environ[SEEN][-1]
    return found


def serve_wsgi(app: Any, **options: Any) -> list[bytes]:
    """Ask an application once behind the middleware, as a server does."""
    body = WSGIRopeMiddleware(app, **options)(make_environ(), lambda *_: print)
    try:
        return list(body)
    finally:
        body.close()  # type: ignore[attr-defined]


def make_environ(path: str = "/", **extra: Any) -> dict[str, Any]:
    environ: dict[str, Any] = {
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        SEEN: [],
        **extra,
    }
    setup_testing_defaults(environ)
    return environ


@dataclass
class Seen:
    """All that a server sees of one request."""

    starts: list[tuple[Any, ...]] = field(default_factory=list)
    output: list[tuple[str, Any]] = field(default_factory=list)
    length: Any = None
    error: tuple[type[BaseException], str] | None = None
    close_error: tuple[type[BaseException], str] | None = None
    raised: BaseException | None = field(default=None, compare=False)
    result: Any = field(default=None, compare=False)

    @property
    def body(self) -> bytes:
        return b"".join(chunk for _, chunk in self.output)

    @property
    def wire(self) -> tuple[Any, ...]:
        """What the client gets to see: the last start, if anything was sent after it."""
        start = self.starts[-1] if self.starts and (self.output or not self.error) else None
        return start, self.output, self.error, self.close_error


class Server:
    """A server as PEP 3333 has it, that can also misbehave.

    Args:
        take: how many chunks it takes before the client goes away; None for all.
        close: how often it calls the iterable's `close()`; 0 for a server that forgets.
    """

    def __init__(self, take: int | None = None, close: int = 1) -> None:
        self.take = take
        self.close = close

    def __call__(self, app: Any, environ: dict[str, Any] | None = None, **extra: Any) -> Seen:
        seen = Seen()
        sent: list[None] = []

        def write(data: bytes) -> None:
            sent.append(None)
            seen.output.append(("write", data))

        def start_response(*args: Any) -> Callable[[bytes], None]:
            status, headers, *rest = args
            exc_info = rest[0] if rest else None
            if exc_info:
                try:
                    if sent:
                        raise exc_info[1].with_traceback(exc_info[2])
                finally:
                    exc_info = (exc_info[0], str(exc_info[1]))
                    args = ()
            elif seen.starts:
                raise AssertionError("Headers already set!")
            seen.starts.append((status, list(headers), exc_info))
            return write

        environ = make_environ(**extra) if environ is None else environ
        try:
            result = seen.result = app(environ, start_response)
        except BaseException as error:
            seen.error, seen.raised = (type(error), str(error)), error
            return seen
        # Servers look for a length before they take the first chunk, some with hasattr().
        if hasattr(result, "__len__"):
            seen.length = len(result)
        try:
            for number, chunk in enumerate(result, 1):
                if not seen.starts:
                    seen.output.append(("too early", chunk))
                else:
                    sent.append(None)
                    seen.output.append(("chunk", chunk))
                if number == self.take:
                    break
        except BaseException as error:
            seen.error, seen.raised = (type(error), str(error)), error
        finally:
            for _ in range(self.close):
                try:
                    if hasattr(result, "close"):
                        result.close()
                except BaseException as error:
                    seen.close_error = (type(error), str(error))
                    seen.raised = seen.raised or error
        return seen


class Iterable:
    """A body that is not its own iterator, whose iterator has a `close()` that is nobody's."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def __iter__(self) -> Any:
        return _Chunks(self.probe)

    def close(self) -> None:
        self.probe.on_close()


class _Chunks:
    def __init__(self, probe: Probe) -> None:
        self.probe, self.number = probe, 0

    def __iter__(self) -> _Chunks:
        return self

    def __next__(self) -> bytes:
        self.number += 1
        return self.probe.on_chunk(self.number)

    def close(self) -> None:
        raise AssertionError("PEP 3333: close() of the iterable, not of its iterator")


class SelfIterator:
    """A body that is its own iterator."""

    def __init__(self, probe: Probe) -> None:
        self.probe, self.number = probe, 0

    def __iter__(self) -> SelfIterator:
        return self

    def __next__(self) -> bytes:
        self.number += 1
        return self.probe.on_chunk(self.number)

    def close(self) -> None:
        self.probe.on_close()


class ClassWrapper(FileWrapper):
    """As gunicorn, waitress and wsgiref have it: a class; its close is the file's."""


def function_wrapper(file: Any, size: int = 8192) -> Any:
    """As mod_wsgi has it: a method that returns an object of a type nobody else sees."""
    return ClassWrapper(file, size)


FILE_WRAPPERS = [ClassWrapper, function_wrapper]


def generator(probe: Probe) -> Iterator[bytes]:
    number = 0
    try:
        while True:
            number += 1
            try:
                chunk = probe.on_chunk(number)
            except StopIteration:
                return
            yield chunk
    finally:
        probe.on_close()


BODIES: dict[str, Callable[[Probe], Any]] = {
    "iterable": Iterable,
    "iterator": SelfIterator,
    "generator": generator,
}


class Probe:
    """An app of three chunks that uses the session wherever it may, and notes what it finds."""

    def __init__(
        self, jenny: SessionJenny[Session], kind: str = "iterable", fail: str = ""
    ) -> None:
        self.jenny, self.kind, self.fail = jenny, kind, fail
        self.sessions: list[Session] = []
        self.scopes: list[Scope] = []
        self.closes = 0

    def use(self, where: str) -> None:
        self.scopes.append(current_scope())
        self.sessions.append(touch(self.jenny))
        if self.fail == where:
            raise ValueError(f"failed: {where}")

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        assert environ[KEY] is current_scope()
        self.use("before start")
        start_response("200 OK", HEADERS)
        self.use("after start")
        return BODIES[self.kind](self)

    def on_chunk(self, number: int) -> bytes:
        if number > 3:
            raise StopIteration
        self.use(f"chunk {number}")
        return b"%d" % number

    def on_close(self) -> None:
        self.closes += 1
        self.use("close")

    def is_over(self, engine: Engine, closes: int = 1) -> None:
        """Its body was closed so often, its scope has ended, and nothing is out or current."""
        assert self.closes == closes
        assert self.scope.closed
        assert no_scope_here()
        assert checked_out(engine) == 0

    @property
    def scope(self) -> Scope:
        """The one scope of the request."""
        assert all(scope is self.scopes[0] for scope in self.scopes)
        assert all(session is self.sessions[0] for session in self.sessions)
        return self.scopes[0]
