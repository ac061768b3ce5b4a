"""Calls in anyio's worker threads, and in threads of ours that are anyio's for one call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from rope_middleware.running.places import Places

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Generator

__all__ = ["in_anyio_thread", "into_anyio_thread"]

_T = TypeVar("_T")


async def in_anyio_thread(func: Callable[[Any], _T], argument: Any, places: Places) -> _T:
    """Call `func` in a thread of anyio's, without a token of its shared limiter."""
    from anyio.to_thread import run_sync

    all_of_them = _limiter(places.name, places.most)
    if places.part is None:
        return await run_sync(func, argument, limiter=all_of_them)
    limiter, who = _limiter(f"{places.name}, in part", places.part), object()
    if limiter.available_tokens:
        limiter.acquire_on_behalf_of_nowait(who)  # saves a turn of the loop
    else:
        await limiter.acquire_on_behalf_of(who)
    try:
        return await run_sync(func, argument, limiter=all_of_them)
    finally:
        limiter.release_on_behalf_of(who)


def _limiter(name: str, most: int) -> Any:
    """Return this event loop's limiter of that name."""
    import anyio
    from anyio.lowlevel import RunVar

    kept = _limiters.get(name)
    if kept is None:
        kept = _limiters.setdefault(name, RunVar(f"rope_middleware.threads.{name}"))
    limiter = kept.get(None)
    if limiter is None:
        limiter = anyio.CapacityLimiter(most)
        kept.set(limiter)
    return limiter


# Of anyio's RunVar: a value for each event loop, forgotten with it.
_limiters: dict[str, Any] = {}

_Work = tuple["AbstractEventLoop", Callable[[Any], Any], Any]


@cache
def into_anyio_thread() -> Callable[[_Work], Any] | None:
    """Return a function that makes a thread of ours anyio's, and calls another function there.

    Then that one can use ``anyio.from_thread``. By what anyio knows its threads is private to it
    (`test_C5_a_sync_function_may_call_back_into_the_event_loop` pins it). Where this is otherwise
    in a later version, the answer is None, and those calls go to anyio's own threads.
    """
    try:
        from anyio._core._eventloop import claim_worker_thread, get_async_backend, threadlocals

        backend = get_async_backend("asyncio")
    except ImportError:
        return None
    try:
        from anyio.lowlevel import EventLoopToken

        token_of: Any = partial(EventLoopToken, backend)
    except ImportError:
        token_of = None
    # anyio has loaded it where it uses it. There it says which library runs in this context: none.
    library = getattr(sys.modules.get("sniffio"), "current_async_library_cvar", None)

    def call(work: _Work) -> Any:
        loop, func, argument = work
        if library is not None:
            library.set(None)  # in the context of this call
        if token_of is None:  # before 4.11
            with claim_worker_thread(backend, loop), _scope_of(threadlocals, backend):
                return func(argument)
        threadlocals.current_token = token_of(loop)
        threadlocals.current_cancel_scope = None  # nobody cancels what is to come to its end
        try:
            return func(argument)
        finally:
            del threadlocals.current_token, threadlocals.current_cancel_scope

    return call


@contextmanager
def _scope_of(threadlocals: Any, backend: Any) -> Generator[None]:
    """Give the thread a cancel scope, without which anyio calls nothing."""
    threadlocals.current_cancel_scope = backend.create_cancel_scope(shield=True)
    try:
        yield
    finally:
        del threadlocals.current_cancel_scope
