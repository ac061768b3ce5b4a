"""A result that another thread reads bit by bit when its scope ends.

``yield_per`` and ``stream_results``: each fetch talks to the database, and no event tells of it. So
the frames of the other threads are looked at: is one of them in a fetch of SQLAlchemy's with this
cursor? That is asked only where such a result is open at the end of its scope.
"""

from __future__ import annotations

from functools import partial
from threading import get_ident
from typing import Any
from weakref import ReferenceType, ref

from sqlalchemy.engine import ExecutionContext, cursor

from rope_middleware.running.finish import may_block
from rope_middleware.scope.hands import wait_until
from rope_middleware.scope.options import DEFAULT
from rope_middleware.session.code.lines import variables_of
from rope_middleware.session.code.stacks import stacks_of_others
from rope_middleware.session.sql.notes import Notes
from rope_middleware.session.sql.taking import refuse_gone

__all__ = ["is_fetching", "stop_fetches"]

_FILE = cursor.__file__
_FETCHES = ("fetchone", "fetchmany", "fetchall")


def stop_fetches(notes: Notes) -> None:
    """Let no other thread begin a fetch: it would meet the ROLLBACK on its way.

    Only of cursors that are written in Python, as PyMySQL's. Those of C have their own locks.
    """
    for context in notes.read_in_parts():
        own: dict[str, Any] | None = getattr(context.cursor, "__dict__", None)
        if own is not None:
            for name in _FETCHES:
                own[name] = partial(_fetch, notes, ref(context), name)


def _fetch(notes: Notes, of: ReferenceType[ExecutionContext], name: str, *given: Any) -> Any:
    context = of()
    if context is None:
        return None
    gone, connection = notes.gone, context.root_connection
    if gone is not None and gone[1] != get_ident() and may_block():
        # Our error has SQLAlchemy close the cursor. To end the transaction PyMySQL reads what is
        # left of the result: nobody else may read meanwhile.
        wait_until(lambda: connection.closed or notes.gone is not gone, DEFAULT.close_timeout)
    refuse_gone(notes, context)
    found: Any = context.cursor
    return getattr(found.__class__, name)(found, *given)


def is_fetching(notes: Notes) -> bool:
    """Tell whether another thread is in the middle of a fetch."""
    contexts = notes.read_in_parts()
    if not contexts:
        return False
    cursors = [context.cursor for context in contexts]
    return any(
        frame.f_code.co_filename == _FILE
        and any(value is one for value in variables_of(frame).values() for one in cursors)
        for frames in stacks_of_others().values()
        for frame in frames
    )
