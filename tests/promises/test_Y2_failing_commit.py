"""Y2, C3: cancellation at every turn of the loop while a commit fails."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.util import await_only

from rope_middleware import ASGIRopeMiddleware, open_scope
from tests.kit.asgi import answer, http_scope
from tests.kit.waiting import PATIENCE, never, turns
from tests.kit.web import Web

Kinds = pytest.mark.parametrize("web", ["asgi-async", "asgi-sync"], indirect=True)
# aiosqlite leaves the connection of a cancelled connect to its finaliser; Python 3.13 warns of it.
Left = pytest.mark.filterwarnings("ignore:unclosed database in <sqlite3.Connection:ResourceWarning")
Cancelled = pytest.mark.parametrize(
    "web", [pytest.param("asgi-async", marks=Left), "asgi-sync"], indirect=True
)
Commits = pytest.mark.parametrize("earlier", [False, True], ids=["first commit", "second commit"])


class Limited:
    """One request with a time limit of so many turns, and what its client saw."""

    def __init__(self, web: Web, turns: int, *, earlier: bool, n: int) -> None:
        self.web, self.turns, self.earlier, self.n = web, turns, earlier, n
        self.statuses: list[int] = []

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        store = self.web.store
        if self.earlier:
            await store.add(self.n)
            await store.commit()
        await store.add_orphan(self.n)
        await answer(send)

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.statuses.append(message["status"])

    async def run(self) -> BaseException | None:
        """Cancel the request after its turns, as a time limit does; return what came out."""
        served: Any = ASGIRopeMiddleware(self.app, commit_on_success=True)
        task = asyncio.create_task(served(http_scope(), never, self.send))
        for _ in range(self.turns):
            await asyncio.sleep(0)
        task.cancel()
        (found,) = await asyncio.gather(task, return_exceptions=True)
        return found  # type: ignore[no-any-return]


@Cancelled
@Commits
@pytest.mark.slow
def test_Y2_C3_no_success_whenever_a_request_is_cancelled_whose_commit_fails(
    web: Web, earlier: bool
) -> None:
    """The client never sees a status under 400; no connection is out, and no orphan is there."""

    async def main() -> None:
        over = 0
        for n, number in enumerate(turns(), 1):
            request = Limited(web, number, earlier=earlier, n=n)
            error = await asyncio.wait_for(request.run(), PATIENCE)
            gc.collect()  # aiosqlite may keep the lock of a query that was cancelled until then
            assert not [status for status in request.statuses if status < 400], number
            assert web.store.held() == 0, number
            over += isinstance(error, IntegrityError) or request.statuses == [500]
            if over == 3:
                return
        raise AssertionError("the request does not end")

    web.loop.run(main())
    assert web.store.orphans() == 0


@Cancelled
@pytest.mark.slow
def test_Y2_C3_the_same_at_the_end_of_open_scope(web: Web) -> None:
    """What comes out is the cancellation or the commit's own error, never nothing."""

    async def work(n: int) -> None:
        async with open_scope(commit_on_success=True):
            await web.store.add_orphan(n)

    async def main() -> None:
        over = 0
        for n, number in enumerate(turns(), 1):
            task = asyncio.create_task(work(n))
            for _ in range(number):
                await asyncio.sleep(0)
            task.cancel()
            (error,) = await asyncio.gather(task, return_exceptions=True)
            gc.collect()
            assert isinstance(error, (asyncio.CancelledError, IntegrityError)), (number, error)
            assert web.store.held() == 0, number
            over += isinstance(error, IntegrityError)
            if over == 3:
                return
        raise AssertionError("the block does not end")

    web.loop.run(main())
    assert web.store.orphans() == 0


@Kinds
@Commits
def test_C3_a_time_limit_around_a_commit_that_fails_slowly_gives_no_success(
    web: Web, earlier: bool
) -> None:
    """The limit is up while the commit is at work, which then fails."""

    up: list[Callable[[], object]] = []

    def slow(connection: Any) -> None:
        up[0]()
        if web.store.is_async:
            await_only(asyncio.sleep(0.2))
        else:
            time.sleep(0.2)

    statuses: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if earlier:
            await web.store.add(1)
            await web.store.commit()
        await web.store.add_orphan(1)
        event.listen(web.store.engine, "commit", slow)
        await answer(send)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def main() -> None:
        served: Any = ASGIRopeMiddleware(app, commit_on_success=True)
        try:
            async with asyncio.timeout(PATIENCE) as limit:
                loop = asyncio.get_running_loop()
                up.append(lambda: loop.call_soon_threadsafe(limit.reschedule, 0))
                await served(http_scope(), never, send)
        except TimeoutError:
            statuses.append(504)
        except IntegrityError:
            statuses.append(500)

    web.loop.run(main())
    assert not [status for status in statuses if status < 400]
    assert web.store.orphans() == 0
