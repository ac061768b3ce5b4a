"""A connection that is held while its code waits for something else (H4).

A model, another service, a slow client: the connection does nothing meanwhile, and the pool has 15
of them. A thread looks twice a second, so that no request pays for it. It keeps numbers and weak
references between two looks, and takes frames only where a transaction was idle for long.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

from sqlalchemy.engine import Connection

from rope_middleware.scope.scope import is_over
from rope_middleware.session.code.lines import text_of
from rope_middleware.session.code.telling import HOUR, tell_hourly
from rope_middleware.session.code.where import is_computing, is_in_call, now
from rope_middleware.session.connections import connections_out, driver_of
from rope_middleware.session.holding.begun import is_open, listed, name_of
from rope_middleware.session.holding.door import mark_of
from rope_middleware.session.sql.notes import notes_of

if TYPE_CHECKING:
    from rope_middleware.session.code.lines import Line
    from rope_middleware.session.tie import Tie

__all__ = ["EVERY", "LIMIT", "look"]

LIMIT = 5.0  # seconds without use that are told
EVERY = 0.5  # seconds from one look to the next


class _Idle(NamedTuple):
    """What was seen of an open transaction."""

    mark: tuple[Any, ...]
    """Another one as soon as anything was executed, or another transaction has begun."""
    since: float
    """When it was seen in use last."""
    again: float
    """When it may be told of."""


_seen: dict[ref[Tie], _Idle] = {}


def look() -> bool:
    """Look at every open transaction; return whether there are any sessions at all."""
    global _seen
    ties = listed()
    seen: dict[ref[Tie], _Idle] = {}
    for one in ties:
        # A session may begin, end or go at any moment: then it is in use.
        with suppress(Exception):
            found = _look_at(one)
            if found is not None:
                seen[one] = found
    _seen = seen
    return bool(ties)


def _look_at(one: ref[Tie]) -> _Idle | None:
    tie, at = one(), monotonic()
    # Most are over before we come by a second time, and cost next to nothing.
    if tie is None or at - tie.since < EVERY or not is_open(tie):
        return None
    out = connections_out(tie)
    if not out or (tie.scope is not None and is_over(tie.scope)):
        return None
    mark, before = _mark(tie, out), _seen.get(one)
    if before is None or before.mark != mark or _is_used(tie, out):
        return _Idle(mark, at, -math.inf)
    if at - before.since <= LIMIT / 2 or at < before.again:
        return before
    if is_computing(tie):  # asked several times: see there
        return _Idle(mark, at, -math.inf)
    if at - before.since <= LIMIT:
        return before
    if is_in_call(tie) and mark_of(tie) is None:  # a COMMIT, say; who has a mark waits for the pool
        return _Idle(mark, at, -math.inf)
    _tell(tie, tie.line, mark, at - before.since)
    return _Idle(mark, before.since, at + HOUR)


def _mark(tie: Tie, out: Collection[Connection]) -> tuple[Any, ...]:
    done = map(notes_of, out)
    return tie.since, *((len(notes), notes[-1][0] if notes else None) for notes in done)


# Of psycopg and psycopg2: "command in progress", which SQLAlchemy need not know of (a COPY).
# https://www.psycopg.org/psycopg3/docs/api/pq.html#psycopg.pq.TransactionStatus
_ACTIVE = 1


def _is_used(tie: Tie, out: Collection[Connection]) -> bool:
    """Tell whether a statement is under way, or a result is being read."""
    for connection in out:
        notes = notes_of(connection)
        if notes.is_executing() or notes.is_read_in_parts():
            return True
        if notes.has_unread() and is_in_call(tie):
            return True
        info = getattr(driver_of(connection), "info", None)
        if getattr(info, "transaction_status", None) == _ACTIVE:
            return True
    return False


def _tell(tie: Tie, began: Line | None, mark: tuple[Any, ...], seconds: float) -> None:
    here = now(tie) or began
    # It may have ended while we looked: then its thread does something else.
    if began is not None and here is not None and is_open(tie) and tie.since == mark[0]:
        tell_hourly(
            "held",
            (began, here),
            "%s has held a connection for %.1f seconds without using it, and waits for something "
            "else: its transaction was begun at %s, its code is at %s. Call release() before the "
            "wait, or commit() where something is written.",
            name_of(tie),
            seconds,
            text_of(began),
            text_of(here),
        )
