"""WSGIRopeMiddleware: PEP 3333 to the letter, and the promises W, S, J and C1 under WSGI.

A server is played by `Server` below, which keeps the rules of PEP 3333 and writes down all that
it sees; real servers are in `tests/e2e/test_wsgi_servers.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import io
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from wsgiref.handlers import SimpleHandler
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import greenlet
import pytest
from sqlalchemy import Engine, create_engine, event, func, select, text
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)

from rope_middleware import (
    ASGIRopeMiddleware,
    NoScopeError,
    RopeError,
    RopeMiddleware,
    Scope,
    ScopeClosedError,
    SessionJenny,
    WSGIRopeMiddleware,
    current_scope,
    open_scope,
)

KEY = "rope_middleware.scope"
HEADERS = [("Content-Type", "text/plain")]

# --------------------------------------------------------------------------------------
# What the tests stand on
# --------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "row"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="")


def make_engine(path: Any, size: int = 3) -> Engine:
    """A file database whose pool runs dry at the first leaks, instead of hiding them."""
    engine = create_engine(f"sqlite:///{path}", pool_size=size, max_overflow=0, pool_timeout=5)
    Base.metadata.create_all(engine)
    return engine


def checked_out(engine: Engine) -> int:
    return engine.pool.checkedout()  # type: ignore[attr-defined]


def rows(engine: Engine) -> int:
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(Row)) or 0


def no_scope_here() -> bool:
    """Tell whether the ContextVar shows nothing in this thread."""
    try:
        current_scope()
    except NoScopeError:
        return True
    return False


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """The tests collect garbage often; what was there before need not be looked at each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def engine(tmp_path: Any) -> Iterator[Engine]:
    """An engine of which nothing may be checked out, and no scope open, when the test is over."""
    engine = make_engine(tmp_path / "wsgi.db")
    yield engine
    gc.collect()
    left = checked_out(engine)
    engine.dispose()
    assert left == 0, f"{left} connections were not given back"
    assert no_scope_here(), "the ContextVar still shows a scope"


@pytest.fixture
def jenny(engine: Engine) -> SessionJenny[Session]:
    return SessionJenny(sessionmaker(engine))


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
        return seen


def make_environ(path: str = "/", **extra: Any) -> dict[str, Any]:
    environ: dict[str, Any] = {"SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": "", **extra}
    setup_testing_defaults(environ)
    return environ


def touch(jenny: SessionJenny[Session]) -> Session:
    """Use the session, so that it holds a connection until somebody ends it."""
    jenny.session.execute(text("select 1"))
    return jenny.session


def eventually(condition: Callable[[], Any], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)


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


