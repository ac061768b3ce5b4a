"""An AsyncSession that is closed while an error is being handled says so to the Session within."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import ReferenceType, ref

from sqlalchemy.orm import Session

__all__ = ["BY_ERROR", "CLOSING", "NOTES_ERRORS", "note_error", "note_errors", "notes_errors"]

CLOSING = ("close", "reset")
"""What closes a session: what it has written is rolled back."""

BY_ERROR = "_rope_middleware_by_error"
"""In a session's ``__dict__``: was an error being handled when its AsyncSession was closed?"""


def note_error(session: Session) -> None:
    """Note whether an error is being handled where the application closes an AsyncSession.

    SQLAlchemy closes `session`, which is within, in a greenlet, and ``async with`` in a task of its
    own: neither knows of the error.
    """
    session.__dict__[BY_ERROR] = isinstance(sys.exc_info()[1], Exception)


def _noting(name: str) -> Callable[[ReferenceType[Any]], Any]:
    def note_and_call(of: ReferenceType[Any]) -> Any:
        session: Any = of()  # who calls its method has it
        note_error(session.sync_session)
        return getattr(session.__class__, name)(session)

    return note_and_call


_note_and_close, _note_and_reset = map(_noting, CLOSING)

NOTES_ERRORS: object = _note_and_close
"""The function of the ``close()`` that `note_errors` puts there, which calls that of the class."""


def note_errors(session: Any) -> None:
    """Let an AsyncSession `note_error`."""
    own = session.__dict__
    if "close" not in own:
        of = ref(session)
        own["close"] = MethodType(_note_and_close, of)
        own.setdefault("reset", MethodType(_note_and_reset, of))


def notes_errors(session: Any) -> bool:
    """Tell whether the ``close()`` of `session` itself is what `note_errors` has put there."""
    return getattr(session.__dict__["close"], "__func__", None) is _note_and_close
