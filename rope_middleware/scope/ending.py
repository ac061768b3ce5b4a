"""Ending, committing and rolling back a scope: from sync code, from async code, after a fork.

What happens in which order is told in `order`. In a sync scope nothing of it ever suspends, so
`run_now` runs it in one go. The way of most requests is shorter: see `short`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rope_middleware.running.finish import finish
from rope_middleware.scope.context import class_of, current, unbind
from rope_middleware.scope.hands import CLOSING, HERE, Async, run_now
from rope_middleware.scope.hop import commit_by_hop, goes_by_hop
from rope_middleware.scope.kind import SessionKind
from rope_middleware.scope.order import (
    committing,
    each,
    ending,
    held,
    open_sessions,
    rolling_back,
    until_free,
)
from rope_middleware.scope.scope import CLOSED, ENDED, Scope
from rope_middleware.scope.settling import Settling
from rope_middleware.scope.short import (
    aend_plainly,
    commit_plainly,
    end_plainly,
    end_shortly,
    is_plain,
    is_untouched,
)

__all__ = [
    "acommit",
    "aend",
    "aend_failed",
    "aroll_back",
    "commit",
    "detach",
    "end",
    "end_closing",
    "end_failed",
    "explain",
    "explainers",
    "roll_back",
]


# -- sync scopes -----------------------------------------------------------------------------------


def end(scope: Scope, commits: bool = False, why: str = "") -> None:
    """End a sync scope. See `order.ending`."""
    if not (is_untouched(scope) or end_shortly(scope)):
        run_now(ending(scope, HERE, commits, why))


def _is_settled(scope: Scope) -> bool:
    """Tell whether a scope that commits has done so before, and left nothing open."""
    return not (scope._on_commit or scope._on_close or scope._registries or open_sessions(scope))


def commit(scope: Scope, note: Callable[[], None]) -> None:
    """Commit a sync scope that goes on.

    Args:
        scope: the request's.
        note: called once the commit stands.

    Raises:
        BaseException: the commit's error; everything is rolled back.
    """
    if scope._sessions is None:
        note()
        return
    with Settling(scope):
        is_done = commit_plainly(scope)
        failure = None if is_done else run_now(committing(scope, HERE, note))
    if is_done:
        note()
    if failure is not None:
        raise failure


def roll_back(scope: Scope, why: str) -> None:
    """Roll back a sync scope that goes on."""
    if scope._sessions is None:
        return
    run_now(rolling_back(scope, HERE, why))


# -- async scopes ----------------------------------------------------------------------------------


async def aend(scope: Scope, commits: bool = False, why: str = "") -> None:
    """End an async scope; finishes under cancellation. See `order.ending`."""
    if is_untouched(scope):
        return
    if is_plain(scope):
        await aend_plainly(scope)
    elif _is_settled(scope):
        end_plainly(scope)  # nothing waits
    else:
        timeout = scope._options.close_timeout
        await finish(ending(scope, Async(timeout), commits, why), timeout)


async def acommit(scope: Scope, note: Callable[[], None]) -> None:
    """Commit an async scope that goes on; finishes under cancellation. See `commit`.

    Args:
        scope: the request's.
        note: called once the commit stands, also where a cancellation is raised then.
    """
    work = open_sessions(scope)
    if not (work or scope._on_commit):
        note()
        return
    if goes_by_hop(scope, work):
        failure = await commit_by_hop(scope, work, note)
    else:
        timeout = scope._options.close_timeout
        failure = await finish(_settle(scope, Async(timeout), note), timeout)
    if failure is not None:
        raise failure


async def _settle(scope: Scope, hands: Async, note: Callable[[], None]) -> BaseException | None:
    with Settling(scope):
        return await committing(scope, hands, note)


async def aroll_back(scope: Scope, why: str) -> None:
    """Roll back an async scope that goes on; finishes under cancellation."""
    if scope._sessions is None or not open_sessions(scope):
        scope._on_commit = None
        return
    timeout = scope._options.close_timeout
    await finish(_undo(scope, Async(timeout), why), timeout)


async def _undo(scope: Scope, hands: Async, why: str) -> None:
    with Settling(scope):  # as a commit: the application may go on meanwhile (C10)
        await until_free(open_sessions(scope), hands)
        await rolling_back(scope, hands, why)


async def aend_failed(scope: Scope, error: BaseException) -> None:
    """End the scope of a call that `error` has left; it commits nothing any more.

    The caller raises `error` again: a cancellation that arrives meanwhile does not replace it.
    """
    explain(scope, error)
    if scope.closed:
        return  # the error came from its end
    if isinstance(error, GeneratorExit):
        end_closing(scope)
        return
    try:
        await aend(scope, why=class_of(error))
    except asyncio.CancelledError:
        pass


def end_failed(scope: Scope, error: BaseException) -> None:
    """End the sync scope of a call that `error` has left. See `aend_failed`."""
    explain(scope, error)
    if not scope.closed:
        end(scope, why=class_of(error))


def end_closing(scope: Scope) -> None:
    """End an async scope whose coroutine is being closed: nothing can be awaited there."""
    token = current.set(scope)  # it may be closed in any context
    try:
        if not is_untouched(scope):
            run_now(ending(scope, CLOSING, False, "its coroutine was closed"))
    finally:
        unbind(token)


# -- errors, forks ---------------------------------------------------------------------------------


explainers: list[Callable[[BaseException], None]] = []
"""What adds notes to an error that leaves a scope, whatever sessions the scope has."""


def explain(scope: Scope, error: BaseException) -> None:
    """Let those who know add notes to an error that leaves the scope."""
    scope._has_failed = True
    for add_notes in explainers:
        add_notes(error)
    for key in list(scope._sessions or ()):
        key.kind.explain(error)
    if scope._cuts_results and isinstance(error, Exception):
        with suppress(Exception):  # an error that takes no note
            if _CUT not in getattr(error, "__notes__", ()):
                error.add_note(_CUT)


_CUT = (
    "commit_on_success has committed before the response started, and that has closed a result "
    "that was still being read. Read it to its end before the response starts, with all(), or open "
    "it in the body that reads it (rope_middleware)."
)


def detach(scope: Scope) -> None:
    """End the scope in a forked process. Its sessions and callbacks are the parent's."""

    async def leave(kind: SessionKind, session: Any) -> None:
        kind.detach(session)

    scope._is_parents = True
    scope._state = ENDED
    run_now(each(scope, held(scope), leave))
    scope._sessions = scope._on_close = scope._on_commit = None
    scope._registries = ()
    scope._state = CLOSED
