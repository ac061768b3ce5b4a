"""What a scope must know of its database's errors: the engine's events tell it.

Frameworks turn an exception into a 5xx before a middleware sees it. The engine's ``handle_error``
event sees it first. Imported by `listening` at the first error, or for `retries`.
"""

from __future__ import annotations

import random
from typing import Any

from sqlalchemy.engine import Connection, ExceptionContext
from sqlalchemy.exc import DBAPIError

from rope_middleware.scope.context import current
from rope_middleware.scope.outcome import (
    is_committing,
    is_loss,
    note_broken,
    note_commit,
    note_loss,
    note_refusal,
)
from rope_middleware.scope.scope import Scope
from rope_middleware.session.connections import is_autocommit
from rope_middleware.session.failures.aborted import aborted_by, suspect, tells_of_aborted
from rope_middleware.session.failures.codes import mysql_code_of, sqlite_code_of, sqlstate_of
from rope_middleware.session.failures.doubt import can_be_asked, trace_of
from rope_middleware.session.failures.lost import (
    is_lost,
    is_lost_in_set_up,
    is_unanswered,
    note_refused_connects,
    note_told,
    was_sent,
)
from rope_middleware.session.failures.trial import (
    LOST,
    Attempt,
    find_trial,
    is_of_session,
    scope_of,
    trial_for,
)
from rope_middleware.session.sql.writes import ends_transaction, has_only_read, may_write

__all__ = [
    "RETRY_LISTENERS",
    "backoff",
    "bridging",
    "is_refusal",
    "note_error",
    "wait_before_retry",
]

# SQLSTATE 40001 serialization_failure, 40P01 deadlock_detected:
# https://www.postgresql.org/docs/current/errcodes-appendix.html (class 40),
# https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html
# CockroachDB and SQL Server (through ODBC) give 40001, too.
_SQLSTATES = frozenset({"40001", "40P01"})

# 1205 ER_LOCK_WAIT_TIMEOUT, 1213 ER_LOCK_DEADLOCK, of MariaDB and MySQL:
# https://mariadb.com/kb/en/mariadb-error-codes/
_MYSQL_CODES = frozenset({1205, 1213})

# SQLITE_BUSY, SQLITE_LOCKED.
_SQLITE_CODES = frozenset({5, 6})


def is_refusal(error: BaseException | None) -> bool:
    """Tell whether the database refused a transaction as one to try again.

    Args:
        error: the driver's own exception.
    """
    if error is None:
        return False
    return (
        sqlstate_of(error) in _SQLSTATES
        or sqlite_code_of(error) in _SQLITE_CODES
        or mysql_code_of(error) in _MYSQL_CODES
    )


# -- errors: always -------------------------------------------------------------------------------


def note_error(context: ExceptionContext) -> None:
    """Note an error of a scope's database, and of what kind it is."""
    scope = current.get(None) or scope_of(context.connection)
    if scope is not None:
        _note_on(scope, context)
    note_told(context)
    suspect(context)


def _note_on(scope: Scope, context: ExceptionContext) -> None:
    error = context.original_exception
    if is_lost(context):
        if context.connection is not None:
            # asyncpg's plain ConnectionResetError, an error that announces the end: SQLAlchemy
            # then throws away this connection, and all others of the pool that are as old.
            context.is_disconnect = True
        if not _is_of_commit(scope, context):
            note_loss(scope, error)
    elif not (_was_left(context) and _is_of_commit(scope, context)):
        if is_refusal(error):
            note_refusal(scope, error)
        _note_failed(scope, context)


def _was_left(context: ExceptionContext) -> bool:
    """Tell whether a statement was left before its answer: by psycopg, or by a cancellation."""
    return is_unanswered(context) or not isinstance(context.original_exception, Exception)


def _is_of_commit(scope: Scope, context: ExceptionContext) -> bool:
    """No answer has come: note whether a commit is in doubt now."""
    error, connection = context.original_exception, context.connection
    if connection is None or not ends_transaction(context.statement) or not was_sent(error):
        return False
    trial = find_trial(scope)
    attempt = None if trial is None else trial.of(connection)
    if attempt is not None:
        attempt.state = LOST
        attempt.error = error
    elif is_committing(scope):
        note_broken(scope)
    else:
        return False
    return True


