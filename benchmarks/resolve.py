"""Finding the session, in a shallow and in a deep stack: the first time and every other time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from time import thread_time
from typing import Any

from sqlalchemy.orm import scoped_session, sessionmaker

from benchmarks.measure import Spread, interleave, per_request, ratio
from rope_middleware import SessionJenny, current_scope, open_scope

# Not where CPython's frame stack needs another chunk of memory (about 205 frames here): a call
# across that line takes some 8 us more, whoever makes it.
DEPTHS = (1, 150)
BASE = "scoped_session.registry()"


@dataclass(frozen=True)
class Found:
    """What finding the session takes, at one depth of the stack."""

    title: str
    depth: int
    first: bool
    """The first use, which makes the session, and the end of it."""
    microseconds: Spread
    ratio: Spread
    """To ``scoped_session.registry()``, in the same round."""

    def as_json(self) -> dict[str, Any]:
        """Return it as what JSON knows."""
        return vars(self) | {
            "microseconds": self.microseconds.as_json(),
            "ratio": self.ratio.as_json(),
        }


@dataclass(frozen=True)
class _Way:
    holder: Any
    later: Callable[[Any, int], float]
    first: Callable[[Any, int], float]
    scope: Callable[[], Any] = nullcontext


def _ways() -> dict[str, _Way]:
    factory = sessionmaker()
    by_registry = _later_by_registry, _first_by_registry
    by_session = _later_by_session, _first_by_session
    ours = SessionJenny(factory)
    ways = {
        BASE: _Way(scoped_session(factory), *by_registry),
        "scoped_session.registry(), scopefunc=current_scope": _Way(
            scoped_session(factory, current_scope), *by_registry, open_scope
        ),
        "rope_middleware, in a scope": _Way(ours, *by_session, open_scope),
        "rope_middleware, by rope": _Way(ours, *by_session),
    }
    try:
        from sqlalchemy_rope import SessionJenny as TheirJenny
    except ImportError:
        return ways
    return ways | {"SQLAlchemy-Rope": _Way(TheirJenny(factory), *by_session)}


# In these the session is asked for where the loop is: a rope hangs on their frame.


def _later_by_registry(scoped: Any, uses: int) -> float:
    scoped.registry()
    started = thread_time()
    for _ in repeat(None, uses):
        scoped.registry()
    taken = thread_time() - started
    scoped.remove()
    return taken


def _later_by_session(jenny: Any, uses: int) -> float:
    jenny.session  # noqa: B018
    started = thread_time()
    for _ in repeat(None, uses):
        jenny.session  # noqa: B018
    taken = thread_time() - started
    jenny.remove()
    return taken


def _first_by_registry(scoped: Any, uses: int) -> float:
    started = thread_time()
    for _ in repeat(None, uses):
        scoped.registry()
        scoped.remove()
    return thread_time() - started


def _first_by_session(jenny: Any, uses: int) -> float:
    started = thread_time()
    for _ in repeat(None, uses):
        jenny.session  # noqa: B018
        jenny.remove()
    return thread_time() - started


def _at(depth: int, work: Callable[[Any, int], float], holder: Any, uses: int) -> float:
    return work(holder, uses) if depth <= 1 else _at(depth - 1, work, holder, uses)


def _measure(way: _Way, first: bool, depth: int, uses: int) -> float:
    with way.scope():
        return _at(depth, way.first if first else way.later, way.holder, uses)


def resolve(rounds: int) -> Iterator[Found]:
    """Yield what each way to the session takes."""
    ways = _ways()
    for depth in DEPTHS:
        for first, uses in ((False, 500), (True, 10)):
            times = interleave(
                {title: partial(_measure, way, first, depth, uses) for title, way in ways.items()},
                rounds,
            )
            for title in ways:
                taken = per_request(times[title], uses)
                yield Found(title, depth, first, taken, ratio(times, title, BASE))
