"""W1: PEP 3333 to the letter, against a server played in process that notes everything."""

from __future__ import annotations

import gc
import io
import itertools
import weakref
from collections.abc import Iterator
from typing import Any
from wsgiref.handlers import SimpleHandler
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import scoped_session, sessionmaker

from rope_middleware import Scope, WSGIRopeMiddleware, current_scope
from tests.kit.leaks import checked_out, no_scope_here
from tests.kit.sessions import Jenny, touch
from tests.kit.wsgi import (
    BODIES,
    FILE_WRAPPERS,
    HEADERS,
    KEY,
    ClassWrapper,
    Probe,
    Server,
    Wrap,
    make_environ,
    scope_of,
    served,
)
from tests.kit.wsgi_apps import APPS, GOOD


@pytest.mark.parametrize("kind", BODIES)
def test_W1_exhausted_body_is_closed_once(
    wrap: Wrap, kind: str, jenny: Jenny, engine: Engine
) -> None:
    """After the last chunk the scope is still open; the server's close() ends it."""
    probe = Probe(jenny, kind)
    result = wrap(probe)(make_environ(), lambda *args: print)
    assert b"".join(result) == b"123"
    # A generator has run to its end and with it its `finally`; the others wait for close().
    assert probe.closes == (kind == "generator")
    assert not probe.scope.closed
    result.close()
    probe.is_over(engine)


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("take", [1, 2, 3])
def test_W1_abandoned_body_is_closed_once(
    wrap: Wrap, kind: str, take: int, jenny: Jenny, engine: Engine
) -> None:
    """A client that goes away after some chunks: one close(), and the scope has ended."""
    probe = Probe(jenny, kind)
    seen = Server(take=take)(wrap(probe))
    assert seen.body == b"123"[:take]
    assert seen.error is None and seen.close_error is None
    probe.is_over(engine)


def test_W1_with_retries_the_iterator_of_a_body_is_not_closed() -> None:
    """PEP 3333: close() of the iterable is called once; its iterator's is nobody's business."""
    closed: list[str] = []

    class Chunks:
        def __iter__(self) -> Iterator[bytes]:
            return self

        def __next__(self) -> bytes:
            return b"chunk"

        def close(self) -> None:
            closed.append("iterator")

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            return Chunks()

        def close(self) -> None:
            closed.append("iterable")

    def app(environ: Any, start_response: Any) -> Body:
        start_response("200 OK", HEADERS)
        return Body()

    seen = Server(take=2)(WSGIRopeMiddleware(app, retries=2))
    assert seen.body == b"chunkchunk"
    del seen
    gc.collect()
    assert closed == ["iterable"]


class HasClose:
    """Bodies whose `close` is found in one place or the other, of classes that stay."""

    def __init__(self, closes: list[Scope]) -> None:
        self.closes = closes

    def __iter__(self) -> Iterator[bytes]:
        return iter([b"1", b"2"])

    def close(self) -> None:
        self.closes.append(current_scope())


class OfTheInstance(HasClose):
    def __init__(self, closes: list[Scope]) -> None:
        super().__init__(closes)
        self.close = super().close  # type: ignore[method-assign]


class OfTheInstanceAlone(OfTheInstance):
    close = None  # type: ignore[assignment]


class FoundLate(OfTheInstance):
    close = None  # type: ignore[assignment]

    def __init__(self, closes: list[Scope]) -> None:
        self.closes = closes

    def __iter__(self) -> Iterator[bytes]:
        super().__init__(self.closes)
        return super().__iter__()


class Dynamic:
    def __init__(self, closes: list[Scope]) -> None:
        self.inner = HasClose(closes)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class SwitchedOff(HasClose):
    close = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("body", "closes"),
    [
        (HasClose, 1), (OfTheInstance, 1), (OfTheInstanceAlone, 1), (FoundLate, 1), (Dynamic, 1),
        (SwitchedOff, 0),
    ],
)  # fmt: skip
def test_W1_close_is_called_wherever_the_body_has_it(
    wrap: Wrap, body: Any, closes: int, jenny: Jenny, engine: Engine
) -> None:
    """On the class, on the instance, or found by `__getattr__`: also once the class is known."""
    for _ in range(3):
        called: list[Scope] = []

        def app(environ: Any, start_response: Any) -> Any:
            touch(jenny)
            start_response("200 OK", HEADERS)
            return body(called)  # noqa: B023

        environ = make_environ()
        seen = Server()(wrap(app), environ)
        assert (seen.error, seen.close_error, seen.body) == (None, None, b"12")
        assert called == [scope_of(environ)] * closes
        assert called == [] or called[0].closed
        assert checked_out(engine) == 0


