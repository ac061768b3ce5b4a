"""Which context of Flask's a teardown function is called for: the frames above it tell."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["being_popped"]

_FAR = 20  # frames between a teardown function and the pop() that it is called for


def being_popped() -> Any:
    """Return the context that a teardown function is called for; None where that cannot be seen.

    Flask does not tell it, and the current one may be another one: see `_teardown`.
    """
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - documented
    for _ in range(_FAR):
        if frame is None:
            break
        if frame.f_code.co_name == "pop" and frame.f_globals.get("__name__") == "flask.ctx":
            return frame.f_locals.get("self")
        frame = frame.f_back
    return None
