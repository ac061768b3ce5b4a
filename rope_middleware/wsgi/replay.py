"""The body of a WSGI request, kept for another try."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from rope_middleware.answer import REPLAY_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed.wsgi import WSGIEnvironment

__all__ = ["Replay"]


class Replay:
    """Keeps what a try reads of the body, as it is read: what nobody reads is not asked for.

    Args:
        environ: the request's.
    """

    def __init__(self, environ: WSGIEnvironment) -> None:
        self._environ = environ
        self._stream: Any = environ["wsgi.input"]
        self._kept: bytearray | None = bytearray()  # None once it is too much, or needed no more
        length = environ.get("CONTENT_LENGTH") or ""
        self._length = int(length) if length.isdecimal() else None
        self._has_ended = False

    def environ(self) -> WSGIEnvironment:
        """Return a copy of the environ for the next try, its input at the beginning."""
        return {**self._environ, "wsgi.input": _Input(self, bytes(self._kept or b""))}

    def can_repeat(self) -> bool:
        """Tell whether all that was read is still here."""
        return self._kept is not None

    def forget(self) -> None:
        """Keep nothing of what was read: no further try can follow."""
        self._kept = None

    def read(self, method: str, size: int) -> bytes:
        """Read on where the server's stream stands; `size` under 0 is no limit."""
        if self._has_ended or not size:
            return b""
        data: bytes = getattr(self._stream, method)(*(() if size < 0 else (size,)))
        if not data or (size < 0 and method == "read"):
            self._has_ended = True
        if self._kept is not None:
            self._kept += data
            # Who reads past the end of the announced body waits for ever at some servers.
            self._has_ended = self._has_ended or len(self._kept) == self._length
            if len(self._kept) > REPLAY_LIMIT:
                self._kept = None
        return data


class _Input:
    """The ``wsgi.input`` of one try (PEP 3333, "Input and Error Streams")."""

    def __init__(self, replay: Replay, first: bytes) -> None:
        self._first = io.BytesIO(first)
        self._replay = replay

    def read(self, size: int | None = -1) -> bytes:
        """Read at most `size` bytes; all that is left by default."""
        limit = -1 if size is None else size
        first = self._first.read(limit)
        return first + self._replay.read("read", limit if limit < 0 else limit - len(first))

    def readline(self, size: int | None = -1) -> bytes:
        """Read one line, or `size` bytes of it."""
        limit = -1 if size is None else size
        first = self._first.readline(limit)
        if first.endswith(b"\n"):
            return first
        return first + self._replay.read("readline", limit if limit < 0 else limit - len(first))

    def readlines(self, hint: int | None = -1) -> list[bytes]:
        """Read lines until they have `hint` bytes; all that are left by default."""
        lines: list[bytes] = []
        size = 0
        for line in self:
            lines.append(line)
            size += len(line)
            if hint is not None and 0 < hint <= size:
                break
        return lines

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")
