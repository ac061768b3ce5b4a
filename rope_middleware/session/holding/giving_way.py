"""An inner scope is about to wait for a connection while its outer scope holds one (S6).

The documented way to work in parallel is a scope for each task. Where such tasks wait for the pool
while their request holds a connection of it, and enough requests do so at a time, nobody ever gets
one. So the outer session gives its connection back when an inner one would wait, as by `release()`;
its next use begins a transaction of its own.

That is done only where nobody can notice, because a new transaction is as good as the old one: it
has read and nothing else (`is_plain_read`), each of its statements saw what was committed at its
time (READ COMMITTED; SQLite outside of a transaction), and nobody is using it. Everybody else keeps
what they have and waits as before: H2 and H3 tell of it.

Why not an error at once? Both are measured: 20 requests that read one row and then gather five
scoped functions, pool of 5 + 10, PostgreSQL. With an error where an outer scope holds a connection,
0 or 1 of 20 are answered; with one in whoever closes the circle, 14; so all 20, in 0.6 s where
release() by hand takes 0.5. And why not at every inner scope, whether it would wait or not? That
would cost each of them a round trip.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection
from types import FrameType
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransactionOrigin
from sqlalchemy.orm import session as _session_module
from sqlalchemy.pool import Pool

from rope_middleware.scope.context import logger, with_outer
from rope_middleware.scope.loop import loop_of
from rope_middleware.session.code.lines import variables_of
from rope_middleware.session.code.stacks import stacks_of_others
from rope_middleware.session.connections import (
    connections_out,
    end_transaction,
    lent_connections,
)
from rope_middleware.session.holding.begun import open_ties
from rope_middleware.session.sql.literals import late
from rope_middleware.session.sql.notes import notes_of
from rope_middleware.session.sql.statements import READS, effect_of
from rope_middleware.session.sql.taking import take
from rope_middleware.session.sql.writes import may_write

if TYPE_CHECKING:
    from rope_middleware.scope.scope import Scope
    from rope_middleware.session.tie import Tie

__all__ = ["give_way", "is_plain_read"]


def give_way(pool: Pool, inner: Scope | None) -> bool:
    """Give back to `pool` a connection that an outer scope of `inner` will not miss.

    Called where a session of `inner` is about to wait for one.

    Returns:
        Whether one was given back.
    """
    outer = list(with_outer(inner))[1:]
    if inner is None or not outer:
        return False
    for tie in open_ties():
        scope = tie.scope
        if scope is not None and any(scope is one for one in outer) and _gives_back(tie, pool):
            logger.info(
                "%r has given its connection back: its inner scope %r would have waited for one",
                scope.name,
                inner.name,
            )
            return True
    return False


def _gives_back(tie: Tie, pool: Pool) -> bool:
    transaction = tie.transaction
    out = connections_out(tie)
    if transaction is None or not any(one.engine.pool is pool for one in out):
        return False
    session = transaction.session
    if (
        not transaction.is_active
        or transaction.origin is not SessionTransactionOrigin.AUTOBEGIN
        or session.in_nested_transaction()
        or lent_connections(transaction)
        or not all(map(_has_only_read, out))
        or not _is_here(tie, out)
        or _is_in_call(session)
    ):
        return False
    is_given = take([*map(notes_of, out)], lambda: end_transaction(transaction, out))
    if is_given and tie.transaction is transaction:
        tie.transaction = tie.flush = None  # they refer to the session: a cycle
    return is_given


def _has_only_read(connection: Connection) -> bool:
    notes = notes_of(connection)
    return (
        # Where nothing was executed, somebody has asked for the connection itself, and keeps it.
        bool(notes.statements())
        and notes.is_whole
        and not connection.in_nested_transaction()
        and _sees_what_is_committed(connection)
        and all(is_plain_read(sql, connection.dialect.name) for sql in notes.sql())
    )


_READ = late(r"\s*(select|with|values)\b", re.IGNORECASE)


def is_plain_read(sql: str, dialect: str = "") -> bool:
    """Tell whether nobody would miss the transaction of a statement: it only reads.

    It writes, locks and sets nothing, and calls no function that may. The answer has to be right
    where it is yes.
    """
    return (
        _READ().match(sql) is not None
        and ";" not in sql
        and effect_of(sql, dialect) == READS
        and not may_write(sql, dialect)
    )


_EACH_ANEW = frozenset({"READ COMMITTED", "READ UNCOMMITTED", "AUTOCOMMIT"})


def _sees_what_is_committed(connection: Connection) -> bool:
    """Tell whether each statement sees what is committed at its time, and not a snapshot."""
    if connection.dialect.name == "sqlite":
        # Python's driver begins a transaction with the first write, unless it is told otherwise.
        driver: Any = connection.connection.driver_connection
        return getattr(driver, "in_transaction", True) is False
    level = connection.get_execution_options().get("isolation_level")
    return (level or connection.default_isolation_level) in _EACH_ANEW


# -- is somebody using the session? ----------------------------------------------------------------


def _is_here(tie: Tie, out: Collection[Connection]) -> bool:
    """Tell whether the session is one of this thread's event loop, where it is async."""
    if not any(connection.dialect.is_async for connection in out):
        return True
    return tie.scope is not None and loop_of(tie.scope) is asyncio.get_running_loop()


def _is_in_call(session: Session) -> bool:
    """Tell whether another thread is inside of a call on the session.

    What it would do next, it would do on the connection that is back in its pool by then.
    """
    return any(
        frame.f_code.co_filename == _SESSION_FILE and _is_call_on(frame, session)
        for frames in stacks_of_others().values()
        for frame in frames
    )


_SESSION_FILE = str(_session_module.__file__)


def _is_call_on(frame: FrameType, session: Session) -> bool:
    found = variables_of(frame).get("self")
    return found is session or getattr(found, "session", None) is session
