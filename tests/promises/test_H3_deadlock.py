"""H3: a deadlock on the pool is told at once, and a false one never."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool, QueuePool, StaticPool

from rope_middleware import (
    AsyncSessionJenny,
    PoolDeadlockError,
    RopeMiddleware,
    SessionJenny,
    holders,
    open_scope,
)
from rope_middleware.session.pools import limit_of
from tests.kit.asgi import http_scope, into_nothing
from tests.kit.engines import small_async_engine
from tests.kit.said import Said
from tests.kit.sessions import SELECT, run_threads, touch
from tests.kit.waiting import eventually, never, poll

pytestmark = pytest.mark.anyio

SOON = 5.0
"""Seconds within which a deadlock must be told here; its wait would last 60."""


def pool(path: Path, size: int, **options: Any) -> Any:
    told: dict[str, Any] = {"pool_size": size, "max_overflow": 0, "pool_timeout": 60} | options
    return create_engine(
        f"sqlite:///{path}/pool.sqlite",
        poolclass=QueuePool,
        connect_args={"check_same_thread": False},
        **told,
    )


def occupy(jenny: Any) -> None:
    """Hold a connection that does not give way to an inner scope: `begin()` was called."""
    jenny.session.begin()
    jenny.session.execute(SELECT)


@pytest.fixture
def make_pool(tmp_path: Path) -> Iterator[Any]:
    made: list[Any] = []

    def make(size: int, **options: Any) -> Any:
        made.append(pool(tmp_path, size, **options))
        return made[-1]

    yield make
    for engine in made:
        assert engine.pool.checkedout() == 0
        engine.dispose()


@pytest.mark.parametrize(("size", "overflow"), [(3, 0), (1, 2), (2, 1), (1, 0)])
def test_H3_whoever_closes_the_circle_is_told_at_once(
    make_pool: Any, size: int, overflow: int
) -> None:
    """As many requests as connections, each with an inner scope: one fails, all others go on."""
    jenny = SessionJenny(sessionmaker(make_pool(size, max_overflow=overflow)))
    together = threading.Barrier(size + overflow)
    failed: list[PoolDeadlockError] = []

    def request(number: int) -> None:
        try:
            with open_scope(f"request {number}"):
                occupy(jenny)
                together.wait(60)
                with open_scope("audit"):
                    touch(jenny)
        except PoolDeadlockError as error:
            failed.append(error)

    before = time.monotonic()
    run_threads([lambda n=n: request(n) for n in range(size + overflow)])  # type: ignore[misc]
    assert time.monotonic() - before < SOON
    (error,) = failed
    assert isinstance(error, PoolTimeout)
    for number in range(size + overflow):
        assert f"request {number} " in str(error)
    assert "test_H3_deadlock.py:" in str(error)
    assert holders() == ()


async def test_H3_tasks_are_told_as_threads_are(tmp_path: Path) -> None:
    """The twin for AsyncSessions."""
    engine = small_async_engine(tmp_path / "a.sqlite", pool_size=3, pool_timeout=60)
    jenny = AsyncSessionJenny(async_sessionmaker(engine))
    begun = 0

    async def request() -> None:
        nonlocal begun
        async with open_scope():
            await jenny.session.begin()
            await jenny.session.execute(SELECT)
            begun += 1
            await poll(lambda: begun == 3)
            async with open_scope("audit"):
                await jenny.session.execute(SELECT)

    async with asyncio.timeout(SOON):
        done = await asyncio.gather(*(request() for _ in range(3)), return_exceptions=True)
    assert [type(one) for one in done if one is not None] == [PoolDeadlockError]
    await engine.dispose()


def test_H3_a_ring_of_two_pools(make_pool: Any) -> None:
    """One holds the first and waits for the second, the other the other way round."""
    one, two = (SessionJenny(sessionmaker(make_pool(1))) for _ in range(2))
    together = threading.Barrier(2)
    failed: list[PoolDeadlockError] = []

    def request(first: Any, second: Any) -> None:
        try:
            with open_scope():
                touch(first)
                together.wait(60)
                touch(second)
        except PoolDeadlockError as error:
            failed.append(error)

    before = time.monotonic()
    run_threads([lambda: request(one, two), lambda: request(two, one)])
    assert time.monotonic() - before < SOON
    assert len(failed) == 1


async def test_H3_requests_with_handlers_in_threads(make_pool: Any) -> None:
    """ASGI requests whose sync handlers run in worker threads."""
    jenny = SessionJenny(sessionmaker(make_pool(3)))
    together = threading.Barrier(3)
    failed: list[PoolDeadlockError] = []

    def handler() -> None:
        occupy(jenny)
        together.wait(60)
        with open_scope("audit"):
            touch(jenny)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await anyio.to_thread.run_sync(handler)
        except PoolDeadlockError as error:
            failed.append(error)

    served = RopeMiddleware(app)
    async with asyncio.timeout(SOON):
        await asyncio.gather(*(served(http_scope(), never, into_nothing) for _ in range(3)))
    assert len(failed) == 1


def test_H3_one_thread_alone_can_stand_in_its_own_way(make_pool: Any) -> None:
    """By ropes and scopes, in any mixture."""
    engine = make_pool(1)
    jenny, other = SessionJenny(sessionmaker(engine)), SessionJenny(sessionmaker(engine))

    def by_rope() -> None:
        jenny.session.begin()
        jenny.session.execute(SELECT)
        with open_scope(), pytest.raises(PoolDeadlockError):
            other.session.execute(SELECT)

    by_rope()
    with open_scope():
        touch(jenny)
        with pytest.raises(PoolDeadlockError, match="waits for another one"):
            touch(other)
    with open_scope():
        touch(jenny)
        jenny.session.commit()
        with open_scope():
            touch(other)  # commit() gives back: no deadlock any more


# -- never a false one -----------------------------------------------------------------------------


def waits_out(jenny: Any) -> None:
    """Check that one who waits for a connection gets a plain time-out, or none."""
    with open_scope("waits"), pytest.raises(PoolTimeout) as raised:
        touch(jenny)
    assert not isinstance(raised.value, PoolDeadlockError)


@pytest.mark.told
def test_H3_somebody_elses_connection_makes_it_unknown(make_pool: Any, said: Said) -> None:
    """A connection that no jenny's session holds may come back at any time."""
    engine = make_pool(2, pool_timeout=0.05)
    jenny = SessionJenny(sessionmaker(engine))
    with engine.connect(), open_scope():
        occupy(jenny)
        waits_out(jenny)
    with Session(engine) as by_hand, open_scope():
        by_hand.execute(SELECT)
        occupy(jenny)
        waits_out(jenny)
    assert said.warnings


