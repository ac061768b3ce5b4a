"""Ending, committing and rolling back a scope: from sync code, and after a fork.

What happens in which order is told in `order`. In a sync scope nothing of it ever suspends, so
`run_now` runs it in one go. The way of most requests is shorter: see `short`. What async code calls
is in `async_ending`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from rope_middleware.running.forks import at_fork
from rope_middleware.scope.context import class_of, current, unbind, with_outer
from rope_middleware.scope.hands import CLOSING, HERE, run_now
from rope_middleware.scope.order import (
    after_failure,
    committing,
    each,
    ending,
    held,
    rolling_back,
)
from rope_middleware.scope.scope import CLOSED, ENDED, OPEN, Scope
from rope_middleware.scope.settling import (
    Aside,
    Settling,
    bare_settling,
    reset_committing,
    set_committing,
)
from rope_middleware.scope.short import end_shortly, end_untouched

if TYPE_CHECKING:
    from rope_middleware.scope.kind import SessionKind

__all__ = [
    "commit",
    "detach",
    "end",
    "end_closing",
    "end_failed",
    "explain",
    "explainers",
    "roll_back",
]


def end(scope: Scope, commits: bool = False, why: str = "") -> None:
    """End a sync scope. See `order.ending`."""
    if not (end_untouched(scope) or end_shortly(scope)):
        run_now(ending(scope, HERE, commits, why))


def commit(scope: Scope) -> None:
    """Commit a sync scope that goes on.

    Most have one session and no callback, and then the session's kind commits it alone. It is
    `order.committing` without its questions about several sessions: of a WSGI request with one
    SELECT and a commit that is 900 of 10,700 instructions of Python's.

    Args:
        scope: the request's.

    Raises:
        BaseException: the commit's error; everything is rolled back.
    """
    sessions = scope._sessions
    if sessions is None:
        return
    if current.get(None) is not scope:
        _within(scope, commit)
        return
    if scope._is_async or scope._registries:
        settling = Settling(scope)
    else:  # the same, a call less: nobody counts the calls on sessions of a sync scope
        settling = bare_settling()
        settling._scope = scope
        scope._settling = settling  # first: who comes from here on has another session
        for key in list(sessions):
            aside = Aside()
            aside.kind = key.kind
            session = sessions.pop(key, None)
            if session is not None:  # else another thread has removed it in this instant
                sessions[aside] = session
                settling._aside = *settling._aside, (key, aside, session)
    is_done, failure = False, None
    token = set_committing(scope)
    try:
        if len(sessions) == 1 and not (scope._on_commit or scope._registries):
            for _, aside, session in settling._aside:
                try:
                    is_done = aside.kind.commit_alone(session)
                except BaseException as error:
                    run_now(after_failure(scope, HERE, error))
                    raise
        # The second and the third: a listener may have asked for more.
        if not is_done or scope._on_commit or len(sessions) != 1:
            failure = run_now(committing(scope, HERE, _go_on))
    finally:
        settling.end()
        reset_committing(token)
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback refers to this frame


def _go_on() -> None:
    """Tell nobody that the commit stands. As `note` of `committing` it says that the scope goes on.

    Who has called `commit` knows by its return, or by its error.
    """


def roll_back(scope: Scope, why: str) -> None:
    """Roll back a sync scope that goes on."""
    if scope._sessions is None:
        return
    if current.get(None) is not scope:
        _within(scope, partial(roll_back, why=why))
        return
    run_now(rolling_back(scope, HERE, why))


def _within(scope: Scope, what: Callable[[Scope], None]) -> None:
    """Do `what` as the scope's own: where write() is called within an open_scope(), that is not."""
    token = current.set(scope)
    try:
        what(scope)
    finally:
        unbind(token)


def end_failed(scope: Scope, error: BaseException) -> None:
    """End the sync scope of a call that `error` has left. See `aend_failed`."""
    explain(scope, error)
    if not scope.closed:
        end(scope, why=class_of(error))


def end_closing(scope: Scope) -> None:
    """End an async scope whose coroutine is being closed: nothing can be awaited there."""
    token = current.set(scope)  # it may be closed in any context
    try:
        if not end_untouched(scope):
            run_now(ending(scope, CLOSING, False, "its coroutine was closed"))
    finally:
        unbind(token)


# -- errors, forks ---------------------------------------------------------------------------------


explainers: list[Callable[[BaseException], None]] = []
"""What adds notes to an error that leaves a scope, whatever sessions the scope has."""


def explain(scope: Scope, error: BaseException) -> None:
    """Let those who know add notes to an error that leaves the scope."""
    scope._has_failed = True
    for add_notes in explainers:
        add_notes(error)
    for key in list(scope._sessions or ()):
        key.kind.explain(error)
    if scope._cuts_results and isinstance(error, Exception):
        with suppress(Exception):  # an error that takes no note
            if _CUT not in getattr(error, "__notes__", ()):
                error.add_note(_CUT)


_CUT = (
    "commit_on_success has committed before the response started, and that has closed a result "
    "that was still being read. Read it to its end before the response starts, with all(), or open "
    "it in the body that reads it (rope_middleware)."
)


def detach(scope: Scope) -> None:
    """End the scope in a forked process. Its sessions and callbacks are the parent's."""

    async def leave(kind: SessionKind, session: Any) -> None:
        kind.detach(session)

    scope._is_parents = True
    scope._state = ENDED
    run_now(each(scope, held(scope), leave))
    scope._sessions = scope._on_close = scope._on_commit = None
    scope._registries = ()
    scope._state = CLOSED


def _after_fork() -> None:
    """Leave to the parent, in a forked process, what is open where it was forked.

    What other threads and tasks have open is not reached any more: they are not there.
    """
    for scope in with_outer(current.get(None)):
        if scope._state == OPEN:
            detach(scope)


at_fork(after_in_child=_after_fork)
