"""What happens in which order when a scope commits, rolls back or ends.

Written once, as coroutines that do no I/O themselves: `Hands` carry it out. Sessions are touched
by one guarded loop, `each`; how is its argument.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from rope_middleware.errors import CommitInDoubtError, RopeError
from rope_middleware.scope.context import class_of, logger, removing, traceback_of
from rope_middleware.scope.scope import CLOSED, ENDED, Scope
from rope_middleware.scope.settling import must_wait_for, settling_of

if TYPE_CHECKING:
    from rope_middleware.scope.kind import Hands, SessionKey, SessionKind, Work

__all__ = [
    "after_failure",
    "committing",
    "each",
    "ending",
    "held",
    "invalidate_failed",
    "open_sessions",
    "rolling_back",
    "until_free",
    "worse",
]


async def committing(
    scope: Scope, hands: Hands, note: Callable[[], None] | None = None
) -> BaseException | None:
    """Commit every session, then run what waits for the commit.

    Args:
        scope: whose sessions.
        hands: how what blocks is carried out.
        note: called once the commit stands, before anything else; None where the scope ends.

    Returns:
        What the first failing step raised; everything is rolled back then.
    """
    try:
        await _commit_all(scope, hands, goes_on=note is not None)
    except BaseException as error:
        await after_failure(scope, hands, error)
        return error
    settling = settling_of(scope)
    if settling is not None:
        settling.end()  # the functions' own work comes after the commit
    if note is not None:
        note()
    if not scope._on_commit:
        return None
    return await _run_all(scope, hands, "on_commit", _take_on_commit(scope))


MAX_ROUNDS = 10


async def _commit_all(scope: Scope, hands: Hands, goes_on: bool) -> None:
    """Commit until no session has anything to commit: a listener may write by another jenny."""
    told: set[SessionKey] = set()  # opaque ones that are committed; they always look open
    late = 1 if goes_on else 2
    for number in range(MAX_ROUNDS):
        work = hands.takes(open_sessions(scope))
        # A class with a close() of its own is never idle: its end needs a thread. What was added
        # while a commit was under way, or by a listener of it, has begun nothing. Where the scope
        # goes on, its end commits that. (A listener may add at each commit: once is enough.)
        work = [
            (key, session)
            for key, session in work
            if key not in told
            and (key.kind.has_begun(session) or (number < late and key.kind.has_changes(session)))
        ]
        if goes_on:  # a block that the response's body is in is the application's to end
            work = [one for one in work if not one[0].kind.is_of_body(one[1])]
        if not work:
            return
        await until_free(work, hands)
        for key, session in work:
            if key.kind.is_opaque(session):
                told.add(key)
            if goes_on and key.kind.has_open_result(session):
                scope._cuts_results = True  # the scope goes on, and this closes its results
        await _commit_each(work, hands)
    raise RopeError(
        f"The commit of {scope.name!r} does not come to an end: after {MAX_ROUNDS} rounds a "
        "session still has something to commit. Does a listener of a commit write by a session "
        "that is committed before?"
    )


async def after_failure(scope: Scope, hands: Hands, error: BaseException) -> None:
    """Log the error of a commit, and roll everything back."""
    if isinstance(error, CommitInDoubtError):
        logger.error("commit of %r in doubt: %s", scope.name, class_of(error.__cause__))
    else:
        logger.error("commit of %r failed: %s", scope.name, class_of(error))
    await rolling_back(scope, hands, "its commit failed", goes_on=False)


async def until_free(work: Work, hands: Hands) -> None:
    """Wait, not for ever, until nobody is in the middle of something in one of the sessions."""
    if not _is_free(work):
        await hands.until(partial(_is_free, work))


def _is_free(work: Work) -> bool:
    for key, session in work:  # noqa: SIM110 - a generator costs double
        if key.kind.is_busy(session):
            return False
    return True


async def _commit_each(work: Work, hands: Hands) -> None:
    if len(work) > 1:
        # What the database refuses at a flush must not find half of them committed.
        for key, session in work:
            await hands.use(key.kind, key.kind.flush, session, work)
    for key, session in work:
        if key.kind.is_twophase(session):
            await hands.use(key.kind, key.kind.prepare, session, work)
    for key, session in work:
        await hands.use(key.kind, key.kind.commit, session, work)


async def rolling_back(scope: Scope, hands: Hands, why: str, goes_on: bool = True) -> None:
    """Roll every session back, log it, and forget what waits for a commit.

    Args:
        scope: whose sessions.
        hands: how what blocks is carried out.
        why: for the log.
        goes_on: whether the application's response is sent all the same. Then a block that its body
            is in stays the application's to end.
    """
    scope._on_commit = None
    work = open_sessions(scope)
    if goes_on:
        work = [one for one in work if not one[0].kind.is_of_body(one[1])]
    if work:
        logger.info("rolled back %r: %s", scope.name, why)

    async def roll_back(kind: SessionKind, session: Any) -> None:
        await hands.release(kind, kind.rollback, session)

    await each(scope, work, roll_back)


async def ending(scope: Scope, hands: Hands, commits: bool, why: str) -> None:
    """End the scope: commit or not, close every session, run what waits for the end.

    Args:
        scope: that ends.
        hands: how what blocks is carried out.
        commits: whether it commits first.
        why: it does not, for the log; "" where its commit has failed just before.

    Raises:
        BaseException: the first error that is no `Exception` (KeyboardInterrupt, SystemExit), or
            else what the commit raised; at the end, when everything is given back.
    """
    failure: BaseException | None = None
    if must_wait_for(scope) is not None:  # the app's call is over, and its response is starting
        await hands.until(lambda: settling_of(scope) is None)
    if commits:
        failure = await committing(scope, hands)
    elif why and scope._options.commit_on_success and open_sessions(scope):
        logger.info("rolled back %r: %s", scope.name, why)

    async def close(kind: SessionKind, session: Any) -> None:
        if kind.is_idle(session):
            kind.discard(session)
        else:
            await hands.release(kind, kind.close, session)

    scope._state = ENDED  # from here on nothing can begin
    token = removing.set(scope)
    try:
        failure = worse(failure, await each(scope, held(scope), close))
    finally:
        removing.reset(token)
    scope._sessions = None
    if scope._on_close:
        failure = worse(failure, await _run_all(scope, hands, "on_close", _take_on_close(scope)))
    scope._on_commit = None
    scope._gate = None  # they refer to each other
    scope._state = CLOSED
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback refers to this frame


async def each(
    scope: Scope, work: Work, manner: Callable[[SessionKind, Any], Coroutine[Any, Any, None]]
) -> BaseException | None:
    """Do with every session what `manner` says; one that fails is invalidated.

    Returns:
        The first error that has to be raised once all are done.
    """
    failure: BaseException | None = None
    for key, session in work:
        try:
            await manner(key.kind, session)
        except BaseException as error:
            failure = worse(failure, invalidate_failed(scope, key.kind, session, error))
    return failure


def invalidate_failed(
    scope: Scope, kind: SessionKind, session: Any, error: BaseException
) -> BaseException | None:
    """Log `error` and invalidate what the session holds; return what is to be raised."""
    if not kind.tells_why(session, error, scope.name):
        logger.error(
            "closing a session of %r failed, its connection is invalidated: %s",
            scope.name,
            traceback_of(error),
        )
    try:
        kind.invalidate(session)
    except Exception:
        logger.exception("a connection of %r could not be invalidated", scope.name)
    return error if _is_fatal(error) else None


async def _run_all(
    scope: Scope, hands: Hands, what: str, functions: Iterable[Callable[[], Any]]
) -> BaseException | None:
    """Call the application's functions; an error of one is logged, and the others still run."""
    failure: BaseException | None = None
    for fn in functions:
        try:
            await hands.run(fn, limited=what == "on_close")
        except BaseException as error:
            if _is_fatal(error):
                failure = failure or error
            else:
                logger.exception("%s function %r of %r failed", what, fn, scope.name)
    return failure


