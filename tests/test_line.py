"""The line of `max_active`, by itself: threads, greenlets, event loops, forks."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from rope_middleware.running import line as lines
from rope_middleware.running.line import Line, wait_in_thread
from tests.kit.programs import run_python
from tests.kit.sessions import beside, run_threads
from tests.kit.waiting import eventually


def places(line: Line) -> tuple[int, int]:
    """Return how many are served and how many wait."""
    return len(line._served), len(line._waiting)


def test_line_first_come_first_served() -> None:
    """Also with a place that falls free between: a newcomer does not overtake."""
    line, order = Line(1), []
    first = line.enter()
    assert first is not None
    waiting = [line.enter(lambda n=n: order.append(n)) for n in range(5)]
    assert line.enter() is None
    for place in [first, *waiting]:
        assert place is not None
        assert place.has_turn
        assert line.enter() is None or place is waiting[-1]
        place.give_back()
    assert order == [0, 1, 2, 3, 4]
    assert places(line) == (0, 0)


def test_line_whoever_leaves_is_not_waited_for() -> None:
    """From the middle of the line, from its front, and with the turn just given; once or twice."""
    line, order = Line(1), []
    first = line.enter()
    a, b, c = (line.enter(lambda n=n: order.append(n)) for n in "abc")
    assert first is not None
    assert a is not None
    assert b is not None
    assert c is not None
    b.give_back()
    first.give_back()
    assert order == ["a"]
    a.give_back()
    a.give_back()
    b.give_back()
    assert order == ["a", "c"]
    c.give_back()
    assert places(line) == (0, 0)
    again = line.enter()
    assert again is not None


def test_line_whoever_cannot_be_woken_is_passed_over() -> None:
    """Its event loop is closed."""

    def fail() -> None:
        raise RuntimeError("Event loop is closed")

    line, order = Line(1), []
    first = line.enter()
    line.enter(fail)
    line.enter(fail)
    last = line.enter(lambda: order.append("last"))
    assert first is not None
    assert last is not None
    first.give_back()
    assert order == ["last"]
    assert places(line) == (1, 0)


def test_line_never_more_than_its_size_and_everybody_is_served() -> None:
    """Threads and three event loops at one line, 400 times."""
    line, lock = Line(3), threading.Lock()
    active, most, served = 0, 0, 0

    def begin() -> None:
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)

    def end() -> None:
        nonlocal active, served
        with lock:
            active -= 1
            served += 1

    def in_thread() -> None:
        for _ in range(20):
            place = wait_in_thread(line)
            begin()
            end()
            place.give_back()

    async def in_task() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(10):
            turn = asyncio.Event()
            place = line.enter(lambda turn=turn: loop.call_soon_threadsafe(turn.set))
            assert place is not None
            if not place.has_turn:
                await turn.wait()
            begin()
            await asyncio.sleep(0)
            end()
            place.give_back()

    async def tasks() -> None:
        await asyncio.gather(*(in_task() for _ in range(10)))

    run_threads([in_thread] * 5 + [lambda: asyncio.run(tasks())] * 3)
    assert served == 400
    assert most <= 3
    assert places(line) == (0, 0)


def test_line_a_thread_whose_wait_is_ended_leaves_nothing() -> None:
    """KeyboardInterrupt, the end of a greenlet, a time-out: whatever comes out of the wait."""
    line = Line(1)
    first = line.enter()
    code = """
import os, signal, threading
from rope_middleware.running.line import Line, wait_in_thread
line = Line(1)
line.enter()
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    wait_in_thread(line)
except KeyboardInterrupt:
    print(len(line._served), len(line._waiting))
"""
    assert run_python("-c", code).stdout.split() == ["1", "0"]
    assert first is not None


@pytest.mark.slow
def test_line_greenlets_of_gevent_wait_without_the_others() -> None:
    """Patched threads; a greenlet that is killed in the line is gone from it."""
    code = """
from gevent import monkey; monkey.patch_all()
import gevent
from rope_middleware.running.line import Line, wait_in_thread
line, order = Line(2), []
def work(n):
    place = wait_in_thread(line)
    try:
        order.append(n)
        gevent.sleep(0.01)
    finally:
        place.give_back()
jobs = [gevent.spawn(work, n) for n in range(20)]
gevent.sleep(0.005)
jobs[10].kill()
gevent.joinall(jobs)
print(order == [n for n in range(20) if n != 10], len(line._served), len(line._waiting))
"""
    assert run_python("-c", code).stdout.split() == ["True", "0", "0"]


def test_line_the_garbage_collector_may_come_by_at_any_moment() -> None:
    """What it finds gives a place back while the line's lock is held in the same thread."""
    line = Line(1)
    dropped = line.enter()
    assert dropped is not None
    with line._lock:
        dropped.give_back()
    assert places(line) == (0, 0)
    first = line.enter()
    assert first is not None
    turn = threading.Lock()
    turn.acquire()
    place = line.enter(turn.release)
    assert place is not None
    with line._lock:
        first.give_back()
    assert turn.acquire(timeout=5)


def test_line_keeps_nobody_alive() -> None:
    """A place, what wakes it, and the line itself go when they are not needed any more."""

    class Wake:
        def __call__(self) -> None: ...

    line = Line(1)
    first, wake = line.enter(), Wake()
    place = line.enter(wake)
    assert first is not None
    assert place is not None
    gone = weakref.ref(wake)
    del wake
    first.give_back()
    gc.collect()
    assert gone() is None
    place.give_back()
    dead = weakref.ref(line)
    del line, place, first
    gc.collect()
    assert dead() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_line_a_forked_process_counts_none_of_its_parents() -> None:
    """Its line is empty, and what its parent's requests do at their end there changes nothing."""
    code = """
import os
from rope_middleware.running.line import Line
line = Line(1)
place = line.enter()
pid = os.fork()
if pid == 0:
    mine = line.enter()
    place.give_back()
    os._exit(0 if mine is not None and line.enter() is None else 1)
print(os.waitpid(pid, 0)[1], len(line._served))
"""
    assert run_python("-c", code).stdout.split() == ["0", "1"]


def test_line_a_line_that_is_full_for_long_is_told_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """How many wait and for how long; by whoever waits, also where nobody comes or goes."""
    monkeypatch.setattr(lines, "LONG", 0.05)
    line = Line(2)
    held = [line.enter(), line.enter()]

    def told() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    with beside(*[_come_and_go(line)] * 3):
        eventually(lambda: told(), "the log is told")
        line.tell()
        assert len(told()) == 1
        assert "max_active=2: " in told()[0]
        assert "in line, the first one for 0." in told()[0]
        assert "while 2 are served" in told()[0]
        monkeypatch.setattr(lines, "AGAIN", 0.0)
        line.tell()
        assert "3 requests wait in line" in told()[-1]
        for place in held:
            assert place is not None
            place.give_back()
    before = len(told())
    line.tell()
    assert len(told()) == before, "nobody waits any more"


def _come_and_go(line: Line) -> Callable[[], Any]:
    return lambda: wait_in_thread(line).give_back()
