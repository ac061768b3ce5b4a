"""What a scope knows of its transactions: what became of them, and whether it may be run again."""

from __future__ import annotations

from typing import Any

from rope_middleware.scope.scope import OPEN, Scope

__all__ = [
    "begin_commit",
    "commits_itself",
    "end_commit",
    "expects_nothing",
    "has_refused",
    "is_broken",
    "is_committing",
    "is_loss",
    "is_to_commit",
    "note_broken",
    "note_commit",
    "note_loss",
    "note_refusal",
    "retries_of",
    "set_trial",
    "timeout_of",
    "trial_of",
]


def expects_nothing(scope: Scope) -> bool:
    """Tell whether nobody expects changes in `scope` to stay.

    An error has left it, it is doomed, or the database has refused them (and another try follows).
    """
    return scope._doomed or scope._is_refused or scope._has_failed or scope._refused is not None


def is_to_commit(scope: Scope) -> bool:
    """Tell whether `scope` is open and commits at a success, which may still come."""
    commits = scope._options.commit_on_success and scope._state == OPEN
    return commits and not expects_nothing(scope)


def commits_itself(scope: Scope) -> bool:
    """Tell whether `scope` commits at a success."""
    return scope._options.commit_on_success


def note_commit(scope: Scope) -> None:
    """A session of a scope with `retries` has committed: nothing may be tried again any more."""
    scope._committed = True


def note_refusal(scope: Scope, error: BaseException) -> None:
    """The database refused a transaction of the scope as one to try again."""
    scope._refused = error
    scope._is_lost = False


def note_loss(scope: Scope, error: BaseException) -> None:
    """A connection of the scope was lost, or could not be made."""
    scope._refused = error
    scope._is_lost = True


def is_loss(scope: Scope) -> bool:
    """Tell whether the error by which the database asked to try again is a lost connection."""
    return scope._is_lost


def has_refused(scope: Scope) -> bool:
    """Tell whether the request may be run again: refused, and nothing is committed (C6, C8)."""
    if scope._refused is None or scope._committed:
        return False
    return scope._trial is None or not scope._trial.stands(scope._is_lost)


def retries_of(scope: Scope) -> int:
    """Return how often the request of the scope may be run again."""
    return scope._options.retries


def timeout_of(scope: Scope) -> float:
    """Return the seconds for what a session needs of the database when it ends."""
    return scope._options.close_timeout


# -- a commit of ours, not one of the application's ------------------------------------------------


def begin_commit(scope: Scope) -> None:
    """A commit of ours begins."""
    scope._is_committing = True
    scope._is_broken = False


def end_commit(scope: Scope) -> None:
    """It has ended, in whatever way."""
    scope._is_committing = False


def is_committing(scope: Scope) -> bool:
    """Tell whether a commit of ours is under way."""
    return scope._is_committing


def note_broken(scope: Scope) -> None:
    """The line broke while a COMMIT of ours was under way."""
    scope._is_broken = True


def is_broken(scope: Scope) -> bool:
    """Tell whether the line broke while the last COMMIT of ours was under way."""
    return scope._is_broken


# -- what the session's floor keeps here -----------------------------------------------------------


def trial_of(scope: Scope) -> Any:
    """Return what is known of the transactions of a request that may be run again, or None."""
    return scope._trial


def set_trial(scope: Scope, trial: object) -> None:
    """Note what is known of the transactions."""
    scope._trial = trial
