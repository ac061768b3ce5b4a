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
import os
import sys
import threading
from collections.abc import Callable, Container
from types import CodeType, FrameType, FunctionType, TracebackType
from typing import Any, Generic, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from sqlalchemy.orm import Session
from sqlalchemy.util import ScopedRegistry

from rope_middleware.registry import _TIE as TIE
from rope_middleware.registry import ScopeRegistry, close, leave_to_parent, listen, tie
from rope_middleware.scope import current_scope

__all__ = ["RopeRegistry", "ScopeRope", "SessionRope", "calling_frame", "owner_name"]

_T = TypeVar("_T", bound=Any)

logger: logging.Logger = logging.getLogger("rope_middleware")


class SessionRope(Generic[_T]):
    """Holds a session for as long as the rope itself lives.

    `SessionJenny` makes its own. One that is made by hand takes the place of the frame: its
    session is closed when nothing refers to the rope any more. Of ``jenny.registry`` it gives
    the session that ``jenny.session`` gives; inside a scope that is the scope's, which only the
    scope's end and `remove` close.

    Args:
        registry: where the session comes from on first use: ``jenny.registry``, or any other
            SQLAlchemy `ScopedRegistry`.
    """

    _session: _T | None = None
    _held: _OwnRope[_T] | None = None

    def __init__(self, registry: ScopedRegistry[_T]) -> None:
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
                self._end(session)
            except Exception:
                logger.exception("closing the session of a rope failed")

    def _end(self, session: _T) -> None:
        try:
            if self._registry.has() and self._registry() is session:
                self._registry.clear()
        finally:
            close(session)

    def _leave_to_parent(self) -> None:
        """Let go of the session in a forked process: see `registry.leave_to_parent`."""
        session, self._session = self._session, None
        if session is not None:
            leave_to_parent(session)

    def _is_in_scope(self) -> bool:
        return isinstance(self._registry, ScopeRegistry) and self._registry.scope() is not None

    def _ropes(self) -> RopeRegistry[_T] | None:
        """Return where jenny's own ropes are found, if this is a rope of a jenny that has them."""
        outside = getattr(self._registry, "outside", None)
        return cast("RopeRegistry[_T]", outside) if isinstance(outside, RopeRegistry) else None


class ScopeRope(SessionRope[_T]):
    """The rope where none is needed: the session belongs to the scope, or to a scopefunc."""

    @property
    def session(self) -> _T:
        """The current session."""
        return self._registry()

    def remove(self) -> None:
        """Close the current session; the next use makes a new one."""
        cast("ScopeRegistry[_T]", self._registry).remove()


