"""J5: when ropes end, and on which thread."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from rope_middleware import SessionJenny, SessionRope, open_scope
from tests.kit.leaks import checked_out
from tests.kit.models import Data
from tests.kit.programs import run_python
from tests.kit.ropes import Seen, is_over
from tests.kit.sessions import Jenny, run_threads, use


@pytest.fixture
def jenny(engine: Engine) -> Jenny:
    """A jenny whose sessions are `Seen`."""
    return SessionJenny(sessionmaker(engine, class_=Seen))


@pytest.mark.parametrize("name", [None, "one_name_for_all"])
def test_J5_two_asyncio_tasks_never_share_one(
    jenny: Jenny, engine: Engine, name: str | None
) -> None:
    """Tasks on one thread have a session each, whatever their ropes are called."""
    if name is not None:
        jenny._rope_name_callback = lambda: name
    sessions: list[Session] = []

    async def work() -> None:
        session = use(jenny.session)
        sessions.append(session)
        while len(sessions) < 4:
            await asyncio.sleep(0)
        for _ in range(3):
            assert jenny.session is session
            await asyncio.sleep(0)
        assert not is_over(session)

    async def main() -> None:
        own = jenny.session
        await asyncio.gather(*[asyncio.create_task(work()) for _ in range(4)])
        assert jenny.session is own
        assert not is_over(own)

    asyncio.run(main())
    assert len(set(sessions)) == 4
    assert all(is_over(session) for session in sessions)
    assert checked_out(engine) == 0


def test_J5_two_trio_tasks_never_share_one(jenny: Jenny) -> None:
    """What is true of asyncio's tasks is true of trio's."""
    sessions: list[Session] = []

    async def work() -> None:
        session = use(jenny.session)
        sessions.append(session)
        while len(sessions) < 3:
            await trio.lowlevel.checkpoint()
        assert jenny.session is session
        assert not is_over(session)

    async def main() -> None:
        own = jenny.session
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(work)
        assert jenny.session is own
        assert not is_over(own)

    trio.run(main)
    assert len(set(sessions)) == 3
    assert all(is_over(session) for session in sessions)


def test_J5_a_worker_thread_of_a_task_has_its_own(jenny: Jenny) -> None:
    """A thread that a task waits for does not use the task's session, and leaves it alone."""

    def work() -> Session:
        return use(jenny.session)

    async def main() -> None:
        session = use(jenny.session)
        theirs = await asyncio.to_thread(work)
        assert theirs is not session
        assert is_over(theirs)
        assert jenny.session is session
        assert not is_over(session)

    asyncio.run(main())


def test_J5_a_callback_of_the_event_loop_is_no_task(jenny: Jenny) -> None:
    """Outside of tasks the loop's thread is the owner."""
    sessions: list[Session] = []

    def callback() -> None:
        sessions.append(use(jenny.session))

    async def main() -> None:
        session = jenny.session
        asyncio.get_running_loop().call_soon(callback)
        while not sessions:
            await asyncio.sleep(0)
        assert sessions[0] is not session
        assert is_over(sessions[0])

    asyncio.run(main())


def test_J5_a_rope_closes_its_session_in_whichever_thread_it_is_collected(
    jenny: Jenny, engine: Engine
) -> None:
    """The session that is closed is the rope's, not the one of the thread that collects it."""
    cell: list[Any] = []
    theirs: list[Session] = []

    def fail() -> None:
        theirs.append(use(jenny.session))
        raise ValueError

    def collect() -> None:
        mine = use(jenny.session)
        cell.clear()
        assert is_over(theirs[0])
        assert theirs[0].closed_in == [threading.get_ident()]  # type: ignore[attr-defined]
        assert not is_over(mine)
        assert jenny.session is mine
        assert checked_out(engine) == 1

    try:
        fail()
    except ValueError as error:
        cell.append(error)
    assert not is_over(theirs[0])
    run_threads([collect])
    assert checked_out(engine) == 0


