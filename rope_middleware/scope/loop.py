"""Which event loop and which thread a scope belongs to."""

from __future__ import annotations

import threading
from asyncio import get_running_loop

from rope_middleware.errors import other_loop
from rope_middleware.scope.scope import AsyncScope, Scope

__all__ = ["check_loop", "is_async", "is_thread_of", "loop_of"]


def is_async(scope: Scope) -> bool:
    """Tell whether `scope` was opened by async code."""
    return scope._is_async


def loop_of(scope: Scope) -> object:
    """Return the event loop that `scope` is known to belong to, or None."""
    return scope._loop if isinstance(scope, AsyncScope) else None


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
