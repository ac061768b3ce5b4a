"""The list of open transactions: since when, from which line, by which thread or task.

It is written at each begin, so it has to be cheap, and it keeps nothing alive: a tie is listed by a
weak reference, a line is a code object and a number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING
from weakref import ref

from rope_middleware.running.forks import at_fork
from rope_middleware.session.code.lines import application_line

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from rope_middleware.session.tie import Tie

__all__ = [
    "DEPTH",
    "OF_BODY",
    "Strand",
    "call_at_begins",
    "call_at_forks",
    "is_alone",
    "is_of_body",
    "is_open",
    "listed",
    "listing",
    "name_of",
    "note_begin",
    "open_ties",
    "strand",
    "strand_of",
    "unlist",
]

Strand = object
"""What runs, and can wait for a connection: a task of asyncio, or the ident of a thread."""

# Above `note_begin` and its caller there are always frames of SQLAlchemy's, on 2.0 and 2.1: the
# event's call, SessionTransaction.__init__, Session._autobegin_t, and who calls that.
DEPTH = 7

_ties: set[ref[Tie]] = set()
unlist: Callable[[ref[Tie]], object] = _ties.discard


class _Listing:
    """Where a tie is listed; in a place of its own, for `call_at_begins` replaces it."""

    __slots__ = ("add",)

    add: Callable[[ref[Tie]], object]


listing: _Listing = _Listing()
listing.add = _ties.add


def note_begin(tie: Tie, depth: int = DEPTH) -> None:
    """Write down that the session of `tie` begins a transaction here.

    Args:
        tie: the session's.
        depth: how many frames from here on are surely not the application's.
    """
    is_new = tie.line is None
    tie.since = monotonic()
    tie.line = application_line(depth)
    tie.thread = get_ident()
    if tie.is_async:
        try:
            task = asyncio.current_task()
        except RuntimeError:  # outside of any loop: add() begins a transaction, too
            task = None
        tie.task = None if task is None else ref(task)
    if is_new:  # not before all of it is written down: others read the list meanwhile
        listing.add(ref(tie, unlist))


def call_at_begins(func: Callable[[], bool]) -> None:
    """Call `func` when a session is listed, or at once where one is, until it returns True.

    Afterwards it costs a transaction nothing.
    """

    def list_and_call(one: ref[Tie]) -> None:
        _ties.add(one)
        if func() and listing.add is list_and_call:
            listing.add = _ties.add

    listing.add = list_and_call
    if _ties and func():
        listing.add = _ties.add


def strand() -> Strand:
    """Return what runs here, for an async session: a task, or else the thread.

    For a sync one it is always the thread: in a task it blocks the event loop and all of its tasks.
    """
    try:
        return asyncio.current_task() or get_ident()
    except RuntimeError:
        return get_ident()


def strand_of(tie: Tie) -> Strand | None:
    """Return what has begun the transaction of `tie`; None for a task that is gone."""
    return tie.thread if tie.task is None else tie.task()


def open_ties() -> list[Tie]:
    """Return the ties of all sessions that have a transaction open, the oldest first."""
    ties = [tie for one in listed() if (tie := one()) is not None and is_open(tie)]
    return sorted(ties, key=lambda tie: tie.since)


def listed() -> list[ref[Tie]]:
    """Return the ties of all sessions that live and have had a transaction."""
    while True:
        try:
            return list(_ties)
        except RuntimeError:  # the list has changed meanwhile
            continue


def is_alone() -> bool:
    """Tell whether no more than one session lives that has had a transaction."""
    return len(_ties) < 2


def is_open(tie: Tie) -> bool:
    """Tell whether the transaction that `tie` has begun last is still open."""
    transaction = tie.transaction
    return transaction is not None and transaction.session.get_transaction() is transaction


def name_of(tie: Tie) -> str:
    """Name what the session of `tie` belongs to, as the subject of a sentence."""
    return "a session outside of scopes" if tie.scope is None else repr(tie.scope.name)


OF_BODY = "_rope_middleware_of_body"
"""In a transaction's ``__dict__``: a response's body has begun it, by a `begin()` block."""


def is_of_body(session: Session) -> bool:
    """Tell whether `session` is in a block of a response's body: see `code.bodies`."""
    transaction = session.get_transaction()
    return transaction is not None and OF_BODY in transaction.__dict__


_leave: list[Callable[[Tie], object]] = []


def call_at_forks(func: Callable[[Tie], object]) -> None:
    """Call `func` in each forked process with everything that is listed: it is the parent's."""
    _leave.append(func)


def _after_fork() -> None:
    for one in listed():
        tie = one()
        if tie is not None:
            for func in _leave:
                func(tie)
    _ties.clear()


at_fork(after_in_child=_after_fork)  # before anybody looks at the list there
