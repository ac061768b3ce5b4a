"""Was a WebSocket accepted? One that was denied, or closed before, commits nothing (C2)."""

from __future__ import annotations

from collections.abc import Awaitable

from rope_middleware.protocols import Message, Send
from rope_middleware.scope.response import note_accepted
from rope_middleware.scope.scope import Scope

__all__ = ["Handshake"]


class Handshake:
    """Stands between the app and the server's `send`.

    Args:
        scope: the connection's.
        send: the server's.
    """

    __slots__ = ("_scope", "_send")

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send

    def __call__(self, message: Message) -> Awaitable[None]:
        """Pass a message on."""
        if message["type"] == "websocket.accept":
            note_accepted(self._scope)
        return self._send(message)
