"""Waiting, in a session that is about to begin, for the commit that has to stand before (C10)."""

from __future__ import annotations

from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.util import await_only

from rope_middleware.running.finish import is_async_running, running_loop
from rope_middleware.scope.options import DEFAULT
from rope_middleware.scope.scope import Scope
from rope_middleware.scope.settling import Settling, must_wait_for

__all__ = ["wait_for", "wait_for_commit"]


def wait_for_commit(scope: Scope) -> None:
    """Let a commit of `scope` end that is under way before its response starts."""
    settling = must_wait_for(scope)
    if settling is not None:
        wait_for(settling)


def wait_for(settling: Settling) -> None:
    """Let that commit end, which the running code is not part of."""
    if running_loop() is None:
        if not is_async_running():  # not on trio's event loop, which the commit needs
            settling.wait(DEFAULT.close_timeout)
        return
    waiter = settling.waiter()
    try:
        await_only(waiter)
    except MissingGreenlet:
        # Nothing can wait here: a sync session on the event loop, or `AsyncSession.add()`, whose
        # flush comes by here again and waits.
        waiter.cancel()
