"""Ending, committing and rolling back an async scope. Imported where there is one.

It does what `ending` does for sync scopes, and finishes under cancellation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from rope_middleware.running.deadlines import deadlines, why_cut_off
from rope_middleware.running.finish import finish
from rope_middleware.running.threads import finish_in_thread
from rope_middleware.scope.async_hands import Async
from rope_middleware.scope.context import class_of, current, unbind
from rope_middleware.scope.ending import end_closing, explain
from rope_middleware.scope.hands import run_now
from rope_middleware.scope.hop import Alone, alone_in, commit_by_hop, commit_in_greenlet
from rope_middleware.scope.order import (
    committing,
    each,
    ending,
    held,
    invalidate_failed,
    open_sessions,
    rolling_back,
    until_free,
    worse,
)
from rope_middleware.scope.scope import CLOSED, ENDED, Scope
from rope_middleware.scope.settling import Settling
from rope_middleware.scope.short import end_shortly, end_untouched

if TYPE_CHECKING:
    from rope_middleware.scope.kind import SessionKey, SessionKind, Work

__all__ = ["acommit", "aend", "aend_at_once", "aend_failed", "aroll_back"]


async def aend(scope: Scope, commits: bool = False, why: str = "") -> None:
    """End an async scope; finishes under cancellation. See `order.ending`."""
    rest = aend_at_once(scope, commits, why)
    if rest is not None:
        await rest


def aend_at_once(scope: Scope, commits: bool = False, why: str = "") -> Awaitable[None] | None:
    """`aend`, without a coroutine where nothing has to wait.

    Returns:
        What is to be awaited for the rest, or None.
    """
    if scope._options.commit_on_success or scope._registries or scope._on_close:
        return _end(scope, commits, why)
    failure: BaseException | None = None
    scope._state = ENDED  # before the look: from here on nothing can begin
    sessions = scope._sessions or {}
    for key, session in list(sessions.items()):
        kind = key.kind
        try:
            if not kind.end_at_once(session):
                if failure is None and len(sessions) == 1:  # as `_close`, two calls less
                    if not kind.is_async:
                        return _end_in_thread(scope)
                    tells: list[Any] = []
                    timeout = scope._options.close_timeout
                    work = kind.in_greenlet(_close_alone, scope, key, session, tells)
                    return finish(work, timeout, timeout, tells)
                continue
        except BaseException as error:
            failure = worse(failure, invalidate_failed(scope, kind, session, error))
        sessions.pop(key, None)
    if sessions:
        rest = _close(scope, list(sessions.items()))
        return rest if failure is None else _raise_after(rest, failure)
    scope._sessions = None  # as `_leave`
    if scope._gate is not None:
        scope._gate = None
    scope._state = CLOSED
    if failure is not None:
        raise failure
    return None


async def _end(scope: Scope, commits: bool, why: str) -> None:
    if end_untouched(scope) or end_shortly(scope):
        return
    timeout = scope._options.close_timeout
    alone = alone_in(scope) if commits else None
    try:
        if alone is not None:
            commits, why = False, ""  # where this one fails, nothing more is committed
            await _commit_alone(scope, alone, None)
            commits = True  # what a listener has added since
    finally:
        if not end_shortly(scope):
            await finish(ending(scope, Async(timeout), commits, why), timeout)


def acommit(scope: Scope, note: Callable[[], None]) -> Coroutine[Any, Any, None]:
    """Commit an async scope that goes on; finishes under cancellation. See `commit`.

    Args:
        scope: the request's.
        note: called once the commit stands, also where a cancellation is raised then.
    """
    if current.get(None) is not scope:
        return _within(scope, acommit, note)
    alone = alone_in(scope)
    return _commit(scope, note) if alone is None else _commit_alone(scope, alone, note)


async def _commit(scope: Scope, note: Callable[[], None]) -> None:
    if not (scope._on_commit or open_sessions(scope)):
        note()
        return
    timeout = scope._options.close_timeout
    failure = await finish(_settle(scope, Async(timeout), note), timeout)
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback refers to this frame


def _commit_alone(
    scope: Scope, alone: Alone, note: Callable[[], None] | None
) -> Coroutine[Any, Any, None]:
    if alone.key.kind.is_async:
        tells: list[Any] = []
        timeout = scope._options.close_timeout
        work = alone.key.kind.in_greenlet(commit_in_greenlet, scope, alone, note, tells)
        return finish(work, timeout, timeout, tells)
    return commit_by_hop(scope, alone, note)


async def _within(
    scope: Scope, what: Callable[[Scope, Any], Awaitable[None]], argument: object
) -> None:
    """Do `what` as the scope's own: where a response starts within an open_scope(), that is not."""
    token = current.set(scope)
    try:
        await what(scope, argument)
    finally:
        unbind(token)


async def _settle(scope: Scope, hands: Async, note: Callable[[], None]) -> BaseException | None:
    with Settling(scope):
        return await committing(scope, hands, note)


async def aroll_back(scope: Scope, why: str) -> None:
    """Roll back an async scope that goes on; finishes under cancellation."""
    if current.get(None) is not scope:
        await _within(scope, aroll_back, why)
        return
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


# -- of a scope that has only sessions to close ----------------------------------------------------


def _close(scope: Scope, work: Work) -> Awaitable[None]:
    """Close what could not end at once; finishes under cancellation."""
    if any(key.kind.is_async for key, _ in work):
        timeout = scope._options.close_timeout
        return finish(ending(scope, Async(timeout), False, ""), timeout)
    return _end_in_thread(scope)


def _close_alone(scope: Scope, key: SessionKey, session: Any, tells: list[Any]) -> None:
    """Close the only session of a scope, in a greenlet: its sync code can wait there.

    As each request comes by here, there are few calls. See `finish` for `tells`.
    """
    if len(tells) > 1:
        deadlines[tells[1]] = monotonic() + scope._options.close_timeout
    failure: BaseException | None = None
    try:
        try:
            key.kind.close_here(session)
        except BaseException as error:
            # No name for what it returns: its traceback refers to this frame.
            failure = invalidate_failed(
                scope, key.kind, session, why_cut_off(error, scope._options.close_timeout)
            )
        scope._sessions = None  # as `_leave`
        if scope._gate is not None:
            scope._gate = None
        scope._state = CLOSED
        if failure is not None:
            raise failure
    finally:
        if tells and not tells[0].done():
            tells[0].set_result(None)


async def _raise_after(rest: Awaitable[None], failure: BaseException) -> None:
    try:
        await rest
    finally:
        raise failure


def _leave(scope: Scope) -> None:
    """Everything is given back. What most requests come by does it without this call."""
    scope._sessions = None
    if scope._gate is not None:
        scope._gate = None  # they refer to each other
    scope._state = CLOSED


_end_here = partial(end_shortly, asks=False)


async def _end_in_thread(scope: Scope) -> None:
    """End sync sessions in one hop to a thread."""
    try:
        await finish_in_thread(_end_here, scope, scope._options.close_timeout)
    except asyncio.CancelledError as error:
        _end_without_thread(scope, error)
        raise
    except Exception as error:  # no thread could be started
        _end_without_thread(scope, error)


def _end_without_thread(scope: Scope, error: BaseException) -> None:
    """End the scope without the thread that should have done it, if it has not."""
    if scope._state == CLOSED:
        return

    async def invalidate(_: SessionKind, __: Any) -> None:
        raise error

    run_now(each(scope, held(scope), invalidate))
    _leave(scope)
