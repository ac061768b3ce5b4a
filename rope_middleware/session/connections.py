"""Which connections a session has out, and which of them the application has lent to it.

A connection that the application gave (`bind=`, `binds=`, `get_bind()`, `bind_arguments`) is the
application's: nobody here closes it, rolls it back or invalidates it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IllegalStateChangeError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry

from rope_middleware.scope.context import class_of, logger

if TYPE_CHECKING:
    from rope_middleware.session.tie import Tie

__all__ = [
    "BLOCK",
    "check_begun",
    "connections_of",
    "connections_out",
    "driver_of",
    "end_transaction",
    "has_connection_out",
    "has_made",
    "has_out",
    "invalidate_all",
    "is_autocommit",
    "leave_block",
    "leave_to_parent",
    "lent_connections",
    "made_connections",
    "refuse_begun",
]


def made_connections(transaction: SessionTransaction | None) -> Collection[Connection]:
    """Return the connections that `transaction` has taken from a pool itself.

    Also of a transaction that has ended: `Session.close()` forgets its connections before it
    fails to close them.

    The one place where a private attribute of SQLAlchemy is read. What is public
    (`SessionTransaction.connections`, from 2.1.7 on) does not say which connections are lent.
    `_connections` has the same form in 2.0 and 2.1: a tuple of the connection, its transaction,
    whether the session commits it and whether the session closes it
    (`tests/promises/test_S3_given_back.py` pins it).
    """
    return {connection for connection, _, _, is_made in connections_of(transaction) if is_made}


def lent_connections(transaction: SessionTransaction | None) -> Collection[Connection]:
    """Return the connections of `transaction` that the application has given to its session."""
    return {connection for connection, _, _, is_made in connections_of(transaction) if not is_made}


def has_made(transaction: SessionTransaction | None) -> bool:
    """Tell whether `transaction` has `made_connections`."""
    for _, _, _, is_made in connections_of(transaction):  # noqa: SIM110 - a generator costs double
        if is_made:
            return True
    return False


def connections_of(
    transaction: SessionTransaction | None,
) -> tuple[tuple[Connection, Any, bool, bool], ...]:
    """Return each connection with what its session does to it: by its engine, and by itself."""
    if transaction is None:
        return ()
    # At once: another thread may be using the session.
    return (*transaction._connections.values(),)  # noqa: SLF001 - by __dict__ it takes twice as long


def connections_out(tie: Tie) -> list[Connection]:
    """Return the session's own connections that have not gone back to their pool."""
    transaction = tie.transaction
    if transaction is None and not tie.connections:
        return []
    return [c for c in (*tie.connections, *made_connections(transaction)) if not c.closed]


def has_out(transaction: SessionTransaction) -> bool:
    """Tell whether `transaction` has taken a connection that has not gone back to its pool.

    Asked several times for each request, and where a transaction begins after another one.
    """
    connections = transaction._connections  # noqa: SLF001 - as in `connections_of`, a call less
    if len(connections) == 2:
        for connection, _, _, is_made in connections.values():
            return is_made and not connection.closed
    for connection, _, _, is_made in (*connections.values(),):  # at once, as there
        if is_made and not connection.closed:
            return True
    return False


def has_connection_out(tie: Tie) -> bool:
    """Tell whether there are `connections_out`."""
    if tie.transaction is not None and has_out(tie.transaction):
        return True
    return bool(tie.connections) and any(not connection.closed for connection in tie.connections)


def driver_of(connection: Connection) -> Any:
    """Return the driver's own connection; None where it is closed or lost."""
    if connection.closed or connection.invalidated:
        return None
    pooled = connection.connection
    # They are one where nothing adapts the driver: three calls less, in each commit of psycopg's.
    return pooled.driver_connection if connection.dialect.is_async else pooled.dbapi_connection


