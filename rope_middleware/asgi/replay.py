"""The body of an ASGI request, kept for another try."""

from __future__ import annotations

from rope_middleware.answer import REPLAY_LIMIT
from rope_middleware.protocols import ASGIScope, Message, Receive

__all__ = ["Replay", "copy_scope"]


class Replay:
    """Stands between the app and the server's `receive`.

    The body is kept in one piece, so that many small messages take no more memory than it.

    Args:
        receive: the server's.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._body: bytearray | None = bytearray()
        self._has_ended = False  # the server has given its last part
        self._is_again = False  # what is kept comes first
        self.is_whole: bool = True
        """False once the body has outgrown REPLAY_LIMIT, the client has gone, or no try follows."""

    async def __call__(self) -> Message:
        """Give the app the next message."""
        if self._is_again:
            self._is_again = False
            return {
                "type": "http.request",
                "body": bytes(self._body or b""),
                "more_body": not self._has_ended,
            }
        message = await self._receive()
        if self._body is not None:
            body = message.get("body", b"")
            if message["type"] != "http.request" or len(self._body) + len(body) > REPLAY_LIMIT:
                self.forget()
            else:
                self._body += body
                self._has_ended = not message.get("more_body", False)
        return message

    def can_repeat(self) -> bool:
        """Tell whether all that was read is still here."""
        return self.is_whole

    def forget(self) -> None:
        """Keep nothing of what was read: no further try can follow."""
        if not self._is_again:
            self._body = None
        self.is_whole = False

    def rewind(self) -> None:
        """Begin again with what was read."""
        self._is_again = bool(self._body) or self._has_ended


def copy_scope(scope: ASGIScope) -> ASGIScope:
    """Return a copy of the scope for one try: what an app changes there is the try's own."""
    copied = dict(scope)
    for key in ("headers", "state"):
        if key in copied:
            copied[key] = copied[key].copy() if key == "state" else list(copied[key])
    return copied
