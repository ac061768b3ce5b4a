"""What is known of the transactions of a request that may be run again (``retries``).

A `Trial` lies on the scope. The engine's events fill it: they see every COMMIT, also one that the
application makes by ``session.connection().commit()``, and whatever its own listeners raise.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.base import Transaction

from rope_middleware.scope.order import held
from rope_middleware.scope.outcome import retries_of, set_trial, trial_of
from rope_middleware.scope.scope import Scope, registries_of
from rope_middleware.session.connections import (
    connections_of,
    lent_connections,
    made_connections,
)
from rope_middleware.session.holding.begun import listed
from rope_middleware.session.tie import tie_of

__all__ = [
    "LOST",
    "SENT",
    "Attempt",
    "Trace",
    "Trial",
    "attempts_lost",
    "find_trial",
    "is_of_session",
    "scope_of",
    "trial_for",
]

SENT, LOST = range(2)


class Trace(NamedTuple):
    """By what a transaction that is about to commit is found again."""

    xid: int
    """Its id, with the epoch."""
    until: float
    """The server's clock when it had the id already, in seconds since 1970."""


class Attempt:
    """A COMMIT that was sent, and has not failed.

    Args:
        connection: it goes over.
        transaction: of the connection.
        wrote: whether the transaction may have written something.
    """

    __slots__ = (
        "connection",
        "engine",
        "error",
        "is_of_session",
        "is_twophase",
        "state",
        "trace",
        "transaction",
        "wrote",
    )

    def __init__(
        self, connection: Connection, transaction: Any, wrote: bool, is_twophase: bool = False
    ) -> None:
        self.connection: Connection = connection
        self.engine: Engine = connection.engine
        self.transaction: Transaction | None = transaction
        self.wrote: bool = wrote
        self.is_twophase: bool = is_twophase
        self.is_of_session: bool = True  # of the scope; False of a connection besides
        self.trace: Trace | None = None  # by which PostgreSQL can be asked, where it is known
        self.error: BaseException | None = None  # by which its answer was lost
        self.state: int = SENT


class Trial:
    """One try of a request."""

    __slots__ = ("attempts", "writing")

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.writing: set[object] = set()  # the transactions that may have written

    def of(self, connection: Connection) -> Attempt | None:
        """Return the attempt to commit what `connection` is in, or None."""
        transaction = connection.get_transaction()
        return next((one for one in self.attempts if one.transaction is transaction), None)

    def lost(self) -> list[Attempt]:
        """Return the attempts whose answer was lost, and that nobody has asked about yet."""
        return [one for one in self.attempts if one.state == LOST]

    def stands(self, is_lost: bool) -> bool:
        """Tell whether something is committed, so that the request is not run again (C6, C8).

        Args:
            is_lost: after a lost connection commits that no session has made count, too.
        """
        return any(
            one.wrote and one.state == SENT and (is_lost or one.is_of_session)
            for one in self.attempts
        )

    def resolve(self, attempt: Attempt, failed: bool) -> None:
        """It is known what became of `attempt`, or that nobody can tell."""
        attempt.state = SENT
        if failed:
            self.attempts.remove(attempt)


def is_of_session(scope: Scope, connection: Connection) -> bool:
    """Tell whether `connection` is that of a session of `scope`, its own or lent to it."""
    if registries_of(scope):
        return True  # a plain scoped_session keeps its session itself
    sessions = (key.kind.inner(session) for key, session in held(scope))
    ties = (tie_of(session) for session in sessions if session is not None)
    return any(
        connection in made_connections(tie.transaction)
        or connection in lent_connections(tie.transaction)
        for tie in ties
        if tie is not None
    )


def scope_of(connection: Connection | None) -> Scope | None:
    """Return the scope whose session has `connection` now, or None.

    Asked where something went wrong: who uses a session may know nothing of its scope, as a thread,
    or a task of another context.
    """
    for one in () if connection is None else listed():
        tie = one()
        if tie is not None and any(c is connection for c, *_ in connections_of(tie.transaction)):
            return tie.scope
    return None


def trial_for(scope: Scope) -> Trial | None:
    """Return the trial of `scope`, made where it has none yet; None where it is not run again."""
    found = find_trial(scope)
    if found is None and retries_of(scope):
        found = Trial()
        set_trial(scope, found)
    return found


def find_trial(scope: Scope) -> Trial | None:
    """Return the trial of `scope`, or None."""
    return cast("Trial | None", trial_of(scope))


def attempts_lost(scope: Scope) -> list[Attempt]:
    """Return what is `Trial.lost` of `scope`."""
    trial = find_trial(scope)
    return [] if trial is None else trial.lost()
