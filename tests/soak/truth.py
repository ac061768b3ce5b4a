"""Is the answer the truth, wherever the line to PostgreSQL breaks? Exits with 1 where it is not.

    python -m tests.soak.truth                      20,000 requests
    python -m tests.soak.truth --requests 400       a short one
    python -m tests.soak.truth --seed 7             the same cuts again

Each request writes one row. Every connection goes over a wire that is cut somewhere: at any byte,
between any two messages, before, in and after a COMMIT, in either direction. Four services take
turns: AsyncSession on asyncpg and on psycopg, Session in threads under ASGI, Session under WSGI.
After them nobody has read a success whose row is not there, nor an error whose row is (but by
`CommitInDoubtError`); no row is there twice; no connection is out.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

from sqlalchemy import text
from sqlalchemy.orm import Session

from rope_middleware import CommitInDoubtError, current_scope
from tests.kit.shop import SHOPS, Shop
from tests.servers.postgres import Database, postgres_server
from tests.servers.wire import RandomCuts, Wire, socket_of

ASKERS = 4  # at a time, of each service
RETRIES = 5
REFUSED = 0.1  # share of the requests that answer 409 after they have written

INSERT = text("INSERT INTO written (n) VALUES (:n)")


@dataclass
class Outcome:
    """What came of a run."""

    answers: dict[int, int] = field(default_factory=dict)
    doubts: set[int] = field(default_factory=set)
    errors: dict[int, str] = field(default_factory=dict)
    cuts: Counter[str] = field(default_factory=Counter)
    held: int = 0
    wrong: list[str] = field(default_factory=list)

    def told(self) -> str:
        """Return the figures in a few lines."""
        statuses = Counter(self.answers.values())
        cuts = ", ".join(f"{kind} {number}" for kind, number in sorted(self.cuts.items()))
        return (
            f"{len(self.answers)} requests: "
            + ", ".join(f"{status}: {number}" for status, number in sorted(statuses.items()))
            + f"; in doubt {len(self.doubts)}; connections out {self.held}\n"
            f"{sum(self.cuts.values())} cuts: {cuts}\n"
            f"wrong: {len(self.wrong)}"
        )


def write(session: Session, n: int) -> int:
    """Do what a request does."""
    if n % 3 == 0:
        session.execute(text("SELECT count(*) FROM written WHERE n = :n"), {"n": n})
    session.execute(INSERT, {"n": n})
    return 409 if random.Random(n).random() < REFUSED else 201


async def run(database: Database, requests: int, seed: int) -> Outcome:
    """Send the requests; look at what is there."""
    database.query("CREATE TABLE written (id serial PRIMARY KEY, n int NOT NULL)")
    outcome, numbers = Outcome(), count(1)

    def note(error: BaseException) -> None:
        n = int(current_scope().name.rpartition("/")[2])
        outcome.errors[n] = repr(error)
        if isinstance(error, CommitInDoubtError):
            outcome.doubts.add(n)

    async def ask(shop: Shop) -> None:
        while (n := next(numbers)) <= requests:
            outcome.answers[n] = (await shop.ask(n)).status

    async def serve(kind: str, number: int) -> None:
        with Wire(socket_of(database), RandomCuts(seed + number)) as wire:
            shop = Shop(
                kind,
                wire.url(database, SHOPS[kind]),
                write,
                commit_on_success=True,
                on_commit_error=note,
                retries=RETRIES,
            )
            await asyncio.gather(*(ask(shop) for _ in range(ASKERS)))
            outcome.held += shop.held()
            await shop.close()
            outcome.cuts += wire.cuts

    await asyncio.gather(*(serve(kind, number) for number, kind in enumerate(SHOPS)))
    rows = dict(database.query("SELECT n, count(*) FROM written GROUP BY n"))
    outcome.wrong = _wrong(outcome, rows)
    return outcome


def _wrong(outcome: Outcome, rows: dict[int, int]) -> list[str]:
    wrong = [f"{outcome.held} connections are out"] if outcome.held else []
    for n, status in outcome.answers.items():
        found = rows.get(n, 0)
        if status < 400 and not found:
            wrong.append(f"request {n}: {status}, and no row")
        elif status >= 400 and found and n not in outcome.doubts:
            wrong.append(f"request {n}: {status}, and a row; {outcome.errors.get(n)}")
        if found > 1:
            wrong.append(f"request {n}: {found} rows")
    return wrong


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    told = parser.parse_args()
    logging.getLogger("rope_middleware").addHandler(logging.NullHandler())
    logging.getLogger("sqlalchemy.pool").addHandler(logging.NullHandler())
    print(f"--requests {told.requests} --seed {told.seed}", flush=True)
    began = time.monotonic()
    with postgres_server().new_database() as database:
        outcome = asyncio.run(run(database, told.requests, told.seed))
    print(f"{outcome.told()}\n{time.monotonic() - began:.0f} s")
    for line in outcome.wrong[:20]:
        print(line)
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
