"""The body of a WSGI request, kept for another try."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, cast

from rope_middleware.answer import REPLAY_LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import WSGIEnvironment

__all__ = ["Replay"]


class Replay:
    """Keeps the body of a request for another try."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        self._environ = environ
        stream = environ["wsgi.input"]
        length = environ.get("CONTENT_LENGTH") or "0"
        self._input: Callable[[], Any] = lambda: stream
        self.is_whole = False
        """False where the body outgrows REPLAY_LIMIT, or its length is unknown."""
        if environ.get("wsgi.input_terminated"):
            kept = stream.read(REPLAY_LIMIT + 1)
            self.is_whole = len(kept) <= REPLAY_LIMIT
            if self.is_whole:
                self._input = lambda: io.BytesIO(kept)
            else:
                self._input = lambda: io.BufferedReader(cast("Any", _Chained(kept, stream)))
        elif (
            length.isdecimal()
            and int(length) <= REPLAY_LIMIT
            and "HTTP_TRANSFER_ENCODING" not in environ
        ):
            body = stream.read(int(length)) if int(length) else b""
            self._input = lambda: io.BytesIO(body)
            self.is_whole = True

    def can_repeat(self) -> bool:
        """Tell whether the body is here for another try."""
        return self.is_whole

    def environ(self) -> WSGIEnvironment:
        """Return a copy of the environ for the next try, its input at the beginning."""
        return {**self._environ, "wsgi.input": self._input()}


class _Chained(io.RawIOBase):
    """What was read of a stream already, then the rest of it."""

    def __init__(self, first: bytes, rest: Any) -> None:
        self._first = io.BytesIO(first)
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data: bytes = self._first.read(len(buffer)) or self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
