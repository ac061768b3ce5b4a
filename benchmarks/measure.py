"""Medians and paired ratios; the machine and the versions.

A machine that other people use is slower in one second than in the next. So figures are compared
only where they were taken side by side: a *round* times one batch of each lane, in an order that
changes; a ratio is taken within a round, and the median of the rounds is what counts. Two processes
that run the same code differ, too, by what lies where in their memory. So each race is run several
times, with new processes each time, and the *spread* is that of these runs.
"""

import importlib.metadata
import os
import platform
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LINUX = sys.platform == "linux"

Times = dict[str, list[float]]
"""Seconds of a request, for each round, by lane."""


@dataclass(frozen=True)
class Spread:
    """The median of several runs, and what lies around it."""

    median: float
    low: float
    high: float
    error: float
    """Two standard errors of the median: another measurement is within it, 19 times of 20."""

    @classmethod
    def of(cls, runs: Sequence[float]) -> "Spread":
        error = 2 * 1.25 * statistics.stdev(runs) / len(runs) ** 0.5 if len(runs) > 1 else 0.0
        return cls(statistics.median(runs), min(runs), max(runs), error)

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f} .. {self.high:.2f}]"


def ratio(times: Times, lane: str, base: str) -> float:
    """Return what `lane` takes, in units of what `base` takes in the same round."""
    return statistics.median(
        a / max(b, 1e-9) for a, b in zip(times[lane], times[base], strict=True)
    )


def added(times: Times, lane: str, base: str) -> float:
    """Return the seconds that `lane` takes more than `base` does in the same round."""
    return statistics.median(a - b for a, b in zip(times[lane], times[base], strict=True))


def microseconds(runs: Sequence[Times], lane: str) -> float:
    """Return what a request takes."""
    return statistics.median(statistics.median(times[lane]) for times in runs) * 1e6


@contextmanager
def one_cpu(which: int) -> Iterator[None]:
    """Keep this process, and what it starts, on one CPU of those it may use.

    Where the kernel puts the threads of a request decides more than what they do: to wake one that
    sleeps on another CPU takes as long as a transaction of SQLite's.
    """
    cpus = os.sched_getaffinity(0) if LINUX else set()
    if LINUX:
        os.sched_setaffinity(0, [sorted(cpus)[which]])
    try:
        yield
    finally:
        if LINUX:
            os.sched_setaffinity(0, cpus)


def surroundings(distributions: Iterable[str] = ()) -> dict[str, str]:
    """Return what the figures depend on."""
    names = ("SQLAlchemy", "greenlet", "anyio", "aiosqlite", "asyncpg", "psycopg", *distributions)
    versions = {name: version_of(name) for name in names}
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text() if LINUX else "")
    return {
        "Machine": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} CPUs",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "Versions": ", ".join(f"{name} {found}" for name, found in versions.items() if found),
        "Load at the start": load(),
    }


def load() -> str:
    """Return how many processes want to run; a quiet machine has less than 1."""
    return f"{os.getloadavg()[0]:.1f}" if LINUX else "unknown"


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
