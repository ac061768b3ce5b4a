"""T3: work of every sort is under way when its sandbox ends, and nothing is left of it."""

from __future__ import annotations

import asyncio
import contextvars
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from rope_middleware import RopeError, open_scope
from rope_middleware.testing import Sandbox
from tests.kit.sandboxes import COUNT, Place, Row, open_place
from tests.kit.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.told]  # what is lost at random is told

EXPECTED = (RopeError, DBAPIError, asyncio.CancelledError)


class Chance:
    """What one piece of work does, at random, by either kind of session."""

    def __init__(self, jenny: Any, seed: float, *, is_async: bool) -> None:
        self.jenny = jenny
        self.is_async = is_async
        self.random = random.Random(seed)

    async def _do(self, name: str, *args: Any) -> None:
        found = getattr(self.jenny.session, name)(*args)
        if self.is_async:
            await found

    async def work(self) -> None:
        for _ in range(self.random.randint(1, 6)):
            await self.random.choice([self._read, self._write, self._end, self._fail, self._set])()

    async def _read(self) -> None:
        await self._do("scalar", COUNT)

    async def _write(self) -> None:
        self.jenny.session.add(Row(n=self.random.randint(1, 10**9)))
        await self._do("flush")

    async def _end(self) -> None:
        await self._do(self.random.choice(["commit", "rollback"]))

    async def _fail(self) -> None:
        try:
            await self._do("execute", text("SELECT 1/0"))
        except DBAPIError:
            await self._do("rollback")

    async def _set(self) -> None:
        await self._do("execute", text("SET LOCAL application_name = 'x'"))


def run_sync(chance: Chance) -> None:
    """Run sync work in this thread: nothing of it suspends."""
    with open_scope():
        try:
            chance.work().send(None)
        except StopIteration:
            pass


def run_async(chances: list[Chance]) -> None:
    """Run async work in tasks of a loop of their own; the first one is cancelled at some time."""

    async def in_scope(chance: Chance) -> None:
        async with open_scope():
            await chance.work()

    async def all_of_them() -> None:
        tasks = [asyncio.create_task(in_scope(chance)) for chance in chances]
        await asyncio.sleep(chances[0].random.random() / 100)
        tasks[0].cancel()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert error is None or isinstance(error, EXPECTED), error

    asyncio.run(all_of_them())


def one_test(place: Place, number: int, errors: list[BaseException]) -> None:
    """A test that ends at some time, while others work in its sandbox."""

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except EXPECTED:
            pass
        except BaseException as error:
            errors.append(error)

    works: list[Callable[[], None]] = [
        partial(run_async, [Chance(place.ajenny, number + n / 9, is_async=True) for n in range(3)]),
        *(partial(run_sync, Chance(place.jenny, number + n / 7, is_async=False)) for n in range(2)),
    ]
    threads: list[threading.Thread] = []
    with Sandbox(place.jenny, place.ajenny, name=f"test {number}", wait=1.0):
        for work in works:
            context = contextvars.copy_context()
            threads.append(threading.Thread(target=context.run, args=(guarded, work)))
            threads[-1].start()
        time.sleep(random.Random(number).choice([0, 0.005, 0.02]))
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_T3_nothing_is_left_of_what_was_under_way(tmp_path: Path) -> None:
    """No row, no open transaction, no error but those that say so."""
    errors: list[BaseException] = []
    with open_place("postgresql", tmp_path) as place:

        def open_transactions() -> list[Any]:
            with place.engine.connect() as connection:
                return list(
                    connection.exec_driver_sql(
                        "SELECT pid, state, query FROM pg_stat_activity WHERE datname ="
                        " current_database() AND state <> 'idle' AND pid <> pg_backend_pid()"
                    )
                )

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda number: one_test(place, number, errors), range(120)))
        assert not errors
        assert place.rows() == 0
        eventually(lambda: not open_transactions(), lambda: str(open_transactions()))
