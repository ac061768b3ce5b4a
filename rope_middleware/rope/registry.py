"""Where ropes are found outside of scopes: by thread or task, then by name."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from sqlalchemy.util import ScopedRegistry

from rope_middleware.rope.frames import calling_frame, held_by, hold
from rope_middleware.rope.rope import OwnRope, SessionRope
from rope_middleware.running.finish import running_loop
from rope_middleware.running.forks import at_fork
from rope_middleware.scope.opening import current_scope

__all__ = ["RopeRegistry", "owner_name"]

_T = TypeVar("_T", bound=Any)


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
        inside: code whose frames hold no ropes, see `code_of`.
    """

    __slots__ = ("__weakref__", "_create_name", "_here", "_inside", "_listed", "_ropes")

    def __init__(
        self,
        createfunc: Callable[..., _T],
        create_name: Callable[[], str],
        listed: WeakValueDictionary[str, SessionRope[_T]],
        inside: frozenset[CodeType] = frozenset(),
    ) -> None:
        super().__init__(createfunc, current_scope)
        self._create_name = create_name
        self._listed = listed
        self._inside = inside
        self._here = _Here()
        # By owner first: threads and tasks with ropes of the same name must not meet.
        self._ropes: WeakKeyDictionary[object, WeakValueDictionary[str, OwnRope[_T]]] = (
            WeakKeyDictionary()
        )
        _registries.add(self)

    def detach(self) -> None:
        """Leave every rope to the parent process; frames of this one hold ropes of their own."""
        for home in list(self._ropes.values()):
            for rope in list(home.values()):
                rope.home = None
                rope.detach()
        self._ropes = WeakKeyDictionary()
        self._listed.clear()

    def _home(self) -> WeakValueDictionary[str, OwnRope[_T]]:
        """Return where the ropes of the running task, or else of this thread, are found."""
        owner = _task() or self._here.thread
        home = self._ropes.get(owner)
        if home is None:
            home = self._ropes[owner] = WeakValueDictionary()
        return home

    def find(self, name: str | None = None) -> OwnRope[_T] | None:
        """Return the living rope of that name in this thread or task, or None."""
        rope = self._home().get(name or self._create_name())
        return None if rope is None or rope.home is None else rope

    def holds(self, session: object) -> bool:
        """Tell whether a living rope holds `session`, whichever thread or task it belongs to."""
        homes = list(self._ropes.values())
        return any(rope._session is session for home in homes for rope in list(home.values()))

    def living(self) -> OwnRope[_T]:
        """Return the rope of this thread or task; its session ends with the last reference."""
        name, home = self._create_name(), self._home()
        return self.find(name) or self._list(name, OwnRope(self, home))

    def _list(self, name: str, rope: OwnRope[_T]) -> OwnRope[_T]:
        if rope.home is not None:
            rope.home[name] = self._listed[name] = rope
        return rope

    def set_in(self, frame: FrameType | None = None) -> OwnRope[_T]:
        """Set a new rope in `frame`, by default the first frame outside the facade."""
        name = self._create_name()
        rope = self._list(name, OwnRope(self, self._home()))
        _hold(frame or calling_frame(self._inside), name, rope)
        return rope

    def rope(self) -> OwnRope[_T]:
        """Return the rope of this thread or task, held by the calling frame from now on."""
        name, home = self._create_name(), self._home()
        frame = calling_frame(self._inside)
        rope = home.get(name)
        if rope is None or rope.home is None:
            # An inner frame may have had a rope of its own meanwhile, by `set_in`.
            held = held_by(frame, name)
            if getattr(held, "home", None) is home:
                rope = self._list(name, cast("OwnRope[_T]", held))
            else:
                rope = self._list(name, OwnRope(self, home))
        _hold(frame, name, rope)
        return rope

    def remove(self, name: str | None = None) -> None:
        """Close the session of the rope of that name and forget the rope, if there is one."""
        rope = self._forget(name)
        if rope is not None:
            rope.remove()

    def cut(self, rope: OwnRope[_T]) -> None:
        """Close the session of `rope`, whichever thread or task it belongs to, and forget it."""
        home, rope.home = rope.home, None
        for ropes in cast("tuple[Any, ...]", (home or {}, self._listed)):
            for name in [name for name, listed in list(ropes.items()) if listed is rope]:
                ropes.pop(name, None)
        rope.remove()

    def _forget(self, name: str | None = None) -> OwnRope[_T] | None:
        name = name or self._create_name()
        rope = self.find(name)
        if rope is not None:
            rope.home = None
            self._home().pop(name, None)
            if self._listed.get(name) is rope:
                self._listed.pop(name, None)
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
        rope = self._forget()
        if rope is not None:
            rope._session = None


def _hold(frame: FrameType, name: str, rope: OwnRope[Any]) -> None:
    if frame.f_locals is frame.f_globals and rope.module is None:
        rope.module = frame.f_code, frame.f_lasti
    hold(frame, name, rope)


def _task() -> object:
    """Return the running task of asyncio or trio; None where none runs."""
    if running_loop() is not None:
        return asyncio.current_task()
    # Not imported: who runs in trio has done so.
    lowlevel: Any = sys.modules.get("trio.lowlevel")
    if lowlevel is not None and lowlevel.in_trio_task():
        return cast("object", lowlevel.current_task())
    return None


def owner_name() -> str:
    """Return a name for the running task, or else for the thread."""
    task = _task()
    ident = threading.get_ident()
    return str(ident) if task is None else f"{ident}:{id(task)}"


# What a forked process leaves to its parent.
_registries: WeakSet[RopeRegistry[Any]] = WeakSet()


def _after_fork() -> None:
    for registry in list(_registries):
        registry.detach()


at_fork(after_in_child=_after_fork)
