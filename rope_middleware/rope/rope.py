"""The rope: outside of scopes, a session hangs on the frame of the function that uses it.

As SQLAlchemy-Rope documents it, the first use sets a `SessionRope` as a local variable of the
first frame outside the facade. When the frame goes, so does the rope, and it closes its session.
Every later frame that uses the session holds the same rope: then a frame that is collected late
(kept by a traceback, a suspended generator) closes nothing that somebody else still uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast
from weakref import WeakSet, WeakValueDictionary

from sqlalchemy.util import ScopedRegistry

from rope_middleware.running.forks import at_fork
from rope_middleware.scope.context import logger
from rope_middleware.session.closing import close, detach
from rope_middleware.session.code.lines import Line
from rope_middleware.session.listeners import listen_to
from rope_middleware.session.notice import notice_module
from rope_middleware.session.registry import ScopeRegistry
from rope_middleware.session.tie import check_own, is_session, tie_of, tie_to
from rope_middleware.session.unsaved import tell_lost
from rope_middleware.signature import explained

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

__all__ = ["OwnRope", "ScopeRope", "SessionRope"]

_T = TypeVar("_T", bound=Any)


if TYPE_CHECKING:

    class RopeHome(Protocol[_T]):
        """Where a jenny's own ropes are made and found: see `RopeRegistry`."""

        @property
        def createfunc(self) -> Callable[..., _T]:
            """Makes a session."""
            ...

        def find(self, name: str | None = None) -> OwnRope[_T] | None:
            """Return the living rope of that name here, or None."""
            ...

        def living(self) -> OwnRope[_T]:
            """Return the rope of this thread or task."""
            ...

        def cut(self, rope: OwnRope[_T]) -> None:
            """Close the session of `rope` and forget it."""
            ...


class SessionRope(Generic[_T]):
    """Holds a session for as long as the rope itself lives.

    `SessionJenny` makes its own. One that is made by hand takes the place of the frame: its
    session is closed when nothing refers to the rope any more. Given ``jenny.registry``, its
    session is always ``jenny.session``. Inside a scope that session belongs to the scope: dropping
    the rope does not close it.

    Args:
        registry: where the session comes from on first use: ``jenny.registry``, or any other
            SQLAlchemy `ScopedRegistry`.
    """

    _session: _T | None = None
    _held: OwnRope[_T] | None = None

    @explained("SessionRope(jenny.registry)")
    def __init__(self, registry: ScopedRegistry[_T]) -> None:
        if not hasattr(registry, "has"):
            raise TypeError(
                f"SessionRope takes a registry, SessionRope(jenny.registry), not {registry!r}."
            )
        self._registry = registry

    @property
    def session(self) -> _T:
        """The session; made on first use."""
        if self._is_in_scope():
            return self._registry()
        ropes = self._ropes()
        if ropes is not None:
            if self._held is None or self._held.home is None:
                self._held = ropes.living()
            return self._held.session
        if self._session is None:
            self._session = _watched(self._registry())
            _by_hand.add(self)
        return self._session

    def remove(self) -> None:
        """Close the session, if there is one; the next use makes a new one."""
        ropes = self._ropes()
        if self._is_in_scope():
            cast("ScopeRegistry[_T]", self._registry).remove()
        elif ropes is not None:
            held, self._held = self._held or ropes.find(), None
            if held is not None:
                ropes.cut(held)
        else:
            session, self._session = self._session, None
            if session is None and self._registry.has():
                session = _watched(self._registry())
            if session is not None:
                self._end(session)

    def __del__(self) -> None:
        # Only what this rope holds itself: it may be collected in any thread. (Not a
        # weakref.finalize, which would hold the session: a session whose flush has failed
        # refers to the frame by the traceback, and the frame to the rope.)
        session, self._session = self._session, None
        if session is not None:
            try:
                _tell_lost(session)
                self._end(session)
            except Exception:
                logger.exception("closing the session of a rope failed")

    def _end(self, session: _T) -> None:
        try:
            if self._registry.has() and self._registry() is session:
                self._registry.clear()
        finally:
            _close(session)

    def detach(self) -> None:
        """Leave the session to the parent process: see `closing.detach`."""
        session, self._session = self._session, None
        if is_session(session):
            detach(session)

    def _is_in_scope(self) -> bool:
        return isinstance(self._registry, ScopeRegistry) and self._registry.scope() is not None

    def _ropes(self) -> RopeHome[_T] | None:
        """Return where jenny's own ropes are found, if this is a rope of a jenny that has them."""
        outside: Any = getattr(self._registry, "outside", None)
        return outside if hasattr(outside, "living") else None


class ScopeRope(SessionRope[_T]):
    """The rope where none is needed: the session belongs to the scope, or to a scopefunc."""

    @property
    def session(self) -> _T:
        """The current session."""
        return self._registry()

    def remove(self) -> None:
        """Close the current session; the next use makes a new one."""
        cast("ScopeRegistry[_T]", self._registry).remove()


class OwnRope(SessionRope[_T]):
    """A rope that makes its session itself, for a `RopeHome`.

    Args:
        registry: what finds the rope.
        home: where it is found by its name; `home` is None once it is found no more.
    """

    def __init__(self, registry: Any, home: WeakValueDictionary[str, OwnRope[_T]]) -> None:
        super().__init__(registry)
        self.home: WeakValueDictionary[str, OwnRope[_T]] | None = home
        self.module: Line | None = None  # where a module's frame holds it

    @property
    def session(self) -> _T:
        if self._session is None:
            return self.hold(self._registry.createfunc())
        return self._session

    def hold(self, session: _T) -> _T:
        self._session = _watched(session)
        made: object = session
        tie = tie_of(made) if is_session(made) else None
        if self.module is not None and tie is not None:
            notice_module(tie, self.module)
        return session

    def remove(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            _close(session)

    def __del__(self) -> None:
        # While this runs a weak reference still finds the rope, here (closing may call the
        # application's code) and in the thread that it belongs to.
        self.home = None
        super().__del__()

    def _end(self, session: _T) -> None:
        _close(session)


def _tell_lost(session: Any) -> None:
    tie = tie_of(session) if is_session(session) else None
    if tie is not None and tie.scope is None:
        tell_lost(tie, session)


def _watched(session: _T) -> _T:
    """Tie `session` to no scope: its connections are known if it cannot be closed."""
    made: object = session
    if is_session(made):  # and no mock or wrapper: that is kept and closed
        check_own(made, None)
        listen_to(made)
        tie = tie_of(made)
        if tie is None or tie.scope is not None:
            tie_to(made)
    return session


def _close(session: Any) -> None:
    if is_session(session):
        close(session)
    else:
        session.close()


# What a forked process leaves to its parent.
_by_hand: WeakSet[SessionRope[Any]] = WeakSet()


def _after_fork() -> None:
    for rope in list(_by_hand):
        rope.detach()


at_fork(after_in_child=_after_fork)
