"""Compare every contestant, check the promises, and write docs/benchmarks.

python -m benchmarks                  everything; about a quarter of an hour
python -m benchmarks --short          a look: few rounds, SQLite only, no servers, no promises
python -m benchmarks --setting Flask  one setting; nothing is written
python -m benchmarks --report         write the page and the plots again from the JSON
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import check, database, report
from benchmarks.compare import Row, compare
from benchmarks.contestants import ASGI_ASYNC, SETTINGS, WSGI, Contestant, find
from benchmarks.measure import Spread, surroundings
from benchmarks.resolve import Found, resolve
from benchmarks.sockets import Served, serve

DOCS = Path(__file__).parents[1] / "docs"
JSON = DOCS / "benchmarks" / "results.json"


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="a look; nothing is written")
    parser.add_argument("--setting", choices=SETTINGS, help="one setting; nothing is written")
    parser.add_argument("--rounds", type=int, help="of every contestant; 61, or 15 with --short")
    parser.add_argument("--report", action="store_true", help="write it again from the JSON")
    options = parser.parse_args()
    if options.report:
        _write(json.loads(JSON.read_text()))
        return 0

    brief = options.short or options.setting
    rounds = options.rounds or (15 if options.short else 61)
    contestants = list(find())
    settings = [options.setting] if options.setting else list(SETTINGS)
    chosen = [
        one for one in contestants if not isinstance(one, Contestant) or one.setting in settings
    ]
    packages = {
        name: None for one in chosen if isinstance(one, Contestant) for name in one.packages
    }
    data: dict[str, Any] = {
        "where": surroundings(["psycopg", "asyncpg", "uvicorn", "gunicorn", *packages]),
        "rows": [], "found": [], "served": [], "results": [], "notes": [],
    }  # fmt: skip
    with ExitStack() as stack:
        where = [stack.enter_context(database.sqlite())]
        if not options.short:
            try:
                where.append(stack.enter_context(database.postgresql()))
            except (ImportError, RuntimeError) as error:
                data["notes"].append(f"PostgreSQL is not measured: {error}\n")
        for one in where:
            for row in compare(chosen, one, rounds):
                data["rows"].append(row.as_json())
                _say_row(row)
        if not brief:
            for found in resolve(rounds):
                data["found"].append(found.as_json())
                print(f"{found.title}, depth {found.depth}, first {found.first}: "
                      f"{found.microseconds.median:.2f} us", flush=True)  # fmt: skip
            try:
                for served in serve(contestants, where[0], (WSGI, ASGI_ASYNC)):
                    data["served"].append(served.as_json())
                    print(served, flush=True)
            except RuntimeError as error:
                data["notes"].append(f"Servers with sockets are not measured: {error}\n")
    if not brief:
        for result in check.Check(check.FULL).all():
            data["results"].append(asdict(result))
            print(result, flush=True)
        JSON.parent.mkdir(parents=True, exist_ok=True)
        JSON.write_text(json.dumps(data, indent=1) + "\n")
        _write(data)
    return 0


def _say_row(row: Row) -> None:
    taken = row.error
    if row.microseconds and row.ratio:
        taken = (
            f"{row.microseconds.median:9.1f} us {row.ratio.median:7.2f} "
            f"[{row.ratio.low:.2f} .. {row.ratio.high:.2f}]"
        )
    print(f"{row.database:<10} {row.setting:<30} {row.path:<7} {row.title:<38} {taken}", flush=True)


def _write(data: dict[str, Any]) -> None:
    """Write the page and the plots."""

    def spread(value: Any) -> Spread | None:
        return None if value is None else Spread(**value)

    rows = [
        Row(**one | {"microseconds": spread(one["microseconds"]), "ratio": spread(one["ratio"])})
        for one in data["rows"]
    ]
    found = [
        Found(**one | {"microseconds": Spread(**one["microseconds"]),
                       "ratio": Spread(**one["ratio"])})
        for one in data["found"]
    ]  # fmt: skip
    served = [Served(**one | {"per_second": spread(one["per_second"])}) for one in data["served"]]
    results = [check.Result(**one) for one in data["results"]]
    plots = report.write_plots(rows, JSON.parent)
    text = report.page(data["where"], rows, found, served, results, plots, data["notes"])
    (DOCS / "benchmarks.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
