"""The figures as a Markdown page and as SVG plots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.check import Result
from benchmarks.compare import Row
from benchmarks.contestants import PATHS, SETTINGS
from benchmarks.measure import Spread
from benchmarks.resolve import Found
from benchmarks.sockets import Served

WHAT = {
    "none": "no database touched",
    "touch": "session touched",
    "select": "one SELECT",
    "insert": "one INSERT with its commit",
}

_INTRODUCTION = """\
# What a request costs

What a way to have one session per request costs, next to the others; and whether the package
keeps what it promises on cost. Everything on this page but these lines is written by `make bench`.

## How it is measured

- Every *setting* is a framework and a kind of session. In each, one site is written *by hand*: its
  handlers open a session and close it (`with Session() as session:`). That is the practical limit.
  All others are compared with it, so that a figure is the cost of the way to the session and not
  of the framework.
- Contestants of a setting run in interleaved rounds: each round times one batch of requests of
  every contestant, in an order that changes. A *ratio* is a contestant's time to that of the one by
  hand in the same round. The tables give the median of the rounds and, in brackets, the quartiles.
- SQLite under WSGI is measured in CPU time of its one thread, all else by the clock on the wall.
- No socket: the application is called as a server would call it, on asyncio's own event loop. One
  round at the end goes over real servers.
- SQLite files do not wait for the disk (`synchronous = OFF`, write-ahead log). PostgreSQL is on the
  same machine, over a Unix socket.
- Some ways commit by themselves, or open a session whether it is used or not: that is theirs, and
  part of the figure. `select` leaves its transaction to be ended by them.
- pyperf is not used: it runs one benchmark after the other, each in its own processes, and a ratio
  of two of them holds the difference of two moments of the machine.
