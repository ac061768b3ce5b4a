"""Are the promises on cost kept? Exits with 1 where one is broken.

    python -m benchmarks.check                    as promised; about five minutes
    python -m benchmarks.check --short            fewer rounds, wider margins; for CI
    python -m benchmarks.check --only P2 Flask    rows whose line contains one of these words
    python -m benchmarks.check --against HEAD~3   beside another state of the package, or a folder

Every row runs in processes of its own, and several times with new ones, see `benchmarks.measure`.
A row is *kept* where the median of its runs is at most the bound, rounded as the bound is. It is
*broken* where the median is above by more than the error of the measurement, and *unclear* in
between: then more runs are made, and what is still unclear in the end is said, and fails nothing.
With ``--short`` it is broken only where every single run is above the bound; of a promise that is
known as not kept yet it says *open* then, and goes on.
What runs in one thread and waits for nothing (P1, P3, P4, H1, L1, a SELECT from SQLite under WSGI)
is measured in CPU time of that thread; what waits for threads or a server, in wall-clock time.
"""

import argparse
import inspect
import io
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import rope_middleware
from benchmarks import database
from benchmarks.database import Database
from benchmarks.lanes import CPU, ROOT, Effort, Side, race
from benchmarks.measure import Spread, Times, added, load, microseconds, ratio, surroundings
from benchmarks.sites import COMMIT, COROUTINES, FLASK, HAND, IS_WSGI, OURS, THREADS, WSGI

BEFORE = ", before"
OPEN = ("P1  Flask", "P2  ", "P5  ", "H1  ")  # with --short: see above


class Plan(NamedTuple):
    """How much is measured."""

    runs: int
    most_runs: int  # where the verdict is unclear
    effort: Effort
    memory_requests: int
    lenient: bool = False  # whether a promise is broken only where every run says so


FULL = Plan(5, 9, Effort(80, 0.005), 500_000)
SHORT = Plan(3, 3, Effort(25, 0.004), 100_000, lenient=True)


@dataclass(frozen=True)
class Row:
    """One promise: which lanes run side by side, and what is asked of them."""

    promise: str
    what: str
    sides: tuple[Side, ...]
    lane: str
    base: str
    bound: float
    bare: str = ""  # if given, what `lane` and `base` add to this lane is compared
    unit: str = ""  # if given, no ratio: " us" more than `base`, or what a lane has counted
    where: str = ""
    missing: bool = False  # whether the package cannot do this yet

    @property
    def title(self) -> str:
        return f"{self.promise}  {self.what}" + (f", {self.where}" if self.where else "")

    def measure(self, times: Times, suffix: str = "") -> float:
        """Return the figure of one run."""
        lane = self.lane + suffix
        base, bare = (
            name + suffix if name + suffix in times else name for name in (self.base, self.bare)
        )
        if self.unit == " us":
            return added(times, lane, base) * 1e6
        if self.unit:
            return times[lane][0] * 1000
        if self.bare:
            return added(times, lane, bare) / added(times, base, bare)
        return ratio(times, lane, base)


class Result(NamedTuple):
    """A row, measured."""

    row: Row
    spread: Spread
    verdict: str
    note: str

    @property
    def bound(self) -> str:
        return "" if self.row.bound == inf else f"{self.row.bound:.2f}{self.row.unit}"

    def __str__(self) -> str:
        bound = self.bound and f"at most {self.bound}"
        return f"{self.verdict:<8}{self.row.title:<72}{self.spread!s:<22}{bound:<15}{self.note}"


def rows() -> Iterator[Row]:
    """Yield every promise."""
    yield from _p1()
    yield from _p2("PostgreSQL", 1.03, 1.05)
    yield from _p2("SQLite", 1.06, 1.06)
    lookup = _side("promised:lookup")
    yield Row("P3", "jenny.session to scoped_session.registry()", (lookup,), "ours", "theirs", 1.0)
    yield from _p4()
    reads = "read_only" in inspect.signature(rope_middleware.open_scope).parameters
    for kind, driver, bound in ((WSGI, "psycopg", 0.62), (COROUTINES, "asyncpg", 0.70)):
        row = _select(f"P5  a read-only scope, {driver}", kind, "read-only", HAND, "select", bound)
        yield replace(row, where="PostgreSQL", missing=not reads)
    for promise, lane, what, bound in (
        ("H1", "transaction", "a transaction without a statement, more than by hand", 3.0),
        ("L1", "left_open", "a transaction left open, to learn that nothing is lost", 1.0),
    ):
        yield Row(promise, what, (_side(f"promised:{lane}"),), OURS, HAND, bound, unit=" us",
                  missing=not hasattr(rope_middleware, "holders"))  # fmt: skip


