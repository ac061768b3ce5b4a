"""What is said once: a WARNING for each line of the application's code."""

from __future__ import annotations

from collections.abc import Hashable

from rope_middleware.scope.context import logger
from rope_middleware.session.lines import Line

__all__ = ["tell_once"]

_told: set[Hashable] = set()
_MOST = 10_000  # lines; somebody may compile code for each request


def tell_once(what: str, line: Line, text: str, *arguments: object) -> None:
    """Log a WARNING, once for each line of code.

    Args:
        what: which warning it is: others have been said of the same line, perhaps.
        line: the application's.
        text: of the log line, with places for `arguments`.
        arguments: no values of the application's.
    """
    code, instruction = line
    key = what, code.co_filename, code.co_firstlineno, instruction
    if key in _told:
        return
    if len(_told) >= _MOST:
        _told.clear()
    _told.add(key)
    logger.warning(text, *arguments)
