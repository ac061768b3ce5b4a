"""What the boundaries ask and tell a scope while they serve its request."""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING, Any, TypeVar

from rope_middleware.scope.context import SCOPE_KEY, class_of, current, logger, with_outer
from rope_middleware.scope.options import Options
from rope_middleware.scope.scope import OPEN, AsyncScope, Scope

if TYPE_CHECKING:
    from rope_middleware.scope.kind import PlainKind

__all__ = [
    "count",
    "doom_rest",
    "end_gate",
    "gate_of",
    "holds_connection",
    "is_accepted",
    "is_counted",
    "is_doomed",
    "is_head",
    "is_watched",
    "log_retry",
    "note_accepted",
    "open_as",
    "options_now",
    "set_gate",
    "shared_scope",
    "take_in",
]

_GateT = TypeVar("_GateT")


def open_as(
    scope: Scope, name: Any, options: Options, registries: tuple[PlainKind, ...] = ()
) -> None:
    """Open a scope that a boundary has just made.

    Args:
        scope: the new one.
        name: what its class makes its `name` of.
        options: the middleware's.
        registries: the plain scoped_sessions whose sessions it removes.
    """
    scope._open(name, options, registries)
    if isinstance(scope, AsyncScope):
        scope._thread = get_ident()


def is_head(scope: Scope) -> bool:
    """Tell whether the request is a HEAD, whose response has no body (RFC 9110, 9.3.2)."""
    return scope.name.startswith("HEAD ")


def options_now(scope: Scope) -> Options:
    """Return the options of `scope`; another middleware inside may have added its own."""
    return scope._options


def is_doomed(scope: Scope) -> bool:
    """Tell whether nothing more in `scope` is committed."""
    return scope._doomed or scope._is_refused


def doom_rest(scope: Scope) -> None:
    """The response is no success: nothing later in the scope commits, either."""
    scope._is_refused = True


def note_accepted(scope: Scope) -> None:
    """The WebSocket of `scope` is accepted."""
    scope._is_accepted = True


def is_accepted(scope: Scope) -> bool:
    """Tell whether the WebSocket of `scope` was accepted."""
    return scope._is_accepted


def gate_of(scope: Scope) -> Any:
    """Return what watches the response, also for a middleware inside; or None."""
    return scope._gate


def set_gate(scope: Scope, gate: _GateT) -> _GateT:
    """Note what watches the response, and return it.

    What an earlier one has refused was not the client's response: the application has asked the
    next one (a cascade of applications, an error page of another one).
    """
    scope._gate = gate
    scope._has_gate = True
    scope._is_refused = False
    return gate


def end_gate(scope: Scope, gate: Any) -> None:
    """The call that `gate` watches is over. Where that is None, nobody has watched it."""
    if gate is not None and scope._gate is gate:
        scope._has_gate = False


def shared_scope(*carriers: Any) -> Scope | None:
    """Return the open scope that another RopeMiddleware has made for this request, or None.

    Args:
        carriers: the dictionaries of the request in which it may stand (S6).
    """
    for carrier in carriers:
        scope: Scope | None = carrier.get(SCOPE_KEY)
        if scope is not None and scope._state == OPEN:
            return None if _is_around(scope, current.get(None)) else scope
    return None


def _is_around(outer: Scope, inner: Scope | None) -> bool:
    """Tell whether `inner` was opened by an open_scope() within `outer`."""
    return inner is not outer and any(one is outer for one in with_outer(inner))


def take_in(scope: Scope, options: Options, registries: tuple[PlainKind, ...]) -> bool:
    """Add what a middleware inside of the one that opened `scope` asks for (S6).

    Returns:
        Whether a gate has to be made now: the scope commits, and nobody watches its response.
    """
    watched = is_watched(scope)
    scope._options = scope._options.plus(options)
    more = tuple(kind for kind in registries if kind not in scope._registries)
    if more:
        scope._registries += more
        scope._begin_use().update(dict.fromkeys(more))
    return scope._options.commit_on_success and not watched


def is_watched(scope: Scope) -> bool:
    """Tell whether a middleware around the one that asks watches the response of `scope`."""
    # Of two applications that are asked one after the other, each has its own gate.
    if scope._gate is None:
        return bool(scope._options.commit_on_success or scope._options.retries)
    return scope._has_gate


def holds_connection(scope: Scope) -> bool:
    """Tell whether a session of `scope` has a connection out of its pool."""
    kept = list((scope._sessions or {}).items())
    return any(key.kind.holds_connection(session) for key, session in kept)


def count(scope: Scope) -> None:
    """Note that the request of `scope` has come through the line of `max_active`."""
    scope._is_counted = True


def is_counted(*carriers: Any) -> bool:
    """Tell whether the request has come through the line of another middleware around this one.

    Also where an open_scope() lies between the two (S6), and this one opens a scope of its own.

    Args:
        carriers: the dictionaries of the request in which that one's scope may stand.
    """
    scopes: list[Scope | None] = [carrier.get(SCOPE_KEY) for carrier in carriers]
    return any(one is not None and one._is_counted and one._state == OPEN for one in scopes)


def log_retry(scope: Scope, number: int, of: int) -> None:
    """Log that a request is run again because the database refused its transaction."""
    logger.warning("retry %d of %d of %r: %s", number, of, scope.name, class_of(scope._refused))
