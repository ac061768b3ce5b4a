"""Measure everything and write docs/benchmarks.md: python -m benchmarks. Under ten minutes.

python -m benchmarks --peers     only print how the ways to a session compare; writes nothing
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks import database
from benchmarks.check import FULL, Check, Result, rows
from benchmarks.lanes import Effort, Side, race
from benchmarks.measure import Spread, Times, ratio, surroundings, version_of
from benchmarks.peers import ASYNC, FLASK, HAND, KINDS, OURS, PATHS, SYNC

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
RUNS, EFFORT = 3, Effort(40, 0.005)

HEADINGS = {
    "none": "no database",
    "select": "one SELECT",
    "insert": "one INSERT, committed",
}

HOW = """\
## How it is measured

- A *round* times one batch of each contestant, a few milliseconds long, in an order that changes.
  A ratio is taken within a round; the median of the rounds counts.
- Every contestant runs in a process of its own, so that it pays for nobody else's event listeners.
  All of it is done several times with new processes. The tables give the median of these runs and,
  in brackets, the lowest and the highest.
- No socket and no server: the application is called as a server would call it. What runs in one
  thread and waits for nothing is measured in CPU time, all else by the clock on the wall.
- PostgreSQL is on the same machine, over a Unix socket. SQLite files do not wait for the disk.
- *By hand* means: the handler opens a session and closes it (`with Session() as session:`).
- *Unclear* means: above the bound by less than the error of the measurement.
"""


def main() -> int:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", action="store_true", help="print the peers, write nothing")
    options = parser.parse_args()
    packages = ["Flask", "FastAPI"] + [way for ways in KINDS.values() for way in ways]
    where = surroundings(sorted({name for name in packages if version_of(name)}))
    results: list[Result] = []
    skipped: list[str] = []
    for result in Check(FULL).all([] if options.peers else list(rows(FULL))):
        print(result, flush=True)
        if isinstance(result, Result):
            results.append(result)
        else:
            skipped.append(result)
    tables = list(peers())
    if not options.peers:
        PAGE.write_text(page(where, results, skipped, tables))
    return 0


Table = dict[str, dict[str, tuple[float, Spread]]]


def peers() -> Iterator[tuple[str, Table]]:
    """Compare the ways to a session; yield, for each kind of app, its figures by way and path."""
    with ExitStack() as stack:
        where = stack.enter_context(database.postgresql())
        for kind, ways in KINDS.items():
            sides = {
                way: Side("benchmarks.peers:site", {"kind": kind, "way": way}, kind != FLASK,
                          ours="rope_middleware" in way)
                for way in ways
            }  # fmt: skip
            absent: dict[str, str] = {}
            runs = [race(list(sides.values()), where, EFFORT, absent) for _ in range(RUNS)]
            table: Table = {}
            for way, side in sides.items():
                if repr(side) in absent:
                    print(f"{kind:<24}{way:<38} {absent[repr(side)]}", flush=True)
                    continue
                table[way] = {path: _figure(runs, way, path) for path in PATHS}
                print(f"{kind:<24}{way:<38}", *map(_cell, table[way].values()), flush=True)
            yield kind, table


def _figure(runs: list[Times], way: str, path: str) -> tuple[float, Spread]:
    """Return microseconds for a request, and the ratio to by hand."""
    lane, base = f"{way}: {path}", f"{HAND}: {path}"
    microseconds = statistics.median(statistics.median(times[lane]) for times in runs) * 1e6
    return microseconds, Spread.of([ratio(times, lane, base) for times in runs])


def _cell(figure: tuple[float, Spread]) -> str:
    microseconds, to_hand = figure
    return f"{microseconds:,.0f} us, {to_hand.median:.2f} [{to_hand.low:.2f} .. {to_hand.high:.2f}]"


# -- the page ----------------------------------------------------------------------------------


def page(
    where: dict[str, str],
    results: list[Result],
    skipped: list[str],
    tables: list[tuple[str, Table]],
) -> str:
    """Return the page."""
    parts = ["# What a request costs\n", _summary(dict(tables)), HOW]
    parts += ["".join(f"- {name}: {value}\n" for name, value in where.items())]
    for kind, table in tables:
        lines = [[way, *(_cell(figures[path]) for path in PATHS)] for way, figures in table.items()]
        parts += [f"## {kind}\n", "Time of a request, and its ratio to that by hand. PostgreSQL.\n"]
        parts.append(_table(["", *(HEADINGS[path] for path in PATHS)], lines))
    lines = [
        [one.row.title, f"{one.spread.median:.2f}{one.row.unit}", f"{one.row.bound:.2f}",
         one.verdict, f"[{one.spread.low:.2f} .. {one.spread.high:.2f}] {one.note}"]
        for one in results
    ]  # fmt: skip
    parts += ["## The promises\n", _table(["", "measured", "at most", "", "details"], lines)]
    parts += ["".join(f"- Not measured: {one}\n" for one in skipped)] if skipped else []
    return "\n".join(parts)


def _summary(tables: dict[str, Table]) -> str:
    """Return what a reader should take away."""

    def more(kind: str) -> str:
        figure, by_hand = (tables[kind][way]["none"][0] for way in (OURS, HAND))
        return f"{max(figure - by_hand, 0):.0f}"

    def times(kind: str) -> str:
        return f"{tables[kind][OURS]['select'][1].median:.2f}"

    return (
        f"A request that touches no database takes about {more(FLASK)} microseconds more on Flask "
        f"and {more(ASYNC)} on FastAPI, whatever your application does.\n"
        f"A request with one short SELECT takes {times(FLASK)} times as long as with a session "
        f"opened and closed by hand on Flask, {times(ASYNC)} times with an AsyncSession, and "
        f"{times(SYNC)} times with a sync handler on FastAPI; the more your queries take, the "
        f"nearer this is to 1.\n"
    )


def _table(heads: list[str], lines: list[list[str]]) -> str:
    made = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in made)


if __name__ == "__main__":
    sys.exit(main())
