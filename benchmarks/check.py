"""Are the promises on cost kept? Exits with 1 where one is broken.

    python -m benchmarks.check                    as promised; a few minutes
    python -m benchmarks.check --short            fewer rounds, wider margins; for CI
    python -m benchmarks.check --only P2 Flask    rows whose line contains one of these words
    python -m benchmarks.check --against HEAD~3   beside another state of the package, or a folder

Every row runs in processes of its own, and several times with new ones, see `benchmarks.measure`.
A row is *kept* where the median of its runs is at most the bound, rounded as the bound is. It is
*broken* where the median is above by more than the error of the measurement, and *unclear* in
between: then more runs are made, and what is still unclear in the end is said, and fails nothing.
With ``--short`` it is broken only where every single run is above the bound.

What runs in one thread and waits for nothing (P1, P3, P4, H1, a SELECT from SQLite under WSGI) is
measured in CPU time of that thread; what waits for threads or a server, by the clock on the wall.
"""

from __future__ import annotations

import argparse
import inspect
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import database
from benchmarks.database import Database
from benchmarks.lanes import ROOT, Effort, Side, counts, race
from benchmarks.measure import Spread, Times, added, ratio, surroundings

BEFORE = ", before"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    name: str
    runs: int
    most_runs: int
    """Where the verdict is unclear."""
    effort: Effort
    memory_requests: int
    objects: int
    lenient: bool = False
    """Whether a promise is broken only where every run says so."""


FULL = Plan("full", 5, 15, Effort(100, 0.005), 1_000_000, 1_000_000)
SHORT = Plan("short", 3, 3, Effort(25, 0.004), 100_000, 1_000_000, lenient=True)


@dataclass(frozen=True)
class Row:
    """One promise: which lanes run side by side, and what is asked of them."""

    promise: str
    what: str
    sides: tuple[Side, ...]
    lane: str
    base: str
    bound: float
    bare: str = ""
    """If given, what `lane` and `base` add to this lane is compared."""
    unit: str = ""
    """If given, no ratio: microseconds more than `base`, or what a lane has counted."""
    where: str = ""
    once: bool = False
    needs: Callable[[], bool] = lambda: True
    """Whether the package can do this already."""

    @property
    def title(self) -> str:
        """The line's beginning."""
        return f"{self.promise}  {self.what}" + (f", {self.where}" if self.where else "")

    def measure(self, times: Times, suffix: str = "") -> float:
        """Return the figure of one run."""
        lane = self.lane + suffix
        base, bare = (
            name + suffix if name + suffix in times else name for name in (self.base, self.bare)
        )
        if self.once:
            return times[lane][0]
        if self.unit:
            return added(times, lane, base) * 1e6
        if self.bare:
            return added(times, lane, bare) / added(times, base, bare)
        return ratio(times, lane, base)


@dataclass(frozen=True)
class Result:
    """A row, measured."""

    row: Row
    spread: Spread
    note: str
    verdict: str
    runs: int

    def __str__(self) -> str:
        one, row = self.spread, self.row
        measured = f"{one.median:6.2f} of at most {row.bound:.2f}{row.unit}"
        spread = f"[{one.low:.2f} .. {one.high:.2f}]"
        return f"{self.verdict:<8}{row.title:<72}{measured}  {spread}  {self.note}"


# -- the promises ------------------------------------------------------------------------------


def rows(plan: Plan) -> Iterator[Row]:
    """Yield every promise."""
    yield from _p1()
    for where in ("PostgreSQL", "SQLite"):
        yield from _p2(where)
    lookup = Side("benchmarks.promised:lookup", ours=True)
    yield Row("P3", "jenny.session to scoped_session.registry()", (lookup,), "ours", "theirs", 1.0)
    yield from _p4(plan)
    for kind, driver, bound in (("wsgi", "psycopg", 0.62), ("async", "asyncpg", 0.70)):
        sides = _sides(f"select_{kind}", kind == "async", "open", "read_only")
        yield Row("P5", f"a read-only scope, {driver}", sides, "ours", "by hand", bound,
                  where="PostgreSQL", needs=_reads)  # fmt: skip
    yield Row("H1", "a transaction without a statement, more than by hand",
              _sides("transaction", False), "ours", "by hand", 3.0, unit=" us",
              needs=_knows_holders)  # fmt: skip


