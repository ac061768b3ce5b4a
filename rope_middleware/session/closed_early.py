"""A ``close()`` or ``reset()`` in a scope that commits says what it has rolled back (L1).

A dependency that ends its session before the response starts loses what the endpoint has written,
and the response is a success all the same. ``close()`` stays a rollback. But nobody means it so
where the scope then commits, and ``rollback()`` says it better. Only an error that leaves a
``with jenny.session:``, or is being handled, says enough.

So does an ``expunge_all()`` that drops what is pending, where a flush() was forgotten before it.
(SQLAlchemy tells of each object that was added. Of those that were changed it would tell as well,
but at the end of each session, too, of every object that was loaded: that costs too much.)
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from sqlalchemy.orm import InstanceState, Session

from rope_middleware.scope.outcome import is_to_commit
from rope_middleware.scope.scope import Scope, call_after_commit
from rope_middleware.session.code.lines import Line, application_line, text_of
from rope_middleware.session.code.telling import tell_once, was_told
from rope_middleware.session.guard.by_error import BY_ERROR
from rope_middleware.session.tie import Tie
from rope_middleware.session.unsaved import Written, dropped, lost_by_closing, note_dropped

__all__ = ["note_closed", "note_expunged"]

_WHAT = "closed"


def note_closed(tie: Tie, scope: Scope, session: Session, how: str) -> None:
    """Let the commit of `scope` tell what its session, about to be closed, has written.

    Args:
        tie: the session's.
        scope: it commits.
        session: closed by the application.
        how: what it has called.
    """
    if tie.line is None or _is_by_error(session):
        return
    what = "" if was_told(_WHAT, tie.line) else lost_by_closing(tie, session)
    if not what:
        return
    # `async with` closes an AsyncSession in a task of its own, where the application has no line.
    is_async = tie.kind is None or tie.kind.is_async
    where = "" if is_async else f" at {text_of(application_line(1))}"
    line = tie.line

    def tell() -> None:
        tell_once(
            _WHAT,
            line,
            "%r was a success, and changes are lost: %s, rolled back by %s%s before the commit "
            "(transaction begun at %s). Leave the session open, its scope commits and closes it; "
            "if it was meant, call rollback().",
            scope.name,
            what,
            how,
            where,
            text_of(line),
        )

    call_after_commit(scope, tell)


def _is_by_error(session: Session) -> bool:
    """Tell whether an error closes the session."""
    was_noted: bool = session.__dict__.pop(BY_ERROR, False)
    return was_noted or isinstance(sys.exc_info()[1], Exception)


_EXPUNGE_ALL = Session.expunge_all.__code__


def note_expunged(tie: Tie, session: Session, state: InstanceState[Any]) -> None:
    """Note that an object was pending, where the application has called ``expunge_all()``.

    Args:
        tie: the session's.
        session: it has dropped the object.
        state: the object's.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented
    while frame is not None and frame.f_code is not _EXPUNGE_ALL:
        frame = frame.f_back
    # expunge() names what is meant, a rollback says it, and close() calls expunge_all() itself.
    caller = None if frame is None else frame.f_back
    if caller is None or caller.f_code.co_filename == _EXPUNGE_ALL.co_filename:
        return
    if tie.line is None or isinstance(sys.exc_info()[1], Exception):
        return
    written = note_dropped(tie, session, state)
    scope = tie.scope
    if scope is not None and is_to_commit(scope) and not was_told(_DROPPED, tie.line):
        _tell_dropped(written, scope, tie.line)


_DROPPED = "dropped"


def _tell_dropped(written: Written, scope: Scope, line: Line) -> None:
    """Let the commit of `scope` tell what it has not found."""
    where = text_of(application_line(1))

    def tell() -> None:
        what = dropped(written)
        if what:
            tell_once(
                _DROPPED,
                line,
                "%r was a success, and changes are lost: %s at %s before they were written "
                "(transaction begun at %s). Call flush() before it; if it was meant, expunge() "
                "each of them.",
                scope.name,
                what,
                where,
                text_of(line),
            )

    call_after_commit(scope, tell)
