"""What is asked of a scope where somebody is told something, and whose event loop this is."""

from __future__ import annotations

import threading
from asyncio import get_running_loop
from collections.abc import Iterator

from rope_middleware.errors import other_loop
from rope_middleware.scope.scope import OPEN, AsyncScope, Scope

__all__ = [
    "check_loop",
    "expects_nothing",
    "is_async",
    "is_request",
    "is_thread_of",
    "is_to_commit",
    "loop_of",
    "with_outer",
]


def expects_nothing(scope: Scope) -> bool:
    """Tell whether nobody expects changes in `scope` to stay.

    An error has left it, it is doomed, or the database has refused them (and another try follows).
    """
    return scope._doomed or scope._is_refused or scope._has_failed or scope._refused is not None


def is_to_commit(scope: Scope) -> bool:
    """Tell whether `scope` is open and commits at a success, which may still come."""
    commits = scope._options.commit_on_success and scope._state == OPEN
    return commits and not expects_nothing(scope)


def is_async(scope: Scope) -> bool:
    """Tell whether `scope` was opened by async code."""
    return scope._is_async


def loop_of(scope: Scope) -> object:
    """Return the event loop that `scope` is known to belong to, or None."""
    return scope._loop if isinstance(scope, AsyncScope) else None


def with_outer(scope: Scope | None) -> Iterator[Scope]:
    """Give `scope` and the scopes around it, the innermost first."""
    while scope is not None:
        yield scope
        scope = None if scope._outer is None else scope._outer()


def is_request(scope: Scope) -> bool:
    """Tell whether a middleware has opened `scope`, and not an `open_scope()`."""
    return isinstance(scope._name, tuple)  # of the method and the path


def is_thread_of(scope: Scope, thread: int) -> bool:
    """Tell whether `thread` is the one that the event loop of `scope` runs in."""
    return isinstance(scope, AsyncScope) and scope._thread == thread


def check_loop(scope: AsyncScope) -> None:
    """Check that the running event loop is that of `scope`; the first that asks makes it so.

    Raises:
        CrossLoopError: it is another one.
    """
    try:
        here = get_running_loop()
    except RuntimeError:  # trio, or no loop at all
        return
    if scope._loop is None and scope._thread == threading.get_ident():
        scope._loop = here
    if scope._loop is not here:
        raise other_loop(scope.name)