def _p1() -> Iterator[Row]:
    def added_by(what: str, side: Side, *bounds: tuple[str, str, float]) -> Iterator[Row]:
        for lane, base, bound in bounds:
            title = f"{what}{', commit_on_success' if lane == 'commit' else ''}, to {base}"
            yield Row("P1", title, (side,), lane, base, bound, bare="bare")

    asgi = Side("benchmarks.promised:untouched_asgi", event_loop=True, ours=True)
    yield from added_by("ASGI", asgi, ("ours", "minimal", 2.0), ("commit", "minimal", 3.5))
    for body, bound, commit in (("list", 2.0, 3.5), ("generator", 4.0, 7.0)):
        wsgi = Side("benchmarks.promised:untouched_wsgi", {"body": body}, ours=True)
        yield from added_by(f"WSGI, {body} body", wsgi, ("ours", "minimal", bound),
                            ("commit", "minimal", commit))  # fmt: skip
    flask = Side("benchmarks.promised:untouched_flask", ours=True)
    yield from added_by("Flask", flask, ("ours", "Flask-SQLAlchemy", 1.0))


def _sides(builder: str, event_loop: bool, *ends: str) -> tuple[Side, Side]:
    """Return the sides by hand and ours: processes of their own."""
    by_hand, ours = ({"end": ends[0]}, {"end": ends[-1]}) if ends else ({}, {})
    builder = f"benchmarks.promised:{builder}"
    return (
        Side(builder, {"by": "by hand"} | by_hand, event_loop),
        Side(builder, {"by": "ours"} | ours, event_loop, ours=True),
    )


ENDS = {
    "closed": "nothing left open",
    "open": "a transaction left open",
    "commit": "commit_on_success, to Session.begin()",
}


def _p2(where: str) -> Iterator[Row]:
    lite = where == "SQLite"
    for kind, what, bounds in (
        ("wsgi", "WSGI", {"open": 1.06 if lite else 1.03, "commit": 1.06}),
        ("threads", "sync handler in an async app",
         {"closed": 1.06 if lite else 1.05, "open": 1.20, "commit": 1.15}),
        ("async", "AsyncSession", {"closed": 1.00, "open": 1.03, "commit": 1.00}),
    ):  # fmt: skip
        for end, bound in bounds.items():
            sides = _sides(f"select_{kind}", kind != "wsgi", end)
            title = f"{what}, {ENDS[end]}"
            yield Row("P2", title, sides, "ours", "by hand", bound, where=where)


def _p4(plan: Plan) -> Iterator[Row]:
    for protocol in ("WSGI", "ASGI"):
        is_async = protocol == "ASGI"
        side = Side(f"benchmarks.memory:memory_{protocol.lower()}", {}, is_async, ours=True)
        for lane, bound in (
            ("objects for the garbage collector", 500),
            ("memory blocks", 5),
            ("bytes of memory", 5 * 1024),
        ):
            yield Row("P4", f"{protocol}: {lane}, for 1,000 requests", (side,), lane, lane, bound,
                      where="SQLite", once=True)  # fmt: skip
        builder = f"benchmarks.memory:open_{protocol.lower()}"
        few, many = (Side(builder, {"count": count}, is_async, ours=True) for count in (1, 10_000))
        yield Row("P4", f"{protocol}: 10,000 open scopes to 1", (few, many), "10,000", "1", 1.05)
    few, many = (
        Side("benchmarks.memory:crowded", {"objects": count}, ours=True)
        for count in (1, plan.objects)
    )
    title = f"a request with a SELECT, {plan.objects:,} objects in the process to 1"
    yield Row("P4", title, (few, many), f"{plan.objects:,}", "1", 1.05, where="SQLite")


def _reads() -> bool:
    import rope_middleware as package

    return all(
        "read_only" in inspect.signature(made).parameters
        for made in (package.open_scope, package.WSGIRopeMiddleware)
    )


def _knows_holders() -> bool:
    import rope_middleware

    return hasattr(rope_middleware, "holders")


# -- measuring ---------------------------------------------------------------------------------


