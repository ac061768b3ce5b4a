"""Interleaved rounds, medians and paired ratios; the machine and the versions.

A machine that other people use is slower in one second than in the next, so figures of two
contestants are comparable only where they were taken side by side. Each *round* times one batch
of every contestant, in an order that changes from round to round; a *ratio* is taken within a
round, and what is reported is the median of the rounds' ratios, with their quartiles.

The cyclic garbage collector is emptied before each batch and off while the batch runs: one
contestant's garbage must not be collected in another one's time. What it would cost is counted
apart, see `cyclic_garbage`.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import random
import sqlite3
import statistics
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

GC_POLICY = (
    "gc.collect() and gc.freeze() before the first round; gc.collect() before each batch, "
    "gc.disable() while it runs"
)

# Seconds per round, by contestant.
Times = dict[str, list[float]]
Batch = Callable[[], float]
AsyncBatch = Callable[[], Awaitable[float]]


@dataclass(frozen=True)
class Spread:
    """A median and what lies around it."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize `values`."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def as_json(self) -> dict[str, float]:
        """Return it as what JSON knows."""
        return {"median": self.median, "low": self.low, "high": self.high}


@contextmanager
def quiet_gc() -> Iterator[None]:
    """Keep the cyclic garbage collector out of the measurement, and undo that."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def _orders(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Yield one order of the contestants per round; each order is followed by its reverse."""
    shuffle = random.Random(42)
    order = list(names)
    for number in range(rounds):
        if number % 2 == 0:
            shuffle.shuffle(order)
        else:
            order.reverse()
        yield order


def interleave(batches: Mapping[str, Batch], rounds: int, warm_up: int = 1) -> Times:
    """Time every batch once per round and return the times, after rounds that do not count."""
    times: Times = {name: [] for name in batches}
    for _ in range(warm_up):
        for batch in batches.values():
            batch()
    with quiet_gc():
        for order in _orders(list(batches), rounds):
            for name in order:
                gc.collect()
                times[name].append(batches[name]())
    return times


async def interleave_async(
    batches: Mapping[str, AsyncBatch], rounds: int, warm_up: int = 1
) -> Times:
    """`interleave` for batches that run in the event loop."""
    times: Times = {name: [] for name in batches}
    for _ in range(warm_up):
        for batch in batches.values():
            await batch()
    with quiet_gc():
        for order in _orders(list(batches), rounds):
            for name in order:
                gc.collect()
                times[name].append(await batches[name]())
    return times


def ratio(times: Times, name: str, base: str) -> Spread:
    """Return what `name` takes, in units of what `base` takes in the same round."""
    return Spread.of([a / b for a, b in zip(times[name], times[base], strict=True)])


def ratio_of_added(times: Times, name: str, base: str, bare: str) -> Spread:
    """Return what `name` adds to `bare`, in units of what `base` adds in the same round."""
    rounds = zip(times[name], times[base], times[bare], strict=True)
    return Spread.of([(a - none) / (b - none) for a, b, none in rounds])


def per_request(times: Sequence[float], requests: int) -> Spread:
    """Return microseconds per request."""
    return Spread.of([seconds / requests * 1e6 for seconds in times])


def cyclic_garbage(batch: Callable[[], object], requests: int) -> float:
    """Return how many objects per request only the cyclic collector can free."""
    batch()
    gc.collect()
    gc.disable()
    try:
        batch()
        return gc.collect() / requests
    finally:
        gc.enable()


# -- where it was measured ---------------------------------------------------------------------


def resident_bytes() -> int | None:
    """Return the memory that the process holds in RAM, or None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def surroundings(distributions: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the figures depend on: machine, Python, versions, garbage collector."""
    names = ("rope-middleware", "SQLAlchemy", "greenlet", "anyio", "aiosqlite", *distributions)
    return {
        "machine": f"{_cpu_model()}, {os.cpu_count()} CPUs, {platform.system()} "
        f"{platform.machine()}",
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "sqlite": sqlite3.sqlite_version,
        "event_loop": "asyncio",
        "gc": GC_POLICY,
        "versions": {name: version_of(name) for name in names if version_of(name)},
    }