@pytest.mark.told
def test_H3_whoever_works_will_give_back(make_pool: Any) -> None:
    """Another request holds a connection and does not wait for one: the others wait for it."""
    engine = make_pool(2, pool_timeout=0.05)
    jenny = SessionJenny(sessionmaker(engine))
    begun, leave = threading.Event(), threading.Event()

    def works() -> None:
        with open_scope():
            touch(jenny)
            begun.set()
            assert leave.wait(60)

    def waits() -> None:
        assert begun.wait(60)
        with open_scope():
            occupy(jenny)
            waits_out(jenny)
        leave.set()

    run_threads([works, waits])


@pytest.mark.told
def test_H3_a_thread_that_has_gone_on_to_another_request_is_no_holder(make_pool: Any) -> None:
    """A pool's thread begins for one request and then waits for another one: unknown."""
    engine = make_pool(1, pool_timeout=0.05)
    jenny = SessionJenny(sessionmaker(engine))

    def body() -> None:
        with open_scope("first") as first:
            jenny.session.execute(SELECT)
            assert not first.closed
            waits_in_another_context()

    def waits_in_another_context() -> None:
        import contextvars

        contextvars.Context().run(waits_out, jenny)

    run_threads([body])


@pytest.mark.told
async def test_H3_a_task_that_only_waits_for_others_is_unknown(tmp_path: Path) -> None:
    """It holds, and its children wait; it might commit at any time, so nothing is claimed."""
    engine = small_async_engine(tmp_path / "a.sqlite", pool_size=1, pool_timeout=0.1)
    jenny = AsyncSessionJenny(async_sessionmaker(engine))

    async def child() -> None:
        async with open_scope():
            await jenny.session.execute(SELECT)

    async with open_scope():
        await jenny.session.begin()
        await jenny.session.execute(SELECT)
        task = asyncio.create_task(child())
        with pytest.raises(PoolTimeout) as raised:
            await task
        assert not isinstance(raised.value, PoolDeadlockError)
        waiting = asyncio.create_task(child())
        await asyncio.sleep(0)
        await jenny.session.commit()
        await waiting
    await engine.dispose()