class _OwnRope(SessionRope[_T]):
    """A rope that makes its session itself, for a `RopeRegistry`.

    Args:
        registry: what finds the rope.
        home: where it is found by its name; `home` is None once it is found no more.
    """

    def __init__(
        self, registry: RopeRegistry[_T], home: WeakValueDictionary[str, _OwnRope[_T]]
    ) -> None:
        super().__init__(registry)
        self.home: WeakValueDictionary[str, _OwnRope[_T]] | None = home

    @property
    def session(self) -> _T:
        if self._session is None:
            return self.hold(self._registry.createfunc())
        return self._session

    def hold(self, session: _T) -> _T:
        self._session = _watched(session)
        return session

    def remove(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            close(session)

    def __del__(self) -> None:
        # While this runs a weak reference still finds the rope, here (closing may call the
        # application's code) and in the thread that it belongs to.
        self.home = None
        super().__del__()

    def _end(self, session: _T) -> None:
        close(session)


def _watched(session: _T) -> _T:
    """Have `session` remember its connections, so that none stays out if it cannot be closed."""
    listen(cast("type[Session]", type(session)))
    if TIE not in vars(session) or vars(session)[TIE].scope is not None:
        tie(session)
    return session


class _Thread:
    """Stands for a thread as a dictionary key; its ident would be reused."""


class _Here(threading.local):
    def __init__(self) -> None:
        self.thread = _Thread()


class RopeRegistry(ScopedRegistry[_T]):
    """The registry outside of scopes: finds the rope of this thread or task, or ties one.

    Args:
        createfunc: makes a session; any callable.
        create_name: makes the name under which a rope is set and looked up. Where it is a
            method, all methods of its object's class belong to the facade, also those of the
            application's own subclass.
        listed: where each rope is listed under its name.
    """

    __slots__ = ("__weakref__", "_create_name", "_facade", "_here", "_listed", "_ropes")

    def __init__(
        self,
        createfunc: Callable[..., _T],
        create_name: Callable[[], str],
        listed: WeakValueDictionary[str, SessionRope[_T]],
    ) -> None:
        super().__init__(createfunc, current_scope)
        self._create_name = create_name
        self._facade = _codes_of(cast("type[Any]", type(getattr(create_name, "__self__", None))))
        self._listed = listed
        self._here = _Here()
        # By owner first: threads and tasks with ropes of the same name must not meet.
        self._ropes: WeakKeyDictionary[object, WeakValueDictionary[str, _OwnRope[_T]]] = (
            WeakKeyDictionary()
        )
        _registries.add(self)

    def leave_to_parent(self) -> None:
        """Let go of every rope in a forked process; its frames tie ropes of their own."""
        for home in list(self._ropes.values()):
            for rope in list(home.values()):
                rope.home = None
                rope._leave_to_parent()
        self._ropes = WeakKeyDictionary()
        self._listed.clear()

    def _home(self) -> WeakValueDictionary[str, _OwnRope[_T]]:
        """Return where the ropes of the running task, or else of this thread, are found."""
        owner = _task() or self._here.thread
        home = self._ropes.get(owner)
        if home is None:
            home = self._ropes[owner] = WeakValueDictionary()
        return home

    def find(self, name: str | None = None) -> _OwnRope[_T] | None:
        """Return the living rope of that name in this thread or task, or None."""
        rope = self._home().get(name or self._create_name())
        return None if rope is None or rope.home is None else rope

    def living(self) -> _OwnRope[_T]:
        """Return the rope of this thread or task. Who does not hold it sees it go at once."""
        name, home = self._create_name(), self._home()
        return self.find(name) or self._list(name, _OwnRope(self, home))

    def _list(self, name: str, rope: _OwnRope[_T]) -> _OwnRope[_T]:
        if rope.home is not None:
            rope.home[name] = self._listed[name] = rope
        return rope

    def tie(self, frame: FrameType | None = None) -> _OwnRope[_T]:
        """Set a new rope in `frame`, by default the first frame outside the facade."""
        name = self._create_name()
        rope = self._list(name, _OwnRope(self, self._home()))
        _hold(frame or calling_frame(self._facade), name, rope)
        return rope

    def rope(self) -> _OwnRope[_T]:
        """Return the rope of this thread or task, held by the calling frame from now on."""
        name, home = self._create_name(), self._home()
        frame = calling_frame(self._facade)
        rope = home.get(name)
        if rope is None or rope.home is None:
            # An inner frame may have had a rope of its own meanwhile, by `tie`.
            held = _held_by(frame, name)
            if getattr(held, "home", None) is home:
                rope = self._list(name, cast("_OwnRope[_T]", held))
            else:
                rope = self._list(name, _OwnRope(self, home))
        _hold(frame, name, rope)
        return rope

    def remove(self, name: str | None = None) -> None:
        """Close the session of the rope of that name and forget the rope, if there is one."""
        rope = self._forget(name)
        if rope is not None:
            rope.remove()

    def cut(self, rope: _OwnRope[_T]) -> None:
        """Close the session of `rope`, whichever thread or task it belongs to, and forget it."""
        home, rope.home = rope.home, None
        for ropes in cast("tuple[Any, ...]", (home or {}, self._listed)):
            for name in [name for name, listed in list(ropes.items()) if listed is rope]:
                ropes.pop(name, None)
        rope.remove()

    def _forget(self, name: str | None = None) -> _OwnRope[_T] | None:
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


def _task() -> object:
    """Return the running task of asyncio or trio; None where none runs."""
    # current_task() raises where no loop runs, which is where ropes are used most.
    loop = asyncio._get_running_loop()
    if loop is not None:
        return asyncio.current_task(loop)
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


# The modules of the facade: this package's, and the one of scoped_session's methods.
_FACADE = frozenset(
    {
        "rope_middleware.flask",
        "rope_middleware.jenny",
        "rope_middleware.registry",
        "rope_middleware.rope",
        "sqlalchemy.orm.scoping",
    }
)

# Up to Python 3.11 they have frames of their own, which are gone before the next line. From
# 3.12 on most of them have none. https://peps.python.org/pep-0709/
_COMPREHENSIONS = frozenset({"<dictcomp>", "<listcomp>", "<setcomp>"})


def calling_frame(facade: Container[int] = ()) -> FrameType:
    """Return the first frame outside the facade that is there to hold something.

    Args:
        facade: the ids of the code that belongs to the facade besides its modules.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if not (
            frame.f_globals.get("__name__") in _FACADE
            or id(code) in facade
            or code.co_name in _COMPREHENSIONS
            # A class body hands its local variables to the class, which keeps them for ever
            # (and an Enum makes members of them): the frame around it is the one that goes.
            or (not code.co_flags & inspect.CO_OPTIMIZED and _is_class_body(frame))
        ):
            return frame
        frame = frame.f_back
    raise RuntimeError("A rope needs a Python frame to hang on, and there is none.")


def _is_class_body(frame: FrameType) -> bool:
    variables = frame.f_locals
    return variables is not frame.f_globals and _get(variables, "__qualname__") is not None


def _get(variables: Any, name: str) -> object:
    """Return a variable or None; exec() takes mappings that can hardly more than be indexed."""
    try:
        return variables[name]
    except KeyError:
        return None


def _codes_of(facade: type) -> dict[int, CodeType]:
    """Return the code of each method and property of `facade`, by its id.

    Not a set: the hash of a code object reads all of it. Generators are no mere passage, their
    own frames last.
    """
    codes: dict[int, CodeType] = {}
    for value in [value for parent in facade.__mro__ for value in vars(parent).values()]:
        functions: list[Any] = [value]
        if isinstance(value, property):
            functions = [value.fget, value.fset, value.fdel]
        elif isinstance(value, (classmethod, staticmethod)):
            functions = [cast("Any", value).__func__]
        for function in functions:
            while isinstance(function, FunctionType) and id(function.__code__) not in codes:
                if not function.__code__.co_flags & _LASTS:
                    codes[id(function.__code__)] = function.__code__
                function = getattr(function, "__wrapped__", None)
    return codes


_LASTS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def _hidden(frame: FrameType, name: str) -> str:
    """Return the key under which `frame` holds a rope called `name`."""
    if name.isidentifier():
        code = frame.f_code
        if name in code.co_varnames or name in code.co_cellvars or name in code.co_freevars:
            # The function has a variable of that name, and Python 3.13 would overwrite it;
            # before, the function's next assignment would drop the rope. PEP 667.
            return f"{name} (rope)"
    return name


def _hold(frame: FrameType, name: str, rope: SessionRope[Any]) -> None:
    variables = frame.f_locals
    variables[_hidden(frame, name)] = rope
    if (
        _COPIES
        and frame.f_code.co_flags & inspect.CO_OPTIMIZED
        # Of very many variables only where there is an error to be found among them.
        and (len(variables) < 30 or sys.exception() is not None)
    ):
        for key in [key for key, value in variables.items() if isinstance(value, _CYCLIC)]:
            del variables[key]


# Before Python 3.13 the local variables of a function are copied into the frame when they are
# read, and stay there until they are read again. What refers to the frame would keep it after
# the function's end, although the function has deleted its variable, as "except ... as" does.
_COPIES = sys.version_info < (3, 13)
_CYCLIC = (BaseException, TracebackType, FrameType)


def _held_by(frame: FrameType, name: str) -> object:
    return _get(frame.f_locals, _hidden(frame, name))


# What a forked process has to let go of.
_registries: WeakSet[RopeRegistry[Any]] = WeakSet()
_by_hand: WeakSet[SessionRope[Any]] = WeakSet()


def _after_fork() -> None:
    for registry in list(_registries):
        registry.leave_to_parent()
    for rope in list(_by_hand):
        rope._leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
