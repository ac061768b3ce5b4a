"""Waiting in line for an ASGI request (`max_active`), and giving its place back.

Nobody reads the messages of a request that waits in line, so nobody would hear that its client has
gone. `Ahead` reads them meanwhile, and hands them to the application when its turn has come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable
from contextlib import suppress

from rope_middleware.protocols import Message, Receive, Send
from rope_middleware.running.finish import running_loop
from rope_middleware.running.line import AGAIN, LONG, Line, Place
from rope_middleware.scope.response import holds_connection
from rope_middleware.scope.scope import Scope

__all__ = ["Ahead", "Leaving", "answer_nobody", "wait_for_turn"]


async def wait_for_turn(line: Line, ahead: Ahead) -> Place | None:
    """Come into the line and wait for the turn.

    Args:
        line: the middleware's.
        ahead: reads the messages of the request meanwhile.

    Returns:
        The place; None where the client has gone, and nothing is left in the line.
    """
    place = line.enter()
    if place is not None:
        return place
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return await _wait_in_trio(line, ahead)
    return await _wait_in_asyncio(line, ahead, loop)


EAGER = 0.05  # seconds in line before messages are read ahead: 60 us that a short wait need not pay


async def _wait_in_asyncio(
    line: Line, ahead: Ahead, loop: asyncio.AbstractEventLoop
) -> Place | None:
    woken: asyncio.Future[None] = loop.create_future()
    gone: asyncio.Task[bool] | None = None

    def wake(*_: object) -> None:
        if not woken.done():
            woken.set_result(None)

    def wake_from_anywhere() -> None:
        wake() if running_loop() is loop else loop.call_soon_threadsafe(wake)

    place = line.enter(wake_from_anywhere)
    assert place is not None  # noqa: S101 - there always is one with a `wake`
    is_gone = True  # or something has ended the wait
    began = loop.time()
    try:
        while not place.has_turn:
            if gone is not None and gone.done() and gone.result():
                return None
            waited = loop.time() - began
            if gone is None and waited >= EAGER:
                gone = loop.create_task(ahead.hears_end())
                gone.add_done_callback(wake)
            timer = loop.call_later(_next_look(line, waited), wake)
            try:
                await woken
            finally:
                timer.cancel()
            woken = loop.create_future()
        is_gone = False
        return place
    finally:
        if gone is not None:
            gone.cancel()
        if is_gone:
            place.give_back()


def _next_look(line: Line, waited: float) -> float:
    """Return the seconds until there is something to do; tell that it has lasted long."""
    if waited < EAGER:
        return EAGER - waited
    if waited < LONG:
        return LONG - waited
    line.tell()
    return AGAIN


async def _wait_in_trio(line: Line, ahead: Ahead) -> Place | None:
    import trio

    turn = trio.Event()
    token = trio.lowlevel.current_trio_token()
    place = line.enter(lambda: token.run_sync_soon(turn.set))
    assert place is not None  # noqa: S101 - there always is one with a `wake`
    is_gone = True

    async def watch() -> None:
        if await ahead.hears_end():
            nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            seconds = LONG
            while not place.has_turn:
                with trio.move_on_after(seconds):
                    await turn.wait()
                if not place.has_turn:
                    line.tell()
                    seconds = AGAIN
            is_gone = False
            nursery.cancel_scope.cancel()
        return None if is_gone else place
    finally:
        if is_gone:
            place.give_back()


async def answer_nobody(send: Send) -> None:
    """Answer a client that has gone, with nginx's status for that.

    What is around us may count on a response: Starlette's BaseHTTPMiddleware raises without one.
    A server may raise an OSError then, and nobody is there whom it would concern:
    https://asgi.readthedocs.io/en/latest/specs/www.html#disconnected-client-send-exception
    """
    with suppress(OSError):
        await send({"type": "http.response.start", "status": 499, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class Ahead:
    """Stands between the app and the server's `receive`: reads ahead of the app.

    Args:
        receive: the server's.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: deque[Message] = deque()
        self._reading: asyncio.Task[Message] | None = None

    async def __call__(self) -> Message:
        """Give the app the next message."""
        if self._kept:
            return self._kept.popleft()
        reading, self._reading = self._reading, None
        return await (self._receive() if reading is None else reading)

    async def hears_end(self) -> bool:
        """Read until the client has gone; False where there is no telling.

        Of a body in several messages only the first is read: a line keeps no uploads in memory.
        """
        while True:
            try:
                message = await self._read()
            except Exception:  # the app will hear of it
                return False
            self._kept.append(message)
            if message["type"] == "http.disconnect":
                return True
            if message.get("more_body"):
                return False

    async def _read(self) -> Message:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # trio: a cancelled receive has taken nothing
            return await self._receive()
        # In a task of its own, which the app goes on waiting for: no server says what becomes of
        # a message whose receive is cancelled.
        self._reading = reading = loop.create_task(self._received())
        await asyncio.wait({reading})
        self._reading = None
        return reading.result()

    async def _received(self) -> Message:
        return await self._receive()

    def stop(self) -> None:
        """End what is still being read: the request is over."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.add_done_callback(_retrieve)
            reading.cancel()


def _retrieve(reading: asyncio.Task[Message]) -> None:
    """Keep asyncio from telling an error that nobody is to hear of."""
    if not reading.cancelled():
        reading.exception()


class Leaving:
    """Stands between the gate and the server's `send`: gives the place back.

    That is when the response has started and its scope holds no connection.
    """

    __slots__ = ("_has_started", "_place", "_scope", "_send")

    def __init__(self, place: Place, scope: Scope, send: Send) -> None:
        self._place: Place | None = place
        self._scope = scope
        self._send = send
        self._has_started = False

    def __call__(self, message: Message) -> Awaitable[None]:
        """Take a message from the gate."""
        if self._place is not None:
            self._has_started = self._has_started or message["type"] == "http.response.start"
            if self._has_started and not holds_connection(self._scope):
                self._place.give_back()
                self._place = None
        return self._send(message)
