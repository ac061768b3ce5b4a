"""Bodies that have begun, that are not sent, and that come from another application.

And what a status line says.
"""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING

from rope_middleware.scope.context import current, logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Begun", "close_unsent", "code_of", "to_the_end"]


def close_unsent(body: object) -> None:
    """Close a body that the server does not get to see (PEP 3333: exactly once)."""
    close = getattr(body, "close", None)
    if close is not None:
        try:
            close()
        except Exception:
            logger.exception("close() of a response that was not sent failed")


def code_of(status: object) -> int:
    """Return the number in a status line; 500 for what the server is going to refuse."""
    try:
        return int(str(status)[:3])
    except ValueError:
        return 500


def to_the_end(body: Iterable[bytes]) -> Iterator[bytes]:
    """Hand on another application's body, and close it."""
    try:
        yield from body
    finally:
        close_unsent(body)


class Begun:
    """A body whose beginning has been made already.

    Args:
        body: the application's.
        first: what comes before it; by itself its first chunk.
    """

    __slots__ = ("_body", "_chunks", "_first", "_inner")

    def __init__(self, body: Iterable[bytes], first: list[bytes] | None = None) -> None:
        self._body = body
        self._chunks = iter(body)
        scope = current.get(None)
        self._first = list(islice(self._chunks, 1)) if first is None else first
        self._inner = current.get(None)  # an open_scope() around several chunks
        current.set(scope)  # it commits now

    def __iter__(self) -> Iterator[bytes]:
        current.set(self._inner)  # undone by who asks for the chunk
        return chain(self._first, self._chunks)

    def close(self) -> None:
        """Close the app's body."""
        close = getattr(self._body, "close", None)
        if close is not None:
            close()
