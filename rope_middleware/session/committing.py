"""A commit of ours, of one session: refused where it would be a rollback.

What is done where its answer is lost, and nobody knows what became of it, stands in
`failures.unanswered`. It is imported when that happens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only

from rope_middleware.running.deadlines import OutOfTimeError, limit, why_cut_off, within
from rope_middleware.running.places import COMMITS, NEEDS, WRITES, Places
from rope_middleware.scope.outcome import (
    begin_commit,
    end_commit,
    is_committing,
    timeout_of,
    trial_of,
)
from rope_middleware.scope.scope import Scope
from rope_middleware.session.connections import BLOCK, has_out, leave_block, made_connections
from rope_middleware.session.failures.aborted import (
    TELLING,
    aborted_by,
    ask_for_aborted,
    knows_aborted,
    refuse_aborted,
)
from rope_middleware.session.guard.busy import has_unread
from rope_middleware.session.guard.sessions import CALLS, WITHOUT, commit_unguarded
from rope_middleware.session.holding.begun import OF_BODY
from rope_middleware.session.sql.notes import NOTES
from rope_middleware.session.tie import TIE, Tie, tie_of
from rope_middleware.session.unsaved import has_pending

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["acommit", "aresolve_doubts", "commit", "commit_alone", "commit_alone_in_greenlet"]
__all__ += ["flush", "places_alone", "resolve_doubts"]


def commit(session: Session) -> None:
    """Commit `session`.

    Raises:
        RopeError: the database would answer with a rollback.
        BaseException: what the commit raised; a CommitInDoubtError, where nobody can tell.
    """
    tie = tie_of(session)
    scope = None if tie is None else tie.scope
    if tie is None or scope is None:
        session.commit()
        return
    if not session.in_transaction():
        session.flush()  # what was added while the commit before was under way begins here
    transaction = tie.transaction
    refuse_aborted(scope, made_connections(transaction))
    begin_commit(scope)
    try:
        commit_unguarded(session)
        leave_block(session)
    except Exception as error:
        if not _stands_here(session, scope, transaction, error):
            raise
    finally:
        end_commit(scope)


def flush(session: Session) -> None:
    """Write what is pending, and refuse what would be a rollback, before another session commits.

    Raises:
        RopeError: the database would answer the commit with a rollback.
    """
    session.flush()
    if (tie := tie_of(session)) is not None and tie.scope is not None:
        ask_for_aborted(tie.scope, made_connections(tie.transaction))


def places_alone(session: Session, is_async: bool = False) -> Places | None:
    """Tell what `commit_alone` may wait for, and others meanwhile; None where it does not go so.

    Nothing has begun, a `begin()` block of a response's body has, or calls are not guarded yet. (An
    async one needs no place in a thread.)
    """
    tie: Tie | None = session.__dict__.get(TIE)
    transaction = None if tie is None else tie.transaction
    if (
        transaction is None
        or session.get_transaction() is not transaction
        or getattr(transaction, OF_BODY, False)  # by __dict__ it would have to make one
        or CALLS not in session.__dict__
    ):
        return None
    if is_async or not has_out(transaction):
        return NEEDS
    # As `has_pending`, three calls less.
    return WRITES if session._new or session.identity_map._modified or session._deleted else COMMITS


def _stands_here(
    session: Session, scope: Scope, transaction: SessionTransaction | None, error: Exception
) -> bool:
    """Find out what became of a commit that has raised `error`; tell whether it stands.

    Raises:
        CommitInDoubtError: nobody can tell.
    """
    if sys.is_finalizing():
        return False
    from rope_middleware.session.failures import unanswered

    connections = made_connections(transaction)  # of one that has ended they are still known
    if unanswered.had_only_read(scope, connections, error):
        session.rollback()
        return True
    if not unanswered.has_no_answer(scope, error):
        return False
    end_commit(scope)
    unanswered.ask_here(scope, connections, error, session)
    return True


def commit_alone(session: Session, commit: Callable[[Session, Scope], None] | None = None) -> bool:
    """`commit` a session that nobody else is using; tell whether nothing more is to be done.

    False, too, where it is not that simple: a result is still being read, a savepoint is open, the
    commit takes two phases, a listener has begun the next transaction. To ask all that one by one,
    as the general way does, is half of what a commit by us costs more than one by hand. So nothing
    here is a call that can be a look.

    Raises:
        BaseException: as `commit`.
    """
    own = session.__dict__
    tie: Tie | None = own.get(TIE)
    scope = None if tie is None else tie.scope
    if tie is None or scope is None or tie.connections or session.twophase:
        return False
    transaction = tie.transaction
    if (
        transaction is None
        or session.get_transaction() is not transaction
        or session.in_nested_transaction()
        or (tie.flush is not None and tie.flush[0].is_active)  # as `is_flushing`
        or session._flushing
        or getattr(transaction, OF_BODY, False)
    ):
        return False
    # As `connections_of`; each is there twice, side by side.
    for connection, its, _, is_made in (*transaction._connections.values(),)[::2]:
        for one, _ in getattr(connection, NOTES, ()):
            if one() is not None and has_unread(connection):  # of most statements nothing is left
                return False
        if not its.is_active:
            return False
        if is_made and connection.dialect.driver in TELLING and knows_aborted(connection):
            raise aborted_by(scope, connection)
    if commit is not None:  # whoever gives it heeds what it raises
        commit(session, scope)
    else:
        scope._is_committing, scope._is_broken = True, False
        try:
            if CALLS in own and "commit" not in own:  # as `commit_unguarded`, a call less
                getattr(type(session), WITHOUT).commit(session)
            else:
                session.commit()
            own.pop(BLOCK, None)
        except Exception as error:
            if not _stands_here(session, scope, transaction, error):
                raise
        finally:
            scope._is_committing = False
    if session.in_transaction():
        return False  # a listener has begun the next one
    tie.transaction = None  # its connections are back: nobody has to look for them
    return True


# -- of an AsyncSession ----------------------------------------------------------------------------


async def acommit(session: AsyncSession) -> None:
    """`commit`, for an AsyncSession."""
    inner = session.sync_session
    tie = tie_of(inner)
    scope = None if tie is None else tie.scope
    if tie is None or scope is None:
        await session.commit()
        return
    if not inner.in_transaction():
        await session.flush()
    transaction = tie.transaction
    refuse_aborted(scope, made_connections(transaction))
    begin_commit(scope)
    try:
        if has_pending(inner):
            await session.flush()  # the application's own statements take as long as they take
        await within(timeout_of(scope), session.commit())
        inner.__dict__.pop(BLOCK, None)
    except Exception as error:
        if not await _stands(session, scope, transaction, error):
            raise
    finally:
        end_commit(scope)


def commit_alone_in_greenlet(session: AsyncSession) -> bool:
    """`commit_alone`, for an AsyncSession, in a greenlet of the task that is the commit's."""
    inner = session.sync_session
    tie: Tie | None = inner.__dict__.get(TIE)
    scope = None if tie is None else tie.scope
    if tie is None or scope is None:
        return False
    transaction = tie.transaction
    try:
        return commit_alone(inner, _commit_in_time)
    except BaseException as error:
        why = why_cut_off(error, timeout_of(scope))
        # Where it has not begun, it was refused.
        if isinstance(why, Exception) and is_committing(scope):
            limit(math.inf)
            if await_only(_stands(session, scope, transaction, why)):
                return False
        if why is error:
            del why  # its traceback refers to this frame
            raise
        raise why from None
    finally:
        scope._is_committing = False


