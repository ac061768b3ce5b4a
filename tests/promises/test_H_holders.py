"""H1, H2: who holds the connections, in a list and in the pool's time-out."""

from __future__ import annotations

import asyncio
import gc
import random
import runpy
import sys
import threading
from contextvars import copy_context
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any
from weakref import ref

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import QueuePool
from starlette.testclient import TestClient

from rope_middleware import AsyncSessionJenny, SessionJenny, SessionRope, holders, open_scope
from rope_middleware.session.code.lines import text_of
from rope_middleware.session.tie import tie_of
from tests.kit.engines import MakeEngine, small_async_engine
from tests.kit.leaks import nothing_checked_out
from tests.kit.models import Row
from tests.kit.planted import Async, Sync, cancelled, line_of
from tests.kit.programs import ROOT, run_python
from tests.kit.said import Said
from tests.kit.sessions import SELECT, Jenny, beside, run_threads, touch
from tests.kit.waiting import PATIENCE, eventually, poll

pytestmark = pytest.mark.anyio


def here(back: int = 1) -> str:
    """Return the caller's line, or the one so many lines before it."""
    return f"{Path(__file__).name}:{sys._getframe(1).f_lineno - back}"


def test_H1_an_open_transaction_is_listed_until_it_ends(jenny: Jenny) -> None:
    """Scope, engine, seconds, the line that began it: from the begin on, and not after it."""
    assert holders() == ()
    with open_scope("import"):
        assert holders() == ()
        touch(jenny)
        jenny.session.commit()
        assert holders() == ()
        jenny.session.execute(SELECT)
        began = here()
        (holder,) = holders()
        assert (holder.scope, holder.began, holder.waiting) == ("import", began, False)
        assert holder.now == here(2)
        assert 0 <= holder.seconds < 60
        assert holder.engine == str(jenny.session.bind.engine.url)  # type: ignore[union-attr]
    assert holders() == ()


def test_H1_it_may_be_asked_at_any_moment_of_a_begin(jenny: Jenny) -> None:
    """Another thread may look between any two lines of ours, while a transaction begins."""
    seen: set[int] = set()

    def look(frame: FrameType, event: str, arg: object) -> Any:
        if event == "line" and "/rope_middleware/session/" in frame.f_code.co_filename:
            seen.add(len(holders()))
        return look

    for _ in range(2):  # the first one learns more
        with open_scope():
            before = sys.gettrace()
            sys.settrace(look)
            try:
                jenny.session.execute(SELECT)
            finally:
                sys.settrace(before)
        assert seen == {0, 1}
        seen.clear()


@pytest.mark.parametrize("way", [Session.commit, Session.connection, "execute"])
def test_H1_each_begin_is_listed_alike(make_engine: MakeEngine, way: Any) -> None:
    """The first on an engine, where more is learnt, and later ones, which are quicker."""
    jenny = SessionJenny(sessionmaker(make_engine()))

    def begin() -> str:  # near to SQLAlchemy, and far from it
        jenny.session.execute(SELECT) if way == "execute" else way(jenny.session)
        return here()

    for _ in range(3):
        with open_scope():
            began = begin()
            tie = tie_of(jenny.session)
            assert tie is not None
            assert tie.line is not None
            assert text_of(tie.line) == began
            assert tie.transaction is not None
            assert (tie.thread, tie.task, tie.written) == (threading.get_ident(), None, None)
            assert 0 <= monotonic() - tie.since < 60
            jenny.session.connection()
            assert [holder.scope for holder in holders()] == ["open_scope()"]


def test_H1_each_begin_is_listed_where_there_is_no_application(make_engine: MakeEngine) -> None:
    """In a thread of libraries alone the line is one of theirs, the first time and later."""
    jenny = SessionJenny(sessionmaker(make_engine()))
    began: list[str] = []
    for _ in range(3):
        with open_scope():
            execute = jenny.session.execute
            thread = threading.Thread(target=copy_context().run, args=[execute, SELECT])
            thread.start()
            thread.join()
            began += [holder.began for holder in holders()]
    assert len(began) == 3
    assert len(set(began)) == 1


def test_H1_it_is_a_table_with_a_row_for_each(jenny: Jenny) -> None:
    """`str()` shows a head and a row for each, without a value of any statement."""
    assert str(holders()) == "no transaction is open"
    with open_scope("one"):
        touch(jenny)
        with open_scope("another"):
            jenny.session.add(Row(n=1, name="secret"))
            jenny.session.flush()
            head, one, another = str(holders()).splitlines()
            jenny.session.rollback()
    assert head.split() == ["scope", "engine", "seconds", "began", "now", "connection"]
    assert one.startswith("one ") and another.startswith("another ")
    assert one.endswith("held") and "secret" not in another


