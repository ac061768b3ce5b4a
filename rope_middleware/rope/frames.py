"""The calling frame, and holding something in it for as long as it lasts."""

from __future__ import annotations

import inspect
import sys
from types import CodeType, FrameType, FunctionType
from typing import Any

__all__ = ["calling_frame", "code_of", "held_by", "hold"]

# The facade: this package, and the module of scoped_session's methods.
_PACKAGE = "rope_middleware."
_SCOPING = "sqlalchemy.orm.scoping"

# Up to Python 3.11 they have frames of their own, which are gone before the next line. From
# 3.12 on most of them have none. https://peps.python.org/pep-0709/
_COMPREHENSIONS = frozenset({"<dictcomp>", "<listcomp>", "<setcomp>"})


# Threads and event loops that call what they are given: their frames never return. Where they call
# a method of the facade itself (``to_thread.run_sync(jenny.scalar, ...)``), its own frame is the
# caller's.
_LOOPS = ("anyio.", "asyncio.", "concurrent.futures.", "multiprocessing.", "threading", "trio.")


def code_of(facade: type, base: type) -> frozenset[CodeType]:
    """Return the code of what a user's subclass of a facade adds: its frames are the facade's, too.

    Args:
        facade: the subclass.
        base: the class of ours.
    """
    added = (one for one in facade.__mro__ if one not in base.__mro__)
    found: set[CodeType] = set()
    for member in [member for one in added for member in vars(one).values()]:
        for name in ("", "__func__", "fget", "fset", "fdel", "func"):
            function: object = getattr(member, name, None) if name else member
            while isinstance(function, FunctionType):
                _add_code(function.__code__, found)
                function = getattr(function, "__wrapped__", None)
    return frozenset(found)


def _add_code(code: CodeType, found: set[CodeType]) -> None:
    found.add(code)
    for inner in code.co_consts:  # functions within it
        if isinstance(inner, CodeType):
            _add_code(inner, found)


def calling_frame(inside: frozenset[CodeType] = frozenset()) -> FrameType:
    """Return the first frame outside the facade that is there to hold something.

    Args:
        inside: code that belongs to the facade, besides our own.
    """
    frame: FrameType | None = sys._getframe(1)
    method: FrameType | None = None  # the outermost one of scoped_session's
    while frame is not None:
        code = frame.f_code
        module: object = frame.f_globals.get("__name__")
        if not (
            module == _SCOPING
            or (isinstance(module, str) and module.startswith(_PACKAGE))
            or code.co_name in _COMPREHENSIONS
            or code in inside
            # A class body hands its local variables to the class, which keeps them for ever
            # (and an Enum makes members of them): the frame around it is the one that goes.
            or (not code.co_flags & inspect.CO_OPTIMIZED and _is_class_body(frame))
        ):
            if method is not None and isinstance(module, str) and module.startswith(_LOOPS):
                return method
            return frame
        if module == _SCOPING:
            method = frame
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


def _hidden(frame: FrameType, name: str) -> str:
    """Return the key under which `frame` holds a rope called `name`."""
    if name.isidentifier():
        code = frame.f_code
        if name in code.co_varnames or name in code.co_cellvars or name in code.co_freevars:
            # The function has a variable of that name, and Python 3.13 would overwrite it;
            # before, the function's next assignment would drop the rope. PEP 667.
            return f"{name} (rope)"
    return name


def hold(frame: FrameType, name: str, rope: object) -> None:
    """Set `rope` as a local variable of `frame`."""
    variables = frame.f_locals
    variables[_hidden(frame, name)] = rope
    code = frame.f_code
    if _COPIES and code.co_flags & inspect.CO_OPTIMIZED:
        for key in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
            variables.pop(key, None)


# Before Python 3.13 the local variables of a function are copied into the frame when they are
# read, and stay there until they are read again. What refers to the frame (an error, a list with
# one) would keep it after the function's end, although the function has deleted its variable, as
# "except ... as" does. Who reads them next gets them from the function itself again.
_COPIES = sys.version_info < (3, 13)


def held_by(frame: FrameType, name: str) -> object:
    """Return what `frame` holds under that name, or None."""
    return _get(frame.f_locals, _hidden(frame, name))