KINDS: dict[str, Callable[[Probe], Any]] = {
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
        return KINDS[self.kind](self)

    def on_chunk(self, number: int) -> bytes:
        if number > 3:
            raise StopIteration
        self.use(f"chunk {number}")
        return b"%d" % number

    def on_close(self) -> None:
        self.closes += 1
        self.use("close")

    @property
    def scope(self) -> Scope:
        """The one scope of the request."""
        assert all(scope is self.scopes[0] for scope in self.scopes)
        assert all(session is self.sessions[0] for session in self.sessions)
        return self.scopes[0]


# --------------------------------------------------------------------------------------
# W1: PEP 3333
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_W1_exhausted_body_is_closed_once(
    kind: str, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """After the last chunk the scope is still open; the server's close() ends it."""
    probe = Probe(jenny, kind)
    result = WSGIRopeMiddleware(probe)(make_environ(), lambda *args: print)
    assert b"".join(result) == b"123"
    # A generator has run to its end and with it its `finally`; the others wait for close().
    assert probe.closes == (kind == "generator")
    assert not probe.scope.closed
    result.close()
    assert probe.closes == 1
    assert probe.scope.closed
    assert checked_out(engine) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("take", [1, 2, 3])
def test_W1_abandoned_body_is_closed_once(
    kind: str, take: int, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """A client that goes away after some chunks: one close(), and the scope has ended."""
    probe = Probe(jenny, kind)
    seen = Server(take=take)(WSGIRopeMiddleware(probe))
    assert seen.body == b"123"[:take]
    assert seen.error is None and seen.close_error is None
    assert probe.closes == 1
    assert probe.scope.closed
    assert checked_out(engine) == 0


@pytest.mark.parametrize("kind", ["iterable", "iterator"])
def test_W1_body_closed_before_its_first_chunk(
    kind: str, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """A HEAD request: the server takes no chunk at all and closes."""
    probe = Probe(jenny, kind)
    result = WSGIRopeMiddleware(probe)(make_environ(), lambda *args: print)
    result.close()
    assert probe.closes == 1
    assert probe.scope.closed
    assert checked_out(engine) == 0


def test_W1_generator_closed_before_its_first_chunk(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """A generator that never started has nothing to run; the scope ends all the same."""
    probe = Probe(jenny, "generator")
    result = WSGIRopeMiddleware(probe)(make_environ(), lambda *args: print)
    result.close()
    assert probe.closes == 0
    assert probe.scope.closed
    assert checked_out(engine) == 0


@pytest.mark.parametrize("where", ["before start", "after start"])
def test_W1_error_in_the_app(where: str, jenny: SessionJenny[Session], engine: Engine) -> None:
    """The app's own error comes out as it is, and the scope has ended by then."""
    probe = Probe(jenny, fail=where)
    with pytest.raises(ValueError, match=f"^failed: {where}$"):
        WSGIRopeMiddleware(probe)(make_environ(), lambda *args: print)
    assert probe.closes == 0
    assert probe.scope.closed
    assert no_scope_here()
    assert checked_out(engine) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_W1_what_is_no_ordinary_error_ends_the_scope_too(
    error: type[BaseException], jenny: SessionJenny[Session], engine: Engine
) -> None:
    """Whatever leaves the app (a worker's time-out raises SystemExit) ends the scope."""
    scopes: list[Scope] = []
    raised = error("stop")

    def app(environ: Any, start_response: Any) -> Any:
        scopes.append(current_scope())
        touch(jenny)
        raise raised

    def late(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        scopes.append(current_scope())
        touch(jenny)
        yield b"x"
        raise raised

    with pytest.raises(error) as caught:
        WSGIRopeMiddleware(app)(make_environ(), lambda *args: print)
    assert caught.value is raised
    seen = Server()(WSGIRopeMiddleware(late))
    assert seen.raised is raised
    assert [scope.closed for scope in scopes] == [True, True]
    assert checked_out(engine) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["chunk 1", "chunk 2", "chunk 3"])
def test_W1_error_in_the_middle_of_the_body(
    kind: str, where: str, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """The error reaches the server; close() is called once and the scope has ended."""
    probe = Probe(jenny, kind, fail=where)
    seen = Server()(WSGIRopeMiddleware(probe))
    assert seen.error == (ValueError, f"failed: {where}")
    assert seen.close_error is None
    assert probe.closes == 1
    assert probe.scope.closed
    assert checked_out(engine) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("take", [1, None])
def test_W1_error_in_close(
    kind: str, take: int | None, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """An error in the app's close() reaches the server, and the scope has ended."""
    probe = Probe(jenny, kind, fail="close")
    seen = Server(take=take)(WSGIRopeMiddleware(probe))
    # An exhausted generator fails in its `finally`, that is in its last chunk.
    late = seen.error if kind == "generator" and take is None else seen.close_error
    assert late == (ValueError, "failed: close")
    assert probe.closes == 1
    assert probe.scope.closed
    assert checked_out(engine) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fail", ["", "close"])
def test_W1_close_called_twice(
    kind: str, fail: str, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """A server that closes again, also after a failed close(), closes the app's body once."""
    probe = Probe(jenny, kind, fail=fail)
    Server(take=1, close=3)(WSGIRopeMiddleware(probe))
    assert probe.closes == 1
    assert probe.scope.closed
    assert checked_out(engine) == 0


def test_W1_a_failing_iter_ends_the_scope(jenny: SessionJenny[Session], engine: Engine) -> None:
    """A body whose __iter__ raises: the server sees its error, and close() is called once."""
    closes: list[Scope] = []

    class Body:
        def __iter__(self) -> Any:
            touch(jenny)
            raise ValueError("no iterator")

        def close(self) -> None:
            closes.append(current_scope())

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        return Body()

    environ = make_environ()
    seen = Server()(WSGIRopeMiddleware(app), environ)
    assert seen.error == (ValueError, "no iterator")
    assert len(closes) == 1
    assert closes[0].closed
    assert checked_out(engine) == 0


# Apps, good and bad. Each takes a function that uses the session where there is a middleware,
# so that the same code can run without one.

Touch = Callable[[], object]
APPS: dict[str, Callable[[Touch], Any]] = {}
GOOD: set[str] = set()


def an_app(good: bool = True) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        name = make.__name__.replace("_", " ")
        APPS[name] = make
        if good:
            GOOD.add(name)
        return make

    return register


def _answers(body: Any, good: bool, name: str) -> None:
    def make(touch: Touch) -> Any:
        def app(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", HEADERS)
            touch()
            return body() if callable(body) else body

        return app

    make.__name__ = name
    an_app(good)(make)


class _Sequence:
    """Iterable by the old protocol only."""

    def __getitem__(self, index: int) -> bytes:
        return [b"old", b" ", b"style"][index]


class _Falsy:
    def __init__(self) -> None:
        self.closed = 0

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Any:
        return iter([b"a", b"b"])

    def close(self) -> None:
        self.closed += 1


class _Sized:
    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        return iter([b"a", b"b"])


class _BadLength:
    def __len__(self) -> int:
        raise NotImplementedError("no length")

    def __iter__(self) -> Any:
        return iter([b"a", b"b"])


_answers([b"one"], True, "list_of_one")
_answers([b"one", b"", b"three"], True, "list_of_three")
_answers([], True, "empty_list")
_answers((b"a", b"b"), True, "tuple")
_answers(lambda: iter([b"a", b"b"]), True, "list_iterator")
_answers(lambda: map(bytes, [b"a", b"b"]), True, "map")
_answers(lambda: io.BytesIO(b"a\nb\n"), True, "file_without_wrapper")
_answers(lambda: {b"a": 1}, True, "dict")
_answers(_Sequence, True, "old_sequence_protocol")
_answers(_Falsy, True, "falsy_iterable")
_answers(_Sized, True, "sized_iterable")
_answers(None, False, "returns_None")
_answers(False, False, "returns_False")
_answers(42, False, "returns_a_number")
_answers(object, False, "returns_an_object")
_answers(lambda: [b"a", "b", None], False, "list_with_str_and_None")
_answers("text", False, "returns_str")
_answers(b"bytes", False, "returns_bytes")


@an_app()
def generator_app(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        touch()
        start_response("200 OK", HEADERS)
        yield b"late"
        touch()
        yield b"r"

    return app


@an_app()
def generator_with_empty_chunks_first(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", HEADERS)
        yield b""
        touch()
        yield b""
        yield b"x"

    return app


@an_app()
def write_only(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", HEADERS)
        write(b"a")
        touch()
        write(b"b")
        return []

    return app


@an_app()
def write_and_body(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", HEADERS)
        write(b"a")
        touch()
        return [b"b", b"c"]

    return app


@an_app()
def write_in_a_generator(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        write = start_response("200 OK", HEADERS)
        write(b"a")
        touch()
        yield b"b"
        write(b"c")
        yield b"d"

    return app


def _failure() -> Any:
    try:
        raise ValueError("the app's own")
    except ValueError:
        return sys.exc_info()


@an_app()
def exc_info_before_headers_are_sent(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        touch()
        try:
            raise ValueError("the app's own")
        except ValueError:
            start_response("500 Oops", HEADERS, sys.exc_info())
        return [b"sorry"]

    return app


@an_app()
def exc_info_in_the_first_call(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        touch()
        start_response("500 Oops", HEADERS, _failure())
        return [b"sorry"]

    return app


@an_app()
def exc_info_of_none(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        touch()
        start_response("200 OK", HEADERS, None)
        return [b"fine"]

    return app


@an_app(good=False)
def exc_info_after_headers_are_sent(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        yield b"begun"
        touch()
        start_response("500 Oops", HEADERS, _failure())
        yield b"never"

    return app


@an_app(good=False)
def exc_info_after_write(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", HEADERS)(b"begun")
        touch()
        start_response("500 Oops", HEADERS, _failure())
        return [b"never"]

    return app


@an_app(good=False)
def start_response_never(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        touch()
        return [b"a"]

    return app


@an_app(good=False)
def start_response_never_in_a_generator(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        touch()
        yield b"a"

    return app


@an_app(good=False)
def start_response_after_the_first_chunk(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        touch()
        yield b"a"
        start_response("200 OK", HEADERS)
        yield b"b"

    return app


@an_app(good=False)
def start_response_twice(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        touch()
        start_response("201 Created", HEADERS)
        return [b"a"]

    return app


@an_app(good=False)
def start_response_twice_and_the_error_swallowed(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        touch()
        with contextlib.suppress(AssertionError):
            start_response("201 Created", HEADERS)
        return [b"a"]

    return app


@an_app(good=False)
def raises_before_start_response(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        touch()
        raise ValueError("before")

    return app


@an_app(good=False)
def raises_after_start_response(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        touch()
        raise ValueError("after")

    return app


@an_app(good=False)
def raises_in_the_first_chunk(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        touch()
        start_response("200 OK", HEADERS)
        raise ValueError("first")
        yield b"never"

    return app


@an_app(good=False)
def raises_in_mid_body(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        touch()
        start_response("200 OK", HEADERS)
        yield b"a"
        raise ValueError("middle")

    return app


class _FailingClose(_Falsy):
    def close(self) -> None:
        raise ValueError("close")


class _FailingAll:
    def __iter__(self) -> Any:
        yield b"a"
        raise ValueError("middle")

    def close(self) -> None:
        raise LookupError("close")


_answers(_FailingClose, False, "raises_in_close")
_answers(_FailingAll, False, "raises_in_mid_body_and_close")
_answers(_BadLength, False, "length_that_raises")


@an_app(good=False)
def raises_StopIteration(touch: Touch) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        touch()
        raise StopIteration("from the app")

    return app


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registries": {"registries": [scoped_session(sessionmaker(), scopefunc=current_scope)]},
    "commit": {"commit_on_success": True},
    "retries": {"commit_on_success": True, "retries": 2},
}


@pytest.mark.parametrize("take", [None, 1], ids=["all", "abandoned"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", APPS)
def test_W1_the_server_sees_what_it_would_see_without_the_middleware(
    name: str,
    options: dict[str, Any],
    take: int | None,
    jenny: SessionJenny[Session],
    engine: Engine,
) -> None:
    """Starts, writes, chunks, their order, the length and every error are the app's own."""
    scopes: list[Scope] = []

    def use() -> None:
        scopes.append(current_scope())
        touch(jenny)

    make = APPS[name]
    if name == "length that raises":
        with pytest.raises(NotImplementedError):
            Server(take)(make(lambda: None))
        with pytest.raises(NotImplementedError):
            Server(take)(WSGIRopeMiddleware(make(use), **options))
    else:
        uses: list[None] = []
        bare = Server(take)(make(lambda: uses.append(None)))
        served = Server(take)(WSGIRopeMiddleware(make(use), **options))
        assert len(scopes) == len(uses)  # the app ran once, and as far as it would
        if "commit_on_success" in options:
            # The start is held back until the commit, so one that is replaced never shows.
            assert served.wire == bare.wire
            assert served.length == bare.length or name == "start response never"
        else:
            assert served == bare
        if bare.result is None or isinstance(bare.result, (bool, int, str, bytes)):
            assert served.result == bare.result
        del bare, served
    gc.collect()
    assert all(scope.closed for scope in scopes)
    assert no_scope_here()
    assert checked_out(engine) == 0


@pytest.mark.parametrize("take", [None, 1], ids=["all", "abandoned"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", sorted(GOOD))
def test_W1_wsgiref_validate_is_silent_on_both_sides(
    name: str,
    options: dict[str, Any],
    take: int | None,
    jenny: SessionJenny[Session],
    engine: Engine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Seen from the server and from the app the middleware keeps the specification."""
    bare = Server(take)(validator(APPS[name](lambda: None)))
    app = validator(APPS[name](lambda: touch(jenny)))
    served = Server(take)(validator(WSGIRopeMiddleware(app, **options)))
    assert bare.error is None and bare.close_error is None
    assert served.wire == bare.wire
    del served, bare
    gc.collect()
    assert capsys.readouterr().err == ""
    assert checked_out(engine) == 0


def test_W1_an_environ_with_empty_variables_left_out(jenny: SessionJenny[Session]) -> None:
    """PEP 3333 lets a server omit SCRIPT_NAME, PATH_INFO and QUERY_STRING where they are empty."""
    for missing in (["SCRIPT_NAME"], ["PATH_INFO"], ["SCRIPT_NAME", "QUERY_STRING"]):
        environ = make_environ("/mounted" if "SCRIPT_NAME" in missing else "")
        if "SCRIPT_NAME" not in missing:
            environ["SCRIPT_NAME"] = "/mounted"
        for name in missing:
            del environ[name]
        probe = Probe(jenny)
        seen = Server()(WSGIRopeMiddleware(probe), environ)
        assert (seen.error, seen.body) == (None, b"123")
        assert probe.scope.name == "GET /mounted"


@pytest.mark.parametrize(
    "name",
    [
        "returns None",
        "returns False",
        "returns str",
        "start response never in a generator",
        "list with str and None",
    ],
)
def test_W1_wsgiref_validate_finds_the_apps_faults_through_the_middleware(
    name: str, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """A checker in front of the middleware finds what it finds in the bare app."""
    bare = Server()(validator(APPS[name](lambda: None)))
    served = Server()(validator(WSGIRopeMiddleware(APPS[name](lambda: touch(jenny)))))
    assert bare.error is not None and bare.error[0] is AssertionError
    assert served.error == bare.error
    del bare, served
    gc.collect()
    assert checked_out(engine) == 0


def serve_with_wsgiref(app: Any, **environ: Any) -> bytes:
    """Run one request through the standard library's own server code."""
    out, errors = io.BytesIO(), io.StringIO()
    handler = SimpleHandler(
        io.BytesIO(), out, errors, make_environ(**environ), multithread=False, multiprocess=False
    )
    handler.run(app)
    assert errors.getvalue() == ""
    return out.getvalue()


def test_W1_length_of_a_list_of_one_gives_the_content_length(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """Servers take the Content-Length from a body of one element; they still can."""

    def one(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", list(HEADERS))
        touch(jenny)
        return [b"hello"]

    def stream(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", list(HEADERS))
        touch(jenny)
        yield b"hello"

    assert b"Content-Length: 5\r\n" in serve_with_wsgiref(WSGIRopeMiddleware(one))
    assert b"Content-Length" not in serve_with_wsgiref(WSGIRopeMiddleware(stream))
    result = WSGIRopeMiddleware(stream)(make_environ(), lambda *args: print)
    assert not hasattr(result, "__len__")
    result.close()
    assert checked_out(engine) == 0


def test_W1_arguments_are_handed_on_as_they_are() -> None:
    """The app gets the server's own environ; the server gets the app's own arguments."""
    seen: list[Any] = []
    headers = [("Content-Type", "text/plain"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]
    status = "299 Made up"

    def app(environ: Any, start_response: Any) -> Any:
        seen.append(environ)
        start_response(status, headers)
        return [b""]

    def start_response(*args: Any) -> Any:
        seen.append(args)
        return lambda data: None

    environ = make_environ()
    before = dict(environ)
    WSGIRopeMiddleware(app)(environ, start_response).close()
    assert seen[0] is environ
    assert seen[1][:2] == (status, headers)
    assert seen[1][2:] in ((), (None,))
    assert {key: value for key, value in environ.items() if key != KEY} == before


def test_W1_the_body_of_the_request_is_left_alone(jenny: SessionJenny[Session]) -> None:
    """Nothing is read from wsgi.input before the app reads it."""

    class Input(io.BytesIO):
        reads = 0

        def read(self, *args: Any) -> bytes:
            self.reads += 1
            return super().read(*args)

    data = Input(b"name=x")

    def app(environ: Any, start_response: Any) -> Any:
        assert data.reads == 0
        start_response("200 OK", HEADERS)
        return [environ["wsgi.input"].read(6)]

    seen = Server()(WSGIRopeMiddleware(app), make_environ(**{"wsgi.input": data}))
    assert seen.body == b"name=x"
    assert data.reads == 1


def test_W1_write_reaches_the_client_at_once(jenny: SessionJenny[Session]) -> None:
    """PEP 3333: write() must send what it is given before it returns."""
    sent: list[bytes] = []

    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", HEADERS)
        touch(jenny)
        write(b"first")
        assert sent == [b"first"]
        write(b"second")
        assert sent == [b"first", b"second"]
        return [b"third"]

    environ = make_environ()
    result = WSGIRopeMiddleware(app)(environ, lambda *args: sent.append)
    assert not environ[KEY].closed
    assert list(result) == [b"third"]
    result.close()
    assert environ[KEY].closed


def test_W1_chunks_come_one_by_one(jenny: SessionJenny[Session]) -> None:
    """PEP 3333: middleware must not wait for a further chunk before it gives one."""
    made: list[int] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", HEADERS)
        for number in range(3):
            made.append(number)
            yield b"%d" % number

    started: list[Any] = []
    result = WSGIRopeMiddleware(app)(make_environ(), lambda *args: started.append(args) or print)
    assert made == [] and started == []  # late: at the first chunk
    chunks = iter(result)
    for number in range(3):
        assert next(chunks) == b"%d" % number
        assert len(made) == number + 1
        assert len(started) == 1
    result.close()


# -- wsgi.file_wrapper ---------------------------------------------------------------------


class File(io.BytesIO):
    closes = 0

    def close(self) -> None:
        self.closes += 1
        super().close()


class ClassWrapper(FileWrapper):
    """As gunicorn, waitress and wsgiref have it: a class; its close is the file's."""


class SlotsWrapper:
    """A wrapper made in C: no attribute can be set on it."""

    __slots__ = ("__weakref__", "file")

    def __init__(self, file: Any, size: int = 8192) -> None:
        self.file = file

    def __iter__(self) -> Any:
        return iter(lambda: self.file.read(4), b"")

    def close(self) -> None:
        self.file.close()


def function_wrapper(file: Any, size: int = 8192) -> Any:
    """As mod_wsgi has it: a method that returns an object of a type nobody else sees."""
    return ClassWrapper(file, size)


def file_app(jenny: SessionJenny[Session], file: Any, made: list[Any]) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        touch(jenny)
        start_response("200 OK", HEADERS)
        made.append(environ["wsgi.file_wrapper"](file, 4))
        return made[0]

    return app


@pytest.mark.parametrize("wrapper", [ClassWrapper, function_wrapper], ids=["class", "function"])
@pytest.mark.parametrize("take", [None, 1, 0], ids=["all", "abandoned", "sendfile"])
def test_W1_what_the_file_wrapper_made_is_handed_on(
    wrapper: Any, take: int | None, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """The server gets its own object, can send the file itself, and close() ends the scope."""
    file, made = File(b"abcdefgh"), []
    environ = make_environ(**{"wsgi.file_wrapper": wrapper})
    result = WSGIRopeMiddleware(file_app(jenny, file, made))(environ, lambda *args: print)
    assert result is made[0]
    assert type(result) is ClassWrapper
    assert not environ[KEY].closed
    assert file.closes == 0
    if take == 0:
        assert result.filelike is file
        assert file.read() == b"abcdefgh"
    else:
        chunks = iter(result)
        assert next(chunks) == b"abcd"
        if take is None:
            assert list(chunks) == [b"efgh"]
    result.close()
    assert file.closes == 1
    assert environ[KEY].closed
    assert checked_out(engine) == 0
    result.close()
    assert environ["wsgi.file_wrapper"] is wrapper or callable(environ["wsgi.file_wrapper"])


def test_W1_a_file_wrapper_may_return_the_file_itself(
    tmp_path: Any, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """uwsgi's wrapper returns the very file and knows it again by its identity."""
    (tmp_path / "file").write_bytes(b"abcdefgh")
    remembered: list[Any] = []

    def wrapper(file: Any, size: int = 0) -> Any:
        remembered.append(file)
        return file

    made: list[Any] = []
    environ = make_environ(**{"wsgi.file_wrapper": wrapper})
    with (tmp_path / "file").open("rb") as file:
        result = WSGIRopeMiddleware(file_app(jenny, file, made))(environ, lambda *args: print)
        assert result is remembered[0] is file
        assert b"".join(result) == b"abcdefgh"
        result.close()
        assert file.closed
    assert environ[KEY].closed
    assert checked_out(engine) == 0


def test_W1_a_file_wrapper_that_takes_no_attribute(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """It is handed on all the same; the scope ends when the app returns."""
    file, made = File(b"abcdefgh"), []
    environ = make_environ(**{"wsgi.file_wrapper": SlotsWrapper})
    result = WSGIRopeMiddleware(file_app(jenny, file, made))(environ, lambda *args: print)
    assert result is made[0]
    assert environ[KEY].closed
    assert checked_out(engine) == 0
    assert list(result) == [b"abcd", b"efgh"]
    result.close()
    assert file.closes == 1


def test_W1_a_file_wrapper_dropped_without_close(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """A server that forgets to close what its wrapper made leaks nothing either."""
    file, made = File(b"abcdefgh"), []
    environ = make_environ(**{"wsgi.file_wrapper": ClassWrapper})
    result = WSGIRopeMiddleware(file_app(jenny, file, made))(environ, lambda *args: print)
    scope = environ.pop(KEY)
    assert next(iter(result)) == b"abcd"
    assert checked_out(engine) == 1
    made.clear()
    del result
    gc.collect()
    assert scope.closed
    assert checked_out(engine) == 0


def test_W1_a_file_wrapper_whose_close_fails(jenny: SessionJenny[Session], engine: Engine) -> None:
    """Its error reaches the server, and the scope has ended."""

    class Failing:
        def __init__(self, file: Any, size: int) -> None:
            self.file = file

        def __iter__(self) -> Any:
            return iter(self.file)

        def close(self) -> None:
            raise OSError("close")

    environ = make_environ(**{"wsgi.file_wrapper": Failing})
    app = file_app(jenny, io.BytesIO(b"abcd"), [])
    result = WSGIRopeMiddleware(app)(environ, lambda *args: print)
    with pytest.raises(OSError, match=r"^close$"):
        result.close()
    assert environ[KEY].closed
    assert checked_out(engine) == 0


def test_W1_a_file_wrapper_of_the_apps_own_is_an_ordinary_body(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """Where the server offers no wrapper, or the app uses another, nothing is special."""
    file = File(b"abcdefgh")

    def app(environ: Any, start_response: Any) -> Any:
        assert "wsgi.file_wrapper" not in environ or environ["wsgi.file_wrapper"] is SlotsWrapper
        touch(jenny)
        start_response("200 OK", HEADERS)
        return FileWrapper(file, 4)

    environ = make_environ(**{"wsgi.file_wrapper": SlotsWrapper})
    seen = Server()(WSGIRopeMiddleware(app), environ)
    assert seen.body == b"abcdefgh"
    assert file.closes == 1
    assert environ[KEY].closed
    assert checked_out(engine) == 0


@pytest.mark.parametrize("wrapper", [ClassWrapper, function_wrapper], ids=["class", "function"])
def test_W2_a_body_that_can_be_read_is_no_file_of_the_servers(
    wrapper: Any, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """An app's own body with a read() makes its chunks within the scope, as any other does."""
    sessions: list[Session] = []

    class Export:
        def read(self, size: int = -1) -> bytes:
            raise AssertionError("the server iterates")

        def __iter__(self) -> Iterator[bytes]:
            for number in range(3):
                sessions.append(touch(jenny))
                yield b"%d" % number

    def app(environ: Any, start_response: Any) -> Any:
        sessions.append(touch(jenny))
        start_response("200 OK", HEADERS)
        return Export()

    environ = make_environ(**{"wsgi.file_wrapper": wrapper})
    seen = Server()(WSGIRopeMiddleware(app), environ)
    assert (seen.error, seen.body) == (None, b"012")
    assert len(sessions) == 4
    assert all(session is sessions[0] for session in sessions)
    assert environ[KEY].closed
    assert checked_out(engine) == 0


def test_W1_wsgirefs_server_sends_the_file_itself(
    tmp_path: Any, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """A server that looks for its wrapper's type finds it and takes its short way."""
    (tmp_path / "file").write_bytes(b"abcdefgh")
    sent: list[bytes] = []

    class Handler(SimpleHandler):
        def sendfile(self) -> bool:
            sent.append(self.result.filelike.read())
            return True

    def app(environ: Any, start_response: Any) -> Any:
        touch(jenny)
        start_response("200 OK", list(HEADERS))
        return environ["wsgi.file_wrapper"]((tmp_path / "file").open("rb"))

    environ = make_environ()
    handler = Handler(io.BytesIO(), io.BytesIO(), io.StringIO(), environ)
    handler.run(WSGIRopeMiddleware(app))
    assert sent == [b"abcdefgh"]
    assert checked_out(engine) == 0


# --------------------------------------------------------------------------------------
# W2: where the scope shows
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_W2_the_scope_shows_in_the_app_its_chunks_and_its_close_only(
    kind: str, jenny: SessionJenny[Session]
) -> None:
    """The server's thread sees nothing before, between and after."""
    probe = Probe(jenny, kind)
    assert no_scope_here()
    result = WSGIRopeMiddleware(probe)(make_environ(), lambda *args: print)
    assert no_scope_here()
    chunks = iter(result)
    for number in (1, 2):
        assert next(chunks) == b"%d" % number
        assert no_scope_here()
    result.close()
    assert no_scope_here()
    assert len(probe.scopes) == 5  # twice in the app, twice in the body, once in close()
    assert probe.scope.closed


@pytest.mark.parametrize("where", ["before start", "chunk 1", "close"])
def test_W2_nothing_shows_after_an_error(where: str, jenny: SessionJenny[Session]) -> None:
    """An error anywhere undoes the ContextVar on its way out."""
    probe = Probe(jenny, fail=where)
    Server(take=1)(WSGIRopeMiddleware(probe))
    assert no_scope_here()


@pytest.mark.parametrize("kind", KINDS)
def test_W2_two_bodies_advanced_in_turn_on_one_thread(
    kind: str, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """Each sees its own session, whichever was advanced or closed last."""
    one, two = Probe(jenny, kind), Probe(jenny, kind)
    first = WSGIRopeMiddleware(one)(make_environ("/1"), lambda *args: print)
    second = WSGIRopeMiddleware(two)(make_environ("/2"), lambda *args: print)
    a, b = iter(first), iter(second)
    assert [next(a), next(b), next(b), next(a), next(a)] == [b"1", b"1", b"2", b"2", b"3"]
    assert one.scope is not two.scope
    assert one.sessions[0] is not two.sessions[0]
    assert checked_out(engine) == 2
    first.close()
    assert one.scope.closed and not two.scope.closed
    assert checked_out(engine) == 1
    assert next(b) == b"3"
    second.close()
    assert two.scope.closed
    assert one.closes == two.closes == 1
    assert checked_out(engine) == 0


def test_W2_each_chunk_may_come_from_another_thread(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """A server may call the app, take each chunk and close the body in different threads."""
    probe = Probe(jenny)
    results: list[Any] = []

    def in_thread(step: Callable[[], Any]) -> Any:
        def run() -> None:
            try:
                results.append(step())
            except BaseException as error:
                results.append(error)
            assert no_scope_here()

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(15)
        return results.pop()

    middleware = WSGIRopeMiddleware(probe)
    result = in_thread(lambda: middleware(make_environ(), lambda *args: print))
    chunks = in_thread(lambda: iter(result))
    assert [in_thread(lambda: next(chunks)) for _ in range(3)] == [b"1", b"2", b"3"]
    assert isinstance(in_thread(lambda: next(chunks)), StopIteration)
    assert in_thread(result.close) is None
    assert probe.scope.closed
    assert probe.closes == 1
    assert checked_out(engine) == 0


def test_W2_each_chunk_may_come_from_another_context(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """As a bridge does that copies the context for each step."""
    probe = Probe(jenny)
    run = contextvars.copy_context().run
    result = run(WSGIRopeMiddleware(probe), make_environ(), lambda *args: print)
    chunks = contextvars.copy_context().run(iter, result)
    for number in (b"1", b"2", b"3"):
        assert contextvars.copy_context().run(next, chunks) == number
    contextvars.copy_context().run(result.close)
    assert probe.scope.closed
    assert probe.closes == 1
    assert checked_out(engine) == 0


def test_W2_the_server_has_a_scope_of_its_own(jenny: SessionJenny[Session]) -> None:
    """What was current before is current again after each step, and is not taken for ours."""
    probe = Probe(jenny)
    with open_scope("the server's") as outer:
        mine = touch(jenny)
        result = WSGIRopeMiddleware(probe)(make_environ(), lambda *args: print)
        assert current_scope() is outer
        chunks = iter(result)
        next(chunks)
        assert current_scope() is outer
        result.close()
        assert current_scope() is outer
        assert probe.scope is not outer
        assert probe.sessions[0] is not mine
        assert not outer.closed
        assert touch(jenny) is mine


def test_W2_the_apps_own_context_variables_are_left_alone(jenny: SessionJenny[Session]) -> None:
    """What the app sets in its call is there in its chunks, as without the middleware."""
    mark: contextvars.ContextVar[str] = contextvars.ContextVar("mark", default="nothing")

    def app(environ: Any, start_response: Any) -> Any:
        mark.set("called")
        start_response("200 OK", HEADERS)
        return chunks()

    def chunks() -> Iterator[bytes]:
        yield mark.get().encode()
        mark.set("streaming")
        yield mark.get().encode()

    def serve(app: Any) -> tuple[bytes, str]:
        return Server()(app).body, mark.get()

    bare = contextvars.copy_context().run(serve, app)
    served = contextvars.copy_context().run(serve, WSGIRopeMiddleware(app))
    assert served == bare == (b"calledstreaming", "streaming")


# --------------------------------------------------------------------------------------
# W3: never closed
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("take", [1, None])
@pytest.mark.parametrize("options", [{}, {"commit_on_success": True}], ids=["plain", "commit"])
def test_W3_a_dropped_body_is_closed_once(
    kind: str,
    take: int | None,
    options: dict[str, Any],
    jenny: SessionJenny[Session],
    engine: Engine,
) -> None:
    """A server that forgets close(): on collection it is called once, inside the scope."""
    probe = Probe(jenny, kind)
    seen = Server(take=take, close=0)(WSGIRopeMiddleware(probe, **options))
    # Nobody may have closed it yet but the generator's own end.
    assert probe.closes == (kind == "generator" and take is None)
    del seen
    gc.collect()
    assert probe.closes == 1
    assert probe.scope.closed
    assert no_scope_here()
    assert checked_out(engine) == 0


def test_W3_a_dropped_list_gives_back_the_connection(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """A body without a close() of its own."""

    def app(environ: Any, start_response: Any) -> Any:
        touch(jenny)
        start_response("200 OK", HEADERS)
        return [b"a", b"b"]

    environ = make_environ()
    result = WSGIRopeMiddleware(app)(environ, lambda *args: print)
    assert checked_out(engine) == 1
    del result
    gc.collect()
    assert environ[KEY].closed
    assert checked_out(engine) == 0


def test_W3_a_body_in_a_cycle_is_closed_when_collected(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """The collector finds it, in whatever state it is."""
    probe = Probe(jenny)
    result = WSGIRopeMiddleware(probe)(make_environ(), lambda *args: print)
    chunks = iter(result)
    next(chunks)
    cycle: list[Any] = [result, chunks]
    cycle.append(cycle)
    del result, chunks, cycle
    gc.collect()
    assert probe.closes == 1
    assert probe.scope.closed
    assert checked_out(engine) == 0


def test_W3_an_exhausted_body_kept_without_close_ends_when_dropped(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """The last chunk is no close(): the scope waits for the one or for the collector."""
    probe = Probe(jenny)
    seen = Server(close=0)(WSGIRopeMiddleware(probe))
    assert seen.body == b"123"
    assert probe.closes == 0
    assert not probe.scope.closed
    del seen
    gc.collect()
    assert probe.closes == 1
    assert probe.scope.closed


def test_W3_nothing_is_committed_on_collection(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """With commit_on_success late work is committed by close(), and never by the collector."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", HEADERS)
        yield b"a"
        jenny.session.add(Row(name="late"))
        jenny.session.flush()
        yield b"b"

    middleware = WSGIRopeMiddleware(app, commit_on_success=True)
    seen = Server(close=0)(middleware)
    assert seen.body == b"ab"
    del seen
    gc.collect()
    assert checked_out(engine) == 0
    assert rows(engine) == 0
    assert Server()(middleware).body == b"ab"
    assert rows(engine) == 1


def test_W3_collection_in_another_thread(jenny: SessionJenny[Session], engine: Engine) -> None:
    """The last reference may go anywhere; that thread's own scope is untouched."""
    probe = Probe(jenny)
    held = [WSGIRopeMiddleware(probe)(make_environ(), lambda *args: print)]
    next(iter(held[0]))
    found: list[bool] = []

    def drop() -> None:
        with open_scope("another") as other:
            session = touch(jenny)
            held.clear()
            gc.collect()
            found.append(current_scope() is other and not other.closed)
            found.append(touch(jenny) is session)

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join(15)
    assert found == [True, True]
    assert probe.closes == 1
    assert probe.scope.closed
    assert checked_out(engine) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_W3_a_close_that_fails_on_collection(jenny: SessionJenny[Session], engine: Engine) -> None:
    """Nobody is there to hear of it; the scope has ended all the same."""
    probe = Probe(jenny, fail="close")
    seen = Server(take=1, close=0)(WSGIRopeMiddleware(probe))
    del seen
    gc.collect()
    assert probe.closes == 1
    assert probe.scopes[0].closed
    assert checked_out(engine) == 0


# --------------------------------------------------------------------------------------
# W4: threads and greenlets
# --------------------------------------------------------------------------------------


def test_W4_each_thread_has_a_scope_of_its_own(tmp_path: Any) -> None:
    """Eight requests at once, each with its own session from the first call to close()."""
    engine = make_engine(tmp_path / "threads.db", size=8)
    jenny = SessionJenny(sessionmaker(engine))
    barrier = threading.Barrier(8)

    class Meeting(Probe):
        def use(self, where: str) -> None:
            super().use(where)
            barrier.wait(15)  # all eight are inside, at the same step

    probes = [Meeting(jenny, kind) for kind in ("iterable", "generator") for _ in range(4)]
    errors: list[BaseException | None] = []

    def run(probe: Probe) -> None:
        seen = Server(take=2)(WSGIRopeMiddleware(probe))
        errors.append(seen.raised)
        assert seen.close_error is None

    threads = [threading.Thread(target=run, args=(probe,)) for probe in probes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == [None] * 8
    assert len({id(probe.scope) for probe in probes}) == 8
    assert len({id(probe.sessions[0]) for probe in probes}) == 8
    assert all(probe.scope.closed for probe in probes)
    assert checked_out(engine) == 0
    engine.dispose()


def test_W4_greenlets_switched_in_the_middle_of_everything(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """Two greenlets of one thread that switch inside the app, inside a chunk, inside close()."""

    class Switching(Probe):
        def use(self, where: str) -> None:
            super().use(where)
            parent = greenlet.getcurrent().parent
            assert parent is not None
            parent.switch()
            super().use(where)  # another request ran meanwhile

    probes = [Switching(jenny, "iterable"), Switching(jenny, "iterable")]
    done: list[Seen] = []
    workers = [
        greenlet.greenlet(lambda probe=probe: done.append(Server()(WSGIRopeMiddleware(probe))))
        for probe in probes
    ]
    turns = 0
    while not all(worker.dead for worker in workers):
        for worker in workers:
            if not worker.dead:
                worker.switch()
                turns += 1
                assert no_scope_here()
    assert turns >= 12
    assert [seen.error for seen in done] == [None, None]
    assert [seen.body for seen in done] == [b"123", b"123"]
    assert probes[0].scope is not probes[1].scope
    assert probes[0].sessions[0] is not probes[1].sessions[0]
    assert [probe.closes for probe in probes] == [1, 1]
    assert all(probe.scope.closed for probe in probes)
    assert checked_out(engine) == 0


def test_W4_a_killed_greenlet_leaves_nothing(jenny: SessionJenny[Session], engine: Engine) -> None:
    """GreenletExit in mid-request ends the scope as any other error does."""
    probe = Probe(jenny)

    def app(environ: Any, start_response: Any) -> Any:
        probe.use("app")
        parent = greenlet.getcurrent().parent
        assert parent is not None
        parent.switch()
        raise AssertionError("never reached")

    worker = greenlet.greenlet(lambda: WSGIRopeMiddleware(app)(make_environ(), lambda *args: print))
    worker.switch()
    assert checked_out(engine) == 1
    worker.throw()
    assert probe.scope.closed
    assert checked_out(engine) == 0


# --------------------------------------------------------------------------------------
# S: the scope under WSGI
# --------------------------------------------------------------------------------------


def test_S1_every_request_has_a_scope_and_sessions_of_its_own(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """Ids are reused from request to request; nothing of one request shows in the next."""
    keep: list[str] = []

    def app(environ: Any, start_response: Any) -> Any:
        assert "mark" not in jenny.session.info
        assert current_scope().info == {}
        jenny.session.info["mark"] = current_scope().info["mark"] = environ["PATH_INFO"]
        touch(jenny)
        keep.append(jenny.session.info["mark"])
        start_response("200 OK", HEADERS)
        return [b""]

    middleware = WSGIRopeMiddleware(app)
    for number in range(200):
        assert Server()(middleware, make_environ(f"/{number}")).error is None
    assert keep == [f"/{number}" for number in range(200)]
    assert checked_out(engine) == 0


def test_S1_the_scope_has_the_name_of_its_request() -> None:
    """Method and path, with the part where the app is mounted, without the query string."""
    names: list[str] = []

    def app(environ: Any, start_response: Any) -> Any:
        names.append(current_scope().name)
        start_response("200 OK", HEADERS)
        return [b""]

    middleware = WSGIRopeMiddleware(app)
    Server()(middleware, make_environ("/a/b", QUERY_STRING="secret=1"))
    Server()(middleware, make_environ("/b", SCRIPT_NAME="/a", REQUEST_METHOD="POST"))
    assert names == ["GET /a/b", "POST /a/b"]


def test_S2_a_session_made_in_a_worker_thread_is_closed_with_the_request(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """The session is kept in the scope, not in the thread."""
    sessions: list[Session] = []

    def app(environ: Any, start_response: Any) -> Any:
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(lambda: sessions.append(touch(jenny)),))
        thread.start()
        thread.join(15)
        assert jenny.session is sessions[0]
        assert checked_out(engine) == 1
        start_response("200 OK", HEADERS)
        return [b""]

    assert Server()(WSGIRopeMiddleware(app)).error is None
    assert checked_out(engine) == 0


def _failing_sessions(engine: Engine, error: type[BaseException]) -> Any:
    class Failing(Session):
        def close(self) -> None:
            raise error("the session's close failed")

    return sessionmaker(engine, class_=Failing)


@pytest.mark.parametrize("fail", ["", "before start", "chunk 2", "close"])
def test_S3_a_failing_close_of_a_session_is_logged_only(
    fail: str, tmp_path: Any, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """It replaces neither answer nor error, strands no other session, and frees the connection."""
    first = make_engine(tmp_path / "first.db")
    last = make_engine(tmp_path / "last.db")
    bad = SessionJenny(_failing_sessions(engine, RuntimeError))
    invalidated: list[Any] = []
    event.listen(engine, "invalidate", lambda *args: invalidated.append(args))
    before, after = SessionJenny(sessionmaker(first)), SessionJenny(sessionmaker(last))

    class All(Probe):
        def use(self, where: str) -> None:
            touch(before)
            touch(self.jenny)
            touch(after)
            super().use(where)

    probe = All(bad, fail=fail)
    with caplog.at_level(logging.ERROR, logger="rope_middleware"):
        seen = Server()(WSGIRopeMiddleware(probe))
    if fail in ("before start", "chunk 2"):
        assert seen.error == (ValueError, f"failed: {fail}")
    else:
        assert seen.error is None
        assert seen.body == b"123"
        assert seen.close_error == ((ValueError, "failed: close") if fail else None)
    assert probe.scopes[0].closed
    assert [checked_out(each) for each in (first, engine, last)] == [0, 0, 0]
    assert len(invalidated) == 1  # closed, and not used again in an unknown state
    assert any(record.name == "rope_middleware" for record in caplog.records)
    first.dispose()
    last.dispose()


def test_S3_a_lost_connection_is_no_leak(
    jenny: SessionJenny[Session], engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver that fails at rollback: the answer stands, the connection is gone from the pool."""
    broken: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        touch(jenny)
        jenny.session.add(Row(name="x"))
        jenny.session.flush()
        driver = jenny.session.connection().connection.driver_connection
        broken.append(driver)
        driver.close()  # behind SQLAlchemy's back
        start_response("200 OK", HEADERS)
        return [b"fine"]

    with caplog.at_level(logging.ERROR):
        seen = Server()(WSGIRopeMiddleware(app))
    assert seen.body == b"fine"
    assert seen.error is None and seen.close_error is None
    assert checked_out(engine) == 0
    assert rows(engine) == 0


def test_S3_after_any_path_the_next_request_is_served(tmp_path: Any) -> None:
    """A pool of one connection survives every way a request can end, one after the other."""
    engine = make_engine(tmp_path / "one.db", size=1)
    jenny = SessionJenny(sessionmaker(engine))
    fails = ["", "before start", "after start", "chunk 1", "chunk 3", "close"]
    for kind in KINDS:
        for fail in fails:
            for server in (Server(), Server(take=1), Server(close=2), Server(take=2, close=0)):
                probe = Probe(jenny, kind, fail)
                if fail == "close" and not server.close:
                    continue  # an unraisable error, see W3
                seen = server(WSGIRopeMiddleware(probe))
                assert all(isinstance(session, Session) for session in probe.sessions)
                assert probe.sessions, (kind, fail, seen.error)
                del seen
                gc.collect()
                assert probe.scope.closed
                assert checked_out(engine) == 0
    engine.dispose()


def test_S4_a_session_kept_beyond_its_request_raises(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """Each use says which scope it was and what to do, and checks nothing out."""
    kept: list[Session] = []

    def app(environ: Any, start_response: Any) -> Any:
        kept.append(touch(jenny))
        start_response("200 OK", HEADERS)
        return [b""]

    Server()(WSGIRopeMiddleware(app), make_environ("/shop", QUERY_STRING="q=1"))
    session = kept[0]
    uses: list[Callable[[], Any]] = [
        lambda: session.execute(text("select 1")),
        lambda: session.scalars(select(Row)).all(),
        lambda: session.get(Row, 1),
        session.begin,
        session.connection,
    ]
    for use in uses * 2:
        with pytest.raises(ScopeClosedError) as caught:
            use()
        assert "GET /shop" in str(caught.value)
        assert "q=1" not in str(caught.value)
        assert "with open_scope():" in str(caught.value)
        assert checked_out(engine) == 0
    session.rollback()
    session.close()
    assert not session.in_transaction()
    with pytest.raises(ScopeClosedError):
        session.execute(text("select 1"))
    assert checked_out(engine) == 0


def test_S4_holds_for_every_session_factory_of_a_long_process(engine: Engine) -> None:
    """sessionmaker makes a class each time; the ids of those that are gone are used again."""

    def keep_one() -> Session:
        jenny = SessionJenny(sessionmaker(engine))
        kept: list[Session] = []

        def app(environ: Any, start_response: Any) -> Any:
            kept.append(touch(jenny))
            start_response("200 OK", HEADERS)
            return [b""]

        Server()(WSGIRopeMiddleware(app))
        return kept[0]

    for _ in range(30):
        with pytest.raises(ScopeClosedError):
            keep_one().execute(text("select 1"))
        assert checked_out(engine) == 0
        gc.collect()


def test_S4_a_thread_that_outlives_its_request(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """jenny.session and current_scope() raise there; a scope of the thread's own works."""
    ended = threading.Event()
    found: list[Any] = []

    def work() -> None:
        assert ended.wait(15)
        for attempt in (
            lambda: jenny.session,
            lambda: jenny.execute(text("select 1")),
            current_scope,
        ):
            try:
                attempt()
            except ScopeClosedError as error:
                found.append(str(error))
        with open_scope("cure"):
            found.append(jenny.session.scalar(text("select 7")))

    threads: list[threading.Thread] = []

    def app(environ: Any, start_response: Any) -> Any:
        touch(jenny)
        context = contextvars.copy_context()
        threads.append(threading.Thread(target=context.run, args=(work,)))
        threads[0].start()
        start_response("200 OK", HEADERS)
        return [b""]

    Server()(WSGIRopeMiddleware(app), make_environ("/outlived"))
    ended.set()
    threads[0].join(15)
    assert len(found) == 4
    assert all("GET /outlived" in each and "open_scope" in each for each in found[:3])
    assert found[3] == 7
    assert checked_out(engine) == 0


def test_S4_a_body_used_after_its_close(jenny: SessionJenny[Session], engine: Engine) -> None:
    """A server that goes on after close() gets an error or nothing, and opens no scope again."""
    probe = Probe(jenny, "iterable")
    result = WSGIRopeMiddleware(probe)(make_environ(), lambda *args: print)
    chunks = iter(result)
    next(chunks)
    result.close()
    with pytest.raises((ScopeClosedError, StopIteration)):
        next(chunks)
    assert checked_out(engine) == 0
    assert no_scope_here()


def test_S5_on_close_runs_once_newest_first_after_the_sessions(
    jenny: SessionJenny[Session], engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A failing one is logged, and the others still run."""
    ran: list[Any] = []

    def fail() -> None:
        ran.append("fail")
        raise ValueError("in on_close")

    def app(environ: Any, start_response: Any) -> Any:
        scope = environ[KEY]
        scope.on_close(lambda: ran.append(("first", checked_out(engine))))
        scope.on_close(fail)
        touch(jenny)
        start_response("200 OK", HEADERS)
        return body(scope)

    def body(scope: Scope) -> Iterator[bytes]:
        yield b"x"
        scope.on_close(lambda: ran.append(("last", checked_out(engine))))

    with caplog.at_level(logging.ERROR, logger="rope_middleware"):
        result = WSGIRopeMiddleware(app)(make_environ(), lambda *args: print)
        assert list(result) == [b"x"]
        assert ran == []
        result.close()
        result.close()
    assert ran == [("last", 0), "fail", ("first", 0)]
    assert any("in on_close" in (record.exc_text or "") for record in caplog.records)


def test_S5_async_functions_are_refused_in_a_wsgi_scope() -> None:
    """Nothing could await them there, and they hear it when they are registered."""
    texts: list[str] = []

    async def late() -> None: ...

    def app(environ: Any, start_response: Any) -> Any:
        for method in (environ[KEY].on_close, environ[KEY].on_commit):
            for fn in (late, functools.partial(late)):
                with pytest.raises(RopeError) as caught:
                    method(fn)
                texts.append(str(caught.value))
        start_response("200 OK", HEADERS)
        return [b""]

    seen = Server()(WSGIRopeMiddleware(app, commit_on_success=True))
    assert seen.error is None
    assert len(texts) == 4
    assert all("async" in each for each in texts)


def test_S6_an_inner_scope_in_a_view(jenny: SessionJenny[Session], engine: Engine) -> None:
    """It has sessions of its own; the outer one is untouched and current again afterwards."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        outer = touch(jenny)
        start_response("200 OK", HEADERS)
        with open_scope("inner") as scope:
            inner = touch(jenny)
            assert inner is not outer
            assert environ[KEY] is not scope
            assert checked_out(engine) == 2
        assert current_scope() is environ[KEY]
        assert jenny.session is outer
        assert outer.in_transaction()
        assert checked_out(engine) == 1
        yield b"ok"

    seen = Server()(WSGIRopeMiddleware(app))
    assert (seen.error, seen.body) == (None, b"ok")
    assert checked_out(engine) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("server", [Server(), Server(take=1), Server(close=2), Server(close=0)])
def test_S6_two_middlewares_around_one_request_share_one_scope(
    kind: str, server: Server, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """The outer one opens and ends it; the inner one only hands on."""
    probe = Probe(jenny, kind)
    scopes: list[Scope] = []

    def between(environ: Any, start_response: Any) -> Any:
        scopes.append(environ[KEY])
        result = inner(environ, start_response)
        assert not environ[KEY].closed
        return result

    inner = WSGIRopeMiddleware(probe)
    seen = server(WSGIRopeMiddleware(between))
    assert seen.body == (b"1" if server.take else b"123")
    del seen
    gc.collect()
    assert scopes == [probe.scope]
    assert probe.closes == 1
    assert probe.scope.closed
    assert no_scope_here()
    assert checked_out(engine) == 0


def test_S6_an_inner_body_closed_early_leaves_the_scope_to_the_outer_middleware(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """A middleware between the two may read and close the inner body before it answers."""

    def between(environ: Any, start_response: Any) -> Any:
        result = inner(environ, start_response)
        body = b"".join(result)
        result.close()
        assert not environ[KEY].closed
        assert touch(jenny) is probe.sessions[0]
        return [body.upper()]

    probe = Probe(jenny)
    inner = WSGIRopeMiddleware(probe)
    environ = make_environ()
    seen = Server()(WSGIRopeMiddleware(between), environ)
    assert (seen.error, seen.body) == (None, b"123")
    assert environ[KEY].closed
    assert probe.closes == 1
    assert checked_out(engine) == 0


@pytest.mark.parametrize("outer_commits", [True, False])
def test_S6_the_outer_middlewares_options_rule(
    outer_commits: bool, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """The inner one's are without effect."""

    def app(environ: Any, start_response: Any) -> Any:
        jenny.session.add(Row(name="x"))
        start_response("200 OK", HEADERS)
        return [b""]

    inner = WSGIRopeMiddleware(app, commit_on_success=not outer_commits)
    Server()(WSGIRopeMiddleware(inner, commit_on_success=outer_commits))
    assert rows(engine) == outer_commits


def test_S6_a_copy_of_the_environ_shares_the_scope_too(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """Dispatchers hand on a copy with another SCRIPT_NAME."""
    probe = Probe(jenny)
    inner = WSGIRopeMiddleware(probe)

    def dispatcher(environ: Any, start_response: Any) -> Any:
        copy = {**environ, "SCRIPT_NAME": "/mounted", "PATH_INFO": "/"}
        return inner(copy, start_response)

    environ = make_environ("/mounted/")
    seen = Server()(WSGIRopeMiddleware(dispatcher), environ)
    assert (seen.error, seen.body) == (None, b"123")
    assert probe.scope is environ[KEY]
    assert probe.scope.closed


def test_S6_an_environ_used_again_gets_a_new_scope(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """What an earlier request left in a reused environ is closed and no scope to share."""
    probes = [Probe(jenny), Probe(jenny)]
    environ = make_environ()
    for probe in probes:
        seen = Server()(WSGIRopeMiddleware(probe), environ)
        assert (seen.error, seen.body) == (None, b"123")
    assert probes[0].scope is not probes[1].scope
    assert checked_out(engine) == 0


def test_S6_a_client_in_the_same_process_makes_another_request(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """A view that calls the app through a test client: two requests, two scopes."""
    sessions: list[Session] = []

    def app(environ: Any, start_response: Any) -> Any:
        session = touch(jenny)
        sessions.append(session)
        start_response("200 OK", HEADERS)
        if environ["PATH_INFO"] == "/inner":
            return [b"inner"]
        body = Server()(middleware, make_environ("/inner")).body
        assert jenny.session is session
        assert session.in_transaction()
        assert current_scope() is environ[KEY]
        return [body]

    middleware = WSGIRopeMiddleware(app)
    seen = Server()(middleware)
    assert (seen.error, seen.body) == (None, b"inner")
    assert sessions[0] is not sessions[1]
    assert checked_out(engine) == 0


def test_S7_several_databases_and_apps_side_by_side(tmp_path: Any, engine: Engine) -> None:
    """Each jenny has its own session in one scope, and all of them are closed with it."""
    other = make_engine(tmp_path / "other.db")
    one, two, three = (SessionJenny(sessionmaker(each)) for each in (engine, other, engine))
    calls: list[int] = []

    def app(environ: Any, start_response: Any) -> Any:
        sessions = [touch(each) for each in (one, two, three)]
        assert len({id(session) for session in sessions}) == 3
        assert [session.get_bind() for session in sessions] == [engine, other, engine]
        calls.append(len(sessions))
        start_response("200 OK", HEADERS)
        return [b""]

    for middleware in (WSGIRopeMiddleware(app), RopeMiddleware(app)):
        assert Server()(middleware).error is None
    assert calls == [3, 3]
    assert checked_out(engine) == checked_out(other) == 0
    other.dispose()


# --------------------------------------------------------------------------------------
# J and C1 under WSGI
# --------------------------------------------------------------------------------------


def test_J2_a_request_that_does_not_touch_the_database_makes_no_session(engine: Engine) -> None:
    """A session is made on first use, once per request."""
    made: list[Session] = []

    def factory() -> Session:
        made.append(Session(engine))
        return made[-1]

    jenny = SessionJenny(factory)

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", HEADERS)
        if environ["PATH_INFO"] == "/use":
            touch(jenny)
            touch(jenny)
        yield b""

    Server()(WSGIRopeMiddleware(app))
    assert made == []
    Server()(WSGIRopeMiddleware(app), make_environ("/use"))
    assert len(made) == 1


def test_J3_remove_closes_the_session_and_the_next_use_makes_another(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """All in the same scope; nothing is left of either."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", HEADERS)
        first = touch(jenny)
        jenny.remove()
        assert checked_out(engine) == 0
        yield b"a"
        second = touch(jenny)
        assert second is not first
        jenny.session.close()  # the user's own close() breaks nothing later
        assert touch(jenny) is second
        yield b"b"

    seen = Server()(WSGIRopeMiddleware(app))
    assert (seen.error, seen.body) == (None, b"ab")
    assert checked_out(engine) == 0


def test_J4_a_strict_jenny_works_in_a_request_and_not_between_chunks(engine: Engine) -> None:
    """The server's thread is outside of the scope between chunks, as W2 says."""
    jenny = SessionJenny(sessionmaker(engine), strict=True)
    probe = Probe(jenny)
    result = WSGIRopeMiddleware(probe)(make_environ(), lambda *args: print)
    with pytest.raises(NoScopeError, match="RopeMiddleware"):
        _ = jenny.session
    assert b"".join(result) == b"123"
    with pytest.raises(NoScopeError, match="open_scope"):
        _ = jenny.session
    result.close()
    assert probe.scope.closed


def test_J6_threads_of_one_request_race_for_the_first_use(engine: Engine) -> None:
    """They get the same session, whoever comes first."""
    made: list[Session] = []

    def factory() -> Session:
        time.sleep(0.002)  # widens the race, decides nothing
        made.append(Session(engine))
        return made[-1]

    jenny = SessionJenny(factory)

    def app(environ: Any, start_response: Any) -> Any:
        got: list[Session] = []
        barrier = threading.Barrier(6)

        def first_use() -> None:
            barrier.wait(15)
            got.append(jenny.session)

        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(first_use,))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(15)
        assert len(got) == 6
        assert len({id(session) for session in got}) == 1
        touch(jenny)
        start_response("200 OK", HEADERS)
        return [b"same"]

    for _ in range(10):
        seen = Server()(WSGIRopeMiddleware(app))
        assert (seen.error, seen.body) == (None, b"same")
    assert checked_out(engine) == 0


def test_J6_a_factory_that_raises_leaves_the_scope_as_it_was(engine: Engine) -> None:
    """The next use in the same request tries again."""
    attempts: list[None] = []

    def factory() -> Session:
        attempts.append(None)
        if len(attempts) == 1:
            raise ConnectionError("not now")
        return Session(engine)

    jenny = SessionJenny(factory)

    def app(environ: Any, start_response: Any) -> Any:
        with pytest.raises(ConnectionError, match="not now"):
            touch(jenny)
        touch(jenny)
        start_response("200 OK", HEADERS)
        return [b"fine"]

    assert Server()(WSGIRopeMiddleware(app)).body == b"fine"
    assert checked_out(engine) == 0


def test_C1_the_application_commits_and_the_rest_is_rolled_back(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """What the app committed is there, what it left is not."""

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", HEADERS)
        jenny.session.add(Row(name="kept"))
        jenny.session.commit()
        yield b"a"
        jenny.session.add(Row(name="left"))
        jenny.session.flush()
        yield b"b"

    assert Server()(WSGIRopeMiddleware(app)).body == b"ab"
    with Session(engine) as session:
        assert session.scalars(select(Row.name)).all() == ["kept"]


# --------------------------------------------------------------------------------------
# Frameworks, and WSGI inside ASGI
# --------------------------------------------------------------------------------------


def flask_app(jenny: SessionJenny[Session]) -> Any:
    flask = pytest.importorskip("flask")
    app = flask.Flask("counter")

    @app.get("/count")
    def count() -> str:
        jenny.session.add(Row())
        jenny.session.commit()
        return str(jenny.session.scalar(select(func.count()).select_from(Row)))

    @app.get("/stream")
    def stream() -> Any:
        session = touch(jenny)

        def chunks() -> Iterator[str]:
            for _ in range(3):
                assert touch(jenny) is session
                yield "x"

        return app.response_class(chunks())

    @app.get("/fail")
    def fail() -> Any:
        touch(jenny)
        raise ValueError("the view's own")

    @app.get("/scope")
    def scope() -> str:
        touch(jenny)
        return current_scope().name

    return app


def test_W2_flask_streams_with_the_requests_session(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """Flask's own teardown comes too early for a stream; the scope lasts as long as the body."""
    app = flask_app(jenny)
    app.wsgi_app = RopeMiddleware(app.wsgi_app)
    client = app.test_client()
    # buffered: the client reads the body and closes it; else it waits for response.close().
    for path, status, text_ in [
        ("/count", 200, "1"),
        ("/count", 200, "2"),
        ("/stream", 200, "xxx"),
        ("/fail", 500, None),
        ("/scope", 200, "GET /scope"),
    ]:
        response = client.get(path, buffered=True)
        assert response.status_code == status
        assert text_ is None or response.text == text_
        assert checked_out(engine) == 0
    response = client.get("/stream")
    assert next(iter(response.iter_encoded())) == b"x"
    assert checked_out(engine) == 1
    response.close()
    assert checked_out(engine) == 0


class ASGIClient:
    """One request to an ASGI app, without a server.

    Args:
        reads: how many chunks of the body the client reads before it stands still; None for all.
    """

    def __init__(self, reads: int | None = None) -> None:
        self.reads = reads
        self.messages: list[Any] = []

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    async def __call__(self, app: Any, path: str) -> ASGIClient:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"testserver")],
            "server": ("testserver", 80),
            "client": ("127.0.0.1", 5),
        }
        first = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Any:
            if first:
                return first.pop()
            return await asyncio.Future()

        async def send(message: Any) -> None:
            if self.reads is not None and len(self.messages) > self.reads:
                await asyncio.Future()  # as a server waits for a socket that nobody reads
            self.messages.append(message)

        await app(scope, receive, send)
        return self


def bridged(name: str, app: Any) -> Any:
    """Mount the WSGI app under /wsgi in an ASGI app, by one of the bridges that people use."""
    if name == "a2wsgi":
        bridge = pytest.importorskip("a2wsgi").WSGIMiddleware(app)
        routing = pytest.importorskip("starlette.routing")
        return routing.Router([routing.Mount("/wsgi", app=bridge)])
    if name == "responder":
        responder = pytest.importorskip("responder")
        pytest.importorskip("a2wsgi")
        api = responder.API(secret_key="only for the test", allowed_hosts=["*"])
        api.mount("/wsgi", app)
        return api
    import warnings

    with warnings.catch_warnings():
        # Starlette names a2wsgi as its replacement, and says so at import.
        warnings.simplefilter("ignore")
        bridge_module = pytest.importorskip("starlette.middleware.wsgi")
    routing = pytest.importorskip("starlette.routing")
    return routing.Router([routing.Mount("/wsgi", app=bridge_module.WSGIMiddleware(app))])


BRIDGES = ["a2wsgi", "starlette", "responder"]


@pytest.fixture
def anyio_backend() -> str:
    """a2wsgi knows asyncio only."""
    return "asyncio"


@pytest.mark.anyio
@pytest.mark.parametrize("bridge", BRIDGES)
async def test_S6_a_mounted_wsgi_app_sees_the_outer_scope(
    bridge: str, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """The scope that the ASGI middleware opened reaches the app in its worker thread."""
    found: list[Scope] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        found.append(current_scope())
        session = touch(jenny)
        start_response("200 OK", HEADERS)
        yield b"a"
        assert touch(jenny) is session
        found.append(current_scope())
        yield b"b"

    client = await ASGIClient()(ASGIRopeMiddleware(bridged(bridge, app)), "/wsgi/")
    assert (client.status, client.body) == (200, b"ab")
    assert found[0] is found[1]
    assert found[0].name == "GET /wsgi/"
    assert found[0].closed
    assert checked_out(engine) == 0


@pytest.mark.anyio
@pytest.mark.parametrize("bridge", ["a2wsgi", "responder"])
async def test_S6_both_middlewares_around_a_mounted_wsgi_app_share_one_scope(
    bridge: str, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """The inner one finds it in environ['asgi.scope'], and leaves its end to the outer one."""
    probe = Probe(jenny)
    outer: list[Scope] = []
    mounted = bridged(bridge, WSGIRopeMiddleware(wsgi_checked(probe, outer)))

    client = await ASGIClient()(ASGIRopeMiddleware(mounted), "/wsgi/")
    assert (client.status, client.body) == (200, b"123")
    assert probe.closes == 1
    assert outer == [probe.scope]
    assert probe.scope.closed
    assert checked_out(engine) == 0


def wsgi_checked(probe: Probe, outer: list[Scope]) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        outer.append(environ["asgi.scope"][KEY])
        return probe(environ, start_response)

    return app


@pytest.mark.anyio
async def test_S6_a_bridge_that_tells_nothing_gets_a_scope_of_its_own(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """Starlette's own bridge hands on no ASGI scope: two scopes, and both of them end."""
    probe = Probe(jenny, "generator")
    mounted = bridged("starlette", WSGIRopeMiddleware(probe))
    client = await ASGIClient()(ASGIRopeMiddleware(mounted), "/wsgi/")
    assert (client.status, client.body) == (200, b"123")
    gc.collect()  # this bridge never calls close()
    assert probe.closes == 1
    assert probe.scope.closed
    assert checked_out(engine) == 0


@pytest.mark.anyio
@pytest.mark.parametrize("bridge", ["a2wsgi", "responder"])
async def test_S6_mounted_flask_counts_in_the_outer_scope(
    bridge: str, jenny: SessionJenny[Session], engine: Engine
) -> None:
    """A whole framework behind the bridge, with and without a middleware of its own."""
    app = flask_app(jenny)
    for number, wsgi in enumerate((app.wsgi_app, RopeMiddleware(app.wsgi_app)), 1):
        api = ASGIRopeMiddleware(bridged(bridge, wsgi))
        assert (await ASGIClient()(api, "/wsgi/count")).body == str(number).encode()
        assert (await ASGIClient()(api, "/wsgi/stream")).body == b"xxx"
        assert (await ASGIClient()(api, "/wsgi/fail")).status == 500
        assert (await ASGIClient()(api, "/wsgi/scope")).body == b"GET /wsgi/scope"
        assert checked_out(engine) == 0


@pytest.mark.anyio
@pytest.mark.parametrize("own_middleware", [False, True], ids=["outer", "both"])
@pytest.mark.parametrize("options", [{}, {"commit_on_success": True}], ids=["plain", "commit"])
async def test_S6_a_bridge_that_never_closes_the_body(
    own_middleware: bool, options: dict[str, Any], jenny: SessionJenny[Session], engine: Engine
) -> None:
    """Where the client is gone a2wsgi stands still in mid-body: the ASGI scope frees everything."""
    a2wsgi = pytest.importorskip("a2wsgi")
    scopes: list[Scope] = []
    stuck, closed = threading.Event(), threading.Event()

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", HEADERS)
        scopes.append(current_scope())
        try:
            for number in range(1000):
                touch(jenny)
                if number == 5:
                    stuck.set()
                yield b"x"
        finally:
            closed.set()

    wsgi = WSGIRopeMiddleware(app, **options) if own_middleware else app
    # A queue of one chunk, so that it fills at once.
    api = ASGIRopeMiddleware(a2wsgi.WSGIMiddleware(wsgi, workers=1, send_queue_size=1), **options)
    task = asyncio.create_task(ASGIClient(reads=3)(api, "/"))
    while not stuck.is_set():
        await asyncio.sleep(0.005)
        assert not task.done(), task
    task.cancel()  # what a server does with the request of a client that is gone
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not closed.is_set()
    assert scopes[0].closed
    assert checked_out(engine) == 0


def test_S2_events_of_the_session_still_reach_their_listeners(
    jenny: SessionJenny[Session], engine: Engine
) -> None:
    """after_begin and friends fire for the request's session as they always do."""
    begun: list[Session] = []

    def note(session: Session, transaction: Any, connection: Any) -> None:
        begun.append(session)

    event.listen(Session, "after_begin", note)
    try:
        probe = Probe(jenny)
        Server()(WSGIRopeMiddleware(probe))
    finally:
        event.remove(Session, "after_begin", note)
    assert begun == [probe.sessions[0]]
