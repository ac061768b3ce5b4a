"""Waiting for one's turn on the connection that the sessions of a sandbox share."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING

from rope_middleware.testing import errors

if TYPE_CHECKING:
    from rope_middleware.testing.shared import SharedConnection
    from rope_middleware.testing.statement import Statement
    from rope_middleware.testing.virtual import VirtualConnection

__all__ = ["take_turn"]

_LOOK = 0.05  # seconds between two looks at whose turn it is


def take_turn(shared: SharedConnection, virtual: VirtualConnection, statement: Statement) -> None:
    """Wait until the connection is free for `statement`: first come, first served.

    Raises:
        RopeError: another session's turn has lasted too long.
        ScopeClosedError: the sandbox has ended.
    """

    def take() -> bool:
        if shared.is_closed or statement.is_cancelled:
            return True
        if shared.busy is not None or shared.writer not in (None, virtual):
            return False
        if shared.writer is None and shared.in_line[0] is not statement:
            return False
        statement.since, statement.thread = monotonic(), get_ident()
        shared.busy = statement
        return True

    shared.in_line.append(statement)
    try:
        _wait(shared, virtual, take)
    finally:
        shared.in_line.remove(statement)
        if shared.busy is not statement:
            shared.lane.wake()  # the next one in line may be the first now
    if statement.is_cancelled:
        raise CancelledError
    if shared.is_closed:
        raise errors.closed(shared.name)


def _wait(
    shared: SharedConnection, virtual: VirtualConnection, is_taken: Callable[[], bool]
) -> None:
    seconds, came = shared.seconds, monotonic()
    while not shared.lane.wait(is_taken, seconds):
        # A statement is under way, or others are first in line: nobody's turn yet.
        seconds = _LOOK
        if shared.writer not in (None, virtual):
            # The time is that of one turn: of many short ones none is to blame.
            seconds = max(came, shared.since) + shared.seconds - monotonic()
            if seconds <= 0:
                raise errors.not_your_turn(shared.name, shared.seconds, shared.line)
