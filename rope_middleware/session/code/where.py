"""Where the work on an open transaction is now: the line of its task or thread.

Asked for where somebody wants to read it, never on the path of a request. Frames are looked at and
released at once: a frame that is kept keeps the variables of a request, and the rope in them.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import opcode
import sys
import threading
from collections.abc import Iterator
from contextvars import Context
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from rope_middleware.scope.context import current
from rope_middleware.scope.loop import is_async, loop_of
from rope_middleware.session.code.lines import (
    Line,
    frames_of_task,
    is_applications,
    is_in_database,
    is_ours,
    line_of,
    variables_of,
)
from rope_middleware.session.code.stacks import stacks_of_others

if TYPE_CHECKING:
    from rope_middleware.scope.scope import Scope
    from rope_middleware.session.tie import Tie

__all__ = ["is_computing", "is_in_call", "note_greenlet", "now"]


def now(tie: Tie) -> Line | None:
    """Return the application's line where the work on the transaction of `tie` is, or was last."""
    for frames in _stacks(tie):
        line = line_of(frames, tie.line)
        if line is not None:
            return line
    return tie.line


def is_in_call(tie: Tie) -> bool:
    """Tell whether the work on the transaction of `tie` is inside of a call to its database."""
    return any(is_in_database(frames) for frames in _stacks(tie))


def is_computing(tie: Tie) -> bool:
    """Tell whether the thread that works on the transaction of `tie` runs Python code.

    It has no way to tell so. But a thread that waits does so in a function of C, while one that
    runs Python code hands over to other threads (to us, who ask) where it jumps back in a loop, or
    begins a function; sometimes also where a function of C has returned. So ask more than once.
    """
    frames = _running(tie)
    if not frames:
        return False
    name = opcode.opname[frames[0].f_code.co_code[frames[0].f_lasti]]
    return name == "RESUME" or "JUMP_BACKWARD" in name


_NONE: list[FrameType] = []


def _running(tie: Tie) -> list[FrameType]:
    """Return the stack of the thread that works on the transaction of `tie`, if one does."""
    scope = tie.scope
    if scope is not None and is_async(scope) and tie.task is None:
        return next(_threads_of(scope, tie.thread), _NONE)
    task = None if tie.task is None else tie.task()
    if tie.task is not None and (task is None or asyncio.current_task(task.get_loop()) is not task):
        return []  # it waits, for whatever it is
    return _thread(tie.thread)


def _stacks(tie: Tie) -> Iterator[list[FrameType]]:
    """Give the stacks of what works on the transaction, the likeliest first."""
    scope = tie.scope
    task = None if tie.task is None else tie.task()
    if task is not None:
        yield frames_of_task(task)
    elif scope is None or not is_async(scope):
        yield _thread(tie.thread) or _greenlet(tie.thread)
    if scope is not None and is_async(scope):
        # The work may have gone on elsewhere: in another thread of the pool, or in a task that
        # the framework has started for a stream.
        yield from _threads_of(scope, tie.thread)
        yield from _tasks_of(scope)


def _stack(frame: FrameType | None) -> list[FrameType]:
    """Return `frame`, of this thread or of none, and what called it."""
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return _not_ours(frames)


def _not_ours(frames: list[FrameType]) -> list[FrameType]:
    """Return `frames` without our own: one that is running here would be a cycle."""
    return [frame for frame in frames if not is_ours(frame)]


def _thread(ident: int) -> list[FrameType]:
    if ident == threading.get_ident():
        return _stack(sys._getframe())  # noqa: SLF001
    return _not_ours(stacks_of_others().get(ident, []))


# By their ids, which are the idents of such threads.
_greenlets: WeakValueDictionary[int, Any] = WeakValueDictionary()


def note_greenlet() -> None:
    """Remember the greenlet that runs here, where greenlets of gevent or eventlet are threads.

    Nothing but the garbage collector finds one by its ident, and with many objects that takes long.
    """
    if _has_green_threads():
        greenlet: Any = sys.modules["greenlet"].getcurrent()
        _greenlets[id(greenlet)] = greenlet


def _has_green_threads() -> bool:
    return "gevent" in sys.modules or "eventlet" in sys.modules


def _greenlet(ident: int) -> list[FrameType]:
    """Return the stack of a greenlet of gevent's or eventlet's, whose ident is its id."""
    if not _has_green_threads():
        return []
    if ident not in _greenlets:
        kind: Any = sys.modules["greenlet"].greenlet
        found = [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]
        _greenlets.update((id(thing), thing) for thing in found)
    greenlet = _greenlets.get(ident)
    return [] if greenlet is None else _stack(greenlet.gr_frame)


def _threads_of(scope: Scope, first: int) -> Iterator[list[FrameType]]:
    """Give the stacks of the threads that work in `scope`.

    A thread's context cannot be asked for from outside. But whoever runs something in a context
    (anyio, asgiref, asyncio.to_thread) has it in a local variable.
    """
    if current.get(None) is scope:
        yield _thread(threading.get_ident())
    threads = stacks_of_others()
    for ident in sorted(threads, key=lambda ident: ident != first):
        frames = _not_ours(threads[ident])
        if any(_runs_in(frame, scope) for frame in frames):
            yield frames


def _runs_in(frame: FrameType, scope: Scope) -> bool:
    """Tell whether `frame`, of a library, runs something in the context of `scope`."""
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED or is_applications(frame):
        return False
    return any(
        type(value) is Context and value.get(current) is scope
        for value in variables_of(frame).values()
    )


def _tasks_of(scope: Scope) -> Iterator[list[FrameType]]:
    """Give the stacks of the tasks that work in `scope`; from Python 3.12 on they tell it."""
    loop: Any = loop_of(scope)
    tasks: Any = () if loop is None or sys.version_info < (3, 12) else asyncio.all_tasks(loop)
    for task in tasks:
        if task.get_context().get(current) is scope:
            yield frames_of_task(task)