@pytest.mark.parametrize("kind", ["iterable", "iterator"])
def test_W1_body_closed_before_its_first_chunk(
    wrap: Wrap, kind: str, jenny: Jenny, engine: Engine
) -> None:
    """A HEAD request: the server takes no chunk at all and closes."""
    probe = Probe(jenny, kind)
    result = wrap(probe)(make_environ(), lambda *args: print)
    result.close()
    probe.is_over(engine)


@served("commit", "retries")  # which take the first chunk before they return
def test_W1_generator_closed_before_its_first_chunk(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """A generator that never started has nothing to run; the scope ends all the same."""
    probe = Probe(jenny, "generator")
    result = wrap(probe)(make_environ(), lambda *args: print)
    result.close()
    probe.is_over(engine, closes=0)


@pytest.mark.parametrize("where", ["before start", "after start"])
def test_W1_error_in_the_app(wrap: Wrap, where: str, jenny: Jenny, engine: Engine) -> None:
    """The app's own error comes out as it is, and the scope has ended by then."""
    probe = Probe(jenny, fail=where)
    with pytest.raises(ValueError, match=f"^failed: {where}$"):
        wrap(probe)(make_environ(), lambda *args: print)
    probe.is_over(engine, closes=0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_W1_what_is_no_ordinary_error_ends_the_scope_too(
    wrap: Wrap, error: type[BaseException], jenny: Jenny, engine: Engine
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
        wrap(app)(make_environ(), lambda *args: print)
    assert caught.value is raised
    seen = Server()(wrap(late))
    assert seen.raised is raised
    assert [scope.closed for scope in scopes] == [True, True]
    assert checked_out(engine) == 0


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("where", ["chunk 1", "chunk 2", "chunk 3"])
def test_W1_error_in_the_middle_of_the_body(
    wrap: Wrap, kind: str, where: str, jenny: Jenny, engine: Engine
) -> None:
    """The error reaches the server; close() is called once and the scope has ended."""
    probe = Probe(jenny, kind, fail=where)
    seen = Server()(wrap(probe))
    assert seen.error == (ValueError, f"failed: {where}")
    assert seen.close_error is None
    probe.is_over(engine)


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("take", [1, None])
def test_W1_error_in_close(
    wrap: Wrap, kind: str, take: int | None, jenny: Jenny, engine: Engine
) -> None:
    """An error in the app's close() reaches the server, and the scope has ended."""
    probe = Probe(jenny, kind, fail="close")
    seen = Server(take=take)(wrap(probe))
    # An exhausted generator fails in its `finally`, that is in its last chunk.
    late = seen.error if kind == "generator" and take is None else seen.close_error
    assert late == (ValueError, "failed: close")
    probe.is_over(engine)


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("fail", ["", "close"])
def test_W1_close_called_twice(
    wrap: Wrap, kind: str, fail: str, jenny: Jenny, engine: Engine
) -> None:
    """A server that closes again, also after a failed close(), closes the app's body once."""
    probe = Probe(jenny, kind, fail=fail)
    Server(take=1, close=3)(wrap(probe))
    probe.is_over(engine)


def test_W1_a_failing_iter_ends_the_scope(wrap: Wrap, jenny: Jenny, engine: Engine) -> None:
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
    seen = Server()(wrap(app), environ)
    assert seen.error == (ValueError, "no iterator")
    assert len(closes) == 1
    assert closes[0].closed
    assert checked_out(engine) == 0


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registries": {"registries": [scoped_session(sessionmaker(), scopefunc=current_scope)]},
    "commit": {"commit_on_success": True},
    "retries": {"commit_on_success": True, "retries": 2},
}


# Each set of options, with a body that is read to its end, and with one that is abandoned.
SERVED = list(itertools.product(OPTIONS.values(), [None, 1]))


@pytest.mark.parametrize("name", APPS)
def test_W1_the_server_sees_what_it_would_see_without_the_middleware(
    name: str, jenny: Jenny, engine: Engine
) -> None:
    """Starts, writes, chunks, their order, the length and every error are the app's own."""
    for options, take in SERVED:
        try:
            compare(name, options, take, jenny)
            assert checked_out(engine) == 0
        except AssertionError as error:
            error.add_note(f"with {options}, {take or 'all'} chunks read")
            raise


def compare(name: str, options: dict[str, Any], take: int | None, jenny: Jenny) -> None:
    """Serve the app with and without the middleware."""
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


@pytest.mark.parametrize("name", sorted(GOOD))
def test_W1_wsgiref_validate_is_silent_on_both_sides(
    name: str, jenny: Jenny, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen from the server and from the app the middleware keeps the specification."""
    for options, take in SERVED:
        bare = Server(take)(validator(APPS[name](lambda: None)))
        app = validator(APPS[name](lambda: touch(jenny)))
        served = Server(take)(validator(WSGIRopeMiddleware(app, **options)))
        assert bare.error is None and bare.close_error is None
        assert served.wire == bare.wire, (options, take)
        del served, bare
        gc.collect()
        assert capsys.readouterr().err == "", (options, take)
        assert checked_out(engine) == 0


def test_W1_an_environ_with_empty_variables_left_out(wrap: Wrap, jenny: Jenny) -> None:
    """PEP 3333 lets a server omit SCRIPT_NAME, PATH_INFO and QUERY_STRING where they are empty."""
    for missing in (["SCRIPT_NAME"], ["PATH_INFO"], ["SCRIPT_NAME", "QUERY_STRING"]):
        environ = make_environ("/mounted" if "SCRIPT_NAME" in missing else "")
        if "SCRIPT_NAME" not in missing:
            environ["SCRIPT_NAME"] = "/mounted"
        for name in missing:
            del environ[name]
        probe = Probe(jenny)
        seen = Server()(wrap(probe), environ)
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
    wrap: Wrap, name: str, jenny: Jenny, engine: Engine
) -> None:
    """A checker in front of the middleware finds what it finds in the bare app."""
    bare = Server()(validator(APPS[name](lambda: None)))
    served = Server()(validator(wrap(APPS[name](lambda: touch(jenny)))))
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
    wrap: Wrap, jenny: Jenny, engine: Engine
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

    assert b"Content-Length: 5\r\n" in serve_with_wsgiref(wrap(one))
    assert b"Content-Length" not in serve_with_wsgiref(wrap(stream))
    result = wrap(stream)(make_environ(), lambda *args: print)
    assert not hasattr(result, "__len__")
    result.close()
    assert checked_out(engine) == 0


class _EmptySlot:
    """Its class has a close, and itself none where nobody has set it."""

    __slots__ = ("close",)

    def __iter__(self) -> Iterator[bytes]:
        yield b"1"


class _NoClose:
    """It says by None that it has no close()."""

    def __init__(self) -> None:
        self.close = None

    def __iter__(self) -> Iterator[bytes]:
        yield b"1"

    def close(self) -> None:  # type: ignore[no-redef]
        raise AssertionError


class _Proxy:
    """It has what is inside of it: a list, which has no close()."""

    def __iter__(self) -> Iterator[bytes]:
        yield b"1"

    @property
    def close(self) -> Any:
        inner: Any = [b"1"]
        return inner.close


@pytest.mark.parametrize("kind", [_EmptySlot, _NoClose, _Proxy])
def test_W1_a_body_without_the_close_that_its_class_has(
    wrap: Wrap, jenny: Jenny, engine: Engine, kind: type[Any]
) -> None:
    """Each time: of the second body the class is known, and it is the body that is asked."""

    def app(environ: Any, start_response: Any) -> Any:
        touch(jenny)
        start_response("200 OK", HEADERS)
        return kind()

    wrapped = wrap(app)
    for _ in range(3):
        body = wrapped(make_environ(), lambda *args: print)
        assert list(body) == [b"1"]
        body.close()
        assert checked_out(engine) == 0
        assert no_scope_here()


def test_W1_a_body_that_hides_its_len_has_none(wrap: Wrap, jenny: Jenny, engine: Engine) -> None:
    """Servers ask the body, not its class: ddtrace's proxies have the method and say no to it."""

    class Proxy:
        def __init__(self, chunks: list[bytes]) -> None:
            self._chunks = iter(chunks)

        def __iter__(self) -> Iterator[bytes]:
            return self._chunks

        def __len__(self) -> int:
            raise TypeError("of an iterator")

        def __getattribute__(self, name: str) -> Any:
            if name == "__len__":
                raise AttributeError(name)
            return super().__getattribute__(name)

    def app(environ: Any, start_response: Any) -> Any:
        touch(jenny)
        start_response("200 OK", list(HEADERS))
        return Proxy([b"one", b"two"])

    result = wrap(app)(make_environ(), lambda *args: print)
    assert not hasattr(result, "__len__")
    assert list(result) == [b"one", b"two"]
    result.close()
    assert checked_out(engine) == 0


def test_W1_a_body_of_known_length_may_start_the_response_as_it_is_read(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """PEP 3333: start_response "may be performed by the iterable's first iteration"."""

    class Late:
        def __init__(self, environ: Any, start_response: Any) -> None:
            self.start_response = start_response

        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Any:
            touch(jenny)
            self.start_response("200 OK", HEADERS)
            yield b"late"

    seen = Server()(wrap(lambda *given: Late(*given)))
    assert (seen.error, seen.output) == (None, [("chunk", b"late")])
    assert checked_out(engine) == 0


# The app's environ is a copy for each try.
@served("retries")
def test_W1_arguments_are_handed_on_as_they_are(wrap: Wrap) -> None:
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
    wrap(app)(environ, start_response).close()
    assert seen[0] is environ
    assert seen[1][:2] == (status, headers)
    assert seen[1][2:] in ((), (None,))
    assert {key: value for key, value in environ.items() if key != KEY} == before


def test_W1_the_body_of_the_request_is_left_alone(wrap: Wrap, jenny: Jenny) -> None:
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

    seen = Server()(wrap(app), make_environ(**{"wsgi.input": data}))
    assert seen.body == b"name=x"
    assert data.reads == 1


def test_W1_write_reaches_the_client_at_once(wrap: Wrap, jenny: Jenny) -> None:
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
    result = wrap(app)(environ, lambda *args: sent.append)
    assert not scope_of(environ).closed
    assert list(result) == [b"third"]
    result.close()
    assert scope_of(environ).closed


def test_W1_chunks_come_one_by_one(
    wrap: Wrap, jenny: Jenny, request: pytest.FixtureRequest
) -> None:
    """PEP 3333: middleware must not wait for a further chunk before it gives one."""
    made: list[int] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", HEADERS)
        for number in range(3):
            made.append(number)
            yield b"%d" % number

    started: list[Any] = []
    result = wrap(app)(make_environ(), lambda *args: started.append(args) or print)
    # The first one decides on commit and retry, so it is there before the server sees anything.
    early = request.node.callspec.params["wrap"] in ("commit", "retries")
    assert len(made) == early and len(started) <= early
    chunks = iter(result)
    for number in range(3):
        assert next(chunks) == b"%d" % number
        assert len(made) == number + 1
        assert len(started) == 1
    result.close()


class File(io.BytesIO):
    closes = 0

    def close(self) -> None:
        self.closes += 1
        super().close()


def file_app(jenny: Jenny, file: Any, made: list[Any]) -> Any:
    def app(environ: Any, start_response: Any) -> Any:
        touch(jenny)
        start_response("200 OK", HEADERS)
        made.append(environ["wsgi.file_wrapper"](file, 4))
        return made[0]

    return app


class Unhashable:
    """As a function, with no hash."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, file: Any, size: int) -> Any:
        return ClassWrapper(file, size)


def local_class() -> Any:
    class Local(ClassWrapper):
        pass

    return Local


@pytest.mark.parametrize(
    "wrapper",
    [*FILE_WRAPPERS, Unhashable(), local_class()],
    ids=["class", "function", "unhashable", "local class"],
)
@pytest.mark.parametrize("take", [None, 1, 0], ids=["all", "abandoned", "sendfile"])
def test_W1_what_the_file_wrapper_made_is_handed_on(
    wrap: Wrap, wrapper: Any, take: int | None, jenny: Jenny, engine: Engine
) -> None:
    """The server gets its own object, can send the file itself, and close() ends the scope."""
    file, made = File(b"abcdefgh"), []
    environ = make_environ(**{"wsgi.file_wrapper": wrapper})
    result = wrap(file_app(jenny, file, made))(environ, lambda *args: print)
    assert result is made[0]
    assert isinstance(result, ClassWrapper)
    assert not scope_of(environ).closed
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
    assert scope_of(environ).closed
    assert checked_out(engine) == 0
    result.close()
    assert environ["wsgi.file_wrapper"] is wrapper or callable(environ["wsgi.file_wrapper"])


def test_W1_a_file_wrapper_may_return_the_file_itself(
    wrap: Wrap, tmp_path: Any, jenny: Jenny, engine: Engine
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
        result = wrap(file_app(jenny, file, made))(environ, lambda *args: print)
        assert result is remembered[0] is file
        assert b"".join(result) == b"abcdefgh"
        result.close()
        assert file.closed
    assert scope_of(environ).closed
    assert checked_out(engine) == 0


class SlotsWrapper:
    """A wrapper made in C: no attribute can be set on it."""

    __slots__ = ("__weakref__", "file")

    def __init__(self, file: Any, size: int = 8192) -> None:
        self.file = file

    def __iter__(self) -> Any:
        return iter(lambda: self.file.read(4), b"")

    def close(self) -> None:
        self.file.close()


def test_W1_a_file_wrapper_that_takes_no_attribute(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """It is handed on all the same; the scope ends when the app returns."""
    file, made = File(b"abcdefgh"), []
    environ = make_environ(**{"wsgi.file_wrapper": SlotsWrapper})
    result = wrap(file_app(jenny, file, made))(environ, lambda *args: print)
    assert result is made[0]
    assert scope_of(environ).closed
    assert checked_out(engine) == 0
    assert list(result) == [b"abcd", b"efgh"]
    result.close()
    assert file.closes == 1


@served("commit")  # which gives the connection back before the body
def test_W1_a_file_wrapper_dropped_without_close(wrap: Wrap, jenny: Jenny, engine: Engine) -> None:
    """A server that forgets to close what its wrapper made leaks nothing either."""
    file, made = File(b"abcdefgh"), []
    environ = make_environ(**{"wsgi.file_wrapper": ClassWrapper})
    result = wrap(file_app(jenny, file, made))(environ, lambda *args: print)
    scope = scope_of(environ)
    assert next(iter(result)) == b"abcd"
    assert checked_out(engine) == 1
    made.clear()
    del result
    gc.collect()
    assert scope.closed
    assert checked_out(engine) == 0


def test_W1_a_file_wrapper_whose_close_fails(wrap: Wrap, jenny: Jenny, engine: Engine) -> None:
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
    result = wrap(app)(environ, lambda *args: print)
    with pytest.raises(OSError, match=r"^close$"):
        result.close()
    assert scope_of(environ).closed
    assert checked_out(engine) == 0


def test_W1_a_file_response_leaves_no_cycle(wrap: Wrap, jenny: Jenny, engine: Engine) -> None:
    """A wrapper whose class has a close(), as waitress's and Werkzeug's have, goes at once."""

    class WithMethod:
        def __init__(self, file: Any, size: int) -> None:
            self.file = file

        def __iter__(self) -> Any:
            return iter(self.file)

        def close(self) -> None:
            self.file.close()

    made: list[Any] = []
    app = file_app(jenny, io.BytesIO(b"abcd"), made)
    gc.disable()
    try:
        environ = make_environ(**{"wsgi.file_wrapper": WithMethod})
        result = wrap(app)(environ, lambda *args: print)
        assert b"".join(result) == b"abcd"
        result.close()
        gone = weakref.ref(result)
        made.clear()
        del result, environ
        assert gone() is None
    finally:
        gc.enable()
    assert checked_out(engine) == 0


def test_W1_a_file_wrapper_of_the_apps_own_is_an_ordinary_body(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """Where the server offers no wrapper, or the app uses another, nothing is special."""
    file = File(b"abcdefgh")

    def app(environ: Any, start_response: Any) -> Any:
        assert "wsgi.file_wrapper" not in environ or environ["wsgi.file_wrapper"] is SlotsWrapper
        touch(jenny)
        start_response("200 OK", HEADERS)
        return FileWrapper(file, 4)

    environ = make_environ(**{"wsgi.file_wrapper": SlotsWrapper})
    seen = Server()(wrap(app), environ)
    assert seen.body == b"abcdefgh"
    assert file.closes == 1
    assert scope_of(environ).closed
    assert checked_out(engine) == 0


def test_W1_wsgirefs_server_sends_the_file_itself(
    wrap: Wrap, tmp_path: Any, jenny: Jenny, engine: Engine
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
    handler.run(wrap(app))
    assert sent == [b"abcdefgh"]
    assert checked_out(engine) == 0
