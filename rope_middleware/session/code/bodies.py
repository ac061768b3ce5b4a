"""Is a `begin()` block that of a response's body (C10)?

A body that is a generator may begin before the middleware hears of the response's start: behind
`BaseHTTPMiddleware`, and in WSGI, where its first chunk is made before. A block in it is the
application's own transaction. The commit before the response's start would cut it in two, and half
of it would stand where the body fails; so it is left alone.

A dependency is a generator, too (``with session.begin(): yield session``), and its block is around
all that the view does: that is committed. What tells them apart is who drives the generator.
"""

from __future__ import annotations

import sys
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from types import FrameType

from rope_middleware.session.code.lines import frames_from, is_applications, package_of

__all__ = ["is_in_body"]

_DRIVERS = frozenset(
    [
        *("a2wsgi", "asgiref", "blacksheep", "bottle", "django", "falcon", "fastapi", "flask"),
        *("litestar", "pyramid", "quart", "responder", "sse_starlette", "starlette", "webob"),
        "werkzeug",
    ]
)
# Most have contextlib drive their dependencies. Litestar and Responder do it in these functions.
_RESOLVERS = frozenset(["resolve_dependency", "_invoke_provider"])
# Our own modules by which a WSGI server reads a body: whatever is between, it is the body's.
_READERS = frozenset(["rope_middleware.wsgi.begun", "rope_middleware.wsgi.body"])
_GENERATOR = CO_GENERATOR | CO_ASYNC_GENERATOR


def is_in_body() -> bool:
    """Tell whether the running code belongs to a generator that a response is made of."""
    is_driven = is_generated = False
    for frame in frames_from(sys._getframe(1)):  # noqa: SLF001 - inspect's is slower
        if (is_driven and _drives(frame)) or (is_generated and _reads(frame)):
            return True
        is_driven = bool(frame.f_code.co_flags & _GENERATOR) and is_applications(frame)
        is_generated = is_generated or is_driven
    return False


def _drives(frame: FrameType) -> bool:
    return package_of(frame) in _DRIVERS and frame.f_code.co_name not in _RESOLVERS


def _reads(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") in _READERS