def test_J5_the_garbage_collector_of_another_thread_closes_the_right_session(
    jenny: Jenny, engine: Engine
) -> None:
    """A rope in a reference cycle is found by whichever thread collects garbage."""
    theirs: list[Session] = []

    def leave_a_cycle() -> None:
        theirs.append(use(jenny.session))
        frame = sys._getframe()
        assert frame is not None  # refers to itself

    def collect() -> None:
        mine = use(jenny.session)
        gc.collect()
        assert theirs[0].closed_in == [threading.get_ident()]  # type: ignore[attr-defined]
        assert not is_over(mine)

    gc.disable()
    try:
        run_threads([leave_a_cycle])
        assert not is_over(theirs[0])
        run_threads([collect])
    finally:
        gc.enable()
    assert checked_out(engine) == 0


def test_J5_a_frame_kept_by_a_traceback_is_collected_late_and_not_wrongly(
    jenny: Jenny, engine: Engine
) -> None:
    """A session that was used again meanwhile stays as long as its last user."""

    def fail() -> None:
        use(jenny.session)
        raise ValueError

    def caller() -> Session:
        kept: BaseException | None = None
        try:
            fail()
        except ValueError as error:
            kept = error
        session = use(jenny.session)
        assert kept is not None
        kept = None
        gc.collect()
        assert not is_over(session)
        assert jenny.session is session
        assert checked_out(engine) == 1
        return session

    assert is_over(caller())
    assert checked_out(engine) == 0


def test_J5_a_traceback_that_is_cleared_lets_the_session_go(jenny: Jenny) -> None:
    """What keeps a frame keeps the session, and no longer."""
    kept: list[Any] = []

    def fail() -> None:
        kept.append(use(jenny.session))
        raise ValueError

    try:
        fail()
    except ValueError as error:
        stack = traceback.TracebackException.from_exception(error)
        kept.append(error)
    assert not is_over(kept[0])
    kept.pop()
    assert is_over(kept[0])
    assert "fail" in "".join(stack.format())


def test_J5_a_reference_cycle_is_collected_late(jenny: Jenny, engine: Engine) -> None:
    """A frame in a cycle ends its session when the garbage collector finds it."""

    def view() -> Session:
        session = use(jenny.session)

        def recursive() -> object:
            return recursive, session

        frame = sys._getframe()
        assert frame is not None
        return session

    gc.disable()
    try:
        session = view()
        assert not is_over(session)
        gc.collect()
        assert is_over(session)
    finally:
        gc.enable()
    assert checked_out(engine) == 0


@pytest.mark.parametrize("cure", [None, "remove", "open_scope"])
def test_J5_an_error_of_the_driver_keeps_the_rope_until_a_collection(
    jenny: Jenny, engine: Engine, cure: str | None
) -> None:
    """SQLAlchemy's own handling of it is a cycle that holds the function: so says the page."""

    class Held:
        pass

    held: list[weakref.ref[Held]] = []

    def plain() -> None:
        mine = Held()
        held.append(weakref.ref(mine))
        with engine.connect() as connection, pytest.raises(OperationalError):
            connection.execute(text("SELECT nothing"))

    def by_rope() -> None:
        try:
            jenny.execute(text("SELECT nothing"))
        except OperationalError:
            if cure == "remove":
                jenny.remove()

    gc.collect()
    gc.disable()
    try:
        plain()
        (open_scope()(by_rope) if cure == "open_scope" else by_rope)()
        assert checked_out(engine) == (1 if cure is None else 0)
        assert held[0]() is not None  # where it is gone, the page has one limit less
    finally:
        gc.enable()
    gc.collect()
    assert checked_out(engine) == 0


def test_J5_using_the_session_where_an_error_is_handled_makes_no_cycle(
    jenny: Jenny, traced: Any
) -> None:
    """The session goes with the function, also where it was used in "except ... as"."""

    def view() -> Session:
        session = use(jenny.session)
        try:
            raise ValueError
        except ValueError as error:
            jenny.session.rollback()
            str(error)
        use(session)
        return session

    gc.disable()
    try:
        with traced():
            assert is_over(view())
    finally:
        gc.enable()


