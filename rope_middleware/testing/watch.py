"""Who waits for whose row: sandboxes wait for one another only in the database, and in silence.

While sandboxes are open on a server that can tell, a look every half second finds statements that
run for more than a second, and asks the server over another connection what blocks them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from rope_middleware.scope.context import logger
from rope_middleware.testing.database import Database
from rope_middleware.testing.lanes import loop
from rope_middleware.testing.shared import SharedConnection
from rope_middleware.testing.statement import Statement

__all__ = ["AskServer", "forget", "others", "watch"]

AskServer = Callable[[Callable[[Database], Any]], Any]
"""Calls a function with another connection to the same server, and returns its result."""

_SECONDS = 1.0
_EACH = 0.5

_watched: WeakKeyDictionary[SharedConnection, AskServer] = WeakKeyDictionary()
_changing = threading.Lock()
_is_ticking = False


def watch(shared: SharedConnection, ask: AskServer) -> None:
    """Look after the statements of `shared` until it is forgotten."""
    global _is_ticking
    if shared.pid is None:
        return
    with _changing:
        _watched[shared] = ask
        if not _is_ticking:
            _is_ticking = True
            loop().call_soon_threadsafe(_tick)


def forget(shared: SharedConnection) -> None:
    """Look after `shared` no more."""
    with _changing:
        _watched.pop(shared, None)


def others(shared: SharedConnection) -> list[SharedConnection]:
    """Return what else has written, for whose rows `shared` may have waited."""
    with _changing:
        found = list(_watched)
    return [other for other in found if other is not shared and (other.wrote or other.writer)]


def _tick() -> None:
    global _is_ticking
    with _changing:
        watched = list(_watched.items())
        _is_ticking = bool(watched)
    for shared, ask in watched:
        statement = shared.busy
        if statement is None or time.monotonic() - statement.since < _SECONDS:
            continue
        if not statement.is_looked_at:
            statement.is_looked_at = True
            loop().run_in_executor(None, _look, shared, statement, ask)
    if watched:
        loop().call_later(_EACH, _tick)


def _look(shared: SharedConnection, statement: Statement, ask: AskServer) -> None:
    """Tell what blocks a statement; stop one that would wait for ever."""
    try:
        pids = ask(lambda database: database.blockers(shared.pid))
        blockers = [other for other in list(_watched) if other.pid in pids and other is not shared]
        own = [other for other in blockers if other.name == shared.name]
        if not blockers or shared.busy is not statement:
            statement.is_looked_at = False
            return
        if own:
            _stop_own(shared, statement, own[0], ask)
            return
        if not statement.is_told:
            statement.is_told = True
            logger.warning("%s", shared.blocked_by(blockers[0]))
        if shared.is_closed:  # the end waits for it, and the other's end may come after this one
            ask(lambda database: database.cancel(shared.pid))
    except Exception:
        logger.debug("the server could not be asked who waits", exc_info=True)
    statement.is_looked_at = False


def _stop_own(
    shared: SharedConnection, statement: Statement, other: SharedConnection, ask: AskServer
) -> None:
    """Stop a statement that waits for another engine of its own sandbox: that ends after it."""
    if time.monotonic() - statement.since >= shared.seconds:
        statement.verdict = shared.blocked_by_own(other)
        ask(lambda database: database.cancel(shared.pid))
    statement.is_looked_at = False