def test_H1_the_example_shows_them_to_who_has_the_token(
    jenny: Jenny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page of examples/holders_app.py: a row for each; 403 without the right token."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOLDERS_TOKEN", "let-me-see")
    example = runpy.run_path(str(ROOT / "examples" / "holders_app.py"))
    client = TestClient(example["app"])
    with open_scope("POST /orders"):
        touch(jenny)
        told = client.get("/holders", headers={"Authorization": "Bearer let-me-see"}).text
    assert told.startswith("scope ") and "POST /orders  sqlite:" in told.splitlines()[1]
    for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer let-me-seé"}):
        encoded = {name: value.encode() for name, value in headers.items()}
        assert client.get("/holders", headers=encoded).status_code == 403  # type: ignore[arg-type]


def test_H1_the_password_is_not_told() -> None:
    """An engine's URL is shown without its password and its query."""
    engine = create_engine("postgresql+psycopg://ann:swordfish@db/shop?sslpassword=swordfish")
    jenny = SessionJenny(sessionmaker(engine))
    with open_scope():
        jenny.session.begin()
        (holder,) = holders()
    assert holder.engine == "postgresql+psycopg://ann@db/shop"


def test_H1_it_tells_who_has_none_yet_and_who_waits(make_engine: MakeEngine) -> None:
    """Added objects need no connection yet; who stands before an empty pool waits."""
    jenny = SessionJenny(sessionmaker(make_engine(1)))
    ready = threading.Event()

    def wait() -> None:
        assert ready.wait(PATIENCE)
        with open_scope("waits"):
            jenny.session.execute(SELECT)

    def hold() -> None:
        with open_scope("holds"):
            touch(jenny)
            ready.set()
            with open_scope("adds"):
                jenny.session.add(Row(n=1))
                eventually(lambda: any(one.waiting for one in holders()), "somebody waits")
                found.update({one.scope: one.connection for one in holders()})
                jenny.session.rollback()

    found: dict[str, str] = {}
    run_threads([hold, wait])
    assert found == {"holds": "held", "adds": "none yet", "waits": "waited for"}
    assert holders() == ()


@pytest.mark.parametrize("kind", sorted(Sync(None, int, threading.Event()).kinds()))
def test_H1_every_way_to_hold_is_listed(make_engine: MakeEngine, kind: str) -> None:
    """Requests, streams, blocks, threads, ropes: by the line that began, while they hold."""
    jenny = SessionJenny(sessionmaker(make_engine()))
    ready, leave = threading.Event(), threading.Event()
    with beside(Sync(jenny, ready.set, leave).kinds()[kind], until=leave):
        assert ready.wait(60)
        (holder,) = holders()
        assert holder.began == line_of(kind)
        assert holder.now.startswith("planted.py:")
        assert (holder.scope == "no scope") == (kind == "rope")
    assert holders() == ()


@pytest.mark.parametrize("kind", sorted(Async(None, int).kinds()))
async def test_H1_every_async_way_to_hold_is_listed(tmp_path: Path, kind: str) -> None:
    """The twin: requests, streams, WebSockets, background tasks, tasks."""
    engine = small_async_engine(tmp_path / "a.sqlite")
    jenny = AsyncSessionJenny(async_sessionmaker(engine))
    ready: list[int] = []
    task = asyncio.create_task(Async(jenny, lambda: ready.append(1)).kinds()[kind]())
    await poll(lambda: bool(ready))
    (holder,) = holders()
    assert holder.began == line_of(kind)
    assert holder.now.startswith(("planted.py:", "waiting.py:"))
    await cancelled([task])
    assert holders() == ()
    await engine.dispose()


def test_H1_nothing_is_kept_alive(jenny: Jenny) -> None:
    """A listed session goes with its scope: neither the list nor what it returned keeps it."""
    with open_scope() as scope:
        session = ref(touch(jenny))
        told = holders()
        gone = ref(scope)
        del scope
    gc.collect()
    assert session() is None and gone() is None
    assert len(told) == 1


