"""A commit in doubt: the line broke after COMMIT was sent, and before its answer came.

PostgreSQL can be asked what became of it, if the transaction's id is known from before
(https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-SNAPSHOT). The question
goes over a connection of its own, when the session has given back the one that is lost.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, ProgrammingError

from rope_middleware.running.finish import at_most, pause
from rope_middleware.running.threads import NEEDS, finish_in_thread
from rope_middleware.scope.context import current, unbind
from rope_middleware.session.failures.codes import sqlstate_of
from rope_middleware.session.failures.trial import Attempt, Trace

__all__ = [
    "ASYNC_ASKING",
    "SYNC_ASKING",
    "Asking",
    "Verdict",
    "can_be_asked",
    "trace_of",
    "verdict_on",
]


class Verdict(enum.Enum):
    """What became of a commit."""

    COMMITTED = enum.auto()
    ABORTED = enum.auto()
    UNKNOWN = enum.auto()


_FIRST_WAIT, _LONGEST_WAIT = 0.01, 0.5  # seconds

# 22023 invalid_parameter_value: "transaction ID ... is in the future"
_IN_THE_FUTURE = "22023"


def can_be_asked(connection: Connection) -> bool:
    """Tell whether the server knows what became of a transaction: PostgreSQL, from 13 on."""
    dialect = connection.dialect
    return dialect.name == "postgresql" and (dialect.server_version_info or ()) >= (13,)


def trace_of(connection: Connection) -> Trace | None:
    """Return the trace of the transaction that `connection` is in; None where it wrote nothing.

    One round trip.
    """
    xid, until = connection.exec_driver_sql(
        "SELECT pg_current_xact_id_if_assigned()::text,"
        " extract(epoch FROM clock_timestamp())::float8"
    ).one()
    return None if xid is None else Trace(int(xid), float(until))


def _ask(connection: Connection, trace: Trace) -> Verdict | None:
    """Ask once what became of the transaction; None where it is to be asked again."""
    in_recovery, is_new, has_restarted = connection.exec_driver_sql(
        "SELECT pg_is_in_recovery(), coalesce("
        "now() - pg_last_xact_replay_timestamp() < interval '1 hour', false),"
        f" pg_postmaster_start_time() > to_timestamp({trace.until!r}::float8)"
    ).one()
    if in_recovery:
        return None  # a standby, which may be about to take over
    try:
        status = connection.exec_driver_sql(f"SELECT pg_xact_status('{trace.xid}'::xid8)").scalar()
    except DBAPIError as error:
        if sqlstate_of(error.orig) == _IN_THE_FUTURE:
            return Verdict.ABORTED  # it never came to this server, which has taken over since
        raise
    if status == "in progress":
        return None
    if status == "aborted":
        return Verdict.ABORTED
    # A standby that has taken over just now, without our transaction, may have given its id away.
    if status != "committed" or is_new:
        return Verdict.UNKNOWN
    return _is_still_ours(connection, trace, has_restarted)


def _is_still_ours(connection: Connection, trace: Trace, has_restarted: bool) -> Verdict:
    """Tell whether the id that is committed is that of our transaction.

    A server that was killed has lost what it had not written yet, with the ids in it, and gives
    them away again. The last checkpoint tells: recovery ends with one, which stands alone (its redo
    point is its own position), and it names the next id to be given away.
    """
    try:
        next_xid, is_alone, second = connection.exec_driver_sql(
            "SELECT split_part(next_xid, ':', 1)::int8 << 32 | split_part(next_xid, ':', 2)::int8,"
            " redo_lsn = checkpoint_lsn, extract(epoch FROM checkpoint_time)::int8"
            " FROM pg_control_checkpoint()"
        ).one()
    except DBAPIError:  # a service that shows it to nobody
        return Verdict.UNKNOWN if has_restarted else Verdict.COMMITTED
    if next_xid > trace.xid:
        # Recovery knew of it, unless this checkpoint is a later one.
        return Verdict.UNKNOWN if has_restarted and not is_alone else Verdict.COMMITTED
    if has_restarted or second > trace.until:
        return Verdict.ABORTED  # the id was free, after our transaction had it
    # The time of a checkpoint is known to the second.
    return Verdict.UNKNOWN if is_alone and second == int(trace.until) else Verdict.COMMITTED


def _ask_over(engine: Engine, trace: Trace) -> Verdict | None:
    with engine.connect() as connection:
        return _ask(connection, trace)


class Asking(Protocol):
    """How a question to the server is carried out, here or in async code."""

    async def ask(self, engine: Engine, trace: Trace, seconds: float, /) -> Verdict | None:
        """Ask over a connection of its own, for at most so many seconds."""

    async def pause(self, seconds: float, /) -> None:
        """Wait."""


class SyncAsking:
    """In this thread."""

    async def ask(self, engine: Engine, trace: Trace, _: float, /) -> Verdict | None:
        return _ask_over(engine, trace)

    async def pause(self, seconds: float, /) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - it runs where nothing else waits for this thread


class AsyncAsking:
    """On the event loop."""

    async def ask(self, engine: Engine, trace: Trace, seconds: float, /) -> Verdict | None:
        if not engine.dialect.is_async:  # of a sync session in async code
            return await finish_in_thread(lambda _: _ask_over(engine, trace), None, seconds, NEEDS)
        from sqlalchemy.ext.asyncio import AsyncEngine

        async def ask() -> Verdict | None:
            async with AsyncEngine(engine).connect() as connection:
                return await connection.run_sync(_ask, trace)

        return await at_most(seconds, ask())

    async def pause(self, seconds: float, /) -> None:
        await pause(seconds)


SYNC_ASKING = SyncAsking()
ASYNC_ASKING = AsyncAsking()


async def verdict_on(attempt: Attempt, asking: Asking, seconds: float) -> Verdict:
    """Find out what became of a commit whose answer was lost.

    Args:
        attempt: the commit.
        asking: how the server is asked.
        seconds: after which it is left at UNKNOWN.
    """
    if not attempt.wrote:
        return Verdict.COMMITTED  # or not: it makes no difference
    trace = attempt.trace
    if trace is None:
        return Verdict.UNKNOWN
    token = current.set(None)  # what goes wrong here is no matter of the scope
    try:
        return await _ask_on(lambda left: asking.ask(attempt.engine, trace, left), asking, seconds)
    finally:
        unbind(token)


async def _ask_on(
    ask: Callable[[float], Awaitable[Verdict | None]], asking: Asking, seconds: float
) -> Verdict:
    end = time.monotonic() + seconds
    wait = _FIRST_WAIT
    while True:
        try:
            verdict = await ask(max(end - time.monotonic(), 0.1))
        except ProgrammingError:
            return Verdict.UNKNOWN  # it does not know the functions
        except Exception:  # it is away still: the driver's errors, OSError, time-outs
            verdict = None
        if verdict is not None:
            return verdict
        if time.monotonic() + wait > end:
            return Verdict.UNKNOWN
        await asking.pause(wait)
        wait = min(2 * wait, _LONGEST_WAIT)
