"""Where the application is: the line that a text about a transaction names."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

__all__ = ["line_of_the_application"]

_NOT_OURS = (
    *("sqlalchemy", "rope_middleware", "greenlet", "asyncio", "anyio", "contextlib", "threading"),
    *("concurrent", "functools", "starlette", "fastapi", "flask", "werkzeug", "_pytest", "pytest"),
)


def line_of_the_application() -> str:
    """Return the innermost line of the application's, as ``file.py:12``."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - there is no other
    greenlet: Any = None
    while True:
        while frame is not None:
            module = str(frame.f_globals.get("__name__", ""))
            if module.partition(".")[0] not in _NOT_OURS:
                return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
            frame = frame.f_back
        # An AsyncSession works in a greenlet, whose frames end where it begins.
        greenlet = _parent(greenlet)
        if greenlet is None:
            return "an unknown line"
        frame = greenlet.gr_frame


def _parent(greenlet: Any) -> Any:
    module = sys.modules.get("greenlet")
    if module is None:
        return None
    return (module.getcurrent() if greenlet is None else greenlet).parent
