"""Measure everything and write docs/benchmarks.md: ``python -m benchmarks``, 15 minutes."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks import database
from benchmarks.check import FULL, Result, check, rows
from benchmarks.lanes import Effort, Side, race
from benchmarks.measure import Spread, Times, load, microseconds, ratio, surroundings
from benchmarks.sites import (
    ASYNC,
    COMMIT,
    FLASK,
    HAND,
    IS_WSGI,
    LEAST,
    OURS,
    OWN,
    SYNC,
    site,
)

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
FRAME = Path(__file__).parent / "page.md"
RUNS, EFFORT = 3, Effort(40, 0.005)
PATHS = {"none": "no database", "select": "one SELECT", "insert": "one INSERT, committed"}
DEPENDS = "FastAPI's dependency with yield"
DISTRIBUTIONS = ("Flask-SQLAlchemy", "advanced-alchemy", "fastapi-async-sqlalchemy")
KINDS = {
    FLASK: (HAND, OURS, COMMIT, "rope_middleware.flask", "scoped_session, removed at teardown",
            "Flask-SQLAlchemy"),
    SYNC: (HAND, OURS, COMMIT, DEPENDS, OWN, "advanced-alchemy"),
    ASYNC: (HAND, OURS, COMMIT, DEPENDS, OWN, "advanced-alchemy", "fastapi-async-sqlalchemy"),
}  # fmt: skip


def main() -> None:
    where = surroundings(["Flask", "FastAPI", *DISTRIBUTIONS])
    results: list[Result | str] = []
    for result in check(list(rows()), FULL):
        print(result, flush=True)
        results.append(result)
    PAGE.write_text(page(where, results, dict(peers())))


Table = dict[str, dict[str, tuple[float, Spread]]]


def peers() -> Iterator[tuple[str, Table]]:
    """Compare the ways to a session; yield, for each kind of app, its figures by way and path."""
    with ExitStack() as stack:
        where = stack.enter_context(database.postgresql())
        for kind, ways in KINDS.items():
            sides = [
                Side(site, {"kind": kind, "way": way, "paths": [*PATHS]},
                     kind not in IS_WSGI)
                for way in ways
            ]  # fmt: skip
            runs = [race(sides, where, EFFORT) for _ in range(RUNS)]
            table = {way: {path: _figure(runs, way, path) for path in PATHS} for way in ways}
            for way, figures in table.items():
                print(f"{kind:<24}{way:<38}", *map(_cell, figures.values()), flush=True)
            yield kind, table


def _figure(runs: list[Times], way: str, path: str) -> tuple[float, Spread]:
    """Return microseconds for a request, and the ratio to by hand."""
    lane, base = f"{way}: {path}", f"{HAND}: {path}"
    return microseconds(runs, lane), Spread.of([ratio(times, lane, base) for times in runs])


def _cell(figure: tuple[float, Spread]) -> str:
    return f"{figure[0]:,.0f} us, {figure[1]}"


def page(where: dict[str, str], results: list[Result | str], tables: dict[str, Table]) -> str:
    """Return the page."""
    parts = []
    for kind, table in tables.items():
        lines = [[way, *map(_cell, figures.values())] for way, figures in table.items()]
        parts += [f"## {kind}\n", "A request's time, and its ratio to that by hand. PostgreSQL.\n"]
        parts.append(_table(["", *PATHS.values()], lines))
    lines = [
        [one, "not measured", "", "", ""] if isinstance(one, str)
        else [one.row.title, str(one.spread), one.bound, one.verdict, one.note]
        for one in results
        if isinstance(one, str) or LEAST not in one.row.what
    ]  # fmt: skip
    return FRAME.read_text().format(
        summary=_summary(tables),
        surroundings="".join(f"- {name}: {value}\n" for name, value in where.items()),
        tables="\n".join(parts),
        promises=_table(["", "measured", "bound", "", "details"], lines),
        reach=_table(["", "aim", LEAST, "ours", "ours to that least", "the aim is"],
                     list(_reach([one for one in results if isinstance(one, Result)]))),
        load=f"Load at the end: {load()}",
    )  # fmt: skip


def _reach(results: list[Result]) -> Iterator[list[str]]:
    """Yield a line for each aim that is missed and that the least that knows was measured for."""
    for missed in results:
        if missed.verdict == "missed":
            same = [one for one in results if one.row.sides == missed.row.sides
                    and one.row.where == missed.row.where and LEAST in one.row.what]  # fmt: skip
            for ours, least in zip(same[::2], same[1::2], strict=True):
                spreads = (str(one.spread) for one in (least, missed, ours))
                yield [missed.row.title, f"{missed.row.bound:.2f}", *spreads,
                       reach(least.spread, missed.row.bound)]  # fmt: skip


def reach(least: Spread, aim: float) -> str:
    """Tell whether an aim is in reach of what has to be done at least."""
    if round(least.median, 2) <= aim:
        return "in reach"
    return "out of reach" if least.median - least.error > aim else "unclear"


def _summary(tables: dict[str, Table]) -> str:
    """Return what a reader should take away."""
    flask, sync, coroutines = ([table[way] for way in (HAND, OURS)] for table in tables.values())
    more = [f"{ours['none'][0] - hand['none'][0]:.0f}" for hand, ours in (flask, coroutines)]
    times = [f"{ours['select'][1].median:.2f}" for _, ours in (flask, coroutines, sync)]
    return (
        f"A request that touches no database takes about {more[0]} microseconds more on Flask and "
        f"{more[1]} on FastAPI.\nOne with a single short SELECT takes {times[0]} times as long as "
        f"with a session opened and closed by hand on Flask, {times[1]} times on FastAPI with an "
        f"AsyncSession, and {times[2]} times with a sync handler; the longer your queries take, "
        f"the nearer this comes to 1.\n"
    )


def _table(heads: list[str], lines: list[list[str]]) -> str:
    made = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in made)


if __name__ == "__main__":
    main()
