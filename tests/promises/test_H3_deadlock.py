"""H3: a deadlock on the pool is told at once, and a false one never."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
from rope_middleware.session.holding.door import door_of
from rope_middleware.session.holding.pools import limit_of
from tests.kit.asgi import http_scope, into_nothing
from tests.kit.engines import small_async_engine
from tests.kit.programs import run_python
from tests.kit.said import Said
from tests.kit.sessions import SELECT, run_threads, touch
from tests.kit.waiting import eventually, never
from tests.kit.wsgi import make_environ

pytestmark = pytest.mark.anyio

AT_ONCE = 0.1
"""Seconds within which a deadlock is told, from the call that closes the circle to its error."""


class Closing:
    """What was told to those who have closed a circle, and how soon."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.texts: list[str] = []

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Wait for a connection here; a deadlock ends this block, not what stands around it."""
        before = time.monotonic()
        try:
            yield
        except PoolDeadlockError as error:
            self.seconds.append(time.monotonic() - before)
            self.texts.append(str(error))  # not the error: its frames have ropes
            error.__traceback__ = None  # from 3.12 on contextlib's own frame and it keep each other

    def told_one_each(self, runs: int) -> None:
        """Check that each run had one, at once. Of five the third counts: others work here, too."""
        assert len(self.seconds) == runs
        assert sorted(self.seconds)[runs // 2] < AT_ONCE, self.seconds


RUNS = 5


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


@pytest.mark.parametrize(("size", "overflow"), [(3, 0), (1, 2), (2, 1), (1, 0), (15, 0)])
def test_H3_whoever_closes_the_circle_is_told_at_once(
    make_pool: Any, size: int, overflow: int
) -> None:
    """As many requests as connections, each with an inner scope: one fails, all others go on."""
    jenny = SessionJenny(sessionmaker(make_pool(size, max_overflow=overflow)))
    together = threading.Barrier(size + overflow)
    closing = Closing()

    def request(number: int) -> None:
        with open_scope(f"request {number}"):
            occupy(jenny)
            together.wait(60)
            with closing.wait(), open_scope("audit"):
                touch(jenny)

    for _ in range(RUNS):
        run_threads([lambda n=n: request(n) for n in range(size + overflow)])  # type: ignore[misc]
    closing.told_one_each(RUNS)
    assert issubclass(PoolDeadlockError, PoolTimeout)
    for number in range(size + overflow):
        assert f"request {number} " in closing.texts[0]
    assert "test_H3_deadlock.py:" in closing.texts[0]
    assert holders() == ()


@pytest.mark.parametrize("pools", [1, 3])
async def test_H3_tasks_are_told_as_threads_are(tmp_path: Path, pools: int) -> None:
    """The twin for AsyncSessions: at one pool of three, and on a ring of three pools of one."""
    engines = [
        small_async_engine(tmp_path / f"{n}.sqlite", pool_size=3 // pools, pool_timeout=60)
        for n in range(pools)
    ]
    jennies = [AsyncSessionJenny(async_sessionmaker(engine)) for engine in engines]
    closing = Closing()

    async def request(number: int, together: asyncio.Barrier) -> None:
        async with open_scope(f"request {number}"):
            await jennies[number % pools].session.begin()
            await jennies[number % pools].session.execute(SELECT)
            await together.wait()
            with closing.wait():
                async with open_scope("audit"):
                    await jennies[(number + 1) % pools].session.execute(SELECT)

    for _ in range(RUNS):
        together = asyncio.Barrier(3)
        await asyncio.gather(*(request(number, together) for number in range(3)))
    closing.told_one_each(RUNS)
    for engine in engines:
        await engine.dispose()


def in_scope(body: Callable[[], None]) -> None:
    with open_scope("block"):
        body()


def by_rope(body: Callable[[], None]) -> None:
    body()


def in_wsgi(body: Callable[[], None]) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        body()
        start_response("200 OK", [])
        return [b""]

    list(RopeMiddleware(app)(make_environ("/wsgi"), lambda *_: print))


def in_thread_of_asgi(body: Callable[[], None]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await anyio.to_thread.run_sync(body)

    asyncio.run(RopeMiddleware(app)(http_scope("/thread"), never, into_nothing))


def on_loop_of_asgi(body: Callable[[], None]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body()

    asyncio.run(RopeMiddleware(app)(http_scope("/loop"), never, into_nothing))


def name_of(kinds: list[Any]) -> str:
    return kinds[0].__name__ if len(set(kinds)) == 1 else "mixed"


KINDS = [in_scope, by_rope, in_wsgi, in_thread_of_asgi, on_loop_of_asgi]


@pytest.mark.parametrize("kinds", [*([kind] * 2 for kind in KINDS), KINDS], ids=name_of)
def test_H3_a_ring_of_pools_and_of_all_kinds(make_pool: Any, kinds: list[Any]) -> None:
    """Each holds the connection of one pool and waits for the next one's; the last for the first's.

    A block, a rope, requests of both protocols: each kind with its like, and all of them mixed.
    """
    jennies = [SessionJenny(sessionmaker(make_pool(1))) for _ in kinds]
    together, closing = threading.Barrier(len(kinds)), Closing()

    def hold(number: int) -> None:
        session = jennies[number].session  # outside of scopes it is this function's
        session.execute(SELECT)
        together.wait(60)
        with closing.wait():
            jennies[(number + 1) % len(kinds)].session.execute(SELECT)
        assert session.in_transaction()

    for _ in range(RUNS):
        run_threads([partial(kind, partial(hold, number)) for number, kind in enumerate(kinds)])
    closing.told_one_each(RUNS)
    assert closing.texts[0].count("test_H3_deadlock.py:") == 2 * len(kinds)


GEVENT = """
from gevent import monkey; monkey.patch_all()
import gevent, sys, threading
from sqlalchemy.orm import sessionmaker
from rope_middleware import SessionJenny, open_scope
from tests.promises.test_H3_deadlock import RUNS, SELECT, Closing, occupy, pool
many = [[] for _ in range(400_000)]  # the garbage collector takes long to look at so many
def ring(jennies):
    together, closing = threading.Barrier(len(jennies)), Closing()
    def request(number):
        with open_scope(f"request {number}"):
            occupy(jennies[number])
            together.wait(60)
            with closing.wait(), open_scope():
                jennies[(number + 1) % len(jennies)].session.execute(SELECT)
    for _ in range(RUNS):
        gevent.joinall([gevent.spawn(request, n) for n in range(len(jennies))], raise_error=True)
    closing.told_one_each(RUNS)
    for number in range(len(jennies)):
        assert f"request {number} " in closing.texts[0], closing.texts
    print(closing.texts[0])
