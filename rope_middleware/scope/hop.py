"""The short way of a commit on asyncio's event loop: of sync sessions, in one hop to a thread.

A request with a sync handler waits for it. A task, its shield and anyio's own thread cost twice as
much as the hop itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rope_middleware.running.finish import finish, running_loop
from rope_middleware.running.threads import finish_in_app_thread
from rope_middleware.scope.context import class_of, logger
from rope_middleware.scope.hands import Async, InThread, Work, run_now
from rope_middleware.scope.order import committing, rolling_back
from rope_middleware.scope.scope import Scope
from rope_middleware.scope.settling import Settling, settling_of

__all__ = ["commit_at_once", "goes_at_once"]


def goes_at_once(scope: Scope, work: Work) -> bool:
    """Tell whether the commit of these sessions needs a thread, and nothing that waits."""
    for key, session in work:
        if key.kind.is_async or key.kind.is_busy(session):
            return False
    return scope._on_commit is None and running_loop() is not None


async def commit_at_once(scope: Scope, note: Callable[[], None]) -> BaseException | None:
    """Commit; finishes under cancellation. See `order.committing`.

    Args:
        scope: the request's.
        note: called in the thread, once the commit stands.

    Returns:
        What failed; everything is rolled back then.
    """
    timeout = scope._options.close_timeout
    hands = InThread(asyncio.get_running_loop(), timeout)
    settling = Settling(scope)
    settling.begin()

    def commit(_: None) -> BaseException | None:
        with settling:
            return run_now(committing(scope, hands, note))

    try:
        return await finish_in_app_thread(commit, None, timeout)
    except BaseException as error:
        if settling_of(scope) is settling:  # no thread could be started, or its time was up
            hands.is_left = True
            logger.error("commit of %r failed: %s", scope.name, class_of(error))
            with settling:  # what rolls back belongs to the commit, and does not wait for it
                await finish(rolling_back(scope, Async(timeout), "its commit failed"), timeout)
        raise
