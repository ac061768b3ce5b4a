"""How what blocks or awaits is carried out on the event loop, while a scope commits or ends."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rope_middleware.running.deadlines import within
from rope_middleware.running.places import COMMITS, NEEDS, WRITES, Places
from rope_middleware.running.threads import in_app_thread, in_thread
from rope_middleware.scope.context import is_async_callable
from rope_middleware.scope.hands import TURN

if TYPE_CHECKING:
    from rope_middleware.scope.kind import SessionCall, SessionKind, Work

__all__ = ["Async"]


class Async:
    """Awaits what is async, and sends what blocks to a thread.

    Args:
        close_timeout: seconds for each async session to give its connection back, and for each
            async function that runs at the end.
    """

    def __init__(self, close_timeout: float) -> None:
        self._close_timeout = close_timeout

    def takes(self, work: Work) -> Work:
        return work

    async def until(self, is_free: Callable[[], bool]) -> None:
        if not is_free():
            import anyio

            with anyio.move_on_after(self._close_timeout):
                while not is_free():  # noqa: ASYNC110 - there is no event to wait for
                    await anyio.sleep(TURN)

    async def use(self, kind: SessionKind, call: SessionCall, session: Any, work: Work) -> None:
        if kind.is_async:
            await call(session)
        else:
            await in_app_thread(call, session, _places_of(kind, session, work))

    async def release(self, kind: SessionKind, call: SessionCall, session: Any) -> None:
        if kind.is_async:
            await within(self._close_timeout, call(session))
        else:
            await in_thread(call, session)

    async def run(self, fn: Callable[[], Any], limited: bool = False) -> None:
        result = fn() if is_async_callable(fn) else await in_app_thread(lambda _: fn(), None)
        if inspect.isawaitable(result):  # also of a lambda around an async function
            await (within(self._close_timeout, result) if limited else result)


def _places_of(kind: SessionKind, session: Any, work: Work) -> Places:
    """Tell what the commit of a session may wait for, and what others wait for meanwhile."""
    if kind.holds_connection(session):
        return WRITES if kind.has_changes(session) else COMMITS
    # Where another session of its scope has a connection, somebody may be waiting for that one.
    return WRITES if any(key.kind.holds_connection(one) for key, one in work) else NEEDS
