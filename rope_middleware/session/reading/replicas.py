"""Which engine a read-only scope reads from: one of the replicas at random, or the primary.

A replica that cannot be reached is left out for a while. One that has not replayed what the client
has written (R3) is passed over for the scope. What a session makes of it stands in `failover`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util.concurrency import in_greenlet

from rope_middleware.position import Position, following
from rope_middleware.scope.context import class_of, logger
from rope_middleware.scope.reading import carried_of, reads_only
from rope_middleware.scope.scope import Scope
from rope_middleware.session.failures.codes import sqlstate_of
from rope_middleware.session.failures.lost import SERVER_GONE
from rope_middleware.session.reading.autocommit import reading_engine
from rope_middleware.session.reading.positions import note_written, replayed, wait_for
from rope_middleware.session.reading.sessions import refuse

if TYPE_CHECKING:
    from rope_middleware.position import Carried
    from rope_middleware.session.tie import Tie

__all__ = ["Choice", "Replica", "Replicas", "replicas_of"]

_LEFT_OUT = 30.0
"""Seconds."""

# Another system, or nobody knows: only the primary is sure to have it.
_NOWHERE = Position(0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)

# 40001 serialization_failure: a replica has cancelled a statement in favour of its replay.
# https://www.postgresql.org/docs/current/hot-standby.html#HOT-STANDBY-CONFLICT
_CONFLICT = "40001"


class Replica:
    """One replica, and what is known of it."""

    def __init__(self, engine: Engine) -> None:
        self.engine: Engine = engine
        self.reading: Engine = reading_engine(engine, refuse)
        self._out_until = 0.0
        self._is_out = False
        self._is_mute = False
        self._system: int | None = None
        self._reached = Position(0, 0)
        event.listen(engine, "connect", self._forget)

    @property
    def is_healthy(self) -> bool:
        """Whether it may be tried."""
        return not self._is_out or monotonic() >= self._out_until

    def leave_out(self, error: BaseException) -> None:
        """Use it no more for a while, and say so once."""
        if not self._is_out:
            logger.warning(
                "replica %s cannot be reached and is left out until it can: %s",
                self.engine.url,
                type(error).__name__,
            )
        self._is_out = True
        self._out_until = monotonic() + _LEFT_OUT

    def cannot_tell(self, error: Exception) -> None:
        """It does not say how far it is: who has written does not read from it. Said once."""
        if not self._is_mute:
            self._is_mute = True
            logger.warning(
                "replica %s does not tell its log position (%s): clients that have written within "
                "the last minute read from the primary",
                self.engine.url,
                class_of(error),
            )

    def answered(self) -> None:
        """It is there again."""
        if self._is_out:
            self._is_out = False
            logger.info("replica %s is there again", self.engine.url)

    def has(self, positions: dict[int, Position]) -> bool:
        """Tell whether it has replayed what a request brings. Asks it only where it must."""
        if 0 in positions:
            return False  # nobody knows how far it was
        if self._covers(positions):
            return True
        with self.reading.connect() as connection:
            if self._system is not None:
                wait_for(connection, positions.get(self._system, Position(0, 0)))
            system, position = replayed(connection)
        self._system, self._reached = system, position
        return self._covers(positions)

    def _covers(self, positions: dict[int, Position]) -> bool:
        if self._system is None:
            return False
        wanted = positions.get(self._system, _NOWHERE)
        return wanted.timeline == self._reached.timeline and wanted.lsn <= self._reached.lsn

    def _forget(self, *_: object) -> None:
        # A new connection may have come to another server, which has not come as far.
        self._system, self._reached = None, Position(0, 0)


class Replicas:
    """The replicas of one jenny.

    Args:
        engines: one for each server: of a name that stands for several of them nobody could say
            which has replayed what.
    """

    def __init__(self, engines: Iterable[Engine]) -> None:
        engines = tuple(engines)
        following.is_on = True
        self._all: list[Replica] = [Replica(engine) for engine in engines]
        self.is_async: bool = any(engine.dialect.is_async for engine in engines)

    def follow(self, tie: Tie, scope: Scope) -> None:
        """Let the client of `scope` be told how far the primary is after each commit (R3)."""
        carried = carried_of(scope)
        if carried is not None and not reads_only(scope):
            tie.follow = partial(note_written, carried)

    def healthy(self) -> list[Replica]:
        """Return those that may be tried, in random order."""
        found = [replica for replica in self._all if replica.is_healthy]
        random.shuffle(found)
        return found


class Choice:
    """What one scope reads from. None of the replicas: the primary."""

    __slots__ = ("_carried", "_is_made", "_replicas", "_told", "replica")

    def __init__(self, replicas: Replicas, carried: Carried | None) -> None:
        self._replicas = replicas
        self._carried = carried
        self._is_made = False
        self._told: object = None  # what the request had written when the choice was made
        self.replica: Replica | None = None

    def engine(self) -> Engine | None:
        """Return the replica's engine; None for the primary.

        Replicas are asked where the request brings a position, or has written meanwhile.
        """
        carried = self._carried
        told = None if carried is None else carried.told
        if not self._is_made or told is not self._told:
            wanted = {} if carried is None else carried.wanted
            if wanted and self._replicas.is_async and not in_greenlet():
                return None  # somebody only looks: nobody can be asked here
            self._make(wanted)
            self._told = told
        return None if self.replica is None else self.replica.reading

    def _make(self, wanted: dict[int, Position]) -> None:
        self.replica = None
        for replica in self._replicas.healthy():
            try:
                if not wanted or replica.has(wanted):
                    self.replica = replica
                    break
            except Exception as error:
                if _is_gone(error):
                    replica.leave_out(error)
                else:
                    replica.cannot_tell(error)
        self._is_made = True

    def again(self, tried: Replica | None, error: Exception) -> bool:
        """Tell whether a statement that failed on `tried` goes to another engine now."""
        if tried is None:
            return False
        if sqlstate_of(getattr(error, "orig", None)) == _CONFLICT:
            self.replica = None
            return True
        if not _is_gone(error):
            return False
        tried.leave_out(error)
        if self.replica is tried:
            self._is_made = False
        return True


def _is_gone(error: Exception) -> bool:
    """Tell whether the server could not be reached, or has gone."""
    if isinstance(error, DBAPIError):
        # Without a statement it failed to connect.
        return (
            error.connection_invalidated
            or error.statement is None
            or sqlstate_of(error.orig) in SERVER_GONE
        )
    return isinstance(error, OSError)  # asyncpg's: it could not connect; TimeoutError is one


def replicas_of(given: Any, expected: type) -> Replicas | None:
    """Return the replicas that a jenny was given; None where there are none.

    Args:
        given: the argument.
        expected: `Engine`, or `AsyncEngine` of the async twin.

    Raises:
        TypeError: it is no collection of such engines.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(_NO_ENGINES.format(expected.__name__, given))
    engines: list[Any] = [*given]
    for engine in engines:
        if not isinstance(engine, expected):
            raise TypeError(_NO_ENGINES.format(expected.__name__, engine))
    if not engines:
        return None
    return Replicas(getattr(engine, "sync_engine", engine) for engine in engines)


_NO_ENGINES = (
    "replicas takes a collection of {0} objects, one for each server that replicates the one of "
    "the session factory, not {1!r}."
)
