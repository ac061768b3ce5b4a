"""Finding the frame that a rope hangs on (J5): what no public name shows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from rope_middleware import SessionJenny
from rope_middleware.rope.frames import calling_frame
from tests.kit.ropes import Seen, is_over, ropes_in, variables
from tests.kit.sessions import Jenny, use


@pytest.fixture
def jenny(engine: Engine) -> Jenny:
    """A jenny whose sessions are `Seen`."""
    return SessionJenny(sessionmaker(engine, class_=Seen))


def test_J5_set_rope_ties_in_the_calling_frame(jenny: Jenny, traced: Any) -> None:
    """`set_rope()` makes the rope where it is called, before any session is there."""

    def view() -> Session:
        jenny.set_rope()
        assert ropes_in(variables()) == [jenny.create_rope_name()]
        assert jenny.registry.has() is False
        session = use(jenny.session)
        assert jenny.session is session
        return session

    with traced():
        assert is_over(view())


def at_depth(depth: int, call: Callable[[], float]) -> float:
    return at_depth(depth - 1, call) if depth else call()


def microseconds(call: Callable[[], object], number: int = 2000) -> float:
    """Return the best of several measurements of one call."""
    best = float("inf")
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(number):
            call()
        best = min(best, time.perf_counter() - start)
    return best / number * 1e6


def test_J5_finding_the_frame_costs_the_same_at_every_depth(jenny: Jenny) -> None:
    """At most 2 microseconds, in a stack of 5 frames as in one of 700."""

    def find() -> float:
        return microseconds(calling_frame)

    def whole_way() -> float:
        return microseconds(lambda: jenny.session, 500)

    coverage_runs = sys.gettrace() is not None or "coverage" in sys.modules
    limit = 2.0 if not coverage_runs else 20.0
    shallow, deep = find(), at_depth(700, find)
    assert shallow <= limit
    assert deep <= limit
    assert deep <= 3 * shallow + 0.2
    shallow, deep = whole_way(), at_depth(700, whole_way)
    assert deep <= 3 * shallow


def test_J5_the_frame_that_is_found_is_the_callers() -> None:
    """Code that belongs to the facade is passed over."""

    code = "def passed_over(find): return find()"
    ours: dict[str, Any] = {"__name__": "rope_middleware.somewhere"}
    theirs: dict[str, Any] = {"__name__": "rope_middleware_of_somebody_else"}
    exec(code, ours)
    exec(code, theirs)
    assert calling_frame() is sys._getframe()
    assert ours["passed_over"](calling_frame) is sys._getframe()
    assert theirs["passed_over"](calling_frame).f_back is sys._getframe()