def test_J5_a_flush_that_failed_does_not_keep_the_session_for_ever(
    jenny: Jenny, engine: Engine
) -> None:
    """The session remembers the error, and the error's traceback the rope: a cycle, no leak."""

    def view() -> weakref.ref[Session]:
        jenny.session.add(Data(id=1))
        try:
            jenny.session.flush()
        except IntegrityError:
            pass
        return weakref.ref(jenny.session)

    session = view()
    gc.collect()
    assert session() is None
    assert checked_out(engine) == 0


def test_J5_code_that_runs_while_a_rope_ends_gets_another_session(
    jenny: Jenny, engine: Engine
) -> None:
    """A rope that is being collected is found no more, though weak references still see it."""
    seen: list[Session] = []

    def view() -> Session:
        session = use(jenny.session)
        session.info["on_close"] = lambda: seen.append(use(jenny.session))
        return session

    session = view()
    assert len(seen) == 1
    assert seen[0] is not session
    assert is_over(seen[0])
    assert is_over(session)
    assert checked_out(engine) == 0


def test_J5_a_rope_whose_session_cannot_be_closed_leaves_nothing_out(
    jenny: Jenny, engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error goes to the log, as a finaliser has nobody to raise it to."""

    def fail(connection: Any) -> None:
        raise RuntimeError("the database is gone")

    def view() -> None:
        use(jenny.session)
        monkeypatch.setattr(engine.dialect, "do_rollback", fail)

    with caplog.at_level(logging.ERROR):
        view()
        monkeypatch.undo()
    records = [record for record in caplog.records if record.name == "rope_middleware"]
    assert len(records) == 1
    assert records[0].exc_info is not None
    assert checked_out(engine) == 0


# From Python 3.15 on nothing can be waited for at the interpreter's end.
NO_PLACE = "TimeoutError" if sys.version_info < (3, 15) else "PythonFinalizationError"

AT_THE_END = {
    "a rope": ("jenny.session.execute(SELECT)\nassert engine.pool.checkedout() == 1\n", ""),
    # What is collected only after the interpreter has stopped to import.
    "a kept rope": (
        "kept = [SessionRope(jenny.registry)]\nkept.append(kept)\nkept[0].session.add(Data())\n",
        "changes are lost: 1 Data added",
    ),
    "a generator": (
        (
            "def generator():\n"
            "    with open_scope(commit_on_success=True):\n"
            "        yield jenny.session.execute(SELECT)\n"
            "kept = [generator()]\n"
            "kept.append(kept)\n"
            "next(kept[0])\n"
        ),
        "",
    ),
    "a first transaction": (
        (
            "class Late:\n"
            "    def __del__(self, jenny=jenny):\n"
            "        try:\n"
            "            jenny.session.execute(text('SELECT nothing'))\n"
            "        except OperationalError:\n"
            "            jenny.remove()\n"
            "kept = [Late()]\n"
            "kept.append(kept)\n"
        ),
        "",
    ),
    "a full pool": (
        (
            "small = create_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=0.01)\n"
            "jenny = SessionJenny(sessionmaker(small))\n"
            "jenny.session.execute(SELECT)\n"
            "jenny.remove()\n"
            "sys.other = small.connect()\n"
            "class Late:\n"
            "    def __del__(self, jenny=jenny, select=SELECT):\n"
            "        try:\n"
            "            jenny.session.execute(select)\n"
            f"        except {NO_PLACE}:\n"
            "            pass\n"
            "kept = [Late()]\n"
            "kept.append(kept)\n"
        ),
        "",
    ),
    "a commit that fails, beside another session": (
        (
            "sys.other = open_scope()\n"
            "sys.other.__enter__()\n"
            "jenny.session.execute(SELECT)\n"
            "class Late:\n"
            "    def __del__(self, jenny=jenny, scope=open_scope, select=SELECT, row=Data()):\n"
            "        with scope(commit_on_success=True), jenny.session.begin():\n"
            "            jenny.session.execute(select)\n"
            "        with scope(commit_on_success=True):\n"
            "            jenny.session.execute(select)\n"
            "            jenny.session.add(row)\n"
            "            jenny.session.close()\n"
            "        try:\n"
            "            with scope(commit_on_success=True):\n"
            "                jenny.session.add(row)\n"
            "        except OperationalError:\n"
            "            pass\n"
            "kept = [Late()]\n"
            "kept.append(kept)\n"
        ),
        "commit of 'open_scope()' failed: sqlalchemy.exc.OperationalError",
    ),
}


@pytest.mark.parametrize("what", AT_THE_END)
def test_J5_a_script_ends_without_a_word(tmp_path: Path, what: str) -> None:
    """At the interpreter's end what the main module has left ends in silence, or with one line."""
    lines, told = AT_THE_END[what]
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from sqlalchemy import create_engine, text\n"
        "from sqlalchemy.exc import OperationalError, TimeoutError\n"
        "from sqlalchemy.orm import sessionmaker\n"
        "from rope_middleware import SessionJenny, SessionRope, open_scope\n"
        "from tests.kit.models import Data\n"
        f"engine = create_engine('sqlite:///{tmp_path}/x.sqlite')\n"
        "jenny = SessionJenny(sessionmaker(engine))\n"
        f"SELECT = text('SELECT 1')\n{lines}print('done')\n"
    )
    done = run_python(script)
    assert done.stdout == "done\n"
    assert told in done.stderr
    assert bool(done.stderr) is bool(told), done.stderr
    assert "ImportError" not in done.stderr


