"""Listening for the errors of databases.

What looks at them (`refusal`, `locks`) knows every driver's errors. It is imported when there is
one: most processes see none for hours.
"""

from __future__ import annotations

import sys
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext

from rope_middleware.running.forks import lock_of_module
from rope_middleware.scope.context import current
from rope_middleware.session.holding.waits import call_at_errors
from rope_middleware.session.sql.notes import notes_of

__all__ = ["listen_for_errors", "listen_for_retries"]

_listening = lock_of_module()
_listens_to: set[str] = set()


def listen_for_errors() -> None:
    """Note on a scope the errors of its database. Done once."""
    _listen_once("errors", ("handle_error", _on_error), ("handle_error", _on_error_of_lock))


def listen_for_retries() -> None:
    """Note on scopes that may be run again what they have written and committed. Done once."""
    from rope_middleware.session.failures.refusal import RETRY_LISTENERS

    listen_for_errors()
    _listen_once("retries", *RETRY_LISTENERS)
    call_at_errors(_on_error_of_pool)


def _listen_once(what: str, *listeners: tuple[str, Any]) -> None:
    if what in _listens_to:
        return
    with _listening:
        if what not in _listens_to:
            for identifier, listener in listeners:
                # First: a listener of the application's that raises ends the line.
                event.listen(Engine, identifier, listener, insert=True)
            _listens_to.add(what)


# At its end the interpreter imports nothing any more, and nobody reads what is noted.


def _on_error(context: ExceptionContext) -> None:
    # The session of a scope may be used where that is not known.
    is_ours = current.get(None) is not None or (
        context.connection is not None and bool(notes_of(context.connection).statements())
    )
    if is_ours and not sys.is_finalizing():
        from rope_middleware.session.failures.refusal import note_error

        note_error(context)


def _on_error_of_lock(context: ExceptionContext) -> None:
    if not sys.is_finalizing():
        from rope_middleware.session.failures.locks import name_other_side

        name_other_side(context)


def _on_error_of_pool(error: Exception) -> None:
    if not sys.is_finalizing():
        from rope_middleware.session.failures.refusal import note_error_of_pool

        note_error_of_pool(error)