def _take_on_commit(scope: Scope) -> Iterable[Callable[[], Any]]:
    # One by one: a function may register another one.
    while scope._on_commit:
        fn, *scope._on_commit = scope._on_commit
        yield fn


def _take_on_close(scope: Scope) -> list[Callable[[], Any]]:
    functions, scope._on_close = scope._on_close or [], None
    return functions[::-1]


def _is_fatal(error: BaseException) -> bool:
    return not isinstance(error, (Exception, asyncio.CancelledError))


def worse(first: BaseException | None, second: BaseException | None) -> BaseException | None:
    """Return which of two errors is raised: the first that is no Exception, else the first."""
    if first is None or (second is not None and not _is_fatal(first) and _is_fatal(second)):
        return second
    return first


def held(scope: Scope) -> Work:
    """Return every session that the scope keeps."""
    return list((scope._sessions or {}).items())


def open_sessions(scope: Scope) -> Work:
    """Return what has something open, in the order in which it was made."""
    sessions = scope._sessions
    if not sessions:
        return []
    # A list of its own first: another thread may make a session meanwhile.
    found = [one for one in list(sessions.items()) if not one[0].kind.is_idle(one[1])]
    settling = settling_of(scope)
    return found if settling is None else [one for one in found if settling.takes(one[0])]