def is_autocommit(connection: Connection, may_ask: bool = True) -> bool:
    """Tell whether what is written by a connection that is in use stands at once.

    Args:
        connection: it is neither closed nor invalidated.
        may_ask: False where the database may not be asked: what only it can tell counts as no.
    """
    option = connection.get_execution_options().get("isolation_level")
    if option is not None:
        return bool(option == "AUTOCOMMIT")
    dialect = connection.dialect
    if dialect.name == "sqlite":
        # The driver's autocommit, with a BEGIN by hand: SQLAlchemy's own recipe.
        driver_connection: Any = connection.connection.driver_connection
        return driver_connection.isolation_level is None and not driver_connection.in_transaction
    if dialect.driver == "mysqlconnector" and not may_ask:
        return False  # its attribute is a query
    detect: Any = getattr(dialect, "detect_autocommit_setting", None)
    try:
        return bool(detect is not None and detect(connection.connection.dbapi_connection))
    except NotImplementedError:
        return False


# The `begin()` block that a session is in. A dependency may have put one around the whole response:
# ``with session.begin(): yield session``. We commit in its middle, and it goes on: background tasks
# and a streamed body write by that session. SQLAlchemy would refuse what comes after a commit in a
# block; without this it is as outside of one, and the block's end does nothing. A private attribute
# of SQLAlchemy's, the same in 2.0 and 2.1 (`tests/promises/test_C10_blocks.py` holds it).
BLOCK = "_trans_context_manager"


def leave_block(session: Session) -> None:
    """Let `session` go on after what we end, where a block of the application's is around it."""
    session.__dict__.pop(BLOCK, None)


def end_transaction(transaction: SessionTransaction, made: Collection[Connection]) -> None:
    """End a transaction that has written nothing; its session keeps all that it has loaded.

    `SessionTransaction.close()` touches no object and not the identity map. A connection that
    cannot be given back is invalidated.

    Args:
        transaction: the session's.
        made: its `made_connections`, which it forgets before it fails.

    Raises:
        IllegalStateChangeError: another task or thread is inside of a call on the session.
    """
    try:
        transaction.close()
    except IllegalStateChangeError:
        raise
    except BaseException as error:
        invalidate_all([connection for connection in made if not connection.closed])
        if not isinstance(error, Exception):
            raise
        logger.error("a connection could not be given back, it is invalidated: %s", class_of(error))


def refuse_begun(engine: Engine) -> None:
    """Let no connection go back to the pool of `engine` within a transaction.

    Where two tasks have used it at once, asyncpg refuses to roll back, and SQLAlchemy takes the
    transaction for ended all the same. Every later request would fail with that connection.
    """
    if engine.dialect.driver == "asyncpg":
        event.listen(engine, "checkin", check_begun)


def check_begun(connection: Any, record: ConnectionPoolEntry) -> None:
    """Throw a connection away that comes back within a transaction."""
    driver_connection: Any = None if connection is None else connection.driver_connection
    if driver_connection is not None and driver_connection.is_in_transaction():
        logger.error(
            "a connection came back within a transaction, it is invalidated: two tasks have "
            "probably used its session at the same time"
        )
        record.invalidate()


class _Parents:
    """Stands in a forked process for a driver's connection, which is the parent's: it is silent.

    What would speak to the database is an error; what ends a transaction only forgets it here.
    """

    def __init__(self, error: Callable[[], Exception]) -> None:
        self._error = error

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse what would say something.

        Raises:
            ScopeClosedError: always.
        """
        raise self._error()

    def rollback(self) -> None:
        """Say nothing: the transaction is the parent's."""

    def close(self) -> None:
        """Say nothing: the parent still uses it."""


def leave_to_parent(connection: Connection, error: Callable[[], Exception]) -> object:
    """Take `connection` from its pool, in a forked process, and say nothing over it any more.

    Args:
        connection: it was open at the fork.
        error: makes what is raised where somebody uses it all the same.

    Returns:
        The driver's connection. It must be kept: its collection would say something.
    """
    pooled: Any = connection.connection  # SQLAlchemy declares it to be read alone
    connection.detach()  # says nothing to the database, as close() and invalidate() do
    parents = pooled.dbapi_connection
    pooled.dbapi_connection = _Parents(error)
    return parents


def invalidate_all(connections: Collection[Connection]) -> None:
    """Throw connections away; never raises an Exception."""
    for connection in connections:
        for step in (connection.invalidate, connection.close):
            try:
                step()
            except Exception:
                logger.exception("a connection could not be invalidated")
