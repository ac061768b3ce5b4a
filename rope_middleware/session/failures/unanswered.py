"""What became of a commit whose answer was lost, and what follows from that.

What comes after a failure is written once, as a coroutine; for a `Session` it never suspends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.orm import Session

from rope_middleware.errors import in_doubt
from rope_middleware.running.deadlines import OutOfTimeError
from rope_middleware.scope.context import class_of, logger
from rope_middleware.scope.hands import run_now
from rope_middleware.scope.outcome import (
    is_broken,
    note_commit,
    note_loss,
    retries_of,
    timeout_of,
)
from rope_middleware.scope.reading import tell_unknown
from rope_middleware.scope.scope import Scope
from rope_middleware.scope.settling import is_after_response
from rope_middleware.session.connections import leave_block
from rope_middleware.session.failures.doubt import (
    ASYNC_ASKING,
    SYNC_ASKING,
    Asking,
    Verdict,
    verdict_on,
)
from rope_middleware.session.failures.lost import is_told, was_sent
from rope_middleware.session.failures.trial import LOST, Attempt, attempts_lost, find_trial
from rope_middleware.session.guard.sessions import reset
from rope_middleware.session.sql.writes import ends_transaction, has_only_read

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = [
    "aresolve_doubts",
    "ask",
    "ask_here",
    "had_only_read",
    "has_no_answer",
    "note_no_answer",
    "resolve_doubts",
]


def note_no_answer(
    scope: Scope, connections: Collection[Connection], error: OutOfTimeError
) -> None:
    """The database has not answered in time: the commit was cut off, and may stand."""
    trial = find_trial(scope)
    for attempt in () if trial is None else trial.attempts:
        if attempt.connection in connections:
            attempt.state = LOST
            attempt.error = error


def had_only_read(scope: Scope, connections: Collection[Connection], error: Exception) -> bool:
    """Tell whether a commit failed for a connection that is gone, and had nothing to write.

    A stream whose client hangs up is cancelled, and the driver closes the connection of the
    statement that is under way. The application knows; there is nothing that could be lost. But an
    error that the application has swallowed is no success, and neither is a cancellation that it
    has, where the response is still to start: what its driver's own connection has written before
    (by COPY, for example) nobody has seen.
    """
    if (
        is_after_response(scope)
        and isinstance(error, PendingRollbackError)
        and error.code == _LOST_BEFORE
        and any(connection.invalidated for connection in connections)
        and not any(frame.f_code is _FLUSH for frame, _ in walk_tb(error.__traceback__))
        and all(map(has_only_read, connections))
        and not any(map(is_told, connections))
    ):
        logger.info("rolled back %r: %s", scope.name, "a read after its response was cut off")
        return True
    return False


# Of a connection; a session's own "rolled back due to a previous exception during flush" is 7s2a:
# https://docs.sqlalchemy.org/en/20/errors.html#error-8s2b
_LOST_BEFORE = "8s2b"

_FLUSH = Session.flush.__code__  # of what was pending nothing is left once that has failed


def has_no_answer(scope: Scope, error: Exception) -> bool:
    """Tell whether the database's answer to the commit was lost."""
    return is_broken(scope) or bool(attempts_lost(scope)) or _broke_at_commit(error)


def ask_here(
    scope: Scope, connections: Collection[Connection], failure: Exception, session: Session
) -> None:
    """`ask`, for a Session."""

    async def adopt() -> None:
        _as_committed(session)

    run_now(_find_out(scope, connections, failure, adopt, SYNC_ASKING))


async def ask(
    scope: Scope, connections: Collection[Connection], failure: Exception, session: AsyncSession
) -> None:
    """Find out what became of the commit, and act on it.

    Args:
        scope: the session's.
        connections: over which the commit has gone.
        failure: what it has raised.
        session: comes into the state after a commit, if that stands.

    Raises:
        CommitInDoubtError: nobody can tell.
        Exception: `failure`, if the commit does not stand.
    """
    await _find_out(
        scope, connections, failure, lambda: session.run_sync(_as_committed), ASYNC_ASKING
    )


async def _find_out(
    scope: Scope,
    connections: Collection[Connection],
    failure: Exception,
    adopt: Callable[[], Awaitable[None]],
    asking: Asking,
) -> None:
    verdict = await _verdict(scope, connections, asking)
    if verdict is Verdict.ABORTED:
        note_loss(scope, failure)
        raise failure
    note_commit(scope)
    tell_unknown(scope)
    if verdict is Verdict.UNKNOWN:
        raise in_doubt(scope.name, _why(scope, failure)) from failure
    logger.warning("the answer to the commit of %r was lost; it stands", scope.name)
    await adopt()


def _broke_at_commit(error: BaseException) -> bool:
    """Tell it from the error alone, where no event did: a thread without the scope's context."""
    return (
        isinstance(error, DBAPIError)
        and error.connection_invalidated
        and ends_transaction(error.statement)
        and was_sent(error)
    )


async def _verdict(scope: Scope, connections: Any, asking: Asking) -> Verdict:
    """Find out what became of a commit of ours, over one connection or over several."""
    lost = attempts_lost(scope)
    if not lost:
        return Verdict.UNKNOWN  # without `retries` nothing is known of it
    verdicts = {await _resolve_one(scope, one, asking) for one in lost}
    if len(verdicts) > 1 or Verdict.UNKNOWN in verdicts:
        return Verdict.UNKNOWN
    (verdict,) = verdicts
    trial = find_trial(scope)
    sent = [] if trial is None else [one.connection for one in trial.attempts]
    stands = [one for one in connections if one in sent]
    # Over several connections without two-phase commit, a part of them may stand.
    is_whole = len(stands) == (len(connections) if verdict is Verdict.COMMITTED else 0)
    return verdict if is_whole else Verdict.UNKNOWN


async def _resolve_one(scope: Scope, attempt: Attempt, asking: Asking) -> Verdict:
    verdict = await verdict_on(attempt, asking, timeout_of(scope))
    trial = find_trial(scope)
    if trial is not None:
        trial.resolve(attempt, verdict is Verdict.ABORTED)
    return verdict


def _why(scope: Scope, failure: Exception) -> str:
    if isinstance(failure, OutOfTimeError):
        return f"no answer came within {timeout_of(scope):g} seconds (close_timeout)"
    if not retries_of(scope):
        return "the database was not asked (that takes retries= and PostgreSQL)"
    return "the database could not tell"


def _as_committed(session: Session) -> None:
    """Bring the session into the state after a commit: its objects stay in it."""
    objects = list(session)
    reset(session)
    leave_block(session)
    session.add_all(objects)
    if session.expire_on_commit:
        session.expire_all()


def resolve_doubts(scope: Scope) -> None:
    """See `committing.resolve_doubts`."""
    run_now(_resolve_all(scope, SYNC_ASKING))


async def aresolve_doubts(scope: Scope) -> None:
    """See `committing.resolve_doubts`."""
    await _resolve_all(scope, ASYNC_ASKING)


async def _resolve_all(scope: Scope, asking: Asking) -> None:
    for attempt in attempts_lost(scope):
        verdict = await _resolve_one(scope, attempt, asking)
        if verdict is Verdict.ABORTED:
            if isinstance(attempt.error, Exception):  # a cancellation of the app's is no loss
                note_loss(scope, attempt.error)
            continue
        note_commit(scope)
        tell_unknown(scope)
        is_unknown = verdict is Verdict.UNKNOWN
        logger.error(
            "a commit of %r, by the application itself, is in doubt%s: %s",
            scope.name,
            "" if is_unknown else " no more, and stands",
            class_of(attempt.error),
        )
