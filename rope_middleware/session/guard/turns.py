"""Waiting, in a session that is about to begin, for the commit that has to stand before (C10)."""

from __future__ import annotations

from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.util import await_only

from rope_middleware.running.finish import is_async_running, running_loop
from rope_middleware.scope.options import DEFAULT
from rope_middleware.scope.settling import Settling

__all__ = ["wait_for"]


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
