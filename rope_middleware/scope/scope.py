"""`Scope`: what is kept for one request, and what the application may ask of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast
from weakref import ReferenceType

from rope_middleware.errors import RopeError, async_callback, belongs_to_parent, scope_ended
from rope_middleware.running.forks import lock_of_module
from rope_middleware.scope.context import is_async_callable
from rope_middleware.scope.options import DEFAULT, Options

if TYPE_CHECKING:
    from rope_middleware.position import Carried
    from rope_middleware.scope.kind import PlainKind, SessionKey
    from rope_middleware.scope.settling import Calls

__all__ = [
    "CLOSED",
    "ENDED",
    "OPEN",
    "AsyncScope",
    "Scope",
    "SyncScope",
    "call_after_commit",
    "forget",
    "is_over",
    "is_request",
    "keep",
    "making",
    "registries_of",
    "require_open",
    "session_of",
]

_T = TypeVar("_T")


# OPEN; ENDED: nothing can be kept any more; CLOSED: everything is given back.
OPEN, ENDED, CLOSED = range(3)

making: AbstractContextManager[bool] = lock_of_module()
"""Held for the instant in which a scope gets its dictionary or a list: two threads race (J6)."""


class Scope:
    """The life of one request, or of one ``with open_scope():`` block.

    Made by the middlewares and by `open_scope`, never by hand. Two scopes are equal only if
    they are the same object, so a Scope is a safe dictionary key.
    """

    # A scope is made for every request. An __init__ would add 0.1 us (239 -> 353 ns), so the plain
    # ways in asgi and wsgi set these slots themselves; everybody else calls `_open`. What most
    # requests never change has its value on the class, and goes into __dict__ when it is changed.
    __slots__ = ("__dict__", "__weakref__", "_name", "_options", "_sessions", "_state")

    _name: Any
    _options: Options
    _sessions: dict[SessionKey, Any] | None  # None: there is nothing to end, not even a callback
    _state: int

    _is_async = False
    _registries: tuple[PlainKind, ...] = ()  # plain scoped_sessions
    _on_commit: list[Callable[[], Any]] | None = None
    _on_close: list[Callable[[], Any]] | None = None
    _info: dict[Any, Any] | None = None
    _outer: ReferenceType[Scope] | None = None  # what `open_scope` found open
    _gate: Any = None  # that watches the response: see `answer`
    _has_gate = False  # and the call that it watches is under way
    _settling: Any = None  # the commit that is under way before the response: see `settling`
    _calls: Calls | None = None  # on its sessions, that are under way: see `session.guard`
    _left: tuple[Scope | None] | None = None  # see `context.restore`
    _carried: Carried | None = None  # of a request that is followed: see R3
    _is_told_inside = False  # by a middleware inside of the one that commits
    _choices: dict[SessionKey, Any] | None = None  # what its sessions read from: see R2
    _is_parents = False  # this process was forked while it was open
    _doomed = False
    _is_refused = False  # the response was no success: nothing later commits, either
    _cuts_results = False  # its commit before the response started has closed open results
    _is_counted = False  # its request has come through the line of `max_active`
    _is_accepted = False  # its WebSocket was
    _has_failed = False  # an error has left it
    # See `outcome`.
    _committed = False
    _refused: BaseException | None = None
    _is_lost = False
    _is_committing = False
    _is_broken = False
    _trial: Any = None

    if not TYPE_CHECKING:  # nothing is said of it in a signature

        def __init__(self, *_, **__):
            raise TypeError(
                "A Scope is opened, not made: what is made would never end. "
                '"with open_scope() as scope:" opens one, and current_scope() returns the one '
                "that is open."
            )

    def _open(self, name: Any, options: Options = DEFAULT, registries: Any = ()) -> None:
        self._name = name
        self._options = options
        self._sessions = None
        self._state = OPEN
        if registries:
            self._registries = registries
            self._sessions = dict.fromkeys(registries)

    def __repr__(self) -> str:
        return f"<Scope {self.name!r} {('open', 'ending', 'closed')[self._state]}>"

    @property
    def name(self) -> str:
        """The scope's name, ``GET /path`` (no query string) or what was given to `open_scope`."""
        return cast("str", self._name)

    @property
    def closed(self) -> bool:
        """True when the scope has ended and every session is closed."""
        return self._state == CLOSED

    @property
    def info(self) -> dict[Any, Any]:
        """A dictionary for the application's own use.

        Empty at the start of a request; in an inner `open_scope` a shallow copy of the outer one's.
        """
        if self._info is None:
            with making:
                if self._info is None:
                    self._info = {}
        return self._info

    def doom(self) -> None:
        """Make the scope roll back, whatever the response will be.

        It stops the commits of `commit_on_success` from now on. What is committed already stays.
        """
        self._doomed = True

    def on_commit(self, fn: Callable[[], object]) -> None:
        """Call `fn` once after the scope's commit and before the response starts.

        A function that is registered after the response started runs after the final commit. It
        never runs after a rollback. If it raises, the error is logged and changes nothing.
        Functions run in order of registration; in an async scope, sync ones run in a thread.

        Args:
            fn: called without arguments; an async function only in an async scope.

        Raises:
            RopeError: the scope does not commit, or `fn` is async and the scope is not.
            ScopeClosedError: the scope has ended.
        """
        if not self._options.commit_on_success:
            raise RopeError(
                f"on_commit() has nothing to wait for: the scope {self.name!r} does not commit. "
                "Give commit_on_success=True to the middleware or to open_scope(), or call the "
                "function yourself after your commit."
            )
        self._check_callback(fn, "on_commit")
        call_after_commit(self, fn)
        self._require_open()

    def on_close(self, fn: Callable[[], object]) -> None:
        """Call `fn` once when the scope has ended and its sessions are closed, newest first.

        If it raises, the error is logged, and the others still run. An async function is cut off
        after `close_timeout` seconds.

        Args:
            fn: called without arguments; an async function only in an async scope.

        Raises:
            RopeError: `fn` is async and the scope is not.
            ScopeClosedError: the scope has ended.
        """
        self._check_callback(fn, "on_close")
        self._begin_use()
        with making:
            self._on_close = [*(self._on_close or ()), fn]
        self._require_open()  # it may have ended in this instant, and passed over `fn`

    def _check_callback(self, fn: Callable[[], object], method: str) -> None:
        self._require_open()
        if not callable(fn):
            raise TypeError(f"{method}() takes a callable without arguments, not {fn!r}.")
        if not self._is_async and is_async_callable(fn):
            raise async_callback(method, fn, self.name)

    def _require_open(self) -> None:
        if self._state:
            self._raise_closed()

    def _raise_closed(self) -> NoReturn:
        raise belongs_to_parent(self.name) if self._is_parents else scope_ended(self.name)

    def _begin_use(self) -> dict[SessionKey, Any]:
        """Make sure that the end does not pass this scope over; return its sessions."""
        made: dict[SessionKey, Any] = {}  # first: a finaliser that runs meanwhile may come by here
        with making:
            if self._sessions is None:
                self._sessions = made
        return self._sessions