def test_H1_looking_does_not_keep_a_rope(jenny: Jenny, engine: Any) -> None:
    """A rope goes with its function, also where `holders()` was called inside or elsewhere."""
    inside, looked = threading.Event(), threading.Event()

    def use() -> None:
        jenny.session.execute(SELECT)
        assert len(holders()) == 1
        inside.set()
        assert looked.wait(60)

    def body() -> None:
        gc.disable()
        try:
            use()
            nothing_checked_out(engine)
        finally:
            gc.enable()

    def look() -> None:
        assert inside.wait(60)
        assert len(holders()) == 1
        looked.set()

    run_threads([body, look])


def test_H1_hand_made_ropes_and_scopefuncs_are_listed(engine: Any) -> None:
    """Whatever came from a jenny: also by a `SessionRope` and by the user's own scopefunc."""
    jenny = SessionJenny(sessionmaker(engine), scopefunc=lambda: "one")
    jenny.session.execute(SELECT)
    (holder,) = holders()
    assert (holder.scope, holder.began) == ("no scope", here(2))
    jenny.remove()
    roped = SessionJenny(sessionmaker(engine))
    rope = SessionRope(roped.registry)
    rope.session.execute(SELECT)
    (holder,) = holders()
    assert holder.began == here(2)
    rope.remove()
    assert holders() == ()


def test_H1_other_sessions_are_not_ours(engine: Any, jenny: Jenny) -> None:
    """A session that no jenny made is not listed, also where its class is the same."""
    with open_scope(), Session(engine) as session, jenny.session_factory() as alike:
        session.execute(SELECT)
        alike.execute(SELECT)
        assert holders() == ()


# -- H2 --------------------------------------------------------------------------------------------


def small(path: Path, size: int, seconds: float = 0.05) -> Any:
    return create_engine(
        f"sqlite:///{path}/pool.sqlite",
        poolclass=QueuePool,
        pool_size=size,
        max_overflow=0,
        pool_timeout=seconds,
        connect_args={"check_same_thread": False},
    )


def began_in(note: str) -> list[str]:
    """Return the lines of the column `began` of a table in a text."""
    rows = note.splitlines()
    head = next(row for row in rows if row.startswith("scope "))
    left, right = head.index("began"), head.index("now")
    return [row[left:right].strip() for row in rows[rows.index(head) + 1 :] if row]


@pytest.mark.told
@pytest.mark.parametrize("seed", range(10))
def test_H2_the_time_out_names_every_holder(tmp_path: Path, seed: int, said: Said) -> None:
    """20 runs with up to 15 holders each: the lines named are the lines planted."""
    choose = random.Random(seed)
    for _ in range(20):
        engine = small(tmp_path, size := choose.randint(1, 15), 0.01)
        jenny = SessionJenny(sessionmaker(engine))
        ready, leave = threading.Semaphore(0), threading.Event()
        ways = Sync(jenny, ready.release, leave).kinds()
        planted = [choose.choice(sorted(ways)) for _ in range(size)]
        with beside(*(ways[kind] for kind in planted), until=leave):
            assert all(ready.acquire(timeout=60) for _ in planted)
            with open_scope("too late"), pytest.raises(PoolTimeout) as raised:
                jenny.session.execute(SELECT)
        (note,) = raised.value.__notes__
        assert sorted(began_in(note)) == sorted(line_of(kind) for kind in planted)
        nothing_checked_out(engine)
        engine.dispose()
    assert len(said.warnings) == 20  # each time another pool


@pytest.mark.told
@pytest.mark.parametrize("seed", range(5))
async def test_H2_the_time_out_names_every_async_holder(
    tmp_path: Path, seed: int, said: Said
) -> None:
    """The twin, for AsyncSessions of one loop, while others hold connections of a sync engine."""
    choose = random.Random(seed)
    for _ in range(RUNS):
        await plant_both_kinds(tmp_path, choose)
    assert len(said.warnings) == 2 * RUNS


RUNS = 4


