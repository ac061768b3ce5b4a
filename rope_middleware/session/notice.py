"""What is noticed where a transaction begins: who begins it, at which pool, and misuse (L2, L3)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction

from rope_middleware.errors import memory_of_thread
from rope_middleware.scope.context import current
from rope_middleware.scope.loop import is_async, is_thread_of
from rope_middleware.scope.scope import is_request
from rope_middleware.session.code.lines import Line, text_of
from rope_middleware.session.code.telling import tell_once
from rope_middleware.session.holding.begun import DEPTH, call_at_begins, note_begin
from rope_middleware.session.holding.waits import put_door

if TYPE_CHECKING:
    from rope_middleware.session.tie import Tie

__all__ = ["KNOWN", "has_modules", "learn_engines", "notice_begin", "notice_module"]


def _look() -> bool:
    # In the thread that looks: nobody waits for this import, which takes two milliseconds.
    from rope_middleware.session.holding import held

    return held.look()


def _every() -> float:
    from rope_middleware.session.holding import held

    return held.EVERY


_ticking: dict[str, object] = {}  # a dict: setdefault() lets one thread of several be the first


def _begin_to_look() -> bool:
    """H4: twice a second from now on, while there is any session that has had a transaction."""
    mine = object()
    if _ticking.setdefault("", mine) is mine and not sys.is_finalizing():
        from rope_middleware.running.ticker import Ticker

        Ticker(_look, _every, call_at_begins)
    return True


call_at_begins(_begin_to_look)

_late: WeakSet[type[Session]] = WeakSet()
_of_modules: WeakKeyDictionary[Any, Line] = WeakKeyDictionary()
has_modules: list[bool] = []
"""Not empty once a module has held a session: to ask `_of_modules` is a call."""

KNOWN = "_rope_middleware_known"
"""Under this name a pool knows its dialect once nothing is left to be noticed of its engine where a
transaction begins: its statements are watched, and it has its door."""


def notice_begin(tie: Tie, session: Session) -> None:
    """Notice that `session` begins a transaction.

    Raises:
        RopeError: its engine gives each thread a database of its own, and this is another thread's.
    """
    note_begin(tie, DEPTH + 2)
    bind, scope = session.bind, tie.scope
    if bind is None:
        learn_engines(type(session))
    else:
        pool = bind.engine.pool
        memory = put_door(bind.engine)
        if memory is None:
            if bind.engine.pool is pool:  # it is another one after Engine.dispose()
                vars(pool)[KNOWN] = bind.dialect
        else:
            first = memory.setdefault("thread", tie.thread)
            if first != tie.thread or (scope is not None and is_async(scope)):
                raise memory_of_thread(is_async=scope is not None and is_async(scope))
    kind = tie.kind
    is_sync = scope is not None and kind is not None and not kind.is_async
    if is_sync and scope is not None and is_thread_of(scope, tie.thread):
        _tell_blocking(tie, scope.name)
    if has_modules:
        _look_at_modules()


def _look_at_modules() -> None:
    here = current.get(None)
    if here is not None and is_request(here):
        for line in list(_of_modules.values()):
            _tell_module(line)


def learn_engines(session_class: type[Session]) -> None:
    """Learn the engines of sessions whose `bind` does not tell them."""
    if session_class not in _late:
        _late.add(session_class)
        event.listen(session_class, "after_begin", _on_connection)


def _on_connection(_: Session, __: SessionTransaction, connection: Connection) -> None:
    put_door(connection.engine)


def notice_module(tie: Tie, line: Line) -> None:
    """Note that a rope on the frame of a module holds the session of `tie`."""
    _of_modules[tie] = line
    has_modules[:] = [True]


def _tell_module(line: Line) -> None:
    tell_once(
        "module",
        line,
        "The session that %s holds belongs to a module: it lives as long as this process, which "
        "serves requests, and so does its connection. Write jenny.session where it is used, in a "
        'function; or "with open_scope():" around work at the start. (strict=True refuses it.)',
        text_of(line),
    )


def _tell_blocking(tie: Tie, name: str) -> None:
    if tie.line is not None:
        tell_once(
            "blocking",
            tie.line,
            "A sync session is used on the event loop of %r, at %s: every other request waits "
            "while it talks to the database. If the handler is async, make it a plain function "
            "(most frameworks run that in a thread); else use anyio.to_thread.run_sync(), or an "
            "AsyncSessionJenny.",
            name,
            text_of(tie.line),
        )
