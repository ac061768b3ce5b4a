"""A commit of ours, of one session: refused where it would be a rollback, asked for where in doubt.

What comes after a failure is written once, as a coroutine; for a `Session` it never suspends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, SessionTransaction

from rope_middleware.errors import in_doubt
from rope_middleware.running.finish import OutOfTimeError, within
from rope_middleware.scope.context import class_of, logger
from rope_middleware.scope.hands import run_now
from rope_middleware.scope.outcome import (
    begin_commit,
    end_commit,
    is_broken,
    note_commit,
    note_loss,
    retries_of,
    timeout_of,
)
from rope_middleware.scope.reading import tell_unknown
from rope_middleware.scope.scope import Scope
from rope_middleware.session.aborted import ask_for_aborted, refuse_aborted
from rope_middleware.session.busy import has_unread
from rope_middleware.session.connections import connections_of, made_connections
from rope_middleware.session.doubt import HERE, Asking, AsyncAsking, Verdict, verdict_on
from rope_middleware.session.lost import was_sent
from rope_middleware.session.tie import tie_of
from rope_middleware.session.trial import LOST, Attempt, attempts_lost, find_trial
from rope_middleware.session.writes import ends_transaction

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["acommit", "asettle", "commit", "commit_alone", "flush", "settle"]

ASYNC = AsyncAsking()


def commit(session: Session) -> None:
    """Commit `session`.

    Raises:
        RopeError: the database would answer with a rollback.
        CommitInDoubtError: the answer was lost, and nobody can tell.
        BaseException: what the commit raised.
    """
    tie = tie_of(session)
    scope = None if tie is None else tie.scope
    if tie is None or scope is None:
        session.commit()
        return
    transaction = tie.transaction
    refuse_aborted(scope, made_connections(transaction))
    _commit(session, scope, transaction)


def flush(session: Session) -> None:
    """Write what is pending, and refuse what would be a rollback, before another session commits.

    Raises:
        RopeError: the database would answer the commit with a rollback.
        BaseException: what the flush raised.
    """
    session.flush()
    tie = tie_of(session)
    if tie is not None and tie.scope is not None:
        ask_for_aborted(tie.scope, made_connections(tie.transaction))


def commit_alone(session: Session) -> bool:
    """`commit` a session that nobody else is using; tell whether nothing more is to be done.

    False, too, where it is not that simple: a result is still being read, a savepoint is open, the
    commit takes two phases, a listener has begun the next transaction. The questions that the
    general way asks about each of these, one after the other, are half of what a commit by us costs
    more than one by hand. Here they are one look.

    Raises:
        BaseException: as `commit`.
    """
    tie = tie_of(session)
    scope = None if tie is None else tie.scope
    if tie is None or scope is None or tie.connections or session.twophase:
        return False
    transaction = tie.transaction
    if transaction is None or session.get_transaction() is not transaction:
        return False
    if tie.flush is not None and tie.flush[0].is_active:
        return False
    before = None
    for connection, _, _, is_made in connections_of(transaction):
        if connection is before:
            continue
        before = connection
        if has_unread(connection):
            return False
        if is_made:
            refuse_aborted(scope, (connection,))
    _commit(session, scope, transaction)
    if session.in_transaction():
        return False
    tie.transaction = None  # its connections are back: nobody has to look for them
    return True


def _commit(session: Session, scope: Scope, transaction: SessionTransaction | None) -> None:
    begin_commit(scope)
    try:
        session.commit()
    except Exception as error:
        if not _is_lost(scope, error):
            raise
        failure = error
    else:
        return
    finally:
        end_commit(scope)
    # Of a transaction that has ended they are still known.
    connections = made_connections(transaction)
    run_now(_ask(scope, connections, failure, partial(_adopt_here, session), HERE))


async def _adopt_here(session: Session) -> None:
    _as_committed(session)


async def acommit(session: AsyncSession) -> None:
    """`commit`, for an AsyncSession."""
    scope = _scope_of(session.sync_session)
    if scope is None:
        await session.commit()
        return
    connections = _begin(session.sync_session, scope)
    inner = session.sync_session
    try:
        if inner.new or inner.dirty or inner.deleted:
            await session.flush()  # the application's own statements take as long as they take
        await within(timeout_of(scope), session.commit())
    except Exception as error:
        if isinstance(error, OutOfTimeError):
            _note_no_answer(scope, connections, error)
        elif not _is_lost(scope, error):
            raise
        failure = error
    else:
        return
    finally:
        end_commit(scope)
    await _ask(scope, connections, failure, lambda: session.run_sync(_as_committed), ASYNC)


def _scope_of(session: Session) -> Scope | None:
    tie = tie_of(session)
    return None if tie is None else tie.scope


def _begin(session: Session, scope: Scope) -> Collection[Connection]:
    """Refuse what would be a rollback; return the connections over which the commit will go."""
    tie = tie_of(session)
    connections = made_connections(None if tie is None else tie.transaction)
    refuse_aborted(scope, connections)
    begin_commit(scope)
    return connections


def _note_no_answer(
    scope: Scope, connections: Collection[Connection], error: OutOfTimeError
) -> None:
    """The database has not answered in time: the commit was cut off, and may stand."""
    trial = find_trial(scope)
    for attempt in () if trial is None else trial.attempts:
        if attempt.connection in connections:
            attempt.state = LOST
            attempt.error = error


def _is_lost(scope: Scope, error: Exception) -> bool:
    """Tell whether the database's answer to the commit was lost."""
    return is_broken(scope) or bool(attempts_lost(scope)) or _broke_at_commit(error)


async def _ask(
    scope: Scope,
    connections: Collection[Connection],
    failure: Exception,
    adopt: Callable[[], Awaitable[None]],
    asking: Asking,
) -> None:
    """Find out what became of the commit, and act on it."""
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
    verdicts = {await _settle_one(scope, one, asking) for one in lost}
    if len(verdicts) > 1 or Verdict.UNKNOWN in verdicts:
        return Verdict.UNKNOWN
    (verdict,) = verdicts
    trial = find_trial(scope)
    sent = [] if trial is None else [one.connection for one in trial.attempts]
    stands = [one for one in connections if one in sent]
    # Over several connections without two-phase commit, a part of them may stand.
    is_whole = len(stands) == (len(connections) if verdict is Verdict.COMMITTED else 0)
    return verdict if is_whole else Verdict.UNKNOWN


async def _settle_one(scope: Scope, attempt: Attempt, asking: Asking) -> Verdict:
    verdict = await verdict_on(attempt, asking, timeout_of(scope))
    trial = find_trial(scope)
    if trial is not None:
        trial.settle(attempt, verdict is Verdict.ABORTED)
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
    session.reset()
    session.add_all(objects)
    if session.expire_on_commit:
        session.expire_all()


# -- commits of the application's own --------------------------------------------------------------


def settle(scope: Scope) -> None:
    """Find out what became of commits of the application's own, before a request is run again."""
    if attempts_lost(scope):
        run_now(_settle(scope, HERE))


async def asettle(scope: Scope) -> None:
    """`settle`, on the event loop."""
    if attempts_lost(scope):
        await _settle(scope, ASYNC)


async def _settle(scope: Scope, asking: Asking) -> None:
    for attempt in attempts_lost(scope):
        verdict = await _settle_one(scope, attempt, asking)
        if verdict is Verdict.ABORTED:
            if attempt.error is not None:
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