"""


def page(
    where: dict[str, Any],
    rows: Sequence[Row],
    found: Sequence[Found],
    served: Sequence[Served],
    results: Sequence[Result],
    plots: dict[tuple[str, str], str],
    notes: Iterable[str] = (),
) -> str:
    """Return the Markdown page."""
    parts = [_INTRODUCTION, "## Where\n", _where(where), *notes]
    if results:
        parts += ["## The promises\n", _promises(results)]
    for database in dict.fromkeys(row.database for row in rows):
        for setting in SETTINGS:
            group = [row for row in rows if (row.database, row.setting) == (database, setting)]
            if group:
                parts.append(f"## {setting}, {database}\n")
                plot = plots.get((database, setting))
                if plot:
                    alt = f"Time per request to that by hand: {setting}, {database}"
                    parts.append(f"![{alt}]({plot})\n")
                parts.append(_setting(group))
    absent = [row for row in rows if not row.setting]
    if absent:
        parts += ["## Not importable\n", _table(["module", "error"], _absent(absent))]
    if found:
        parts += ["## Finding the session\n", _FINDING, _finding(found)]
    if served:
        parts += ["## Over real servers\n", _OVER_SOCKETS, _sockets(served)]
    return "\n".join(parts)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    text = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    text += ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(text) + "\n"


def _where(where: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"- Machine: {where['machine']}",
        f"- {where['python']}, SQLite {where['sqlite']}; {versions}",
        f"- Garbage collector: {where['gc']}",
    ]
    return "\n".join(lines) + "\n"


def _promises(results: Sequence[Result]) -> str:
    return _table(
        ["", "what", "measured", "at most", "", "details"],
        [
            [
                one.promise,
                one.what,
                f"{one.measured:.2f}",
                f"{one.bound:.2f}" if one.bound < math.inf else "",
                "kept" if one.kept else "**broken**",
                " ".join(filter(None, [one.spread, one.note])),
            ]
            for one in results
        ],
    )


def _microseconds(taken: Spread) -> str:
    return f"{taken.median:,.{1 if taken.median < 10 else 0}f}"


def _cell(row: Row) -> str:
    if row.microseconds is None or row.ratio is None:
        return "error"
    taken = _microseconds(row.microseconds)
    spread = f"[{row.ratio.low:.2f} .. {row.ratio.high:.2f}]"
    return f"{taken} us, **{row.ratio.median:.2f}** {spread}"


def _setting(group: Sequence[Row]) -> str:
    titles = dict.fromkeys(row.title for row in group)
    cells = {(row.title, row.path): row for row in group}
    lines = [
        [title, *(_cell(cells[title, path]) for path in PATHS), cells[title, PATHS[0]].versions]
        for title in titles
    ]
    text = _table(["", *(WHAT[path] for path in PATHS), "versions"], lines)
    errors = dict.fromkeys((row.title, row.error) for row in group if row.error)
    return text + "".join(f"\n{title}: `{error}`\n" for title, error in errors)


def _absent(rows: Sequence[Row]) -> list[list[str]]:
    return [[row.title, f"`{row.error}`"] for row in rows]


_FINDING = """\
Microseconds for each use of the session in a stack of 1 and of 150 frames (besides those of the
command), and for a first use together with the removal: the session is made and closed then.
"""


def _finding(found: Sequence[Found]) -> str:
    titles = dict.fromkeys(one.title for one in found)
    columns = dict.fromkeys((one.depth, one.first) for one in found)
    cells = {(one.title, one.depth, one.first): one.microseconds.median for one in found}
    head = [
        f"{'first use' if first else 'each use'}, {depth} frame{'s' if depth > 1 else ''}"
        for depth, first in columns
    ]
    lines = [
        [title, *(f"{cells[title, depth, first]:.2f} us" for depth, first in columns)]
        for title in titles
    ]
    return _table(["", *head], lines)


_OVER_SOCKETS = """\
One `SELECT` per request; one server process (gunicorn with threads, uvicorn with asyncio and h11),
wrk with 4 connections on the same machine. Most of such a request is the server's.
"""


def _sockets(served: Sequence[Served]) -> str:
    return _table(
        ["setting", "", "server", "requests per second", "latency: mean, 99 %"],
        [
            [
                f"{one.setting}, {one.database}",
                one.title,
                one.server,
                f"{one.per_second.median:.0f} "
                f"[{one.per_second.low:.0f} .. {one.per_second.high:.0f}]"
                if one.per_second
                else f"`{one.error}`",
                one.latency,
            ]
            for one in served
        ],
    )


# -- plots -------------------------------------------------------------------------------------

_BAR, _GAP, _LEFT, _WIDTH, _RIGHT = 16, 6, 270, 480, 130
_STYLE = """\
text { font: 12px sans-serif; fill: #333 }
.head { font-weight: bold }
.grid { stroke: #ddd }
.one { stroke: #333; stroke-dasharray: 3 3 }
.bar { fill: #9db4c8 }
.ours { fill: #d9822b }
.hand { fill: #555 }
.spread { stroke: #000 }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .grid { stroke: #444 } .one { stroke: #ddd } .hand { fill: #bbb }
  .spread { stroke: #fff }
}
"""


def plot(title: str, rows: Sequence[Row]) -> str:
    """Return a plot of one setting: a bar per contestant and path, on a logarithmic scale."""
    drawn = [row for row in rows if row.ratio is not None]
    ratios = [row.ratio for row in drawn if row.ratio is not None]
    low = min(0.8, *(ratio.low for ratio in ratios))
    high = max(1.5, *(ratio.high for ratio in ratios))

    def x(value: float) -> float:
        part = math.log(max(value, low) / low) / math.log(high / low)
        return _LEFT + part * _WIDTH

    body: list[str] = []
    y = 44.0
    for path in PATHS:
        body.append(f'<text class="head" x="8" y="{y + 12:.0f}">{escape(WHAT[path])}</text>')
        y += _BAR + _GAP
        for row in drawn:
            if row.path != path or row.ratio is None or row.microseconds is None:
                continue
            body += _bar(row, row.ratio, row.microseconds, x, y)
            y += _BAR + _GAP
        y += _GAP
    grid = [
        f'<line class="{"one" if tick == 1 else "grid"}" x1="{x(tick):.1f}" x2="{x(tick):.1f}" '
        f'y1="34" y2="{y:.0f}"/>'
        f'<text x="{x(tick):.1f}" y="30" text-anchor="middle">{tick:g}</text>'
        for tick in _ticks(high / low)
        if low <= tick <= high
    ]
    width, height = _LEFT + _WIDTH + _RIGHT, y + 8
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" '
                f'width="{width}" height="{height:.0f}" role="img">'
            ),
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            f'<text class="head" x="8" y="14">{escape(title)}: time to that by hand</text>',
            *grid,
            *body,
            "</svg>\n",
        ]
    )


def _ticks(range_: float) -> tuple[float, ...]:
    if range_ > 12:  # there is no room for the small ones
        return (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    return (0.5, 0.6, 0.8, 1, 1.2, 1.5, 2, 3, 5, 7, 10)


def _bar(row: Row, ratio: Spread, taken: Spread, x: Any, y: float) -> list[str]:
    kind = "ours" if row.ours else "hand" if row.title == "by hand" else "bar"
    start, end = sorted((x(1.0), x(ratio.median)))
    middle = y + _BAR / 2
    return [
        f'<text x="{_LEFT - 8}" y="{y + 12:.0f}" text-anchor="end">{escape(row.title)}</text>',
        (
            f'<rect class="{kind}" x="{start:.1f}" y="{y:.0f}" width="{max(end - start, 1.5):.1f}" '
            f'height="{_BAR}"/>'
        ),
        (
            f'<line class="spread" x1="{x(ratio.low):.1f}" x2="{x(ratio.high):.1f}" '
            f'y1="{middle:.1f}" y2="{middle:.1f}"/>'
        ),
        (
            f'<text x="{max(x(ratio.high), end) + 5:.1f}" y="{y + 12:.0f}">{ratio.median:.2f} '
            f"({_microseconds(taken)} us)</text>"
        ),
    ]


def write_plots(rows: Sequence[Row], folder: Path) -> dict[tuple[str, str], str]:
    """Write a plot for each database and setting; return their names, relative to the page."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for database in dict.fromkeys(row.database for row in rows):
        for setting in SETTINGS:
            group = [row for row in rows if (row.database, row.setting) == (database, setting)]
            if any(row.ratio is not None for row in group):
                slug = f"{setting}-{database}".lower().replace(",", "").replace(" ", "-")
                (folder / f"{slug}.svg").write_text(plot(f"{setting}, {database}", group))
                names[database, setting] = f"{folder.name}/{slug}.svg"
    return names