class SyncScope(Scope):
    """A scope that is opened and ended in sync code."""

    __slots__ = ()

    if not TYPE_CHECKING:
        __init__ = object.__init__


class AsyncScope(Scope):
    """A scope that is opened and ended in async code. Its opener sets `_thread`, too."""

    # The event loop is looked up at the first use of an AsyncSession. Until then the thread's id
    # stands for it: cheaper to get, and a thread runs one loop at a time.
    __slots__ = ("_thread",)

    if not TYPE_CHECKING:
        __init__ = object.__init__

    _thread: int

    _is_async = True
    _loop: object = None


# -- what the floors above ask of a scope ----------------------------------------------------------


def is_request(scope: Scope) -> bool:
    """Tell whether a middleware has opened `scope`, and not an `open_scope()`."""
    return isinstance(scope._name, tuple)  # of the method and the path


def call_after_commit(scope: Scope, fn: Callable[[], Any]) -> None:
    """Call `fn` once after the next commit of `scope`, and never after a rollback."""
    scope._begin_use()
    with making:
        scope._on_commit = [*(scope._on_commit or ()), fn]


def require_open(scope: Scope) -> None:
    """Check that `scope` has not ended.

    Raises:
        ScopeClosedError: it has.
    """
    if scope._state:
        scope._raise_closed()


def is_over(scope: Scope) -> bool:
    """Tell whether `scope` has ended, or is ending: nothing can begin in it any more."""
    return scope._state != OPEN


def keep(scope: Scope, key: SessionKey, session: _T) -> _T:
    """Keep `session` for `key`, or discard it where another thread was first; return that kept.

    Raises:
        ScopeClosedError: the scope has ended; nothing is kept.
    """
    kept: _T = scope._begin_use().setdefault(key, session)
    # Order matters. We store, then read `_state`; the end sets `_state`, then reads `_sessions`.
    # So either the end finds this session, or we find the scope ended.
    if scope._state or kept is not session:
        if scope._state:
            forget(scope, key)
        key.kind.invalidate(session)
        key.kind.discard(session)
        scope._require_open()
    return kept


def forget(scope: Scope, key: SessionKey) -> Any:
    """Take the session of `key` out of `scope`; return it, or None."""
    return None if scope._sessions is None else scope._sessions.pop(key, None)


def session_of(scope: Scope, key: SessionKey) -> Any:
    """Return the session of `key`, or None."""
    return None if scope._sessions is None else scope._sessions.get(key)


def registries_of(scope: Scope) -> tuple[PlainKind, ...]:
    """Return the plain scoped_sessions whose sessions the scope removes."""
    return scope._registries
