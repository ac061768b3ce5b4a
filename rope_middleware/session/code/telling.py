"""What is said once: a WARNING for each line of the application's code, or once an hour."""

from __future__ import annotations

import math
from collections.abc import Hashable
from time import monotonic

from rope_middleware.scope.context import logger
from rope_middleware.session.code.lines import Line, place_of

__all__ = ["HOUR", "tell_hourly", "tell_once", "was_told"]

HOUR = 3600.0

_told: dict[Hashable, float] = {}
"""What was said, and when it may be said again."""
_MAX_LINES = 10_000  # lines; somebody may compile code for each request


def tell_once(what: str, line: Line, text: str, *arguments: object) -> None:
    """Log a WARNING, once for each line of code.

    Args:
        what: which warning it is: others have been said of the same line, perhaps.
        line: the application's.
        text: of the log line, with places for `arguments`.
        arguments: no values of the application's.
    """
    if _is_new(_key(what, line), math.inf):
        logger.warning(text, *arguments)


def was_told(what: str, line: Line) -> bool:
    """Tell whether `tell_once` would be silent."""
    return _told.get(_key(what, line), -math.inf) > monotonic()


def _key(what: str, line: Line) -> Hashable:
    return what, *place_of(line)


def tell_hourly(what: str, lines: tuple[Line, ...], text: str, *arguments: object) -> None:
    """Log a WARNING, once for each of these lines of code together and hour."""
    if _is_new((what, *map(place_of, lines)), HOUR):
        logger.warning(text, *arguments)


def _is_new(key: Hashable, seconds: float) -> bool:
    now = monotonic()
    if _told.get(key, -math.inf) > now:
        return False
    if len(_told) >= _MAX_LINES:
        _told.clear()
    _told[key] = now + seconds
    return True
