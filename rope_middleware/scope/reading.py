"""What a scope keeps of reading: is it read-only, from where, and what the client has written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from rope_middleware.running.forks import lock_of_module
from rope_middleware.scope.context import with_outer
from rope_middleware.scope.options import EVERY
from rope_middleware.scope.scope import Scope

if TYPE_CHECKING:
    from rope_middleware.position import Carried
    from rope_middleware.scope.kind import SessionKey

__all__ = [
    "carried_inside",
    "carried_of",
    "carry",
    "choice_of",
    "reads_only",
    "tell_unknown",
]

_T = TypeVar("_T")

# Held for the instant in which a scope gets its choice: two threads may race for it.
_first_use = lock_of_module()


def reads_only(scope: Scope) -> bool:
    """Tell whether `scope` is a read-only one (R1)."""
    methods = scope._options.read_only
    # Of a request the name begins with its method; of an `open_scope` it is a text.
    return bool(methods) and (methods is EVERY or scope._name[0] in methods)


def choice_of(scope: Scope, key: SessionKey, make: Callable[[], _T]) -> _T:
    """Return what the sessions of `key` read from: one choice for a scope (R2)."""
    with _first_use:
        if scope._choices is None:
            scope._choices = {}
        found: _T | None = scope._choices.get(key)
        if found is None:
            found = scope._choices[key] = make()
        return found


def carry(scope: Scope, carried: Carried, is_watched: bool = False) -> None:
    """Note what the request of `scope` carries of log positions (R3).

    Args:
        scope: the request's.
        carried: by its headers.
        is_watched: by a middleware around this one, which commits when the response's start has
            passed this one: what it commits, it has to tell.
    """
    scope._carried = carried
    scope._is_told_inside = is_watched


def carried_inside(scope: Scope) -> Carried | None:
    """Return what has to be told once more after the commit: see `carry`."""
    return scope._carried if scope._is_told_inside else None


def carried_of(scope: Scope) -> Carried | None:
    """Return what the request around `scope` carries of log positions (R3), if it is followed."""
    for one in with_outer(scope):
        if one._carried is not None:
            return one._carried
    return None


def tell_unknown(scope: Scope) -> None:
    """Something was committed, or may be, and nobody could ask how far: only the primary has it."""
    carried = carried_of(scope)
    if carried is not None:
        from rope_middleware.position import UNKNOWN

        carried.tell(UNKNOWN)
