"""Which event loop and which thread a scope belongs to."""

from __future__ import annotations

import threading
from asyncio import get_running_loop

from rope_middleware.errors import other_loop
from rope_middleware.scope.scope import AsyncScope, Scope

__all__ = ["check_loop", "is_async", "is_thread_of", "loop_of", "may_use"]


def is_async(scope: Scope) -> bool:
    """Tell whether `scope` was opened by async code."""
    return scope._is_async


def loop_of(scope: Scope) -> object:
    """Return the event loop that `scope` is known to belong to, or None."""
    return scope._loop if isinstance(scope, AsyncScope) else None


def is_thread_of(scope: Scope, thread: int) -> bool:
    """Tell whether `thread` is the one that the event loop of `scope` runs in."""
    return isinstance(scope, AsyncScope) and scope._thread == thread


def may_use(scope: Scope, is_async: bool) -> bool:
    """Tell whether a session of `scope` is at its place here: not to be asked, and not to be told.

    An async one in the event loop in which the scope was first used, a sync one in a thread that is
    not that of the loop (L2).
    """
    if not is_async:
        # As `is_thread_of`, a call less.
        return not (isinstance(scope, AsyncScope) and scope._thread == threading.get_ident())
    try:
        here = get_running_loop()
    except RuntimeError:  # trio
        return False
    return isinstance(scope, AsyncScope) and scope._loop is here


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
