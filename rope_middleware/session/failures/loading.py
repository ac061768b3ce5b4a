"""An attribute that could not be loaded when it was read: the note that names it, and the cures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, cast

from sqlalchemy.exc import MissingGreenlet
from sqlalchemy.orm import QueryableAttribute
from sqlalchemy.orm.exc import DetachedInstanceError

from rope_middleware.session.code.lines import is_sqlalchemys, variables_of

__all__ = ["note_of_load"]

_DETACHED = (
    "was not loaded while the session was open, and read when it had ended. Load it there: "
    "selectinload() for a relationship. If a commit has expired it: "
    "sessionmaker(..., expire_on_commit=False) (rope_middleware)."
)
_UNAWAITED = (
    "was not loaded, and an AsyncSession cannot load anything while an attribute is read. Load it "
    "before: selectinload() for a relationship, or await session.refresh(). A commit expires what "
    "was loaded before, also that of commit_on_success before the response starts: make the "
    "sessions by async_sessionmaker(..., expire_on_commit=False) (rope_middleware)."
)
# How the note begins where no attribute was read, or nobody tells which.
_NO_ATTRIBUTE = {
    _DETACHED: "An attribute ",
    _UNAWAITED: "An AsyncSession was used where nothing awaits it. If an attribute was read: it ",
}


def note_of_load(error: BaseException, around: Iterable[BaseException]) -> str:
    """Return the note for an error of a lazy load; "" for any other.

    Args:
        error: one of a chain of errors.
        around: those that it was the cause of; their tracebacks reach further up.
    """
    words = _words_for(error)
    if words:
        for one in (error, *around):
            for name in _attributes_in(one.__traceback__):
                return f"{name} {words}"
        return _NO_ATTRIBUTE[words] + words
    if type(error).__name__.endswith("ValidationError"):
        return _of_model(error)
    return ""


def _words_for(error: BaseException) -> str:
    if isinstance(error, DetachedInstanceError):
        return _DETACHED
    return _UNAWAITED if isinstance(error, MissingGreenlet) else ""


def _attributes_in(traceback: TracebackType | None) -> Iterator[str]:
    """Give the attributes of mapped classes that were being read, the outermost first."""
    while traceback is not None:
        frame, traceback = traceback.tb_frame, traceback.tb_next
        if frame.f_code.co_name == "__get__" and is_sqlalchemys(frame):
            variables = variables_of(frame)
            attribute = variables.get("self")
            if isinstance(attribute, QueryableAttribute):
                owner = type(variables.get("instance")).__name__
                yield f"{owner}.{cast('Any', attribute).key}"


def _of_model(error: Any) -> str:
    """Return the note for what pydantic tells: a response model has read the attribute.

    It keeps the text of the error alone: FastAPI's ResponseValidationError has no cause.
    """
    found: Any = error.errors() if callable(getattr(error, "errors", None)) else ()
    for one in found:
        if one.get("type") != "get_attribute_error":
            continue
        text = str(one.get("ctx", {}).get("error"))
        for name, words in ("DetachedInstanceError", _DETACHED), ("MissingGreenlet", _UNAWAITED):
            if name in text:
                return f"{type(one.get('input')).__name__}.{one['loc'][-1]} {words}"
    return ""
