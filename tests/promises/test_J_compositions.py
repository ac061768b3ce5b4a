"""J5, J6, S3, C2: what real applications make of factories, threads, classes and programs."""

from __future__ import annotations

import asyncio
import gc
import sys
from multiprocessing.pool import ThreadPool
from typing import Any

import anyio.to_thread
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.event import registry
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker
from sqlalchemy.orm import scoped_session, sessionmaker

from rope_middleware import (
    ASGIRopeMiddleware,
    RopeMiddleware,
    SessionJenny,
    WSGIRopeMiddleware,
    open_scope,
)
from tests.kit.engines import rows
from tests.kit.leaks import checked_out
from tests.kit.models import Row
from tests.kit.programs import run_python
from tests.kit.sessions import Jenny
from tests.kit.waiting import eventually

COUNT = text("SELECT 1")


@pytest.mark.told
def test_J5_a_method_that_a_thread_is_given_holds_its_session_for_its_call(
    jenny: Jenny, engine: Engine
) -> None:
    """The loop of a worker thread never returns, so no rope hangs on it."""
    seen: list[Any] = []

    async def main() -> None:
        async def writes() -> None:
            await anyio.to_thread.run_sync(jenny.add, Row(name="never committed"))

        async def reads() -> None:
            count = text("SELECT count(*) FROM row")
            seen.append(await anyio.to_thread.run_sync(jenny.scalar, count))

        await asyncio.create_task(writes())
        await asyncio.create_task(reads())
        await asyncio.to_thread(jenny.scalar, COUNT)

    asyncio.run(main())
    pool = ThreadPool(1)
    pool.apply(jenny.scalar, (COUNT,))
    eventually(lambda: checked_out(engine) == 0, "no connection is out")
    pool.terminate()
    pool.join()
    assert seen == [0]


def test_J5_a_list_that_the_function_has_deleted_keeps_no_rope(
    jenny: Jenny, engine: Engine
) -> None:
    """Before Python 3.13 the frame keeps a copy of its variables from when they were read."""

    def view() -> None:
        kept = [sys._getframe()]
        jenny.execute(COUNT)
        kept.clear()
        kept = [sys._getframe()]
        jenny.execute(COUNT)
        del kept

    gc.disable()
    try:
        view()
        assert checked_out(engine) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("many", [20, 400])
def test_J6_a_factory_that_makes_a_sessionmaker_each_time_grows_nothing(
    many: int, engine: Engine
) -> None:
    """SQLAlchemy keeps an entry for each listener of a class; there are few of ours."""
    jenny = SessionJenny(lambda: sessionmaker(engine)())

    def use() -> None:
        with open_scope():
            jenny.execute(COUNT)

    for _ in range(20):
        use()
    gc.collect()
    before = len(registry._key_to_collection)
    for _ in range(many):
        use()
    gc.collect()
    assert len(registry._key_to_collection) <= before + 5


_FOREIGN = """
import sys
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, sessionmaker
from rope_middleware import SessionJenny, open_scope

ours, theirs, calls = create_engine("sqlite://"), create_engine("sqlite://"), []
odd, plain = SessionJenny(lambda: Session(ours)), SessionJenny(sessionmaker(ours))

def profile(frame, what, _):
    listening = "rope_middleware.session.beginning", "rope_middleware.session.listeners"
    if what == "call" and frame.f_globals.get("__name__") in listening:
        calls.append(frame.f_code.co_name)

def heard(use):
    sys.setprofile(profile)
    try:
        use()
    finally:
        sys.setprofile(None)
    found = len(calls)
    calls.clear()
    return found

def own():
    with open_scope():
        odd.execute(text("SELECT 1"))
        plain.execute(text("SELECT 1"))

def foreign():
    with Session(theirs) as one, sessionmaker(theirs)() as two:
        one.execute(text("SELECT 1"))
        two.execute(text("SELECT 1"))

print(bool(heard(own)), heard(foreign))
"""


def test_J6_sessions_that_are_none_of_ours_are_not_listened_to() -> None:
    """Neither those of `Session` nor of another sessionmaker, whatever jennies there are.

    In a process of its own: `registries=` with sessions of a class that cannot be told listens to
    all of `Session`.
    """
    done = run_python("-c", _FOREIGN)
    assert (done.stdout, done.stderr) == ("True 0\n", "")


@pytest.mark.parametrize("kind", ["plain", "by task"])
def test_S3_a_scoped_session_of_another_scopefunc_is_refused(kind: str, engine: Engine) -> None:
    """The end of a request would never find its sessions."""

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    scoped: Any = scoped_session(sessionmaker(engine))
    if kind == "by task":
        scoped = async_scoped_session(async_sessionmaker(), scopefunc=asyncio.current_task)
    with pytest.raises(TypeError, match="scopefunc=current_scope"):
        RopeMiddleware(app, registries=[scoped])


def test_A1_W1_a_subclass_of_the_choosing_class_is_of_the_apps_protocol() -> None:
    """`class My(RopeMiddleware)` is called as its application is."""

    class My(RopeMiddleware):
        def __init__(self, app: Any) -> None:
            super().__init__(app, commit_on_success=True)  # type: ignore[call-arg]

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    def wsgi_app(environ: Any, start_response: Any) -> Any: ...

    assert isinstance(My(app), (My, ASGIRopeMiddleware))
    assert isinstance(My(app), ASGIRopeMiddleware)
    assert isinstance(My(wsgi_app), WSGIRopeMiddleware)
    assert type(My(app)) is type(My(app))


@pytest.mark.parametrize(("code", "expected"), [(0, 1), (None, 1), (1, 0), ("no", 0)])
@pytest.mark.parametrize("is_async", [False, True])
def test_C2_a_program_that_ends_by_exit_0_has_succeeded(
    code: Any, expected: int, is_async: bool, jenny: Jenny, engine: Engine
) -> None:
    """click, argparse and Django's commands end a success so."""

    async def main() -> None:
        async with open_scope(commit_on_success=True):
            jenny.add(Row(name="x"))
            sys.exit(code)

    with pytest.raises(SystemExit):
        if is_async:
            asyncio.run(main())
        with open_scope(commit_on_success=True):
            jenny.add(Row(name="x"))
            sys.exit(code)
    assert rows(engine) == expected
