"""Two tasks in one AsyncSession: the note that says so (Y3)."""

from __future__ import annotations

from contextlib import suppress
from typing import cast

__all__ = ["note_shared_session"]

_SHARED_SESSION = (
    "Two tasks have probably used one AsyncSession at the same time, which SQLAlchemy does not "
    "allow. Give each concurrent task sessions of its own: 'async with open_scope():' around "
    "its work, or @open_scope() on its function (rope_middleware)."
)


def note_shared_session(error: BaseException) -> None:
    """Add to `error`, where it tells of a session shared by tasks, a note that says so."""
    with suppress(Exception):  # an error that has no text, or takes no note
        _note_shared_session(error)


def _note_shared_session(error: BaseException) -> None:
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        inner = pending.pop()
        if inner is None or id(inner) in seen:
            continue
        seen.add(id(inner))
        if _tells_of_sharing(inner):
            for told in (inner, error):
                if _SHARED_SESSION not in getattr(told, "__notes__", ()):
                    told.add_note(_SHARED_SESSION)
        pending += (inner.__cause__, inner.__context__)
        if isinstance(inner, BaseExceptionGroup):
            pending += cast("BaseExceptionGroup[BaseException]", inner).exceptions


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