def _side(builder: str, event_loop: bool = False, ours: bool = True, **options: Any) -> Side:
    return Side(f"benchmarks.{builder}", options, event_loop, ours)


def _p1() -> Iterator[Row]:
    def row(what: str, side: Side, lane: str, base: str, bound: float) -> Row:
        what += ", commit_on_success" if lane == "commit" else ""
        return Row("P1", f"{what}: adds, to {base}", (side,), lane, base, bound, bare="bare")

    for body, bounds in (
        ("ASGI", (2.0, 3.5)), ("WSGI, list body", (2.0, 3.5)), ("WSGI, generator body", (4.0, 7.0)),
    ):  # fmt: skip
        side = _side("promised:untouched", body == "ASGI", body=body)
        for lane, bound in zip(("ours", "commit"), bounds, strict=True):
            yield row(body, side, lane, "minimal", bound)
    flask = _side("promised:untouched", body=FLASK)
    for base, bound in (("Flask-SQLAlchemy", 1.0), ("minimal", inf)):
        yield replace(row(FLASK, flask, "ours", base, bound), where="SQLite")


def _select(title: str, kind: str, way: str, base: str, path: str, bound: float) -> Row:
    """Return a row whose sides each serve one path in one way: processes of their own."""
    base_side, side = (
        _side("sites:site", kind not in IS_WSGI, one == way, kind=kind, way=one, paths=(path,))
        for one in (base, way)
    )
    promise, _, what = title.partition("  ")
    return Row(promise, what, (base_side, side), f"{way}: {path}", f"{base}: {path}", bound)


def _p2(where: str, wsgi: float, closed: float) -> Iterator[Row]:
    bounds = {
        WSGI: (None, wsgi, 1.06), THREADS: (closed, 1.20, 1.15), COROUTINES: (1.00, 1.03, 1.00),
    }  # fmt: skip
    for kind, three in bounds.items():
        for (what, way, base, path), bound in zip(ENDS, three, strict=True):
            if bound:
                row = _select(f"P2  {kind}, {what}", kind, way, base, path, bound)
                yield replace(row, where=where)


ENDS = (
    ("nothing left open", OURS, HAND, "closed"),
    ("a transaction left open", OURS, HAND, "select"),
    ("commit_on_success, to Session.begin()", COMMIT, "Session.begin()", "select"),
)


def _p4() -> Iterator[Row]:
    for kind, protocol in ((WSGI, "WSGI"), (COROUTINES, "ASGI")):
        is_async = kind == COROUTINES
        many = (_side("memory:many_requests", is_async, kind=kind),)
        for unit, bound in ((" objects of garbage", 500), (" memory blocks", 5), (" bytes", 5120)):
            yield Row("P4", f"{protocol}: left by 1,000 requests", many, unit, unit, bound,
                      unit=unit, where="SQLite")  # fmt: skip
        builder = f"memory:open_{protocol.lower()}"
        sides = tuple(_side(builder, is_async, count=count) for count in (1, 10_000))
        yield Row("P4", f"{protocol}: a request with 10,000 open scopes to 1", sides, "10,000",
                  "1", 1.05, where="SQLite")  # fmt: skip
    sides = tuple(_side("memory:crowded", objects=count) for count in (1, 1_000_000))
    yield Row("P4", "WSGI: a SELECT with 1,000,000 objects in the process to 1", sides,
              "1,000,000", "1", 1.05, where="SQLite")  # fmt: skip


def check(chosen: Sequence[Row], plan: Plan, tree: str = "") -> Iterator[Result | str]:
    """Measure these rows, those of the same sides in one race, and say which were skipped."""
    groups: dict[str, list[Row]] = {}
    for row in chosen:
        groups.setdefault(repr((row.sides, row.where)), []).append(row)
    places: dict[str, Database | None] = {"": None}
    with ExitStack() as stack:
        for group in groups.values():
            where = group[0].where
            try:
                if group[0].missing:
                    raise RuntimeError("not in this version")
                if where not in places:
                    places[where] = stack.enter_context(database.PLACES[where]())
                yield from _measured(group, places[where], plan, tree)
            except (ImportError, RuntimeError) as error:
                yield from (f"{row.title}: {error}" for row in group)