jenny = lambda size: SessionJenny(sessionmaker(pool(sys.argv[1], size)))
ring([jenny(15)] * 15)
ring([jenny(1), jenny(1), jenny(1)])
"""


@pytest.mark.slow
def test_H3_greenlets_of_gevent_are_told_as_threads_are(tmp_path: Path) -> None:
    """At one pool, and on a ring of three pools; each with the line where it waits."""
    program = tmp_path / "app.py"
    program.write_text(GEVENT)
    done = run_python(program, tmp_path)
    rows = [row.split() for row in done.stdout.splitlines() if row.startswith("request")]
    assert len(rows) == 15 + 3
    for row in rows:
        assert row[4].startswith("test_H3_deadlock.py:") and row[5].startswith("app.py:"), row


def test_H3_a_connection_is_known_to_belong_to_the_pool_that_it_came_from(make_pool: Any) -> None:
    """A private attribute of SQLAlchemy's tells it; its engine has another pool after dispose()."""
    engine = make_pool(1)
    jenny = SessionJenny(sessionmaker(engine))
    with open_scope():
        before = jenny.connection()
        door = door_of(before)
        assert door is not None
        assert door.pool() is engine.pool
        engine.dispose()
        with open_scope():
            now = door_of(jenny.connection())
        assert now is not None
        assert now.pool() is engine.pool
        assert door_of(before) is door
        before.detach()
        assert door_of(before) is None


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
    former = engine.pool
    jenny = SessionJenny(sessionmaker(engine))
    with open_scope():
        occupy(jenny)
        engine.dispose()
        with open_scope():
            occupy(jenny)  # the new pool has one
            with open_scope(), pytest.raises(PoolDeadlockError):
                touch(jenny)
    former.dispose()  # of what came back to it since


@pytest.mark.parametrize("size", [2, 5])
def test_H3_at_saturation_nobody_is_told_of_a_deadlock(make_pool: Any, size: int) -> None:
    """Ten threads at a small pool; in all but one of it an inner scope waits at a time.

    (Once with 100,000 requests of threads, of tasks and of greenlets each: none was told of one.)
    """
    jenny = SessionJenny(sessionmaker(make_pool(size)))
    one_is_left = threading.Semaphore(size - 1)

    def works() -> None:
        for number in range(200):
            if number % 3:
                with open_scope():
                    touch(jenny)
            else:
                with one_is_left, open_scope():
                    occupy(jenny)
                    with open_scope():
                        touch(jenny)

    run_threads([works] * 10)


async def test_H3_at_saturation_no_task_is_told_of_a_deadlock(tmp_path: Path) -> None:
    """The twin for AsyncSessions."""
    engine = small_async_engine(tmp_path / "a.sqlite", pool_size=3, pool_timeout=60)
    jenny = AsyncSessionJenny(async_sessionmaker(engine))
    one_is_left = asyncio.Semaphore(2)

    async def works() -> None:
        for _ in range(25):
            async with one_is_left, open_scope():
                await jenny.session.begin()
                await jenny.session.execute(SELECT)
                async with open_scope():
                    await jenny.session.execute(SELECT)

    await asyncio.gather(*(works() for _ in range(10)))
    await engine.dispose()


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
    from rope_middleware.session.holding.door import marks

    jenny = SessionJenny(sessionmaker(make_pool(1)))
    with open_scope():
        occupy(jenny)
        with open_scope(), pytest.raises(PoolDeadlockError):
            touch(jenny)
    eventually(lambda: not marks, lambda: f"no marks: {marks}")
