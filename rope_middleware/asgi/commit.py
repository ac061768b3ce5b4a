"""The gate of an ASGI response: commits before a success can start."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from rope_middleware import answer
from rope_middleware.answer import FAILED, HELD, REPLACED, SERVER_ERROR, STARTED, WAITING, Act
from rope_middleware.protocols import Message, Send
from rope_middleware.running.finish import finish
from rope_middleware.scope.ending import acommit, aend, aroll_back
from rope_middleware.scope.response import doom_rest, options_now
from rope_middleware.scope.scope import Scope, has_committed

if TYPE_CHECKING:
    from rope_middleware.asgi.replay import Replay

__all__ = ["Gate"]


class Gate(answer.Gate):
    """Stands between the app and the server's `send`.

    Args:
        scope: the request's.
        send: the server's.
        replay: the request's body for another try; None where there is none to come.
    """

    __slots__ = ("_replay", "_send")

    def __init__(self, scope: Scope, send: Send, replay: Replay | None = None) -> None:
        # The base's, without the price of a call.
        self._scope = scope
        self._may_replay = None if replay is None else replay.can_repeat
        self.state = WAITING
        self.commits = False
        self.why = ""
        self._send = send
        self._replay = replay

    def send(self, message: Message) -> Awaitable[None]:
        """Take a message from the app."""
        if self.state == STARTED or (
            message["type"] == "http.response.start" and self.passes(message["status"])
        ):
            return self._send(message)
        return self._before_start(message)

    @property
    def holds_back(self) -> bool:
        """Whether the response was held back, for there is to be another try."""
        return self.state == HELD

    async def end(self) -> None:
        """The app has returned: end the scope."""
        try:
            # The app may have swallowed the error of a commit that failed, and kept quiet.
            if self.state == FAILED:
                if self.may_try_again():
                    self.state = HELD
                else:
                    await self._replace()
        finally:
            why = self.why_not()
            await aend(self._scope, not why, why)

    async def _before_start(self, message: Message) -> None:
        if self.state in (REPLACED, HELD):
            return  # this response was replaced, or held back: swallow it
        if message["type"] == "http.response.start":
            await self._announce(message)
        elif self.state == FAILED and message["type"] == "http.response.body":
            # The app has swallowed the error and goes on with the response that never started.
            await self._replace()
        else:
            await self._send(message)

    async def _announce(self, message: Message) -> None:
        """The app wants to start its response: do what that means."""
        act = self.decide(message["status"], lambda: _headers(message))
        if act is Act.HOLD:
            self.state = HELD
        elif act is Act.REPLACE:
            await self._replace()
        else:
            if act is Act.ROLL_BACK:
                await self._roll_back()
            elif act is Act.COMMIT:
                await self._commit(message)
            self._start()
            await self._send(message)

    def _start(self) -> None:
        self.state = STARTED
        if self._replay is not None:
            self._replay.forget()

    async def _roll_back(self) -> None:
        self.state = FAILED  # assumed; corrected by the caller once the response starts
        doom_rest(self._scope)  # nothing later in the scope commits, either
        await aroll_back(self._scope, self.why)

    async def _commit(self, message: Message) -> None:
        self.state = FAILED  # assumed; corrected by the caller when the commit has succeeded
        try:
            await acommit(self._scope)
        except CancelledError:
            if has_committed(self._scope):
                # The rows are there, so nobody may read an error: the response that was
                # announced starts before the cancellation goes on.
                self.commits = True
                self._start()
                timeout = options_now(self._scope).close_timeout
                await finish(_sent(self._send(message)), timeout)
            raise
        self.commits = True

    async def _replace(self) -> None:
        """Answer a plain 500 instead of a success whose commit failed."""
        self.state = REPLACED
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(SERVER_ERROR)).encode()),
        ]
        await self._send({"type": "http.response.start", "status": 500, "headers": headers})
        await self._send({"type": "http.response.body", "body": SERVER_ERROR})


async def _sent(sending: Awaitable[None]) -> None:
    await sending


def _headers(message: Message) -> list[tuple[str, str]]:
    # Any iterable is allowed, and a generator can be read only once.
    message["headers"] = headers = list(message.get("headers", ()))
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