def _measured(
    group: Sequence[Row], where: Database | None, plan: Plan, tree: str
) -> Iterator[Result]:
    sides, effort = list(group[0].sides), plan.effort
    if tree:
        sides += [replace(side, tree=tree, suffix=BEFORE) for side in sides if side.ours]
    if group[0].bare:  # differences of short times: more rounds of shorter batches
        effort = Effort(effort.rounds * 3, effort.seconds / 4)
    runs, most = [], plan.most_runs
    if group[0].unit not in ("", " us"):
        effort, most = Effort(1, 0, plan.memory_requests), 1
    while len(runs) < min(plan.runs, most) or (
        len(runs) < most and any(_result(row, runs, plan).verdict == "unclear" for row in group)
    ):
        runs.append(race(sides, where, effort))
    yield from (_result(row, runs, plan) for row in group)


def _result(row: Row, runs: Sequence[Times], plan: Plan) -> Result:
    spread = Spread.of([row.measure(times) for times in runs])
    verdict = "told" if row.bound == inf else "kept"
    if round(spread.median, 2) > row.bound:
        beyond = spread.low if plan.lenient else spread.median - spread.error
        known = plan.lenient and any(words in row.title for words in OPEN)
        verdict = ("open" if known else "BROKEN") if beyond > row.bound else "unclear"
    return Result(row, spread, verdict, _note(row, runs))


def _note(row: Row, runs: Sequence[Times]) -> str:
    if row.unit not in ("", " us"):
        return ""
    less = microseconds(runs, row.bare) if row.bare else 0
    both = (f"{microseconds(runs, lane) - less:,.4g} us" for lane in (row.lane, row.base))
    note = f"{' to '.join(both)}, {len(runs)} runs"
    if not row.bare and not row.unit:
        in_cpu = Spread.of([ratio(times, row.lane + CPU, row.base + CPU) for times in runs])
        note += f", in CPU time {in_cpu.median:.2f}"
    if row.lane + BEFORE in runs[0]:
        before = Spread.of([row.measure(times, BEFORE) for times in runs])
        of_it = Spread.of([ratio(t, row.lane + CPU, row.lane + BEFORE + CPU) for t in runs])
        note += f"; before {before}; of its CPU {of_it.median:.3f}, error {of_it.error:.3f}"
    return note


def other_tree(what: str, folder: str) -> str:
    """Put another rope_middleware, of a folder or of a state in git, alone into `folder`."""
    if (Path(what) / "rope_middleware").is_dir():
        Path(folder, "rope_middleware").symlink_to(Path(what, "rope_middleware").resolve())
    else:
        archive = subprocess.run(
            ["git", "archive", what, "rope_middleware"], cwd=ROOT, check=True, capture_output=True
        )
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
    return folder


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--short", action="store_true", help="fewer rounds, wider margins")
    add("--only", nargs="+", metavar="WORD", help="rows that contain one of these")
    add("--against", metavar="REF", help="a state in git, or a folder")
    add("--runs", type=int, help="of each row, and no more where it is unclear")
    options: Any = parser.parse_args()
    plan = SHORT if options.short else FULL
    if options.runs:
        plan = plan._replace(runs=options.runs, most_runs=options.runs)
    for name, value in surroundings().items():
        print(f"{name}: {value}")
    started = time.monotonic()
    words = options.only or [""]
    chosen = [row for row in rows() if any(word in row.title for word in words)]
    verdicts: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rope_bench_") as folder:
        tree = other_tree(options.against, folder) if options.against else ""
        for result in check(chosen, plan, tree):
            print(result if isinstance(result, Result) else f"skipped {result}", flush=True)
            verdicts += [result.verdict] if isinstance(result, Result) else []
    told = ", ".join(f"{verdicts.count(one)} {one}" for one in sorted({*verdicts}))
    print(f"{told}, {time.monotonic() - started:.0f} s, load at the end: {load()}")
    return 1 if "BROKEN" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
