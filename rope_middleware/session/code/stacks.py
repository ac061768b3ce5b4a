"""The frames of the threads of this process, taken in one step.

``sys._current_frames()`` names the innermost frame of each thread, and ``f_back`` leads on. Python
code that follows it may be interrupted at each turn: the other thread goes on, its frames end, and
on Python 3.11 an ``f_back`` has then led to freed memory (seen under load, with the process ended
by a segmentation fault). So all of it is done by iterators of the standard library that are
written in C: while they run no other thread does. Nor is garbage collected: a finaliser is Python
code, too, and in ``sys._current_frames()`` of Python 3.11 it may wait for ever, for a thread that
waits for us (https://github.com/python/cpython/issues/106883).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from itertools import accumulate, chain, filterfalse, repeat, takewhile
from operator import call
from types import FrameType
from typing import Any

__all__ = ["stacks_of_others"]


def stacks_of_others() -> dict[int, list[FrameType]]:
    """Return the frames of every other thread by its ident, the innermost first.

    They are not to be kept: a frame keeps the variables of what it runs.
    """
    threads: list[dict[int, FrameType]] = []
    # append() returns None, so that filterfalse() lets everything pass.
    asked = filterfalse(threads.append, map(call, (sys._current_frames,)))  # noqa: SLF001 - documented
    innermost = chain.from_iterable(map(dict[int, FrameType].values, asked))
    # Of each frame: itself, its f_back, the f_back of that, until there is none.
    back: Iterator[Any] = repeat(repeat("f_back"))
    steps: Iterator[Any] = map(chain, zip(innermost, strict=True), back)
    follow: Any = accumulate
    chains: Iterator[Any] = map(follow, steps, repeat(getattr))
    walks: Iterator[Any] = map(takewhile, repeat(bool), chains)
    collects = gc.isenabled()
    ends = gc.enable if collects else gc.isenabled
    try:
        work = chain(map(call, (gc.disable,)), map(list, walks), map(call, (ends,)))
        stacks: list[Any] = list(work)[1:-1]
    except BaseException:
        if collects:
            gc.enable()
        raise
    found: dict[int, list[FrameType]]
    found = dict(zip(threads[0], stacks, strict=True))
    # This thread's own hold the frame of this function, which would hold them: a cycle. (Not by
    # get_ident(): gevent gives the number of a greenlet.)
    for ident, frames in list(found.items()):
        if frames and frames[0].f_code is stacks_of_others.__code__:
            found.pop(ident).clear()
    del threads, asked, innermost, steps, chains, walks, work, stacks
    return found