def _note_failed(scope: Scope, context: ExceptionContext) -> None:
    """A COMMIT that has failed for sure was none."""
    trial = find_trial(scope)
    if trial is not None and context.connection is not None and ends_transaction(context.statement):
        attempt = trial.of(context.connection)
        if attempt is not None:
            trial.resolve(attempt, failed=True)


# -- commits: with `retries` alone -----------------------------------------------------------------


def note_error_of_pool(error: Exception) -> None:
    """Note a new connection that was lost while SQLAlchemy set it up."""
    if is_lost_in_set_up(error):
        _on_refused_connect(error)


def _on_refused_connect(error: Exception) -> None:
    scope = current.get(None)
    if scope is not None:
        note_loss(scope, error)


def _on_statement(connection: Connection, _: Any, statement: str, *__: Any) -> None:
    scope, dialect = current.get(None), connection.dialect.name
    if scope is None and may_write(statement, dialect) and is_autocommit(connection):
        scope = scope_of(connection)
    trial = None if scope is None else trial_for(scope)
    if scope is not None and trial is not None and may_write(statement, dialect):
        trial.writing.add(connection.get_transaction())
        if is_autocommit(connection):
            note_commit(scope)  # it stands at once


def _on_commit(connection: Connection) -> None:
    """A COMMIT is about to be sent: know the transaction by its id."""
    scope = current.get(None)
    trial = None if scope is None else trial_for(scope)
    if scope is None or trial is None:
        return
    transaction = connection.get_transaction()
    # The second: a thread that knows nothing of the scope may have written in its transaction.
    wrote = transaction in trial.writing or not has_only_read(connection)
    attempt = Attempt(connection, transaction, wrote)
    attempt.is_of_session = is_of_session(scope, connection)
    if attempt.wrote and can_be_asked(connection):
        try:
            attempt.trace = trace_of(connection)
            attempt.wrote = attempt.trace is not None
        except DBAPIError as error:
            if not tells_of_aborted(error):
                raise  # a line that broke before COMMIT was sent
            if is_committing(scope):
                raise aborted_by(scope, connection)  # noqa: B904 - its cause is the statement that failed
            return  # the application's own commit of an aborted transaction does what it does
    trial.attempts.append(attempt)


def _on_twophase(connection: Connection, *_: Any) -> None:
    scope = current.get(None)
    trial = None if scope is None else trial_for(scope)
    if trial is not None and trial.of(connection) is None:
        transaction = connection.get_transaction()
        trial.attempts.append(Attempt(connection, transaction, wrote=True))


RETRY_LISTENERS = (
    ("before_cursor_execute", _on_statement),
    ("commit", _on_commit),
    ("prepare_twophase", _on_twophase),
    ("commit_twophase", _on_twophase),
    ("do_connect", note_refused_connects(_on_refused_connect)),
)
"""Note on scopes that may be run again what they have written and committed."""


# -- waiting --------------------------------------------------------------------------------------


def wait_before_retry(scope: Scope, tries: int) -> float:
    """Return the seconds to wait before the request of `scope` is run again.

    Args:
        scope: of the last try.
        tries: how many tries there have been.
    """
    return bridging(tries) if is_loss(scope) else backoff(tries)


def backoff(tries: int) -> float:
    """Return the seconds to wait for other transactions: "full jitter", at most one second.

    Args:
        tries: how many tries there have been.

    See https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    return random.uniform(0, min(1.0, 0.005 * 2.0 ** min(tries, 10)))  # noqa: S311 - no secret


def bridging(tries: int) -> float:
    """Return the seconds to wait for a database that is away: five waits are 2.3 to 3.1 seconds.

    Args:
        tries: how many tries there have been.
    """
    return random.uniform(0.75, 1.0) * min(3.0, 0.1 * 2.0 ** min(tries, 10))  # noqa: S311 - no secret
