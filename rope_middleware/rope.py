"""The rope: outside of scopes, a session hangs on the frame of the function that uses it.

As SQLAlchemy-Rope documents it, the first use sets a `SessionRope` as a local variable of the
first frame outside the facade. When the frame goes, so does the rope, and it closes its session.
Every later frame that uses the session holds the same rope: then a frame that is collected late
(kept by a traceback, a suspended generator) closes nothing that somebody else still uses.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Generic, TypeVar, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

from sqlalchemy.orm import Session
from sqlalchemy.util import ScopedRegistry

from rope_middleware.registry import ScopeRegistry, close, listen, tie
from rope_middleware.scope import current_scope

__all__ = ["RopeRegistry", "SessionRope"]

_T = TypeVar("_T", bound=Any)

logger = logging.getLogger("rope_middleware")


class SessionRope(Generic[_T]):
    """Holds a session for as long as the rope itself lives.

    Args:
        registry: where the session comes from on first use: ``jenny.registry``, or any other
            SQLAlchemy `ScopedRegistry`.
    """

    def __init__(self, registry: ScopedRegistry[_T]) -> None:
        self._registry = registry
        self._session: _T | None = None

    @property
    def session(self) -> _T:
        """The session; made on first use."""
        if self._session is None:
            self._session = self._registry()
        return self._session

    def remove(self) -> None:
        """Close the session, if there is one; the next use makes a new one."""
        session, self._session = self._session, None
        if session is None and self._registry.has():
            session = self._registry()
        if session is not None:
            if self._registry.has() and self._registry() is session:
                self._registry.clear()
            close(session)

    def __del__(self) -> None:
        # Only what this rope holds itself: it may be collected in any thread.
        session = self.__dict__.pop("_session", None)
        if session is not None:
            try:
                close(session)
            except Exception:
                logger.exception("closing the session of a rope failed")


class ScopeRope(SessionRope[_T]):
    """The rope where none is needed: the session belongs to the scope, or to a scopefunc."""

    @property
    def session(self) -> _T:
        """The current session."""
        return self._registry()

    def remove(self) -> None:
        """Close the current session; the next use makes a new one."""
        cast("ScopeRegistry[_T]", self._registry).remove()


class _Thread:
    """Stands for a thread as a dictionary key; its ident would be reused."""


class _Here(threading.local):
    def __init__(self) -> None:
        self.thread = _Thread()


class RopeRegistry(ScopedRegistry[_T]):
    """The registry outside of scopes: finds the rope of this thread or task, or ties one.

    Args:
        createfunc: makes a session; any callable.
        create_name: makes the name under which a rope is set and looked up.
        listed: where each rope is listed under its name.
    """

    __slots__ = ("_create_name", "_here", "_listed", "_ropes")

    def __init__(
        self,
        createfunc: Callable[..., _T],
        create_name: Callable[[], str],
        listed: WeakValueDictionary[str, SessionRope[_T]],
    ) -> None:
        super().__init__(createfunc, current_scope)
        self._create_name = create_name
        self._listed = listed
        self._here = _Here()
        # By owner first: threads and tasks with ropes of the same name must not meet.
        self._ropes: WeakKeyDictionary[object, WeakValueDictionary[str, _OwnRope[_T]]] = (
            WeakKeyDictionary()
        )

    def _owner(self) -> object:
        """Return what ropes belong to: the running asyncio task, or else the thread."""
        return _task() or self._here.thread

    def find(self, name: str | None = None) -> _OwnRope[_T] | None:
        """Return the living rope of that name in this thread or task, or None."""
        ropes = self._ropes.get(self._owner())
        return None if ropes is None else ropes.get(name or self._create_name())

    def tie(self, frame: FrameType | None = None) -> _OwnRope[_T]:
        """Set a new rope in `frame`, by default the first frame outside the facade."""
        frame = frame or calling_frame()
        name = self._create_name()
        rope = _OwnRope(self)
        self._ropes.setdefault(self._owner(), WeakValueDictionary())[name] = rope
        self._listed[name] = rope
        frame.f_locals[name] = rope
        return rope

    def rope(self) -> _OwnRope[_T]:
        """Return the rope of this thread or task, held by the calling frame from now on."""
        name = self._create_name()
        rope = self.find(name)
        if rope is None:
            return self.tie()
        calling_frame().f_locals[name] = rope
        return rope

    def remove(self, name: str | None = None) -> None:
        """Close the session of the rope of that name and forget the rope, if there is one."""
        rope = self._forget(name or self._create_name())
        if rope is not None:
            rope.remove()

    def _forget(self, name: str) -> _OwnRope[_T] | None:
        ropes = self._ropes.get(self._owner())
        rope = None if ropes is None else ropes.pop(name, None)
        if rope is not None and self._listed.get(name) is rope:
            del self._listed[name]
        return rope

    # ScopedRegistry's interface

    def __call__(self) -> _T:
        return self.rope().session

    def has(self) -> bool:
        rope = self.find()
        return rope is not None and rope._session is not None

    def set(self, obj: _T) -> None:
        self.rope().hold(obj)

    def clear(self) -> None:
        rope = self._forget(self._create_name())
        if rope is not None:
            rope._session = None


class _OwnRope(SessionRope[_T]):
    """A rope that makes its session itself, for a `RopeRegistry`."""

    @property
    def session(self) -> _T:
        if self._session is None:
            return self.hold(self._registry.createfunc())
        return self._session

    def hold(self, session: _T) -> _T:
        tied = cast("Session", session)
        listen(type(tied))
        tie(tied, None)
        self._session = session
        return session

    def remove(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            close(session)


def _task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def owner_name() -> str:
    """Return a name for the running asyncio task, or else for the thread."""
    task = _task()
    return f"{threading.get_ident()}" + ("" if task is None else f":{id(task)}")


# The frames of the facade: this package, and SQLAlchemy's methods of scoped_session.
_FACADE = frozenset(
    {
        "rope_middleware.flask",
        "rope_middleware.jenny",
        "rope_middleware.registry",
        "rope_middleware.rope",
        "sqlalchemy.orm.scoping",
    }
)


def calling_frame() -> FrameType:
    """Return the first frame outside the facade."""
    frame = inspect.currentframe()
    while frame is not None and (
        frame.f_globals.get("__name__") in _FACADE
        # A class body hands its local variables to the class, which keeps them for ever (and
        # an Enum makes members of them): the frame around it is the one that goes.
        or _is_class_body(frame)
    ):
        frame = frame.f_back
    if frame is None:
        raise RuntimeError("A rope needs a Python frame to hang on, and there is none.")
    return frame


def _is_class_body(frame: FrameType) -> bool:
    return (
        not frame.f_code.co_flags & inspect.CO_OPTIMIZED
        and frame.f_locals is not frame.f_globals
        and "__qualname__" in frame.f_locals
    )
