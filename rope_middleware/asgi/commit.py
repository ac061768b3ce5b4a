"""The gate of an ASGI response: commits before a success can start."""

from __future__ import annotations

from asyncio import CancelledError, get_running_loop
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from rope_middleware import answer
from rope_middleware.answer import (
    COMMIT,
    FAILED,
    HELD,
    PASS,
    REPLACED,
    SERVER_ERROR,
    SETTLING,
    STARTED,
    WAITING,
)
from rope_middleware.asgi.position import told_again
from rope_middleware.protocols import ASGIApp, ASGIScope, Message, Receive, Send
from rope_middleware.running.finish import finish
from rope_middleware.scope.async_ending import acommit, aend, aroll_back
from rope_middleware.scope.response import doom_rest, is_head, options_now
from rope_middleware.scope.scope import Scope
from rope_middleware.scope.short import end_shortly
from rope_middleware.session.committing import aresolve_doubts

if TYPE_CHECKING:
    from rope_middleware.asgi.replay import Replay

__all__ = ["Gate"]

# What may come before the response's start, and is no part of the response.
_BEFORE = frozenset({"http.response.early_hint", "http.response.push", "http.response.debug"})


class Gate(answer.Gate):
    """Stands between the app and the server's `send`.

    Args:
        scope: the request's.
        send: the server's.
        request: what `on_commit_error` needs to answer.
        replay: the request's body for another try; None where there is none to come.
    """

    __slots__ = ("_replay", "_request", "_send", "_settled")

    def __init__(
        self,
        scope: Scope,
        send: Send,
        request: tuple[ASGIScope, Receive],
        replay: Replay | None = None,
    ) -> None:
        self._scope = scope
        self._may_replay = None if replay is None else replay.can_repeat
        self.state: int = WAITING
        self.commits = False
        self.why: str = ""
        self.raised: BaseException | None = None
        self._told_inside = None
        self._settled: Any = None  # an anyio.Event, where another task waits for the commit
        self._send = send
        self._request = request
        self._replay = replay

    def send(self, message: Message) -> Awaitable[None]:
        """Take a message from the app."""
        if self.state == STARTED:
            return self._send(message)
        if message["type"] == "http.response.start":
            act = self.decide_plainly(message["status"])
            if act is PASS:
                return self._send(message)
            if act is COMMIT:
                return self._commit(message)
        return self._before_start(message)

    @property
    def holds_back(self) -> bool:
        """Whether the response was held back, for there is to be another try."""
        return self.state == HELD

    def ends_at_once(self) -> bool:
        """End the scope, where its commit stands and nothing is open; tell whether it was so.

        Nearly all that commit come this way, and need no coroutine of `end`.
        """
        return self.state == STARTED and end_shortly(self._scope)

    async def end(self) -> None:
        """The app has returned: end the scope."""
        try:
            if self.raised is not None:
                raise self.raised  # the app has swallowed it
            # The app may have swallowed the error of a commit that failed, and kept quiet.
            if self.state == FAILED:
                await aresolve_doubts(self._scope)
                if self.may_try_again():
                    self.state = HELD
                else:
                    await self._replace()
        finally:
            why = self.why_not()
            if self.state == WAITING and options_now(self._scope).commit_on_success:
                doom_rest(self._scope)  # the client has gone, and the framework has kept quiet
            await aend(self._scope, not why, why)

    async def _before_start(self, message: Message) -> None:
        while self.state == SETTLING:  # start and body may be sent from two tasks
            await self._wait()
        if self.state in (REPLACED, HELD):
            return  # this response was replaced, or held back: swallow it
        if self.state == STARTED:
            await self._send(message)
        elif message["type"] == "http.response.start":
            await self._announce(message)
        elif self.state == FAILED and message["type"] not in _BEFORE:
            # The app has swallowed the error and goes on with the response that never started.
            await self._replace()
        else:
            await self._send(message)

    async def _wait(self) -> None:
        """Wait until it is decided whether the response starts."""
        if self._settled is None:
            import anyio

            self._settled = anyio.Event()
        await self._settled.wait()

    def _set(self, state: int) -> None:
        """Go on from SETTLING; who has waited for that goes on, too."""
        self.state = state
        if state == STARTED and self._replay is not None:
            self._replay.forget()
        if self._settled is not None:
            self._settled.set()
            self._settled = None

    async def _announce(self, message: Message) -> None:
        """The app wants to start its response: do what that means."""
        await aresolve_doubts(self._scope)
        act = self.decide(message["status"], lambda: _headers(message))
        if act is answer.Act.HOLD:
            self.state = HELD
        elif act is answer.Act.REPLACE:
            await self._replace()
        elif act is COMMIT:
            await self._commit(message)
        else:
            if act is answer.Act.ROLL_BACK:
                await self._roll_back()
            self._set(STARTED)
            await self._send(message)

    async def _roll_back(self) -> None:
        self.state = SETTLING
        doom_rest(self._scope)  # nothing later in the scope commits, either
        try:
            await aroll_back(self._scope, self.why)
        except BaseException:
            self._set(FAILED)
            raise

    async def _commit(self, message: Message) -> None:
        """Commit, then start the response. Once the commit stands, nobody may read an error."""
        if self.state != WAITING:  # another start, of another task, has come first
            await self._before_start(message)
            return
        self.state = SETTLING
        try:
            await acommit(self._scope, self._note_commit)
        except CancelledError:
            if not self.commits:
                self._set(FAILED)
                raise
            # The response that was announced starts before the cancellation goes on.
            await self._start_shielded(message)
            raise
        except BaseException as error:
            self._set(FAILED)
            instead = self.instead_of(error, "asgi")
            if instead is None:
                raise
            await self._answer(instead)
            return
        try:
            get_running_loop()
        except RuntimeError:
            # In trio a cancellation that came during the commit is felt at the next await.
            await self._start_shielded(message)
            return
        if self._told_inside is not None:
            message = told_again(message, self._told_inside)
        if self._replay is None and self._settled is None:
            self.state = STARTED  # as `_set`, which would be a call for nearly nobody
        else:
            self._set(STARTED)
        await self._send(message)

    async def _start_shielded(self, message: Message) -> None:
        if self._told_inside is not None:
            message = told_again(message, self._told_inside)
        self._set(STARTED)
        await finish(_sent(self._send(message)), options_now(self._scope).close_timeout)

    async def _answer(self, instead: ASGIApp) -> None:
        """Answer by the application that `on_commit_error` has returned."""
        bodiless = is_head(self._scope)

        async def send(message: Message) -> None:
            if bodiless and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await self._send(message)

        try:
            await instead(*self._request, send)
        except BaseException as error:
            self.raised = error
            raise

    async def _replace(self) -> None:
        """Answer a plain 500 instead of a success whose commit failed."""
        self.state = REPLACED
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(SERVER_ERROR)).encode()),
        ]
        body = b"" if is_head(self._scope) else SERVER_ERROR
        await self._send({"type": "http.response.start", "status": 500, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


async def _sent(sending: Awaitable[None]) -> None:
    await sending


def _headers(message: Message) -> list[tuple[str, str]]:
    given = message.get("headers", ())
    headers: list[tuple[bytes, bytes]] = list(given)
    if not isinstance(given, (list, tuple)):
        # Any iterable is allowed, and a generator can be read only once.
        message["headers"] = headers
    return [
        (bytes(name).decode("latin-1"), bytes(value).decode("latin-1")) for name, value in headers
    ]
