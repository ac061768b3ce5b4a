"""The listeners that heed what a session's `Tie` tells.

On the session's class, because listening on each session would cost a quarter of a small request.
"""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.orm import InstanceState, Session

from rope_middleware.running.forks import lock_of_module
from rope_middleware.scope.outcome import note_commit, retries_of
from rope_middleware.session.beginning import on_begin
from rope_middleware.session.connections import has_made, made_connections
from rope_middleware.session.holding.begun import is_alone
from rope_middleware.session.holding.ended import note_ended
from rope_middleware.session.notice import learn_engines
from rope_middleware.session.sql.notes import watch_binds
from rope_middleware.session.tie import TIE, Tie
from rope_middleware.session.unsaved import (
    forget_committed,
    forget_rolled_back,
    note_flush,
    tell_expired,
)

__all__ = ["listen", "listen_to"]

# Not event.contains(): it goes by ids, which come again. A sessionmaker makes a class each time.
_listening_to: WeakSet[type[Session]] = WeakSet()
_listening = lock_of_module()


def listen(session_class: type[Session]) -> None:
    """Listen to the events of `session_class`, once."""
    with _listening:
        if session_class not in _listening_to:
            _listen(session_class)
            if session_class.get_bind is not Session.get_bind:
                watch_binds(session_class)
                learn_engines(session_class)
            _listening_to.add(session_class)


def _listen(target: type[Session] | Session) -> None:
    event.listen(target, "after_transaction_create", on_begin)
    # First: one of the application's that raises must not keep the commit from being known.
    event.listen(target, "after_commit", _on_commit, insert=True)
    event.listen(target, "after_rollback", _on_rollback)
    event.listen(target, "after_flush", _on_flush)
    event.listen(target, "pending_to_transient", _on_expunge, raw=True)


MAX_CLASSES = 8  # that are listened to only because a session of theirs came along
_found: list[None] = []  # one for each of them


def listen_to(session: Session) -> bool:
    """Listen to the events of `session`.

    Returns:
        Whether its class is listened to now, so that the next one needs nothing.
    """
    session_class = type(session)
    if any(base in _listening_to for base in session_class.__mro__):
        return True
    # A sessionmaker makes a class, of the application's own or of `Session`.
    is_makers = session_class.__module__ == Session.__module__
    base = session_class.__mro__[1] if is_makers else session_class
    if not issubclass(base, Session) or base is Session:
        # `Session` itself is the class of everybody's sessions. And a factory that makes a
        # sessionmaker each time makes a class each time: SQLAlchemy keeps a listener's entry for
        # each of them.
        if session_class is Session or len(_found) >= MAX_CLASSES:
            _listen(session)
            return False
        _found.append(None)
        base = session_class
    listen(base)
    return True


def _on_commit(session: Session) -> None:
    """Tell the scope that something is committed."""
    tie: Tie | None = session.__dict__.get(TIE)
    if tie is None:
        return
    # Each commit comes by here. Where no other session lives, nobody can have waited for this one.
    if (tie.written is not None or not is_alone()) and not session.in_nested_transaction():
        note_ended(tie)
    if tie.written is not None:
        forget_committed(tie, session)
    if session.identity_map._modified and not session.in_nested_transaction():  # noqa: SLF001
        tell_expired(tie, session)  # the commit began with everything flushed
    scope = tie.scope
    # Whether something has been committed matters to `retries` and to R3 alone.
    if scope is None or not (tie.follow is not None or retries_of(scope)):
        return
    if session.in_nested_transaction():
        return
    if tie.connections or has_made(tie.transaction):
        note_commit(scope)
        if tie.follow is not None:
            tie.follow(made_connections(tie.transaction))


def _on_rollback(session: Session) -> None:
    tie: Tie | None = session.__dict__.get(TIE)
    if tie is not None and tie.written is not None:
        forget_rolled_back(tie, session)


def _on_flush(session: Session, _: object) -> None:
    tie: Tie | None = session.__dict__.get(TIE)
    if tie is not None:
        note_flush(tie, session)


def _on_expunge(session: Session, state: InstanceState[Any]) -> None:
    """Something pending goes: by a rollback, by close(), or by the application's expunge_all().

    By then nothing may hold the object any more: only its state.
    """
    tie: Tie | None = session.__dict__.get(TIE)
    if tie is not None and not sys.is_finalizing():
        from rope_middleware.session.closed_early import note_expunged

        note_expunged(tie, session, state)
