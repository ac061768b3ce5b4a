"""The short way of a commit on asyncio's event loop: of one sync session, in one hop to a thread.

A request with a sync handler waits for it. A task, its shield and anyio's own thread cost more than
the hop itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rope_middleware.running.finish import finish, running_loop
from rope_middleware.running.threads import there_and_back
from rope_middleware.scope.async_hands import Async, places_of
from rope_middleware.scope.order import after_failure, committing, open_sessions
from rope_middleware.scope.scope import Scope
from rope_middleware.scope.settling import Settling

if TYPE_CHECKING:
    from rope_middleware.scope.kind import SessionKey, Work

__all__ = ["commit_by_hop", "goes_by_hop"]


def goes_by_hop(scope: Scope, work: Work) -> bool:
    """Tell whether these sessions are one sync session, and nobody else works with it."""
    if len(work) != 1 or scope._on_commit or scope._registries or scope._calls:
        return False
    kind = work[0][0].kind
    return not kind.is_async and running_loop() is not None


async def commit_by_hop(scope: Scope, work: Work, note: Callable[[], None]) -> BaseException | None:
    """Commit; finishes under cancellation. See `order.committing`.

    Args:
        scope: the request's.
        work: its only session that has something open.
        note: called once the commit stands.

    Returns:
        What failed; everything is rolled back then.
    """
    ((key, session),) = work
    settling, timeout = Settling(scope), scope._options.close_timeout
    settling.begin()
    is_done, cancelled, failure = False, None, None
    if not scope._calls:  # order matters: see `session.aside`
        try:
            outcome, cancelled = await there_and_back(
                _commit, (settling, key, session), timeout, places_of(key.kind, session, work)
            )
            is_done = outcome is True
            failure = None if isinstance(outcome, bool) else outcome
        except BaseException as error:  # the time was up, or no thread could be started
            failure = error
    is_alone = len(scope._sessions or ()) == 1  # which nearly all are: 80 instructions less
    if is_done and not scope._on_commit and (is_alone or not open_sessions(scope)):
        settling.end()
        note()
    else:
        with settling:
            if failure is None:
                failure = await finish(committing(scope, Async(timeout), note), timeout)
            else:
                await finish(after_failure(scope, Async(timeout), failure), timeout)
    if cancelled is not None:
        raise cancelled
    return failure


def _commit(told: tuple[Settling, SessionKey, Any]) -> bool | BaseException:
    """Commit in the thread; tell whether that was all, or what failed."""
    settling, key, session = told
    settling.join()
    try:
        return key.kind.commit_alone(session)
    except BaseException as error:
        return error
