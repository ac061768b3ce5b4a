"""What a response means for the scope: a table, without I/O. Both boundaries carry it out.

| status    | the commit failed before | may be run again | the scope commits      | act       |
|-----------|--------------------------|------------------|------------------------|-----------|
| from 500  |                          | yes              |                        | HOLD      |
| under 400 | yes                      | yes              |                        | HOLD      |
| under 400 | yes                      | no               |                        | REPLACE   |
| from 400  | yes                      | no               |                        | PASS      |
| any       | no                       | no               | no                     | PASS      |
| from 400  | no                       | no               | yes                    | ROLL_BACK |
| under 400 | no                       | no               | yes, doomed or vetoed  | ROLL_BACK |
| under 400 | no                       | no               | yes                    | COMMIT    |
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from rope_middleware.scope.outcome import has_refused
from rope_middleware.scope.reading import carried_inside
from rope_middleware.scope.response import doom_rest, is_doomed, options_now
from rope_middleware.scope.scope import Scope

if TYPE_CHECKING:
    from rope_middleware.position import Carried
    from rope_middleware.protocols import Veto

__all__ = [
    "COMMIT",
    "FAILED",
    "HELD",
    "PASS",
    "REPLACED",
    "REPLAY_LIMIT",
    "SERVER_ERROR",
    "SETTLING",
    "STARTED",
    "WAITING",
    "Act",
    "Gate",
    "decide",
]

REPLAY_LIMIT = 1024 * 1024  # bytes of memory for a request that may be run again
SERVER_ERROR = b"Internal Server Error"  # the body of the plain 500

Headers = Callable[[], list[tuple[str, str]]]


class Act(enum.Enum):
    """What to do with a response that is about to start."""

    COMMIT = enum.auto()  # then start it
    ROLL_BACK = enum.auto()  # then start it
    PASS = enum.auto()  # start it
    HOLD = enum.auto()  # keep it back: the request is run again
    REPLACE = enum.auto()  # answer an error in its place


# Bound once: each response that may commit comes by, and to look a name up in an Enum takes Python
# 0.09 us each time.
COMMIT, PASS = Act.COMMIT, Act.PASS


def decide(status: int, *, failed: bool, may_retry: bool, commits: bool) -> Act:
    """Decide on a response that is about to start.

    Args:
        status: of the response.
        failed: the commit for this response has failed already, and the app has swallowed that.
        may_retry: the request may be run again (C6).
        commits: the scope commits on success.

    Returns:
        What to do; of a COMMIT that is doomed or vetoed it is ROLL_BACK.
    """
    if may_retry and (status >= 500 or (failed and status < 400)):
        return Act.HOLD
    if failed:
        return Act.PASS if status >= 400 else Act.REPLACE
    if not commits:
        return Act.PASS
    return Act.COMMIT if status < 400 else Act.ROLL_BACK


# What has become of the response of one try. SETTLING: its commit or rollback is under way. FAILED:
# its commit has, and nothing has started.
WAITING, FAILED, HELD, REPLACED, SETTLING, STARTED = range(6)


class Gate:
    """What both boundaries know of one try's response; their own `Gate` sets it."""

    __slots__ = ("_may_replay", "_scope", "_told_inside", "commits", "raised", "state", "why")

    _scope: Scope
    _may_replay: Callable[[], bool] | None  # can the request be run again? None: no try follows
    state: int
    commits: bool  # what is done after the response's start
    why: str  # it is not committed
    raised: BaseException | None  # by on_commit_error, or by what it returned
    _told_inside: Carried | None  # what the response's start has to tell again: R3

    def decide_plainly(self, status: int) -> Act | None:
        """`decide`, where nobody has asked for more than a commit; None where it has to be asked.

        What that says of it costs 1 us more, on the path of every request that commits. (WSGI asks
        the same in `announce` itself: a call less.)
        """
        scope = self._scope
        options = scope._options
        if status >= 400 or self.state != WAITING or options.commit_veto is not None:
            return None
        if scope._sessions is None:
            if self._may_replay is not None:
                return None
            self.commits = options.commit_on_success
            self.state = STARTED
            return PASS  # no session was used, so there is nothing to settle
        if not options.commit_on_success or options.retries or scope._doomed or scope._is_refused:
            return None  # the last two as `is_doomed`, a call less
        return COMMIT

    def may_try_again(self) -> bool:
        """Tell whether this try may be run again (C6)."""
        return (
            self._may_replay is not None
            and self.state <= HELD
            and has_refused(self._scope)
            and self._may_replay()
        )

    def decide(self, status: int, headers: Headers) -> Act:
        """Decide on the response that the app has announced; `why` tells the reason."""
        options = options_now(self._scope)
        act = decide(
            status,
            failed=self.state == FAILED,
            may_retry=self._may_replay is not None and self.may_try_again(),
            commits=options.commit_on_success,
        )
        if act is Act.COMMIT:
            if is_doomed(self._scope):
                self.why = "doomed"
            elif options.commit_veto is not None and self._is_vetoed(
                options.commit_veto, status, headers
            ):
                self.why = "vetoed"
            return Act.ROLL_BACK if self.why else act
        if act is not Act.PASS:
            self.why = f"status {status}"
        return act

    def _is_vetoed(self, veto: Veto, status: int, headers: Headers) -> bool:
        try:
            return bool(veto(status, headers()))
        except BaseException:
            self.state = FAILED  # nobody knows whether it may commit
            doom_rest(self._scope)
            raise

    def instead_of(self, error: BaseException, protocol: str) -> Any:
        """Ask `on_commit_error` for the application that answers a commit that has failed for good.

        Raises:
            BaseException: what it raised.
            TypeError: what it returned is no application.
        """
        ask = options_now(self._scope).on_commit_error
        if ask is None or not isinstance(error, Exception) or self.may_try_again():
            return None
        self.state = REPLACED  # whatever it does: nothing of the app's response starts
        doom_rest(self._scope)
        try:
            found = ask(error)
            if found is not None and not _is_application(found, protocol):
                raise TypeError(_NO_ANSWER.format(ask, found, protocol.upper()))
        except BaseException as raised:
            self.raised = raised
            raise
        if found is None:
            self.state = FAILED
        return found

    def _note_commit(self) -> None:
        """The commit before the response's start stands."""
        self.commits = True
        if self._scope._options.read_only:
            self._told_inside = carried_inside(self._scope)

    def why_not(self) -> str:
        """Tell why what was done after the response's start is not committed; "" where it is."""
        if not self.commits:
            return self.why or ("no response" if self.state == WAITING else "no success")
        return "doomed" if is_doomed(self._scope) else ""


_NO_ANSWER = (
    "on_commit_error {!r} returned {!r}; it must return an {} application (for example a response "
    "of your framework's, where that is one), or None."
)


def _is_application(found: object, protocol: str) -> bool:
    arguments = range(3 if protocol == "asgi" else 2)
    try:
        inspect.signature(cast("Callable[..., object]", found)).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return not isinstance(found, type)
