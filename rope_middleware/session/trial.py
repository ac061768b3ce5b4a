"""What is known of the transactions of a request that may be run again (``retries``).

A `Trial` lies on the scope. The engine's events fill it: they see every COMMIT, also one that the
application makes by ``session.connection().commit()``, and whatever its own listeners raise.
"""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.base import Transaction

from rope_middleware.scope.outcome import retries_of, set_trial, trial_of
from rope_middleware.scope.scope import Scope

__all__ = [
    "LOST",
    "SENT",
    "Attempt",
    "Trial",
    "attempts_lost",
    "find_trial",
    "has_sent",
    "trial_for",
]

SENT, LOST = range(2)


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
        "is_twophase",
        "state",
        "transaction",
        "wrote",
        "xid",
    )

    def __init__(
        self, connection: Connection, transaction: Any, wrote: bool, is_twophase: bool = False
    ) -> None:
        self.connection = connection
        self.engine: Engine = connection.engine
        self.transaction: Transaction | None = transaction
        self.wrote = wrote
        self.is_twophase = is_twophase
        self.xid: str | None = None  # PostgreSQL's transaction id, where it is known
        self.error: BaseException | None = None  # by which its answer was lost
        self.state = SENT


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

    def settle(self, attempt: Attempt, failed: bool) -> None:
        """It is known what became of `attempt`, or that nobody can tell."""
        attempt.state = SENT
        if failed:
            self.attempts.remove(attempt)


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
    """Return the commits of `scope` whose answer was lost, and nobody has asked for yet."""
    trial = find_trial(scope)
    return [] if trial is None else [one for one in trial.attempts if one.state == LOST]


def has_sent(scope: Scope) -> bool:
    """Tell whether anything that may have written is committed, by a session or without one."""
    trial = find_trial(scope)
    return trial is not None and any(one.wrote for one in trial.attempts)
