"""`jenny.release()`: the connection goes back, the session keeps what it has loaded (J7).

What ends the transaction is `SessionTransaction.close()`, by which `Session.close()` ends it, too.
It touches no object and not the identity map. (`Session.rollback()` would expire every object,
`Session.close()` expunge them, and `Session.commit()` would write.) That is right where nothing was
written since the last commit, so we look for that first.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, SessionTransaction, SessionTransactionOrigin

from rope_middleware.errors import RopeError
from rope_middleware.scope.context import logger
from rope_middleware.scope.reading import reads_only
from rope_middleware.session.connections import end_transaction, lent_connections, made_connections
from rope_middleware.session.guard.sessions import in_turn
from rope_middleware.session.sql.notes import is_watched, notes_of
from rope_middleware.session.tie import tie_of
from rope_middleware.session.unsaved import pending

if TYPE_CHECKING:
    from rope_middleware.session.registry import ScopeRegistry

__all__ = ["HAS_WRITTEN", "has_connection", "inner_session", "release"]


def inner_session(registry: ScopeRegistry[Any]) -> Session:
    """Return the Session of the current session, which there is.

    Raises:
        RopeError: it is none of SQLAlchemy's.
    """
    made = registry()
    session = registry.kind.inner(made)
    if session is None:
        raise RopeError(
            f"release() takes a session of SQLAlchemy's; the factory has made {made!r}."
        )
    return session  # type: ignore[no-any-return]


def has_connection(session: Session) -> bool:
    """Tell whether `release` will talk to the database."""
    return bool(made_connections(session.get_transaction()))


def release(session: Session) -> None:
    """Give the session's connection back to its pool; what it has loaded stays as it is.

    Raises:
        RopeError: that would lose something written, or a savepoint, a ``begin()`` block or a
            result is open.
    """
    in_turn(session, _release)


def _release(session: Session) -> None:
    transaction = session.get_transaction()
    made = made_connections(transaction)
    lent = lent_connections(transaction)
    # A lent connection's notes begin with the session's transaction where it is the session's bind.
    noted = [*made, *(one for one in lent if one is session.bind)]
    _refuse([*pending(session), *(name for one in noted for name in notes_of(one).dml())])
    if transaction is None:
        return
    _refuse_open(session, transaction, made)
    if lent and (not made or session.join_transaction_mode == "control_fully"):
        # In that mode the end of the session's transaction is that of the application's.
        logger.info("release() leaves alone a connection that the application has lent")
        return
    tie = tie_of(session)
    for connection in made:
        if tie is None or tie.scope is None or not reads_only(tie.scope):
            _refuse_unseen(connection)
    if made:
        end_transaction(transaction, made)
        if tie is not None and tie.transaction is transaction:
            tie.transaction = tie.flush = None  # they refer to the session: a cycle


# -- what must not be lost -------------------------------------------------------------------------


def _refuse(written: list[str]) -> None:
    if written:
        names = ", ".join(dict.fromkeys(written))
        raise RopeError(
            f"release() would lose what is not committed: {names}. Call commit() first, or "
            "rollback() if it is not to be kept."
        )


def _refuse_open(
    session: Session, transaction: SessionTransaction, made: Collection[Connection]
) -> None:
    """Check that nothing is open that ends with the transaction.

    Raises:
        RopeError: something is.
    """
    tie = tie_of(session)
    if not transaction.is_active:
        what, cure = "the transaction has failed, or is prepared", "call rollback() or commit()"
    elif session.in_nested_transaction() or any(one.in_nested_transaction() for one in made):
        what, cure = "a savepoint is open", "end it, and commit() what was written in it"
    elif transaction.origin is SessionTransactionOrigin.BEGIN:
        # Also of a begin_nested() that came first, and has ended: nothing public tells the two.
        what, cure = "begin() has opened the transaction", "leave its block, or call commit()"
    elif tie is not None and tie.flush is not None and tie.flush[0].is_active:
        what, cure = "a flush is under way", "call commit() after it"
    elif any(notes_of(one).has_unread() for one in made):
        what = "a result is still being read, or a statement is under way"
        cure = "read the result to its end with all(), or close() it"
    else:
        return
    raise RopeError(f"release() cannot give the connection back: {what}. First, {cure}.")


_UNSEEN = "text, or a function that writes"

# Has this transaction written? Row locks (SELECT ... FOR UPDATE) and sequences take a transaction
# id as well; neither is anything to lose. What writes holds a stronger lock on some relation, or
# has taken its id for something that is no relation.
HAS_WRITTEN = """\
SELECT CASE WHEN txid_current_if_assigned() IS NULL THEN false ELSE (
    SELECT coalesce(bool_or(writes), false) OR NOT coalesce(bool_or(takes_id), false) FROM (
        SELECT relkind IS DISTINCT FROM 'S' AND mode NOT IN ('AccessShareLock', 'RowShareLock')
                   AS writes,
               relkind IS NOT DISTINCT FROM 'S' OR mode = 'RowShareLock' AS takes_id
        FROM pg_catalog.pg_locks LEFT JOIN pg_catalog.pg_class ON pg_class.oid = relation
        WHERE pid = pg_backend_pid() AND locktype = 'relation' AND granted
    ) AS held
) END"""


def _refuse_unseen(connection: Connection) -> None:
    """Check that nothing was written that SQLAlchemy did not compile.

    PostgreSQL can be asked. Of other databases the first word of a textual statement tells, which
    is good enough for the log, and for no error.

    Raises:
        RopeError: something was.
    """
    notes = notes_of(connection)
    is_noted = is_watched(connection)
    if connection.dialect.name == "postgresql":
        try:
            has_written = connection.exec_driver_sql(HAS_WRITTEN).scalar()
        except DBAPIError:  # the transaction is aborted: there is nothing left to lose
            return
        if has_written:
            _refuse(notes.textual_dml() or [_UNSEEN])
    elif not is_noted:
        raise RopeError(
            f"release() cannot tell whether anything was written by {connection.engine}, which "
            "this session was given by binds= or bind_arguments for the first time in this "
            "process. Call commit(), or rollback() if nothing is to be kept."
        )
    elif written := notes.textual_dml():
        logger.warning(
            "release() rolls back what was written by text: %s. Call commit() before it.",
            ", ".join(written),
        )
