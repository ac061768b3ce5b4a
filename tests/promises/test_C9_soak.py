"""C8, C9: a short run of `tests.soak.truth`."""

from __future__ import annotations

import asyncio
import random

from tests.servers.postgres import postgres_server
from tests.soak.truth import run


def test_C9_the_answer_is_the_truth_wherever_the_line_breaks() -> None:
    """A success has its row, an error has none, no row is there twice."""
    seed = random.SystemRandom().randrange(10**6)
    with postgres_server().new_database() as database:
        outcome = asyncio.run(run(database, 400, seed))
    assert not outcome.wrong, f"--seed {seed}: {outcome.wrong[:5]}"
    assert sum(outcome.cuts.values()) > 20
