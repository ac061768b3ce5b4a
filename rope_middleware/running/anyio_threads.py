"""Calls in anyio's worker threads, and in threads of ours that are anyio's for one call."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

__all__ = ["in_anyio_thread", "into_anyio_thread"]

_T = TypeVar("_T")


async def in_anyio_thread(func: Callable[[Any], _T], argument: Any, most: int) -> _T:
    """Call `func` in a thread of anyio's, of which each event loop has at most so many."""
    import anyio.to_thread

    return await anyio.to_thread.run_sync(func, argument, limiter=_limiter(most))


def _limiter(most: int) -> Any:
    """Return this event loop's limiter for so many threads."""
    import anyio
    from anyio.lowlevel import RunVar

    kept = _limiters.get(most)
    if kept is None:
        kept = _limiters.setdefault(most, RunVar(f"rope_middleware.threads.{most}"))
    limiter = kept.get(None)
    if limiter is None:
        limiter = anyio.CapacityLimiter(most)
        kept.set(limiter)
    return limiter


# Of anyio's RunVar: a value for each event loop, forgotten with it.
_limiters: dict[int, Any] = {}


@cache
def into_anyio_thread() -> Callable[[tuple[asyncio.AbstractEventLoop, Any, Any]], Any] | None:
    """Return a function that calls another one so that it can use ``anyio.from_thread``.

    What anyio knows of its own threads is private to it, and the same from 4.4 to 4.16
    (`test_C5_a_sync_function_may_call_back_into_the_event_loop`). Where a later one has it
    otherwise, this returns None, and those calls go to anyio's own threads.
    """
    try:
        from anyio._core._eventloop import (
            claim_worker_thread,
            get_async_backend,
            threadlocals,
        )

        backend = get_async_backend("asyncio")
    except ImportError:
        return None
    # anyio has loaded it where it uses it. There it says which library runs in this context: none.
    library = getattr(sys.modules.get("sniffio"), "current_async_library_cvar", None)

    def call(work: tuple[asyncio.AbstractEventLoop, Callable[[Any], Any], Any]) -> Any:
        loop, func, argument = work
        if library is not None:
            library.set(None)  # in the context of this call
        with claim_worker_thread(backend, loop):
            # Of from_thread.check_cancelled(): nobody cancels what is to come to its end.
            threadlocals.current_cancel_scope = backend.create_cancel_scope(shield=True)
            try:
                return func(argument)
            finally:
                del threadlocals.current_cancel_scope

    return call
