"""WSGI applications, good and bad.

Each takes a function that uses the session where there is a middleware, so that the same code can
run without one.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from tests.kit.wsgi import HEADERS

Touch = Callable[[], object]
APPS: dict[str, Callable[[Touch], Any]] = {}
GOOD: set[str] = set()


def an_app(good: bool = True) -> Callable[[Any], Any]:
    """Register an application that takes `touch` first."""

    def register(app: Any) -> Any:
        name = app.__name__.replace("_", " ")
        APPS[name] = partial(partial, app)
        if good:
            GOOD.add(name)
        return app

    return register


def _answers(body: Any, good: bool, name: str) -> None:
    def app(touch: Touch, environ: Any, start_response: Any) -> Any:
        start_response("200 OK", HEADERS)
        touch()
        return body() if callable(body) else body

    app.__name__ = name
    an_app(good)(app)


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
def generator_app(touch: Touch, environ: Any, start_response: Any) -> Iterator[bytes]:
    touch()
    start_response("200 OK", HEADERS)
    yield b"late"
    touch()
    yield b"r"


@an_app()
def generator_with_empty_chunks_first(
    touch: Touch, environ: Any, start_response: Any
) -> Iterator[bytes]:
    start_response("200 OK", HEADERS)
    yield b""
    touch()
    yield b""
    yield b"x"


@an_app()
def write_only(touch: Touch, environ: Any, start_response: Any) -> Any:
    write = start_response("200 OK", HEADERS)
    write(b"a")
    touch()
    write(b"b")
    return []


@an_app()
def write_and_body(touch: Touch, environ: Any, start_response: Any) -> Any:
    write = start_response("200 OK", HEADERS)
    write(b"a")
    touch()
    return [b"b", b"c"]


@an_app()
def write_in_a_generator(touch: Touch, environ: Any, start_response: Any) -> Iterator[bytes]:
    write = start_response("200 OK", HEADERS)
    write(b"a")
    touch()
    yield b"b"
    write(b"c")
    yield b"d"


def _failure() -> Any:
    try:
        raise ValueError("the app's own")
    except ValueError:
        return sys.exc_info()


@an_app()
def exc_info_before_headers_are_sent(touch: Touch, environ: Any, start_response: Any) -> Any:
    start_response("200 OK", HEADERS)
    touch()
    try:
        raise ValueError("the app's own")
    except ValueError:
        start_response("500 Oops", HEADERS, sys.exc_info())
    return [b"sorry"]


@an_app()
def exc_info_in_the_first_call(touch: Touch, environ: Any, start_response: Any) -> Any:
    touch()
    start_response("500 Oops", HEADERS, _failure())
    return [b"sorry"]


@an_app()
def exc_info_of_none(touch: Touch, environ: Any, start_response: Any) -> Any:
    touch()
    start_response("200 OK", HEADERS, None)
    return [b"fine"]


@an_app(good=False)
def exc_info_after_headers_are_sent(touch: Touch, environ: Any, start_response: Any) -> Any:
    start_response("200 OK", HEADERS)
    yield b"begun"
    touch()
    start_response("500 Oops", HEADERS, _failure())
    yield b"never"


@an_app(good=False)
def exc_info_after_write(touch: Touch, environ: Any, start_response: Any) -> Any:
    start_response("200 OK", HEADERS)(b"begun")
    touch()
    start_response("500 Oops", HEADERS, _failure())
    return [b"never"]


@an_app(good=False)
def start_response_never(touch: Touch, environ: Any, start_response: Any) -> Any:
    touch()
    return [b"a"]


@an_app(good=False)
def start_response_never_in_a_generator(touch: Touch, environ: Any, start_response: Any) -> Any:
    touch()
    yield b"a"


@an_app(good=False)
def start_response_after_the_first_chunk(touch: Touch, environ: Any, start_response: Any) -> Any:
    touch()
    yield b"a"
    start_response("200 OK", HEADERS)
    yield b"b"


@an_app(good=False)
def start_response_twice(touch: Touch, environ: Any, start_response: Any) -> Any:
    start_response("200 OK", HEADERS)
    touch()
    start_response("201 Created", HEADERS)
    return [b"a"]


@an_app(good=False)
def start_response_twice_and_the_error_swallowed(
    touch: Touch, environ: Any, start_response: Any
) -> Any:
    start_response("200 OK", HEADERS)
    touch()
    with contextlib.suppress(AssertionError):
        start_response("201 Created", HEADERS)
    return [b"a"]


@an_app(good=False)
def raises_before_start_response(touch: Touch, environ: Any, start_response: Any) -> Any:
    touch()
    raise ValueError("before")


@an_app(good=False)
def raises_after_start_response(touch: Touch, environ: Any, start_response: Any) -> Any:
    start_response("200 OK", HEADERS)
    touch()
    raise ValueError("after")


@an_app(good=False)
def raises_in_the_first_chunk(touch: Touch, environ: Any, start_response: Any) -> Any:
    touch()
    start_response("200 OK", HEADERS)
    raise ValueError("first")
    yield b"never"


@an_app(good=False)
def raises_in_mid_body(touch: Touch, environ: Any, start_response: Any) -> Any:
    touch()
    start_response("200 OK", HEADERS)
    yield b"a"
    raise ValueError("middle")


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
def raises_StopIteration(touch: Touch, environ: Any, start_response: Any) -> Any:
    touch()
    raise StopIteration("from the app")
