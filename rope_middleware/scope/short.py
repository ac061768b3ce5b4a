"""The short way of most requests: there are only sessions to close.

It does what `order.ending` does, in one function for each way. Of a WSGI request with one SELECT it
saves 3 points (1.056 against 1.088 of the handler by hand), of an async one 13 calls of 83.
"""

from __future__ import annotations

import asyncio
from typing import Any

from rope_middleware.running.finish import finish, within
from rope_middleware.running.threads import finish_in_thread, in_thread
from rope_middleware.scope.hands import HERE, run_now
from rope_middleware.scope.kind import SessionKind
from rope_middleware.scope.order import after_failure, each, held, invalidate_failed, worse
from rope_middleware.scope.scope import CLOSED, ENDED, Scope

__all__ = [
    "aend_plainly",
    "commit_plainly",
    "end_plainly",
    "end_shortly",
    "is_plain",
    "is_untouched",
]


def is_untouched(scope: Scope) -> bool:
    """End a scope that has nothing to end; tell whether it was one."""
    if scope._sessions is not None:
        return False
    scope._state = ENDED
    if scope._sessions is not None:  # made by a thread in this instant
        return False  # type: ignore[unreachable]
    scope._state = CLOSED
    return True


def is_plain(scope: Scope) -> bool:
    """Tell whether there are only sessions to close: no commit, no callback, nothing to remove."""
    return not (scope._options.commit_on_success or scope._registries or scope._on_close)


def commit_plainly(scope: Scope) -> bool:
    """Commit a sync scope that has one session and no callback; tell whether that was all.

    Most requests are such. It is `order.committing` without its questions about several sessions:
    of a WSGI request with one SELECT and a commit that is 900 of 10,700 instructions of Python's.

    Raises:
        BaseException: the commit's error; everything is rolled back.
    """
    sessions = scope._sessions
    if sessions is None or len(sessions) != 1 or scope._on_commit or scope._registries:
        return False
    for key, session in list(sessions.items()):
        try:
            if not key.kind.commit_alone(session):
                return False
        except BaseException as error:
            run_now(after_failure(scope, HERE, error))
            raise
    return len(sessions) == 1 and not scope._on_commit  # a listener may have asked for more


def end_shortly(scope: Scope) -> bool:
    """End a sync scope that has only sessions to close; tell whether it was one.

    It may have committed before: then they have nothing open.
    """
    if scope._registries or scope._on_close:
        return False
    if scope._options.commit_on_success:
        if scope._on_commit or scope._settling is not None:
            return False
        for key, session in list((scope._sessions or {}).items()):
            if not key.kind.is_idle(session):
                return False
    end_plainly(scope)
    return True


def end_plainly(scope: Scope) -> None:
    """Close the sessions here."""
    failure: BaseException | None = None
    scope._state = ENDED
    for key, session in list((scope._sessions or {}).items()):
        kind = key.kind
        try:
            kind.end(session)
        except BaseException as error:
            failure = worse(failure, invalidate_failed(scope, kind, session, error))
    scope._sessions = None
    if scope._gate is not None:
        scope._gate = None  # they refer to each other
    scope._state = CLOSED
    if failure is not None:
        raise failure


async def aend_plainly(scope: Scope) -> None:
    """`end_plainly`, on the event loop; finishes under cancellation."""
    scope._state = ENDED  # before the look: from here on nothing can begin
    waits = is_async = False
    for key, session in list((scope._sessions or {}).items()):
        kind = key.kind
        if not (kind.is_idle(session) or kind.ends_at_once(session)):
            waits = True
            is_async = is_async or kind.is_async
    if not waits:
        end_plainly(scope)
    elif is_async:
        await finish(_close_each(scope), scope._options.close_timeout)
    else:
        await _end_in_thread(scope)


async def _close_each(scope: Scope) -> None:
    """Close the sessions of a scope that has nothing else to end."""
    failure: BaseException | None = None
    for key, session in list((scope._sessions or {}).items()):
        kind = key.kind
        try:
            if kind.is_idle(session):
                kind.discard(session)
            elif kind.is_async:
                await within(scope._options.close_timeout, kind.close(session))
            else:
                await in_thread(kind.close, session)
        except BaseException as error:
            failure = worse(failure, invalidate_failed(scope, kind, session, error))
    scope._sessions = None
    if scope._gate is not None:
        scope._gate = None  # they refer to each other
    scope._state = CLOSED
    if failure is not None:
        raise failure


async def _end_in_thread(scope: Scope) -> None:
    """End sync sessions in one hop to a thread."""
    try:
        await finish_in_thread(end_plainly, scope, scope._options.close_timeout)
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
    scope._sessions = None
    scope._state = CLOSED