def _commit_in_time(session: Session, scope: Scope) -> None:
    """Commit, where `commit_alone_in_greenlet` heeds what it raises."""
    scope._is_committing, scope._is_broken = True, False
    if session._new or session.identity_map._modified or session._deleted:  # as `has_pending`
        limit(math.inf)
        session.flush()  # the application's own statements take as long as they take
        limit(timeout_of(scope))
    own = session.__dict__
    if CALLS in own and "commit" not in own:
        getattr(type(session), WITHOUT).commit(session)
    else:
        session.commit()
    own.pop(BLOCK, None)


async def _stands(
    session: AsyncSession, scope: Scope, transaction: SessionTransaction | None, error: Exception
) -> bool:
    """Find out what became of a commit that has raised `error`; tell whether it stands.

    Raises:
        CommitInDoubtError: nobody can tell.
    """
    if sys.is_finalizing():
        return False
    from rope_middleware.session.failures import unanswered

    connections = made_connections(transaction)  # of one that has ended they are still known
    if isinstance(error, OutOfTimeError):
        unanswered.note_no_answer(scope, connections, error)
    elif unanswered.had_only_read(scope, connections, error):
        await session.rollback()
        return True
    elif not unanswered.has_no_answer(scope, error):
        return False
    end_commit(scope)
    await unanswered.ask(scope, connections, error, session)
    return True


# -- commits of the application's own --------------------------------------------------------------


def resolve_doubts(scope: Scope) -> None:
    """Find out what became of commits of the application's own, before a request is run again."""
    if (trial := trial_of(scope)) is not None and trial.lost():  # the answer to one
        from rope_middleware.session.failures import unanswered

        unanswered.resolve_doubts(scope)


async def aresolve_doubts(scope: Scope) -> None:
    """`resolve_doubts`, on the event loop."""
    if (trial := trial_of(scope)) is not None and trial.lost():  # the answer to one
        from rope_middleware.session.failures import unanswered

        await unanswered.aresolve_doubts(scope)
