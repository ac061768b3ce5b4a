"""Batches, medians and paired ratios; the machine and the versions.

A machine that other people use is slower in one second than in the next. So figures are compared
only where they were taken side by side: a *round* times one batch of each lane, in an order that
changes; a ratio is taken within a round, and the median of the rounds is what counts. Two processes
that run the same code differ, too, by what lies where in their memory. So each race is run several
times, with new processes each time, and the *spread* is that of these runs.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GC_POLICY = "collected before each batch and off while it runs"

Times = dict[str, list[float]]
"""Seconds for each round, by lane."""


@dataclass(frozen=True)
class Spread:
    """The median of several runs, and what lies around it."""

    median: float
    low: float
    high: float
    error: float
    """Two standard errors of the median: another measurement is within it, 19 times of 20."""

    @classmethod
    def of(cls, runs: Sequence[float]) -> Spread:
        """Summarize the runs."""
        error = 0.0
        if len(runs) > 1:
            error = 2 * 1.25 * statistics.stdev(runs) / len(runs) ** 0.5
        return cls(statistics.median(runs), min(runs), max(runs), error)


def ratio(times: Times, lane: str, base: str) -> float:
    """Return what `lane` takes, in units of what `base` takes in the same round."""
    return statistics.median(a / b for a, b in zip(times[lane], times[base], strict=True))


def added(times: Times, lane: str, base: str) -> float:
    """Return the seconds that `lane` takes more than `base` does in the same round."""
    return statistics.median(a - b for a, b in zip(times[lane], times[base], strict=True))


def orders(lanes: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Yield an order of the lanes for each round; each order is followed by its reverse."""
    shuffle = random.Random(42)
    order = list(lanes)
    for number in range(rounds):
        if number % 2 == 0:
            shuffle.shuffle(order)
        else:
            order.reverse()
        yield order


def cyclic_garbage(work: Callable[[], object]) -> int:
    """Return how many objects of `work` only the cyclic collector can free."""
    work()
    gc.collect()
    gc.disable()
    try:
        work()
        return gc.collect()
    finally:
        gc.enable()


def resident_bytes() -> int:
    """Return the memory that the process holds in RAM; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


# -- where it was measured ---------------------------------------------------------------------


def surroundings(distributions: Sequence[str] = ()) -> dict[str, str]:
    """Return what the figures depend on."""
    names = ("SQLAlchemy", "greenlet", "anyio", "aiosqlite", "asyncpg", "psycopg", *distributions)
    return {
        "Machine": f"{_cpu_model()}, {os.cpu_count()} CPUs, {platform.system()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "Versions": ", ".join(f"{name} {version_of(name)}" for name in names if version_of(name)),
        "Garbage collector": GC_POLICY,
        "Load at the start": f"{os.getloadavg()[0]:.1f}" if sys.platform != "win32" else "?",
    }


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found: list[Any] = [line for line in lines if line.startswith("model name")]
    return found[0].partition(":")[2].strip() if found else platform.machine()
