"""Try every way and print the table that README shows: `make peers`, or `python -m tests.peers`."""

from __future__ import annotations

import gc
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor

from tests.peers.sites import WAYS
from tests.peers.trials import TRIALS, try_out


def main() -> None:
    # What fails, fails on purpose.
    logging.disable()
    warnings.simplefilter("ignore")
    # It would find some of the connections that are left behind, sooner or later.
    gc.disable()
    print("| |", " | ".join(TRIALS), "|")
    print("|---" * (len(TRIALS) + 1) + "|")
    builders = [(way, build) for way, several in WAYS.items() for build in several]
    told: set[str] = set()
    with ThreadPoolExecutor(4) as pool:
        for (way, _), cells in zip(
            builders, pool.map(lambda one: try_out(one[1]), builders), strict=True
        ):
            row = " | ".join((f"| {way}", *cells)) + " |"
            if row not in told:  # built more than once, and the same each time: one row
                print(row, flush=True)
            told.add(row)


if __name__ == "__main__":
    main()