def query_of(jenny: Jenny) -> object:
    model = type("Model", (Data,), {"query": jenny.query_property()})
    try:
        return model.query  # type: ignore[attr-defined]
    finally:
        Data.registry._dispose_cls(model)


def ways_in() -> dict[str, Callable[[Jenny], object]]:
    """Return what makes a session, on every public name that SQLAlchemy proxies."""
    ways: dict[str, Callable[[Jenny], object]] = {
        "session": lambda jenny: jenny.session,
        "rope.session": lambda jenny: jenny.rope.session,
        "()": lambda jenny: jenny(),
        "(kw)": lambda jenny: jenny(autoflush=False),
        "registry()": lambda jenny: jenny.registry(),
        "in": lambda jenny: Data() in jenny,
        "iter": lambda jenny: list(jenny),
        "query()": lambda jenny: jenny.query(Data),
        "query_property": lambda jenny: query_of(jenny),
        "set_rope": lambda jenny: (jenny.set_rope(), jenny.session),
    }
    for name, value in vars(scoped_session).items():
        if isinstance(value, property) and not name.startswith("_"):
            ways[name] = functools.partial(lambda jenny, name: getattr(jenny, name), name=name)
    return ways


@pytest.mark.parametrize("way", ways_in())
def test_J5_every_way_in_makes_the_rope(jenny: Jenny, way: str) -> None:
    """The rope is set in the frame of the caller, whichever name of the facade it used."""
    enter = ways_in()[way]
    made: list[Session] = []
    plain = jenny.session_factory

    def factory(**kw: Any) -> Session:
        made.append(plain(**kw))
        return made[-1]

    jenny.session_factory = factory  # type: ignore[assignment]

    def view() -> None:
        space: dict[str, Any] = {"enter": enter, "jenny": jenny}
        result = enter(jenny)
        assert len(made) == 1
        del result, space

    view()
    assert len(made) == 1
    assert is_over(made[0])
    assert not jenny._ropes


def test_J5_a_request_for_an_attribute_that_needs_no_session_makes_none(jenny: Jenny) -> None:
    """`jenny.rope` alone makes a rope and no session; `has()` and `remove()` make neither."""
    assert jenny.registry.has() is False
    jenny.remove()
    assert not jenny._ropes
    rope = jenny.rope
    assert isinstance(rope, SessionRope)
    assert jenny.registry.has() is False
    assert rope.session is jenny.session
    assert jenny.registry.has() is True
    jenny.remove()