class Check:
    """Measures rows; those that have the same sides, in the same race."""

    def __init__(self, plan: Plan, tree: str = "") -> None:
        self.plan = plan
        self.tree = tree

    def all(self, chosen: Sequence[Row]) -> Iterator[Result | str]:
        """Measure these rows, and say which were skipped."""
        with ExitStack() as stack:
            places: dict[str, Database | str | None] = {"": None}
            groups: dict[tuple[str, str], list[Row]] = {}
            for row in chosen:
                groups.setdefault((repr(row.sides), row.where), []).append(row)
            for group in groups.values():
                try:
                    yield from self._group(group, self._place(places, group[0].where, stack))
                except (ImportError, RuntimeError) as error:
                    yield from (f"{row.title}: {error}" for row in group)

    @staticmethod
    def _place(places: dict[str, Any], where: str, stack: ExitStack) -> Database | None:
        """Start the database, where it is used for the first time."""
        if where not in places:
            try:
                places[where] = stack.enter_context(database.PLACES[where]())
            except (ImportError, RuntimeError) as error:
                places[where] = error
        if isinstance(places[where], Exception):
            raise places[where]
        return places[where]

    def _group(self, group: Sequence[Row], where: Database | None) -> Iterator[Result | str]:
        first = group[0]
        if not first.needs():
            yield from (f"{row.title}: not in this version" for row in group)
            return
        sides = list(first.sides)
        if self.tree:
            sides += [replace(side, tree=self.tree, suffix=BEFORE) for side in sides if side.ours]
        runs: list[Times] = []
        if first.once:
            runs.append(counts(sides[0], where, self.plan.memory_requests))
        while not first.once and (
            len(runs) < self.plan.runs
            or (len(runs) < self.plan.most_runs and any(
                self._result(row, runs).verdict == "unclear" for row in group))
        ):  # fmt: skip
            runs.append(race(sides, where, self.plan.effort))
        yield from (self._result(row, runs) for row in group)

    def _result(self, row: Row, runs: Sequence[Times]) -> Result:
        spread = Spread.of([row.measure(times) for times in runs])
        over = round(spread.median, 2) > row.bound
        beyond = spread.low if self.plan.lenient else spread.median - spread.error
        verdict = "kept" if not over else "BROKEN" if beyond > row.bound else "unclear"
        return Result(row, spread, self._note(row, runs), verdict, len(runs))

    def _note(self, row: Row, runs: Sequence[Times]) -> str:
        if row.once:
            return ""

        def microseconds(lane: str) -> float:
            return statistics.median(statistics.median(times[lane]) for times in runs) * 1e6

        less = microseconds(row.bare) if row.bare else 0
        note = " to ".join(f"{microseconds(name) - less:.4g} us" for name in (row.lane, row.base))
        if self.tree:
            before = Spread.of([row.measure(times, BEFORE) for times in runs])
            to_before = Spread.of([ratio(times, row.lane, row.lane + BEFORE) for times in runs])
            note += (
                f"; before {before.median:.2f} [{before.low:.2f} .. {before.high:.2f}]; the request"
                f" takes {to_before.median:.3f} [{to_before.low:.3f} .. {to_before.high:.3f}] of it"
            )
        return note + f", {len(runs)} runs"


def other_tree(what: str, folder: Path) -> str:
    """Put another rope_middleware, of a folder or of a state in git, alone into `folder`."""
    if (Path(what) / "rope_middleware").is_dir():
        (folder / "rope_middleware").symlink_to((Path(what) / "rope_middleware").resolve())
    else:
        archive = subprocess.run(
            ["git", "archive", what, "rope_middleware"], cwd=ROOT, check=True, capture_output=True
        )
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
    return str(folder)


# -- the command -------------------------------------------------------------------------------


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="fewer rounds, wider margins")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows that contain one of these")
    parser.add_argument("--against", metavar="REF", help="a state in git, or a folder")
    parser.add_argument("--runs", type=int, help="of each row, and no more where it is unclear")
    options = parser.parse_args()
    plan = SHORT if options.short else FULL
    if options.runs:
        plan = replace(plan, runs=options.runs, most_runs=options.runs)
    for name, value in surroundings().items():
        print(f"{name}: {value}")
    started = time.monotonic()
    chosen = [
        row for row in rows(plan)
        if not options.only or any(word in row.title for word in options.only)
    ]  # fmt: skip
    done: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="rope_bench_") as folder:
        tree = other_tree(options.against, Path(folder)) if options.against else ""
        for result in Check(plan, tree).all(chosen):
            if isinstance(result, Result):
                done.append(result)
                print(result, flush=True)
            else:
                print(f"skipped {result}", flush=True)
    verdicts = [result.verdict for result in done]
    print(
        f"{verdicts.count('kept')} kept, {verdicts.count('unclear')} unclear, "
        f"{verdicts.count('BROKEN')} broken, {time.monotonic() - started:.0f} s"
    )
    return 1 if "BROKEN" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