async def plant_both_kinds(path: Path, choose: random.Random) -> None:
    """Plant up to 15 holders of any kind; check that each pool's time-out names its own."""
    size = choose.randint(2, 15)
    sizes = [own := choose.randint(1, size - 1), size - own]
    engine = small(path, sizes[0], 0.01)
    asynchronous = small_async_engine(path / "a.sqlite", pool_size=sizes[1], pool_timeout=0.01)
    jenny = SessionJenny(sessionmaker(engine))
    other = AsyncSessionJenny(async_sessionmaker(asynchronous))
    ready: list[int] = []
    leave = threading.Event()
    ways = Sync(jenny, lambda: ready.append(1), leave).kinds()
    async_ways = Async(other, lambda: ready.append(1)).kinds()
    planted, async_planted = (
        [choose.choice(sorted(known)) for _ in range(number)]
        for known, number in zip((ways, async_ways), sizes, strict=True)
    )
    threads = [threading.Thread(target=ways[kind]) for kind in planted]
    for thread in threads:
        thread.start()
    tasks = [asyncio.create_task(async_ways[kind]()) for kind in async_planted]
    try:
        await poll(lambda: len(ready) == size)
        lines = [line_of(kind) for kind in planted]
        async_lines = [line_of(kind) for kind in async_planted]
        assert sorted(one.began for one in holders()) == sorted(lines + async_lines)
        with pytest.raises(PoolTimeout) as raised:
            await asyncio.to_thread(in_scope, jenny)
        assert sorted(began_in(raised.value.__notes__[0])) == sorted(lines)
        with pytest.raises(PoolTimeout) as raised:
            async with open_scope("too late"):
                await other.session.execute(SELECT)
        assert sorted(began_in(raised.value.__notes__[0])) == sorted(async_lines)
    finally:
        leave.set()
        await cancelled(tasks)
        for thread in threads:
            await asyncio.to_thread(thread.join)
        engine.dispose()
        await asynchronous.dispose()


def in_scope(jenny: Jenny) -> None:
    with open_scope("too late"):
        touch(jenny)


@pytest.mark.told
def test_H2_a_swallowed_time_out_is_logged_once_a_minute(tmp_path: Path, said: Said) -> None:
    """An app that catches the error and goes on: the log has the table, once for each pool."""
    engine = small(tmp_path, 1)
    jenny = SessionJenny(sessionmaker(engine))

    def another() -> None:
        for _ in range(3):
            with pytest.raises(PoolTimeout) as raised, Session(engine) as by_hand:
                by_hand.execute(SELECT)
            assert "holds it" in raised.value.__notes__[0]

    with open_scope("holds it"):
        touch(jenny)
        run_threads([another])
    (told,) = said.warnings
    assert "QueuePool limit of size 1 overflow 0 reached" in told
    assert "0 more wait for one" in told and "each worker process" in told and "holds it" in told
    engine.dispose()


@pytest.mark.told
def test_H2_only_the_holders_of_that_pool(tmp_path: Path, said: Said) -> None:
    """Another engine's connections are nobody's business here."""
    engine, other = small(tmp_path, 1), small(tmp_path, 2)
    jenny, elsewhere = SessionJenny(sessionmaker(engine)), SessionJenny(sessionmaker(other))
    leave, ready = threading.Event(), threading.Semaphore(0)
    blocks = [Sync(one, ready.release, leave).block for one in (jenny, elsewhere)]
    with beside(*blocks, until=leave):
        assert all(ready.acquire(timeout=60) for _ in blocks)
        with open_scope(), pytest.raises(PoolTimeout) as raised:
            jenny.session.execute(SELECT)
    assert began_in(raised.value.__notes__[0]) == [line_of("block")]
    engine.dispose()
    other.dispose()
    assert said.warnings


GEVENT = """
from gevent import monkey; monkey.patch_all()
import gevent, sys
from sqlalchemy import create_engine, text
from sqlalchemy.exc import TimeoutError
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import QueuePool
from rope_middleware import SessionJenny, open_scope
engine = create_engine(
    f"sqlite:///{sys.argv[1]}", poolclass=QueuePool, pool_size=2, max_overflow=0, pool_timeout=0.2
)
jenny, leave = SessionJenny(sessionmaker(engine)), gevent.event.Event()
def hold(name):
    with open_scope(name):
        jenny.session.execute(text("SELECT 1"))
        leave.wait()
holding = [gevent.spawn(hold, "one"), gevent.spawn(hold, "another")]
gevent.sleep(0.01)
def late():
    with open_scope("late"):
        try:
            jenny.session.execute(text("SELECT 1"))
        except TimeoutError as error:
            print(*error.__notes__, sep="\\n")
gevent.spawn(late).join()
leave.set()
gevent.joinall(holding)
"""


@pytest.mark.slow
def test_H2_greenlets_of_gevent_are_named(tmp_path: Path) -> None:
    """They are threads of one thread: each with its own line, and where it is now."""
    program = tmp_path / "app.py"
    program.write_text(GEVENT)
    done = run_python(program, tmp_path / "x.sqlite")
    rows = [line.split() for line in done.stdout.splitlines()]
    held = {row[0]: row[3:] for row in rows if row and row[-1] == "held"}
    assert set(held) == {"one", "another"}, done.stdout + done.stderr
    for began, now, _ in held.values():
        assert (began, now) == ("app.py:15", "app.py:16")
