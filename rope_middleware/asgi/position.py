"""The log position of an ASGI request: what its headers bring, what its response tells (R3)."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable

from rope_middleware.position import Carried, is_told
from rope_middleware.protocols import ASGIScope, Message, Send

__all__ = ["Telling", "carried_by", "told_again"]


def carried_by(scope: ASGIScope) -> Carried:
    """Return what a request carries; its headers are read where somebody asks for it."""

    def values(name: str) -> Iterable[str]:
        wanted = name.encode("latin-1")
        return [
            bytes(value).decode("latin-1")
            for key, value in scope.get("headers") or ()
            if bytes(key).lower() == wanted
        ]

    return Carried(values)


class Telling:
    """Stands between the gate and the server's `send`: puts the position into the response's start.

    Args:
        carried: the request's.
        send: the server's.
    """

    __slots__ = ("_carried", "_send")

    def __init__(self, carried: Carried, send: Send) -> None:
        self._carried = carried
        self._send = send

    def __call__(self, message: Message) -> Awaitable[None]:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            message = _told(message, self._carried, message.get("headers") or ())
        return self._send(message)


def told_again(message: Message, carried: Carried) -> Message:
    """Return a response's start that tells what was written after a `Telling` has seen it."""
    headers = [
        (name, value)
        for name, value in message.get("headers") or ()
        if not is_told(bytes(name).decode("latin-1"), bytes(value).decode("latin-1"))
    ]
    return _told(message, carried, headers)


def _told(message: Message, carried: Carried, headers: Iterable[tuple[bytes, bytes]]) -> Message:
    told = carried.response_headers()
    if not told:
        return message
    more = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in told]
    return {**message, "headers": [*headers, *more]}