def test_H3_connections_of_a_disposed_pool_do_not_count(make_pool: Any) -> None:
    """After Engine.dispose() those that are out belong to the former pool."""
    engine = make_pool(1)
    jenny = SessionJenny(sessionmaker(engine))
    with open_scope():
        occupy(jenny)
        engine.dispose()
        with open_scope():
            occupy(jenny)  # the new pool has one
            with open_scope(), pytest.raises(PoolDeadlockError):
                touch(jenny)


@pytest.mark.parametrize("size", [2, 5])
def test_H3_at_saturation_nobody_is_told_of_a_deadlock(make_pool: Any, size: int) -> None:
    """Ten threads at a small pool, some with inner scopes that give back first: none is raised."""
    jenny = SessionJenny(sessionmaker(make_pool(size)))

    def works() -> None:
        for number in range(300):
            with open_scope():
                touch(jenny)
                if number % 3 == 0:
                    jenny.session.commit()
                    with open_scope():
                        touch(jenny)

    run_threads([works] * 10)


def test_H3_how_large_a_pool_is(make_pool: Any) -> None:
    """What a pool was made with is learnt from its own recreate(), on each SQLAlchemy."""
    assert limit_of(make_pool(3, max_overflow=4).pool) == 7
    assert limit_of(make_pool(1, max_overflow=0).pool) == 1
    assert limit_of(make_pool(3, max_overflow=-1).pool) is None
    assert limit_of(make_pool(0, max_overflow=4).pool) is None
    assert limit_of(create_engine("sqlite://", poolclass=StaticPool).pool) is None
    assert limit_of(create_engine("sqlite://", poolclass=NullPool).pool) is None
    asynchronous = small_async_engine(Path("nowhere"), pool_size=2, max_overflow=3)
    assert limit_of(asynchronous.pool) == 5

    class Own(QueuePool):
        def recreate(self) -> Any:
            raise NotImplementedError

    assert limit_of(Own(lambda: None, pool_size=2)) is None  # type: ignore[arg-type, return-value]


def test_H3_the_pool_is_asked_without_a_word_in_its_log(
    make_pool: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is recreated, and nothing says so."""
    caplog.set_level("INFO", "sqlalchemy.pool")
    limit_of(make_pool(3).pool)
    assert "recreating" not in caplog.text


def test_H3_nothing_is_left_behind_by_who_waited(make_pool: Any) -> None:
    """Marks go with the wait, whatever its end."""
    from rope_middleware.session.door import marks

    jenny = SessionJenny(sessionmaker(make_pool(1)))
    with open_scope():
        occupy(jenny)
        with open_scope(), pytest.raises(PoolDeadlockError):
            touch(jenny)
    eventually(lambda: not marks, lambda: f"no marks: {marks}")
