"""Errors of a session that say what is wrong, and not why: the notes that do.

Two tasks have shared it (Y3), an object that a commit has expired was read, or an error handler has
used a session whose flush had failed.
"""

from __future__ import annotations

from contextlib import suppress
from typing import cast

from sqlalchemy.exc import MissingGreenlet, PendingRollbackError

from rope_middleware.session.lines import text_of
from rope_middleware.session.shared_at import lines_of_both
from rope_middleware.session.telling import tell_once

__all__ = ["note_reason", "note_rollback"]

_SHARED_SESSION = (
    "Two tasks have probably used one AsyncSession at the same time, which SQLAlchemy does not "
    "allow. Give each concurrent task sessions of its own: 'async with open_scope():' around "
    "its work, or @open_scope() on its function (rope_middleware)."
)

_EXPIRED = (
    "An AsyncSession cannot load anything while an attribute is read. A commit expires what was "
    "loaded before, also that of commit_on_success before the response starts: make the sessions "
    "by async_sessionmaker(..., expire_on_commit=False). A relationship is loaded with its object: "
    "selectinload() (rope_middleware)."
)

_ROLL_BACK = (
    "A flush of this session has failed before, and the application went on (an error handler?). "
    "Roll back first: jenny.rollback(), which an AsyncSession awaits. What was loaded is read anew "
    "then (rope_middleware)."
)


def note_rollback(error: BaseException) -> None:
    """Tell what to call where a session is used on after a failed flush."""
    if isinstance(error, PendingRollbackError) and _ROLL_BACK not in getattr(
        error, "__notes__", ()
    ):
        error.add_note(_ROLL_BACK)


def note_reason(error: BaseException) -> None:
    """Add to `error` a note that says why, where it tells of what is misunderstood often."""
    with suppress(Exception):  # an error that has no text, or takes no note
        _add_note(error)


def _add_note(error: BaseException) -> None:
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        inner = pending.pop()
        if inner is None or id(inner) in seen:
            continue
        seen.add(id(inner))
        note = _note_for(inner)
        for told in (inner, error) if note else ():
            if note not in getattr(told, "__notes__", ()):
                told.add_note(note)
        pending += (inner.__cause__, inner.__context__)
        if isinstance(inner, BaseExceptionGroup):
            pending += cast("BaseExceptionGroup[BaseException]", inner).exceptions


def _note_for(error: BaseException) -> str:
    if _tells_of_sharing(error):
        if any(note.startswith(_SHARED_SESSION) for note in getattr(error, "__notes__", ())):
            return ""
        return _SHARED_SESSION + _both(error)
    return _EXPIRED if isinstance(error, MissingGreenlet) else ""


def _both(error: BaseException) -> str:
    """Say at which lines the two tasks are, and tell it once in the log."""
    here, other = lines_of_both(error)
    if here is None:
        return ""
    where = f" This one is at {text_of(here)}"
    where += "." if other is None else f", the other at {text_of(other)}."
    tell_once("shared", here, "%s%s", _SHARED_SESSION, where)
    return where


# The drivers' own errors of this kind: asyncpg's InterfaceError, psycopg's OperationalError.
_TEXTS = ("another operation is in progress", "another command is already in")


def _tells_of_sharing(error: BaseException) -> bool:
    # SQLAlchemy gives its own errors of this kind the code "isce".
    # https://docs.sqlalchemy.org/en/20/errors.html#error-isce
    if getattr(error, "code", None) == "isce":
        return True
    # Only what is short: the text of an error with many bound values takes its time.
    told = error.args[0] if error.args else None
    return isinstance(told, str) and any(text in told for text in _TEXTS)
