"""Where does the time of one request go? Counts, not seconds: they repeat exactly.

    python -m tests.profile wsgi-select
    python -m tests.profile threads-commit

Each line is a function: how often one request calls it (or goes on with it, for a coroutine), and
how many of Python's instructions it runs itself, next to the same request by hand.
"""

import argparse
import sys
import threading
from collections import Counter
from contextlib import AsyncExitStack
from types import FrameType
from typing import Any

from benchmarks import database
from benchmarks.lanes import Side, build, run
from benchmarks.sites import COMMIT, COROUTINES, FLASK, HAND, IS_WSGI, OURS, THREADS, WSGI, site

KINDS = {"wsgi": WSGI, "threads": THREADS, "async": COROUTINES, "flask": FLASK}
WAYS = {"none": (HAND, OURS), "select": (HAND, OURS), "closed": (HAND, OURS),
        "commit": ("Session.begin()", COMMIT)}  # fmt: skip
REQUESTS = 50
WHAT = ("instructions", "calls")
FORMAT = "{:>12.1f}{:>9.1f}{:>8.1f}{:>9.1f}  {}"


def count(side: Side, where: database.Database) -> Counter[tuple[str, str]]:
    """Return calls and Python's instructions of so many requests, by function."""
    counted: Counter[tuple[str, str]] = Counter()
    counting = False

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not counting:
            return None
        code = frame.f_code
        file = "/".join(code.co_filename.rsplit("/", 2)[1:])
        name = f"{file}:{code.co_firstlineno} {code.co_qualname}"
        counted[name, "calls"] += 1
        frame.f_trace_lines, frame.f_trace_opcodes = False, True

        def local(frame: FrameType, event: str, arg: Any) -> Any:
            counted[name, "instructions"] += event == "opcode"
            return local

        return local

    async def main() -> None:
        nonlocal counting
        async with AsyncExitStack() as stack:
            (lane,) = (await build(side, where, stack)).values()
            await lane(20)
            counting = True
            await lane(REQUESTS)
            counting = False

    threading.settrace(trace)
    sys.settrace(trace)
    run(side, main())
    sys.settrace(None)
    return counted


def main() -> None:
    """Count by hand and with the middleware, and print what differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=[f"{kind}-{way}" for kind in KINDS for way in WAYS])
    name, path = parser.parse_args().name.split("-")
    kind, paths = KINDS[name], ["select" if path == "commit" else path]
    with database.sqlite() as where:
        hand, ours = (
            count(Side(site, {"kind": kind, "way": way, "paths": paths},
                       kind not in IS_WSGI), where)
            for way in WAYS[path]
        )  # fmt: skip
    lines = {
        name: [one[name, what] / REQUESTS for what in WHAT for one in (ours, hand)]
        for name, _ in hand | ours
    }
    print(f"{'instructions':>12}{'by hand':>9}{'calls':>8}{'by hand':>9}")
    for name, line in sorted(lines.items(), key=lambda item: item[1][1] - item[1][0]):
        if line[0] != line[1] or line[2] != line[3]:
            print(FORMAT.format(*line, name))
    print(FORMAT.format(*map(sum, zip(*lines.values(), strict=True)), "in all"))


if __name__ == "__main__":
    main()
