"""Which scope is current here, and which are around it; what all need of errors and functions."""

from __future__ import annotations

import inspect
import logging
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar, Token
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from rope_middleware.errors import left_behind

if TYPE_CHECKING:
    from rope_middleware.scope.scope import Scope

__all__ = [
    "MAX_CAUSES",
    "SCOPE_KEY",
    "check_is_no_job",
    "check_stays",
    "class_of",
    "current",
    "is_async_callable",
    "logger",
    "printable",
    "removing",
    "restore",
    "traceback_of",
    "unbind",
    "with_outer",
]

SCOPE_KEY = "rope_middleware.scope"
"""Where the ASGI scope and the WSGI environ carry the open Scope."""


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """Our logger. A filter or handler that raises must not keep a scope from its end (S3)."""

    def log(self, level: int, msg: object, *args: object, **kw: Any) -> None:
        if not self.isEnabledFor(level):
            return
        try:
            self.logger.log(level, msg, *args, stacklevel=2, **kw)  # of who has called us
        except Exception:
            # As Handler.handleError() of logging does it.
            if logging.raiseExceptions and sys.stderr is not None:
                traceback.print_exc()


logger: logging.LoggerAdapter[logging.Logger] = _Logger(logging.getLogger("rope_middleware"))

current: ContextVar[Scope | None] = ContextVar("rope_middleware.scope")
"""The scope that is open here."""

removing: ContextVar[Scope | None] = ContextVar("rope_middleware.removing", default=None)
"""The scope that has ended and is just removing the sessions of plain scoped_sessions.

They find their session by `current_scope`, which refuses an ended scope to everybody else.
"""


def unbind(token: Token[Scope | None]) -> None:
    """Give the ContextVar `current` the value it had before."""
    try:
        current.reset(token)
    except ValueError:
        # Left in another context than it was entered in (a coroutine closed by the garbage
        # collector, a generator dependency run in two threads): here nothing was set.
        pass


def restore(scope: Scope, former: Scope | None) -> None:
    """Make `former` current again, also where scopes are not left in order.

    Generators that open a scope each may be closed in any order. A scope that is left while
    another one is current cannot reset the ContextVar: it records what was current before it. When
    that scope becomes current again, the loop below steps over it.
    """
    if current.get(None) is not scope:
        scope._left = (former,)
        return
    while former is not None and former._left is not None:
        former = former._left[0]
    current.set(former)


def with_outer(scope: Scope | None) -> Iterator[Scope]:
    """Give `scope` and the scopes around it, the innermost first."""
    while scope is not None:
        yield scope
        scope = None if scope._outer is None else scope._outer()


def printable(name: str) -> str:
    """Escape what is no text in `name`: a client chooses it, and a log has lines."""
    if name.isprintable():
        return name
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in name
    )


def class_of(error: BaseException | None) -> str:
    """Name the class of `error`, and of the driver's error inside of it.

    Not its text: that may hold bound values, which are no matter for a log.
    """
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    try:
        inner = getattr(error, "orig", None)
    except Exception:  # a property of the driver's, or of the user's
        inner = None
    if inner is None or inner is error:
        return name
    return f"{name} ({type(inner).__module__}.{type(inner).__qualname__})"


def traceback_of(error: BaseException) -> str:
    """Return the whole traceback of `error` as text, without the values of a statement."""
    hidden: list[Any] = []
    one: BaseException | None = error
    while one is not None and one not in hidden and len(hidden) < MAX_CAUSES:
        hidden.append(one)
        one = one.__cause__ or one.__context__
    # An error that can hide its parameters (SQLAlchemy's) does so meanwhile.
    hidden = [each for each in hidden if getattr(each, "hide_parameters", None) is False]
    for each in hidden:
        each.hide_parameters = True
    try:
        return "".join(traceback.format_exception(error)).rstrip()
    finally:
        for each in hidden:
            each.hide_parameters = False


MAX_CAUSES = 20  # that are looked at, in a chain of errors


def is_async_callable(fn: object) -> bool:
    """Tell whether calling `fn` gives a coroutine: async functions, methods, partials, objects."""
    while isinstance(fn, partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(fn, "__call__", None)  # noqa: B004 - not a test for callable()
    )


# What sends a job, of the objects into which the decorators of queues turn a function: Celery's,
# Dramatiq's, Huey's, taskiq's. (RQ's leaves it a function, which a worker finds by its name.)
_SENDS = "apply_async", "send_with_options", "call_local", "kiq"


def check_is_no_job(fn: object) -> None:
    """Check that `fn` is not what the decorator of a queue has made.

    Raises:
        TypeError: it is one.
    """
    if any(hasattr(fn.__class__, name) for name in _SENDS):
        raise TypeError(
            f"@open_scope() stands below the decorator of a queue, directly above the function: "
            f"{fn!r} is a job already, and a worker would call the function in it without a scope."
        )


def check_stays(frame: FrameType | None) -> None:
    """Check that what a generator makes current stays so when it has yielded.

    FastAPI enters a dependency that is a plain generator in a worker thread of anyio's, which
    works in a copy of the context: https://github.com/fastapi/fastapi/issues/953

    Raises:
        RopeError: it would be gone.
    """
    is_entered = False
    while frame is not None:
        is_generator = frame.f_code.co_flags & inspect.CO_GENERATOR
        module = str(frame.f_globals.get("__name__"))
        if not is_generator and module != "contextlib":
            if is_entered and module.startswith("anyio."):
                raise left_behind()
            return
        is_entered = module == "contextlib"
        frame = frame.f_back
