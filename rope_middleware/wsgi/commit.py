"""The gate of a WSGI response: commits before a success starts."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from rope_middleware import answer
from rope_middleware.answer import FAILED, HELD, SERVER_ERROR, STARTED, WAITING, Act
from rope_middleware.scope.context import class_of
from rope_middleware.scope.ending import commit, end, roll_back
from rope_middleware.scope.response import doom_rest
from rope_middleware.scope.scope import Scope
from rope_middleware.wsgi.body import close_unsent, hand_on, is_odd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from rope_middleware.wsgi.replay import Replay

__all__ = ["AGAIN", "Gate"]

AGAIN: list[bytes] = []  # no response: the request is to be run again


class Gate(answer.Gate):
    """Stands between the app and the server's `start_response`.

    The app's call is held back until the app has returned its body, so that a success whose
    commit fails was never announced. PEP 3333 sends nothing before the first chunk anyway.
    Where the app starts the response only while its body is read, the gate opens at once.

    Args:
        scope: the request's.
        start_response: the server's.
        replay: the request's body for another try; None where there is none to come.
        owns: False where another middleware ends the scope.
    """

    __slots__ = ("_call", "_owns", "_returned", "_start_response", "_write_on")

    def __init__(
        self,
        scope: Scope,
        start_response: StartResponse,
        replay: Replay | None = None,
        owns: bool = True,
    ) -> None:
        # The base's, without the price of a call.
        self._scope = scope
        self._may_replay = None if replay is None else replay.can_repeat
        self.state = WAITING
        self.commits = False
        self.why = ""
        self._start_response = start_response
        self._owns = owns
        self._returned = False
        self._call: Any = None  # the app's call of start_response, while it is held back
        self._write_on: Callable[[bytes], object] | None = None

    def serve(self, app: WSGIApplication, environ: WSGIEnvironment) -> Iterable[bytes]:
        """Call the app; return what the server gets, or AGAIN for another try.

        Raises:
            BaseException: what the app raised, unless a commit failed or another try follows.
        """
        body: Iterable[bytes] = ()
        try:
            body = app(environ, self.start_response)
            self._returned = True
            if self._call is not None:
                self._announce()
            elif self.state == WAITING and not is_odd(body):
                body = _begin(body, self)
        except BaseException as error:
            self.why = class_of(error)
            if not isinstance(error, Exception) or not (
                self.state == FAILED or self.may_try_again()
            ):
                close_unsent(body)
                raise
            if self.state == WAITING:
                self.state = HELD
        if self.state in (WAITING, STARTED):
            return hand_on(body, environ, self._scope, self.commits, self._owns)
        close_unsent(body)
        if self.may_try_again():
            self.state = HELD
        if self._owns:
            end(self._scope, why=self.why)
        return AGAIN if self.state == HELD else self._plain_error()

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        """Take the app's call."""
        if self._call is not None and exc_info is None and self.state == WAITING:
            self._announce()  # called twice: the server shall say so
        call: Any = (status, headers) if exc_info is None else (status, headers, exc_info)
        if self.state == STARTED:
            write = self._start_response(*call)
            if _code(status) >= 400:
                doom_rest(self._scope)  # the server has taken it instead of the success
            return write
        if self.state != HELD:
            self._call = call
            if self._returned:
                self._announce()
        return self._write

    def _write(self, data: bytes) -> object:
        """The `write` callable that the app gets."""
        if self._call is not None and data:
            self._announce()
        # None: this response was replaced, or held back.
        return None if self._write_on is None else self._write_on(data)

    def _announce(self) -> None:
        """The app wants to start its response: do what that means."""
        call, self._call = self._call, None
        status = _code(call[0])
        if self.passes(status):
            self._write_on = self._start_response(*call)
            return
        act = self.decide(status, lambda: list(call[1]))
        if act is Act.HOLD:
            self.state = HELD
        elif act is not Act.REPLACE:
            if act is Act.ROLL_BACK:
                self.state = FAILED  # assumed; corrected below once the response starts
                doom_rest(self._scope)  # nothing later in the scope commits, either
                roll_back(self._scope, self.why)
            elif act is Act.COMMIT:
                self.state = FAILED  # assumed; corrected below when the commit has succeeded
                commit(self._scope)
                self.commits = True
            self.state = STARTED
            self._write_on = self._start_response(*call)

    def _plain_error(self) -> list[bytes]:
        """Answer a plain 500 instead of a success whose commit failed; return its body."""
        self._start_response(
            "500 Internal Server Error",
            [
                ("Content-Type", "text/plain; charset=utf-8"),
                ("Content-Length", str(len(SERVER_ERROR))),
            ],
        )
        return [SERVER_ERROR]


def _begin(body: Iterable[bytes], gate: Gate) -> Iterable[bytes]:
    """Make chunks of `body` until the app has called start_response, and return all of them.

    PEP 3333 has the app call it before the first chunk that is not empty.
    """
    begun = _Begun(body)
    for chunk in begun.rest:
        begun.first.append(chunk)
        if chunk or gate.state != WAITING:
            break
    return begun


class _Begun:
    """A body whose first chunks have been made already."""

    def __init__(self, body: Iterable[bytes]) -> None:
        self._body = body
        self.first: list[bytes] = []
        self.rest = iter(body)

    def __iter__(self) -> Iterator[bytes]:
        return chain(self.first, self.rest)

    def close(self) -> None:
        """Close the app's body."""
        close = getattr(self._body, "close", None)
        if close is not None:
            close()


def _code(status: object) -> int:
    """Return the number in a status line; 500 for what the server is going to refuse."""
    try:
        return int(str(status)[:3])
    except ValueError:
        return 500
