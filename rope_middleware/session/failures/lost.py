"""Which errors tell of a lost connection, or of one that could not be made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from importlib import import_module
from typing import Any

from sqlalchemy.engine import Connection, Dialect, ExceptionContext

from rope_middleware.session.failures.aborted import ACTIVE, transaction_status
from rope_middleware.session.failures.codes import mysql_code_of, sqlstate_of

__all__ = [
    "SERVER_GONE",
    "is_lost",
    "is_lost_in_set_up",
    "is_told",
    "is_unanswered",
    "note_refused_connects",
    "note_told",
    "was_sent",
]

# 57P01 admin_shutdown, 57P02 crash_shutdown, 57P03 cannot_connect_now; class 08 is
# "connection exception": https://www.postgresql.org/docs/current/errcodes-appendix.html
SERVER_GONE: frozenset[str] = frozenset({"57P01", "57P02", "57P03"})

# 1053 server shutdown in progress, 1927 connection was killed; 2006, 2013: gone, lost (the
# client's): https://mariadb.com/kb/en/mariadb-error-codes/
_MYSQL_CODES = frozenset({1053, 1927, 2006, 2013})

# A connection that another password or name would cure, and no other try: SQLSTATEs of classes
# 28 (authorization) and 3D (no such database), 1044, 1045 and 1049 of MariaDB and MySQL.
_HOPELESS_STATES = ("28", "3D")
_HOPELESS_CODES = frozenset({1044, 1045, 1049})


def is_lost(context: ExceptionContext) -> bool:
    """Tell whether a connection was lost, or could not be made, so that another try may do.

    Args:
        context: of the engine's ``handle_error`` event.
    """
    error = context.original_exception
    if not isinstance(error, Exception) or context.is_pre_ping:
        # A cancellation is none; and a dead connection that the pool finds is replaced by it.
        return False
    if context.connection is None:
        return not _is_hopeless(error)
    return (
        context.is_disconnect
        or isinstance(error, ConnectionError)
        or _says_so(error)
        or (isinstance(error, context.dialect.loaded_dbapi.Error) and is_unanswered(context))
    )


def is_lost_in_set_up(error: Exception) -> bool:
    """Tell whether a connection was lost after asyncpg has made it, and before it was in its pool.

    The error is asyncpg's own: for SQLAlchemy this is no statement.
    """
    return (
        isinstance(error, OSError)
        or _says_so(error)
        or (type(error).__module__.startswith("asyncpg.") and not was_sent(error))
    )


_TOLD = "_rope_middleware_loss_told"


def note_told(context: ExceptionContext) -> None:
    """Note on a lost connection that its loss is told to the application, by an error.

    A cancellation tells nothing: a client has hung up, and who reads for it is cut off.
    """
    is_error = isinstance(context.original_exception, Exception)
    if context.is_disconnect and is_error and context.connection is not None:
        context.connection.__dict__[_TOLD] = True


def is_told(connection: Connection) -> bool:
    """Tell whether the application has been told, by an error, that `connection` is lost."""
    return _TOLD in connection.__dict__


def is_unanswered(context: ExceptionContext) -> bool:
    """Tell whether psycopg has left a statement before its answer: the server may have done it.

    A line may be reset in the instant in which psycopg looks at its socket. psycopg raises
    "connection socket closed" then, and takes the connection for open. So does SQLAlchemy. Or a
    signal handler has raised something.

    Args:
        context: of the engine's ``handle_error`` event.
    """
    error, connection = context.original_exception, context.connection
    if connection is None or sqlstate_of(error):  # that is an answer
        return False
    return (
        transaction_status(connection) == ACTIVE
        # This one was not even sent: the application's own COPY is under way, for example.
        and "another command is already in progress" not in str(error)
    )


def _says_so(error: Exception) -> bool:
    state = sqlstate_of(error)
    if state:
        return state in SERVER_GONE or state.startswith("08")
    return mysql_code_of(error) in _MYSQL_CODES


def _is_hopeless(error: Exception) -> bool:
    state = sqlstate_of(error)
    if state:
        return state.startswith(_HOPELESS_STATES)
    # libpq tells of a connection that was not made by its text alone.
    return mysql_code_of(error) in _HOPELESS_CODES


def was_sent(error: BaseException) -> bool:
    """Tell whether what failed with `error` may have reached the server.

    The drivers look at the connection first, and say of one that is closed already that it is.
    """
    cause = getattr(error, "orig", None) or error
    return "connection is closed" not in str(cause)


def note_refused_connects(note: Callable[[Exception], None]) -> Callable[..., None]:
    """Make a ``do_connect`` listener that hears of connections that asyncpg cannot make.

    asyncpg raises the system's own OSError, of which SQLAlchemy's ``handle_error`` is not told:
    it is for errors of the DBAPI. SQLAlchemy 2.0 takes no error of asyncpg's connect for one.

    Args:
        note: called with each such error.
    """

    def listener(dialect: Dialect, _: Any, __: list[Any], parameters: dict[str, Any]) -> None:
        if dialect.driver != "asyncpg":
            return
        connect = parameters.get("async_creator_fn")
        if connect is None:
            connect = import_module("asyncpg").connect
        parameters["async_creator_fn"] = _noting(connect, note)

    return listener


def _noting(
    connect: Callable[..., Awaitable[Any]], note: Callable[[Exception], None]
) -> Callable[..., Awaitable[Any]]:
    @wraps(connect)
    async def connect_and_note(*args: Any, **kwargs: Any) -> Any:
        try:
            return await connect(*args, **kwargs)
        except Exception as error:
            if isinstance(error, OSError) or _says_so(error):
                note(error)
            raise

    return connect_and_note
