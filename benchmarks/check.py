"""Are the promises on cost kept? Exits with 1 where one is broken.

    python -m benchmarks.check                    as promised; about eleven minutes
    python -m benchmarks.check --short            fewer rounds, wider margins; for CI
    python -m benchmarks.check --only P2 Flask    rows whose line contains one of these words

Every row runs in processes of its own, and several times with new ones, see `benchmarks.measure`.
A row is *kept* where the median of its runs is at most the bound, rounded as the bound is. It is
*broken* where the median is above by more than the error of the measurement, and *unclear* in
between: then more runs are made, and what is still unclear in the end is said, and fails nothing.
With ``--short`` it is broken only where every single run is above the bound, some by a `MARGIN`.
What a request with a SELECT costs, or one of Flask's without, is compared with the least that could
do the same, which is a bound, and with what was aimed at, the handler by hand or Flask-SQLAlchemy:
`missed` or `reached`. How near anything can come to P2's aims that knows of each transaction what
H1, H3 and L1 ask for is `told`, but not with ``--short``: see `benchmarks.least`.
What runs in one thread and waits for nothing (P1, P3, P4, H1, a SELECT from SQLite under WSGI)
is measured in CPU time of that thread; what waits for threads or a server, in wall-clock time.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import inf
from typing import Any, NamedTuple

from benchmarks import database, memory, promised, sites
from benchmarks.database import Database
from benchmarks.lanes import CPU, Effort, Side, race
from benchmarks.measure import Spread, Times, added, load, microseconds, ratio, surroundings
from benchmarks.sites import (
    BEGIN,
    COMMIT,
    COROUTINES,
    FLASK,
    HAND,
    LEAST,
    LEAST_COMMIT,
    OURS,
    OWN,
    THREADS,
    WSGI,
)

MARGIN = 1.15  # runs of the same code have been so far apart, on a machine that does other work,
BUSY = ("P1  Flask", "P2  ", "P5  ", "H1  ")  # of these rows


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
    is_aim: bool = False  # `bound` was aimed at first: missed or reached, it fails nothing

    @property
    def title(self) -> str:
        return f"{self.promise}  {self.what}" + (f", {self.where}" if self.where else "")

    def measure(self, times: Times) -> float:
        """Return the figure of one run."""
        if self.unit == " us":
            return added(times, self.lane, self.base) * 1e6
        if self.unit:
            return times[self.lane][0] * 1000
        if self.bare:
            return added(times, self.lane, self.bare) / added(times, self.base, self.bare)
        return ratio(times, self.lane, self.base)


class Result(NamedTuple):
    """A row, measured."""

    row: Row
    spread: Spread
    verdict: str
    note: str

    @property
    def bound(self) -> str:
        if self.row.bound == inf:
            return ""
        return f"{'aim' if self.row.is_aim else 'at most'} {self.row.bound:.2f}{self.row.unit}"

    def __str__(self) -> str:
        start = f"{self.verdict:<8}{self.row.title:<102}"
        return f"{start}{self.spread!s:<22}{self.bound:<18}{self.note}"


def rows(is_short: bool = False) -> Iterator[Row]:
    """Yield every promise."""
    yield from _p1()
    for where in P2:
        yield from _p2(where, is_short)
    lookup = _side(promised.lookup)
    yield Row("P3", "jenny.session to scoped_session.registry()", (lookup,), "ours", "theirs", 1.0)
    yield from _p4()
    ways = HAND, sites.AUTOCOMMIT, sites.READ_ONLY
    for kind, driver, aim in ((WSGI, "psycopg", 0.62), (COROUTINES, "asyncpg", 0.70)):
        title = f"P5  a read-only scope, {driver}"
        yield from _selects(title, kind, ways, "select", "PostgreSQL", 1.05, aim)
    transaction = Row("H1", "a transaction without a statement, to by hand",
                      (_side(promised.transaction),), OURS, HAND, 1.13)  # fmt: skip
    yield transaction
    yield replace(transaction, what="the same: more", bound=3.0, unit=" us", is_aim=True)


def _side(builder: Any, event_loop: bool = False, **options: Any) -> Side:
    return Side(builder, options, event_loop)


def _p1() -> Iterator[Row]:
    def row(what: str, side: Side, lane: str, base: str, bound: float) -> Row:
        what += ", commit_on_success" if lane == "commit" else ""
        return Row("P1", f"{what}: adds, to {base}", (side,), lane, base, bound, bare="bare")

    for body, bounds in (
        ("ASGI", (2.0, 3.5)), ("WSGI, list body", (2.0, 3.5)), ("WSGI, generator body", (4.0, 7.0)),
    ):  # fmt: skip
        side = _side(promised.untouched, body == "ASGI", body=body)
        for lane, bound in zip(("ours", "commit"), bounds, strict=True):
            yield row(body, side, lane, "minimal", bound)
    flask = _side(promised.untouched, body=FLASK)
    for base, bound in ((promised.LEAST, 1.5), ("Flask-SQLAlchemy", 1.0), ("minimal", inf)):
        one = row(FLASK, flask, "ours", base, bound)
        yield replace(one, where="SQLite", is_aim=bound == 1.0)


def _selects(
    title: str, kind: str, ways: Sequence[str], path: str, where: str, bound: float, aim: float
) -> Iterator[Row]:
    """Yield two rows for a way: to the least that could do it, and to the handler by hand.

    If a fourth way is given, the least that knows: how that way compares with it, and it by hand.
    """
    hand, least, way, *knowing = ways
    sides = tuple(
        _side(sites.site, kind not in sites.IS_WSGI, kind=kind, way=one, paths=(path,))
        for one in ways
    )
    promise, _, what = title.partition("  ")
    compared = [(way, least, bound), (way, hand, aim)]
    for one in knowing:
        compared += [(way, one, inf), (one, hand, inf)]
    for lane, base, most in compared:
        name = what if lane == way else f"{what}, {lane}"
        yield Row(promise, f"{name}, to {base}", sides, f"{lane}: {path}", f"{base}: {path}", most,
                  where=where, is_aim=most != inf and base == hand)  # fmt: skip


def _p2(where: str, is_short: bool) -> Iterator[Row]:
    for kind, bounds in P2[where].items():
        for (what, ways, path), (bound, aim) in zip(ENDS, bounds, strict=True):
            if bound:
                chosen = ways[:3] if is_short else ways
                yield from _selects(f"P2  {kind}, {what}", kind, chosen, path, where, bound, aim)


ENDS = (
    ("nothing left open", (HAND, OWN, OURS, LEAST), "closed"),
    ("a transaction left open", (HAND, OWN, OURS, LEAST), "select"),
    ("commit_on_success", (BEGIN, sites.OWN_COMMIT, COMMIT, LEAST_COMMIT), "select"),
)
# To a middleware by hand, and what was aimed at: to the handler by hand.
P2 = {
    "PostgreSQL": {
        WSGI: ((0, 0), (1.10, 1.03), (1.15, 1.06)),
        THREADS: ((1.10, 1.05), (1.10, 1.20), (1.10, 1.15)),
        COROUTINES: ((1.10, 1.00), (1.10, 1.03), (1.15, 1.00)),
    },
    "SQLite": {
        WSGI: ((0, 0), (1.15, 1.06), (1.25, 1.06)),
        THREADS: ((1.15, 1.06), (1.10, 1.20), (1.20, 1.15)),
        COROUTINES: ((1.10, 1.00), (1.10, 1.03), (1.20, 1.00)),
    },
}


def _p4() -> Iterator[Row]:
    for kind, protocol in ((WSGI, "WSGI"), (COROUTINES, "ASGI")):
        is_async = kind == COROUTINES
        many = (_side(memory.many_requests, is_async, kind=kind),)
        for unit, bound in ((" objects of garbage", 500), (" memory blocks", 5), (" bytes", 5120)):
            yield Row("P4", f"{protocol}: left by 1,000 requests", many, unit, unit, bound,
                      unit=unit, where="SQLite")  # fmt: skip
        builder = memory.open_asgi if is_async else memory.open_wsgi
        sides = tuple(_side(builder, is_async, count=count) for count in (1, 10_000))
        yield Row("P4", f"{protocol}: a request with 10,000 open scopes to 1", sides, "10,000",
                  "1", 1.05, where="SQLite")  # fmt: skip
    sides = tuple(_side(memory.crowded, objects=count) for count in (1, 1_000_000))
    yield Row("P4", "WSGI: a SELECT with 1,000,000 objects in the process to 1", sides,
              "1,000,000", "1", 1.05, where="SQLite")  # fmt: skip


def check(chosen: Sequence[Row], plan: Plan) -> Iterator[Result | str]:
    """Measure these rows, those of the same sides in one race, and say which were skipped."""
    groups: dict[str, list[Row]] = {}
    for row in chosen:
        groups.setdefault(repr((row.sides, row.where)), []).append(row)
    places: dict[str, Database | None] = {"": None}
    with ExitStack() as stack:
        for group in groups.values():
            where = group[0].where
            try:
                if where not in places:
                    places[where] = stack.enter_context(database.PLACES[where]())
                yield from _measured(group, places[where], plan)
            except (ImportError, RuntimeError) as error:
                yield from (f"{row.title}: {error}" for row in group)


def _measured(group: Sequence[Row], where: Database | None, plan: Plan) -> Iterator[Result]:
    effort = plan.effort
    if group[0].bare:  # differences of short times: more rounds of shorter batches
        effort = Effort(effort.rounds * 3, effort.seconds / 4)
    runs, most = [], plan.most_runs
    if group[0].unit not in ("", " us"):
        effort, most = Effort(1, 0, plan.memory_requests), 1
    while len(runs) < min(plan.runs, most) or (
        len(runs) < most and any(_result(row, runs, plan).verdict == "unclear" for row in group)
    ):
        runs.append(race(group[0].sides, where, effort))
    yield from (_result(row, runs, plan) for row in group)


def _result(row: Row, runs: Sequence[Times], plan: Plan) -> Result:
    spread = Spread.of([row.measure(times) for times in runs])
    is_within = round(spread.median, 2) <= row.bound
    if row.is_aim:
        verdict = "reached" if is_within else "missed"
    elif is_within:
        verdict = "told" if row.bound == inf else "kept"
    else:
        margin = MARGIN if row.title.startswith(BUSY) else 1
        beyond = spread.low / margin if plan.lenient else spread.median - spread.error
        verdict = "BROKEN" if beyond > row.bound else "unclear"
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
    return note


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--short", action="store_true", help="fewer rounds, wider margins")
    add("--only", nargs="+", metavar="WORD", help="rows that contain one of these")
    options: Any = parser.parse_args()
    plan = SHORT if options.short else FULL
    for name, value in surroundings().items():
        print(f"{name}: {value}")
    started = time.monotonic()
    words = options.only or [""]
    chosen = [row for row in rows(options.short) if any(word in row.title for word in words)]
    verdicts: list[str] = []
    for result in check(chosen, plan):
        print(result if isinstance(result, Result) else f"skipped {result}", flush=True)
        verdicts += [result.verdict] if isinstance(result, Result) else []
    told = ", ".join(f"{verdicts.count(one)} {one}" for one in sorted({*verdicts}))
    print(f"{told}, {time.monotonic() - started:.0f} s, load at the end: {load()}")
    return 1 if "BROKEN" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
