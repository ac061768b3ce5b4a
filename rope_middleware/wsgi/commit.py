"""The gate of a WSGI response: commits before a success starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rope_middleware import answer
from rope_middleware.answer import COMMIT, FAILED, HELD, SERVER_ERROR, STARTED, WAITING, Act
from rope_middleware.scope.context import class_of, logger, traceback_of
from rope_middleware.scope.ending import commit, end, roll_back
from rope_middleware.scope.reading import carried_inside
from rope_middleware.scope.response import doom_rest, is_head
from rope_middleware.scope.scope import Scope
from rope_middleware.session.committing import resolve_doubts
from rope_middleware.wsgi.begun import Begun, close_unsent, code_of
from rope_middleware.wsgi.body import Body, ListBody, hand_on, made
from rope_middleware.wsgi.files import is_odd, is_streamed
from rope_middleware.wsgi.late import hand_on_late
from rope_middleware.wsgi.position import told_again

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from rope_middleware.wsgi.replay import Replay

__all__ = ["AGAIN", "Gate"]

AGAIN: list[bytes] = []  # no response: the request is to be run again


class Gate(answer.Gate):
    """Stands between the app and the server's `start_response`.

    The app's call is held back until the first chunk of its stream is made (of a list: until the
    app returns it), so that a success whose commit fails was never announced, and one whose first
    chunk fails was never committed. That chunk is made before the server gets the body: not every
    server looks at what start_response was told after that (granian), or has an answer to an error
    in a first chunk (Cheroot).

    It serves one call, by `serve`.
    """

    __slots__ = (
        "_call",
        "_environ",
        "_instead",
        "_owns",
        "_replay",
        "_start_response",
        "_write_on",
        "_written",
    )

    _environ: WSGIEnvironment

    def serve(
        self,
        app: WSGIApplication,
        environ: WSGIEnvironment,
        scope: Scope,
        start_response: StartResponse,
        replay: Replay | None = None,
        owns: bool = True,
    ) -> Iterable[bytes]:
        """Call the app; return what the server gets, or AGAIN for another try.

        `replay` is None where no other try may follow, and `owns` is False where another middleware
        ends the scope.

        Raises:
            BaseException: what the app raised, unless a commit failed or another try follows.
        """
        # Here, and not in an `__init__`: that would be one more function for each request.
        self._scope = scope
        self._may_replay = None if replay is None else replay.can_repeat
        self.state: int = WAITING
        self.commits: bool = False
        self.why: str = ""
        self.raised: BaseException | None = None
        self._instead: WSGIApplication | None = None  # what `on_commit_error` has returned
        self._write_on: Callable[[bytes], object] | None = None
        self._written: list[bytes] | None = []
        self._start_response = start_response
        self._replay = replay
        self._owns = owns
        self._call: Any = None  # the app's call of start_response, while it is held back
        self._environ = environ
        body: Iterable[bytes] = ()
        try:
            body = app(environ, self.start_response)
            written, self._written = self._written, None
            if written:
                body = Begun(body, written)
            kind = type(body)
            if kind is list or kind is tuple:  # most of all
                self.announce()
                if self.state == STARTED and owns:
                    ours = ListBody()  # as `made`, a call less
                    ours._body, ours._scope, ours._owns = body, scope, True
                    ours._commits, ours._read = self.commits, False
                    return ours
            elif (streamed := self._begin(body)) is not None:
                return streamed
        except BaseException as error:
            self._note_error(error, body)
        return self._finish(body)

    def _begin(self, body: Iterable[bytes]) -> Iterable[bytes] | None:
        """Start the response of a body that is no list; return what the server gets of a stream."""
        streamed = self.state == WAITING and (
            is_streamed(body, self._environ) or self._starts_late(body)
        )
        if streamed:
            body = Begun(body)
        self.announce()
        if streamed and self.state == WAITING:
            return hand_on_late(body, self._scope, self._owns, self)
        if streamed and self.state == STARTED:
            return made(Body, body, self._scope, self.commits, self._owns)
        return None

    def _finish(self, body: Iterable[bytes]) -> Iterable[bytes]:
        """Return what the server gets in any other case, or AGAIN."""
        if self.state in (WAITING, STARTED):
            return hand_on(body, self._environ, self._scope, self.commits, self._owns)
        close_unsent(body)
        if self.may_try_again():
            self.state = HELD
        instead = None if self.state == HELD else self._answer()
        if self._owns:
            end(self._scope, why=self.why)
        return AGAIN if instead is None else instead

    def _starts_late(self, body: object) -> bool:
        """Tell whether a body of a known length, or a file, may call start_response as it is read.

        PEP 3333: "this invocation may be performed by the iterable's first iteration".
        """
        return self._call is None and type(body) not in (list, tuple) and not is_odd(body)

    def _note_error(self, error: BaseException, body: Iterable[bytes]) -> None:
        """The app's call, or the commit, has raised: raise it again, unless we answer."""
        self.why = class_of(error)
        resolve_doubts(self._scope)
        is_ours = self.state == FAILED or self.may_try_again()
        if not isinstance(error, Exception) or not is_ours:
            close_unsent(body)
            raise error
        if self.state == WAITING:
            self.state = HELD
        if self.state == FAILED and not self.may_try_again():
            self._tell(error)

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        """Take the app's call."""
        if exc_info is None and self._call is None and self.state == WAITING:
            self._call = status, headers
            return self._write
        call: Any = (status, headers) if exc_info is None else (status, headers, exc_info)
        if self._call is not None and exc_info is None and self.state == WAITING:
            # Called twice, a fatal error (PEP 3333): nothing is committed, the server shall say so.
            first, self._call = self._call, None
            self._refuse_success("start_response was called twice")
            self._start(first)
        if self.state == STARTED:
            write = self._start_response(*call)
            if code_of(status) >= 400:
                doom_rest(self._scope)  # the server has taken it instead of the success
            return write
        if self.state != HELD:
            self._call = call
        return self._write

    def _write(self, data: bytes) -> object:
        """The `write` callable that the app gets."""
        if data:
            self.announce()
        if self._write_on is None and self.state != STARTED:
            return None  # this response was replaced, or held back
        if self._write_on is None and self._written is not None:
            # The server has none (granian). The commit may stand by now, and Python's own error
            # for that would be a 500: so what is written becomes the beginning of the body.
            self._written.append(data)
            return None
        write: Any = self._write_on  # None to what is written too late: Python's own error
        return write(data)

    def announce(self) -> None:
        """The app wants to start its response, if it has said so: do what that means.

        Raises:
            BaseException: the commit's error; nothing has started.
        """
        call = self._call
        if call is None:
            return
        self._call = None
        try:
            status = int(str(call[0])[:3])  # as `code_of`, a call less
        except ValueError:
            status = 500
        scope, options = self._scope, self._scope._options
        is_plain = (  # as in `decide_plainly`
            status < 400
            and self.state == WAITING
            and options.commit_on_success
            and options.commit_veto is None
            and not options.retries
            and (scope._sessions is None or not (scope._doomed or scope._is_refused))
        )
        if not is_plain and not self._is_to_commit(call, status):
            return
        if scope._sessions is not None:
            self.state = FAILED  # assumed; corrected when the commit has succeeded
            try:
                commit(scope)
            except Exception as error:
                self._instead = self.instead_of(error, "wsgi")
                if self._instead is None:
                    raise
                return
        self.commits = True
        if options.read_only:
            call = told_again(call, carried_inside(scope))
        self.state = STARTED  # as `_start`, a call less
        if self._replay is not None:
            self._replay.forget()
        self._write_on = self._start_response(*call)

    def _is_to_commit(self, call: Any, status: int) -> bool:
        """Tell whether a commit comes first; if not, do what the response's start means."""
        resolve_doubts(self._scope)
        act = self.decide(status, lambda: list(call[1]))
        if act is COMMIT:
            return True
        if act is Act.HOLD:
            self.state = HELD
        elif act is not Act.REPLACE:
            if act is Act.ROLL_BACK:
                self._refuse_success(self.why)
            self._start(call)
        return False

    def _start(self, call: Any) -> None:
        self.state = STARTED
        if self._replay is not None:
            self._replay.forget()
        self._write_on = self._start_response(*call)

    def _refuse_success(self, why: str) -> None:
        self.state = FAILED  # until the response starts
        doom_rest(self._scope)  # nothing later in the scope commits, either
        roll_back(self._scope, why)

    @property
    def is_waiting(self) -> bool:
        """Whether the app has not called start_response yet."""
        return self.state == WAITING

    def announce_or_replace(self) -> Iterable[bytes] | None:
        """`announce` of a body that the server reads; what it gets in place of it, or None."""
        try:
            self.announce()
        except Exception as error:
            if self.state != FAILED:
                raise
            self.why = class_of(error)
            self._tell(error)
        return None if self.state in (WAITING, STARTED) else self._answer()

    def _tell(self, error: BaseException) -> None:
        """Log what nobody else hears of: the framework has done its part already."""
        logger.error("%r is answered by a plain 500: %s", self._scope.name, traceback_of(error))

    def _answer(self) -> Iterable[bytes]:
        """Answer instead of a success whose commit failed; return the body.

        Raises:
            BaseException: what `on_commit_error` raised, where the app has swallowed it.
        """
        if self.raised is not None:
            raise self.raised
        if self._instead is None:
            return self._plain_error()
        body = self._instead(self._environ, self._start_response)
        if not is_head(self._scope):
            return body
        close_unsent(body)
        return []

    def _plain_error(self) -> list[bytes]:
        """Answer a plain 500 instead of a success whose commit failed; return its body."""
        length = ("Content-Length", str(len(SERVER_ERROR)))
        headers = [("Content-Type", "text/plain; charset=utf-8"), length]
        self._start_response("500 Internal Server Error", headers)
        return [] if is_head(self._scope) else [SERVER_ERROR]
