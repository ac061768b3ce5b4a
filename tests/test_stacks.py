"""The frames of all threads, taken in one step."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rope_middleware.session.code.stacks import stacks_of_others


@contextmanager
def threads_in(run: object, count: int) -> Iterator[list[threading.Thread]]:
    """Run so many threads, and end them by the event that `run` is given."""
    over = threading.Event()
    threads = [threading.Thread(target=run, args=(over,)) for _ in range(count)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        over.set()
        for thread in threads:
            thread.join()


class Kept:
    """A variable of a thread."""


def test_every_other_threads_frames_from_the_innermost_on() -> None:
    """The same as by `f_back`, and nothing of the thread that asks."""
    ready = threading.Barrier(4)
    kept: list[weakref.ref[Kept]] = []

    def inner(over: threading.Event) -> None:
        variable = Kept()
        kept.append(weakref.ref(variable))
        ready.wait()
        over.wait()

    def outer(over: threading.Event) -> None:
        inner(over)

    with threads_in(outer, 3) as threads:
        ready.wait()
        found = stacks_of_others()
        assert threading.get_ident() not in found
        for thread in threads:
            names = [frame.f_code.co_name for frame in found[thread.ident or 0]]
            assert names[-4:] == ["outer", "run", "_bootstrap_inner", "_bootstrap"]
            assert "inner" in names
        del found
    gc.collect()
    assert [one() for one in kept] == [None] * 3


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_meanwhile(collects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within ``sys._current_frames()`` that can wait for ever; afterwards it is as it was."""
    seen: list[bool] = []
    take = sys._current_frames
    monkeypatch.setattr(sys, "_current_frames", lambda: seen.append(gc.isenabled()) or take())
    if not collects:
        gc.disable()
    try:
        stacks_of_others()
        assert gc.isenabled() is collects
    finally:
        gc.enable()
    assert seen == [False]


@pytest.mark.parametrize("kind", ["calls", "generators", "errors"])
def test_threads_that_go_on_meanwhile_do_no_harm(kind: str) -> None:
    """The asking thread and the others take turns as often as they can."""

    def deep(n: int) -> int:
        if n:
            return deep(n - 1)
        if kind == "errors":
            raise ValueError
        return sum(x for x in range(3))

    @contextmanager
    def around() -> Iterator[None]:
        yield

    def run(over: threading.Event) -> None:
        while not over.is_set():
            try:
                with around():
                    deep(10)
            except ValueError:
                pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with threads_in(run, 6) as threads:
            idents = {thread.ident for thread in threads}
            for _ in range(200):
                found = stacks_of_others()
                assert idents <= set(found)
                assert all(frame.f_code for frames in found.values() for frame in frames)
    finally:
        sys.setswitchinterval(interval)
