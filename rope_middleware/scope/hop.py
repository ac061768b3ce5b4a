"""The short way of a commit on asyncio's event loop: of one session that nobody else is using.

A request waits for it. What `order.committing` asks about several sessions, about callbacks and
about what else may be under way is half of what the commit costs more than one by hand. A sync
session takes one hop to a thread: a task, its shield and anyio's own thread cost more than the hop
itself. An AsyncSession takes one task, in which all is sync code in one greenlet.

Where it turns out not to be that simple, `order.committing` goes on from there.
"""

from __future__ import annotations

import math
from asyncio import get_running_loop
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from rope_middleware.running.deadlines import deadlines, limit
from rope_middleware.running.finish import finish
from rope_middleware.running.threads import there_and_back
from rope_middleware.scope.async_hands import Async
from rope_middleware.scope.order import after_failure, committing, open_sessions
from rope_middleware.scope.scope import Scope
from rope_middleware.scope.settling import Settling

if TYPE_CHECKING:
    from rope_middleware.running.places import Places
    from rope_middleware.scope.kind import SessionKey

__all__ = ["Alone", "alone_in", "commit_by_hop", "commit_in_greenlet"]


class Alone(NamedTuple):
    """The only session of a scope that has something open, where nobody else works with it."""

    key: SessionKey
    session: Any
    places: Places


def alone_in(scope: Scope) -> Alone | None:
    """Return the only open session of `scope`, if it can be committed in a short way."""
    sessions = scope._sessions
    if (
        sessions is None
        or scope._on_commit
        or scope._registries
        or scope._calls
        or scope._settling is not None
    ):
        return None
    try:
        get_running_loop()
    except RuntimeError:  # trio
        return None
    alone: Alone | None = None
    for key, session in list(sessions.items()):
        kind = key.kind
        places = kind.places_alone(session)
        if places is not None and alone is None:
            alone = Alone(key, session, places)
        elif places is not None or not kind.is_idle(session):
            return None
    return alone


async def commit_by_hop(scope: Scope, alone: Alone, note: Callable[[], None] | None) -> None:
    """Commit a sync session; finishes under cancellation. See `order.committing`.

    Args:
        scope: the request's.
        alone: its session.
        note: called once the commit stands; None where the scope ends.

    Raises:
        BaseException: what failed; everything is rolled back then.
    """
    settling, timeout = Settling(scope, note is None, alone.key), scope._options.close_timeout
    is_done, cancelled, failure = False, None, None
    if not scope._calls:  # order matters: see `session.guard`
        try:
            outcome, cancelled = await there_and_back(
                _commit, (settling, alone), timeout, alone.places
            )
            is_done = outcome is True
            failure = None if isinstance(outcome, bool) else outcome
            del outcome
        except BaseException as error:  # the time was up, or no thread could be started
            failure = error
    is_only = len(scope._sessions or ()) == 1  # which nearly all are: 80 instructions less
    if is_done and not scope._on_commit and (is_only or not open_sessions(scope)):
        settling.end()
        if note is not None:
            note()
    else:
        failure = await finish(_go_on(scope, settling, failure, note), timeout)
    if cancelled is not None:
        raise cancelled
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback refers to this frame


def _commit(told: tuple[Settling, Alone]) -> bool | BaseException:
    """Commit in the thread, or greenlet; tell whether that was all, or what failed."""
    settling, (key, session, _) = told
    settling.join()
    try:
        return key.kind.commit_alone(session)
    except BaseException as error:
        return error


def commit_in_greenlet(
    scope: Scope, alone: Alone, note: Callable[[], None] | None, tells: list[Any]
) -> None:
    """`commit_by_hop`, of an AsyncSession: in a greenlet of a task that has so long for it.

    Args:
        scope: the request's.
        alone: its session.
        note: called once the commit stands; None where the scope ends.
        tells: see `finish`.
    """
    if len(tells) > 1:
        deadlines[tells[1]] = monotonic() + scope._options.close_timeout
    outcome: bool | BaseException | None = False
    try:
        settling = Settling(scope, note is None, alone.key)
        if not scope._calls:  # order matters: see `session.guard`
            settling.join()  # from here on as `_commit`
            try:
                outcome = alone.key.kind.commit_alone(alone.session)
            except BaseException as error:
                outcome = error
        is_only = len(scope._sessions or ()) == 1
        if outcome is True and not scope._on_commit and (is_only or not open_sessions(scope)):
            settling.end()
            if note is not None:
                note()
            return
        failure = None if isinstance(outcome, bool) else outcome
        if isinstance(failure, GeneratorExit):  # closed by hand: there is nothing to await with
            settling.end()
            raise failure
        limit(math.inf)
        alone.key.kind.wait_here(_go_on_and_raise(scope, settling, failure, note))
    finally:
        outcome = failure = None  # their tracebacks refer to this frame
        if tells and not tells[0].done():
            tells[0].set_result(None)


async def _go_on_and_raise(
    scope: Scope,
    settling: Settling,
    failure: BaseException | None,
    note: Callable[[], None] | None,
) -> None:
    """`_go_on`, in the greenlet: SQLAlchemy's would keep an error that is returned through it."""
    try:
        failure = await _go_on(scope, settling, failure, note)
        if failure is not None:
            raise failure
    finally:
        del failure


async def _go_on(
    scope: Scope,
    settling: Settling,
    failure: BaseException | None,
    note: Callable[[], None] | None,
) -> BaseException | None:
    """Do what is left to be done where that was not all; return what failed."""
    hands = Async(scope._options.close_timeout)
    with settling:
        if failure is None:
            return await committing(scope, hands, note)
        await after_failure(scope, hands, failure)
        return failure
