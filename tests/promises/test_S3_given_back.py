"""S3: whatever happens, everything is given back."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import logging
import os
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from rope_middleware import (
    ASGIRopeMiddleware,
    AsyncSessionJenny,
    Scope,
    SessionJenny,
    current_scope,
    open_scope,
)
from rope_middleware.session.connections import (
    connections_of,
    has_out,
    lent_connections,
    made_connections,
)
from tests.kit.asgi import asgi_app, ask, serve
from tests.kit.engines import MakeEngine, counts, hold_up, rows, small_async_engine
from tests.kit.leaks import checked_out, no_scope_here
from tests.kit.models import Data, Row
from tests.kit.programs import run_python
from tests.kit.sessions import SELECT, Jenny, errors_in, touch, use
from tests.kit.stores import Store
from tests.kit.waiting import PATIENCE, eventually, poll
from tests.kit.ways import Way, by_decorator, by_with
from tests.kit.wsgi import BODIES, HEADERS, Probe, Server, Wrap, served

pytestmark = pytest.mark.anyio


def test_S3_which_connections_are_lent_is_known_on_each_sqlalchemy(make_engine: MakeEngine) -> None:
    """A private attribute tells it: each connection twice, by its engine and by itself."""
    own, other = make_engine(), make_engine()
    with other.connect() as lent, Session(binds={Data: own, Row: lent}) as session:
        transaction = session.begin()
        assert connections_of(transaction) == () and not has_out(transaction)
        session.scalars(select(Row)).all()
        assert len(connections_of(transaction)) == 2 and not has_out(transaction)
        session.scalars(select(Data)).all()
        ((first, _, _, is_made), again, third, last) = connections_of(transaction)
        assert again[0] is first is lent and not is_made
        assert third is last and last[3] and last[0].engine is own
        assert set(made_connections(transaction)) == {last[0]} and has_out(transaction)
        assert set(lent_connections(transaction)) == {lent}
        session.rollback()
        assert set(made_connections(transaction)) == {last[0]} and not has_out(transaction)
        assert not lent.closed


@pytest.mark.told
def test_S3_a_return_gives_everything_back(jenny: Jenny, engine: Engine, way: Way) -> None:
    """The connection is back, the scope closed, and what was not committed is rolled back."""

    def body() -> Scope:
        session = use(jenny.session)
        session.add(Data(count=7))
        session.flush()
        assert checked_out(engine) == 1
        assert not current_scope().closed
        return current_scope()

    scope = way(body)
    assert scope.closed
    assert checked_out(engine) == 0
    assert counts(engine) == [0]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("way", [by_with, by_decorator])
def test_S3_an_exception_passes_and_everything_is_given_back(
    jenny: Jenny, engine: Engine, way: Way, error: type[BaseException]
) -> None:
    """The very exception of the block comes out."""
    raised = error("mine")

    def body() -> None:
        use(jenny.session)
        raise raised

    with pytest.raises(error) as caught:
        way(body)
    assert caught.value is raised
    assert checked_out(engine) == 0
    assert no_scope_here()


@pytest.mark.parametrize("how", ["close", "del", "throw"])
def test_S3_a_generator_that_is_left_ends_its_scope(jenny: Jenny, engine: Engine, how: str) -> None:
    """GeneratorExit, by close() or by collection, is an end like any other."""
    scopes: list[Scope] = []

    def rows() -> Iterator[int]:
        with open_scope() as scope:
            scopes.append(scope)
            use(jenny.session)
            yield 1
            yield 2

    generator = rows()
    next(generator)
    assert checked_out(engine) == 1
    if how == "close":
        generator.close()
    elif how == "throw":
        with pytest.raises(ValueError):
            generator.throw(ValueError())
    del generator
    gc.collect()
    assert scopes[0].closed
    assert checked_out(engine) == 0
    assert no_scope_here()


def test_S3_a_generator_that_is_collected_in_another_thread_ends_its_scope(
    jenny: Jenny, engine: Engine
) -> None:
    """The scope of that thread stays current there, and its session is not touched."""
    kept: list[Any] = []

    def rows() -> Iterator[Session]:
        with open_scope():
            yield use(jenny.session)

    def collect() -> None:
        with open_scope() as scope:
            mine = use(jenny.session)
            kept.clear()
            assert current_scope() is scope
            assert jenny.session is mine
            assert checked_out(engine) == 1

    def begin() -> None:
        kept.append(rows())
        next(kept[0])

    with ThreadPoolExecutor(1) as pool:
        pool.submit(contextvars.Context().run, begin).result(30)
        assert checked_out(engine) == 1
        pool.submit(contextvars.Context().run, collect).result(30)
    assert checked_out(engine) == 0


class TimeLimitError(Exception):
    """What the handler of a signal raises: SoftTimeLimitExceeded of Celery's, for example."""


class _Interrupt:
    """Raises at the nth call of a function in `folder`: that is when Python looks for signals."""

    def __init__(self, folder: str, number: int) -> None:
        self.folder = folder
        self.left = number

    def __call__(self, frame: FrameType, _: str, __: object) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(self.folder):
            return
        if code.co_name != "__del__":  # Python prints what a finaliser raises
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise TimeLimitError


@pytest.mark.told
@pytest.mark.parametrize("way", [by_with, by_decorator])
def test_S3_an_error_of_a_signal_at_any_call_of_ours_gives_everything_back(
    jenny: Jenny, engine: Engine, way: Way
) -> None:
    """Also where the block has just been entered, or is just about to be left."""
    folder = str(Path(inspect.getfile(open_scope)).parent)
    tracing = sys.gettrace()

    def run(interrupt: _Interrupt) -> None:
        sys.settrace(interrupt)
        try:
            way(lambda: use(jenny.session))
        finally:
            sys.settrace(tracing)

    for number in count(1):
        interrupt = _Interrupt(folder, number)
        with suppress(TimeLimitError):
            run(interrupt)
        if interrupt.left > 0:  # it has come to its end
            break
        gc.collect()
        assert no_scope_here(), number
        assert checked_out(engine) == 0, number
    assert number > 10


def test_S3_a_generator_in_a_cycle_that_is_left_ends_its_scope(
    jenny: Jenny, engine: Engine
) -> None:
    """Whether the collector comes by the generator first, or by its open_scope()."""

    def rows(cycle: list[Any]) -> Iterator[int]:
        with cycle[0] or open_scope():
            use(jenny.session)
            yield 1

    for is_first in (True, False):
        cycle: list[Any] = [open_scope() if is_first else None]
        cycle.append(rows(cycle))
        next(cycle[1])
        assert checked_out(engine) == 1
        del cycle
        gc.collect()
        assert checked_out(engine) == 0
        assert no_scope_here()


class CannotClose(Session):
    """Raises when it is closed; its connection stays out."""

    error: BaseException = RuntimeError("cannot close")

    def close(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [None, ValueError("mine")], ids=["returns", "raises"])
def test_S3_a_close_that_fails_is_logged_and_the_next_session_is_closed(
    make_engine: MakeEngine, way: Way, error: ValueError | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection is invalidated; nothing comes out but what the application raised."""
    engines = [make_engine(pool_size=1) for _ in range(3)]
    classes = [Session, CannotClose, Session]
    scopes: list[Scope] = []

    def body() -> None:
        for engine, class_ in zip(engines, classes, strict=True):
            use(SessionJenny(sessionmaker(engine, class_=class_)).session)
        assert [checked_out(engine) for engine in engines] == [1, 1, 1]
        scopes.append(current_scope())
        if error is not None:
            raise error

    with pytest.raises(ValueError, match="mine") if error else nullcontext():
        way(body)
    assert scopes[0].closed
    assert [checked_out(engine) for engine in engines] == [0, 0, 0]
    assert len(errors_in(caplog)) == 1
    assert "RuntimeError" in errors_in(caplog)[0]
    for engine in engines:
        with engine.connect() as connection:
            assert connection.scalar(SELECT) == 1


class Fails(logging.Filter):
    """A filter of the application's with a mistake in it: it raises where something is told."""

    def filter(self, record: logging.LogRecord) -> bool:
        raise ZeroDivisionError(record.msg)


@pytest.mark.told
def test_S3_logging_that_fails_leaves_nothing_out(
    jenny: Jenny, engine: Engine, way: Way, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scope tells of a misuse at its end, and its end goes on, whatever logging makes of it."""

    def forget() -> None:
        jenny.session.add(Row(n=1))
        jenny.session.flush()

    logger, fails = logging.getLogger("rope_middleware"), Fails()
    logger.addFilter(fails)
    try:
        way(forget)
    finally:
        logger.removeFilter(fails)
    assert not checked_out(engine)
    assert no_scope_here()
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_S3_a_rollback_that_fails_in_the_driver_invalidates_the_connection(
    jenny: Jenny, engine: Engine, way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """`Session.close()` has forgotten its connection by then; the scope has not."""
    broken: list[Any] = []

    def fail(connection: Connection) -> None:
        if not broken:
            broken.append(connection)
            raise RuntimeError("the database is gone")

    def body() -> None:
        use(jenny.session)
        event.listen(engine, "rollback", fail)

    try:
        way(body)
    finally:
        event.remove(engine, "rollback", fail)
    assert broken
    assert len(errors_in(caplog)) == 1
    assert checked_out(engine) == 0


@pytest.mark.parametrize("way", [by_with, by_decorator])
def test_S3_an_interrupt_while_closing_is_raised_when_everything_is_closed(
    make_engine: MakeEngine, way: Way
) -> None:
    """KeyboardInterrupt is nobody's to swallow; it comes out at the end."""
    engines = [make_engine(), make_engine()]
    interrupted = type("Interrupted", (CannotClose,), {"error": KeyboardInterrupt()})
    first = SessionJenny(sessionmaker(engines[0], class_=interrupted))
    second = SessionJenny(sessionmaker(engines[1]))

    def body() -> None:
        use(first.session)
        use(second.session)

    with pytest.raises(KeyboardInterrupt):
        way(body)
    assert [checked_out(engine) for engine in engines] == [0, 0]
    assert no_scope_here()


async def test_S3_an_interrupt_while_an_idle_session_ends_comes_after_what_has_to_wait(
    tmp_path: Path,
) -> None:
    """Another AsyncSession has a transaction open: its connection is back by then."""

    class Interrupt(BaseException):
        pass

    class Interrupted(Session):
        def reset(self) -> None:
            raise Interrupt

    engine = small_async_engine(tmp_path / "x.db")
    idle = AsyncSessionJenny(async_sessionmaker(engine, sync_session_class=Interrupted))
    other = AsyncSessionJenny(async_sessionmaker(engine))
    with pytest.raises(Interrupt):
        async with open_scope() as scope:
            assert idle.session
            await other.execute(SELECT)
    assert scope.closed
    assert checked_out(engine.sync_engine) == 0
    await engine.dispose()


@pytest.mark.told
async def test_P4_the_error_of_a_close_goes_when_it_is_told(tmp_path: Path) -> None:
    """And its traceback with it, which keeps all that the end has had in hand."""
    errors: list[weakref.ref[Exception]] = []

    class Error(Exception):
        pass

    class Failing(Session):
        def reset(self) -> None:
            super().reset()
            try:
                raise Error
            except Error as error:
                errors.append(weakref.ref(error))
                raise

    engine = small_async_engine(tmp_path / "x.db")
    jenny = AsyncSessionJenny(async_sessionmaker(engine, sync_session_class=Failing))
    gc.disable()
    try:
        async with open_scope():
            await jenny.execute(SELECT)
        await asyncio.sleep(0)
        assert errors and {error() for error in errors} == {None}
    finally:
        gc.enable()
    await engine.dispose()


def test_S3_a_connection_that_the_application_lent_is_not_taken(engine: Engine, way: Way) -> None:
    """A session bound to the application's own connection leaves it open."""
    with engine.connect() as connection:
        jenny = SessionJenny(sessionmaker(connection))
        way(lambda: use(jenny.session))
        assert not connection.closed
        assert connection.scalar(SELECT) == 1


def test_S3_a_removed_session_that_is_used_on_is_closed_with_its_scope(
    jenny: Jenny, engine: Engine, way: Way
) -> None:
    """After `remove()` a captured session still belongs to its scope."""

    def body() -> None:
        session = use(jenny.session)
        jenny.remove()
        assert checked_out(engine) == 0
        use(session)
        use(jenny.session)
        assert checked_out(engine) == 2

    way(body)
    assert checked_out(engine) == 0


@pytest.mark.parametrize("kind", [Session, CannotClose])
def test_S3_a_session_that_the_factory_has_begun_is_given_back(
    engine: Engine, kind: type[Session]
) -> None:
    """A transaction that was open before the scope knew the session ends, also if close() fails."""
    jenny = SessionJenny(lambda: use(kind(engine)))
    with open_scope():
        session = jenny.session
        assert session.in_transaction()
        assert checked_out(engine) == 1
    out = checked_out(engine)
    Session.close(session)
    assert out == 0


@pytest.mark.told
def test_S3_nested_transactions_are_given_back(make_engine: MakeEngine) -> None:
    """Savepoints that are open at the end go with the rest."""
    engine = make_engine(writer=True)
    jenny = SessionJenny(sessionmaker(engine))
    with open_scope():
        session = jenny.session
        with session.begin_nested():
            session.add(Data(count=1))
        session.begin_nested()
        session.add(Data(count=2))
        session.flush()
    assert checked_out(engine) == 0
    assert counts(engine) == [0]


def test_S3_a_session_on_several_databases_gives_all_back(make_engine: MakeEngine) -> None:
    """Every connection of one session goes back to its own pool."""
    engines = [make_engine(), make_engine()]
    jenny = SessionJenny(sessionmaker())
    with open_scope():
        for engine in engines:
            jenny.session.execute(SELECT, bind_arguments={"bind": engine})
        assert [checked_out(engine) for engine in engines] == [1, 1]
    assert [checked_out(engine) for engine in engines] == [0, 0]


def test_S3_a_connection_that_was_invalidated_is_no_trouble(jenny: Jenny, engine: Engine) -> None:
    """The application may have given up its connection itself."""
    with open_scope():
        jenny.session.connection().invalidate()
    with open_scope():
        use(jenny.session)
        jenny.session.invalidate()
    assert checked_out(engine) == 0


@pytest.mark.parametrize("phase", ["after_transaction_end", "after_rollback", "before_commit"])
def test_S3_a_session_event_that_raises_leaves_nothing_out(
    make_engine: MakeEngine, phase: str
) -> None:
    """Listeners of the application may fail at the end; the connection is back all the same."""
    engine = make_engine(pool_size=1)
    jenny = SessionJenny(sessionmaker(engine))

    def fail(*_: object) -> None:
        raise RuntimeError("mine")

    with open_scope():
        session = use(jenny.session)
        event.listen(session, phase, fail)
        if phase == "before_commit":
            with pytest.raises(RuntimeError):
                session.commit()
    assert checked_out(engine) == 0
    with engine.connect() as connection:
        assert connection.scalar(SELECT) == 1


_FORK = """
import asyncio, os, signal
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import NullPool
from rope_middleware import SessionJenny, open_scope

jenny = SessionJenny(sessionmaker(create_engine("sqlite://", poolclass=NullPool)))

async def request():
    async with open_scope():
        jenny.execute(text("SELECT 1"))

asyncio.run(request())
child = os.fork()
if child == 0:
    signal.alarm(20)
    asyncio.run(request())
    os._exit(0)
print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_S3_a_forked_process_has_threads_of_its_own() -> None:
    """A server that forks its workers after a request was served in it."""
    assert run_python("-c", _FORK).stdout == "child: 0\n"


def test_S3_the_thread_ends_the_scope_also_where_its_loop_is_gone(
    jenny: SessionJenny[Any], engine: Engine
) -> None:
    """A loop that is closed in the middle of a rollback: the connection comes back."""
    reached, may_go = hold_up(engine, "rollback")
    loop = asyncio.new_event_loop()
    request = ask(ASGIRopeMiddleware(asgi_app(lambda: jenny.execute(SELECT))))
    task = loop.create_task(request)
    while not reached.is_set():
        loop.run_until_complete(asyncio.sleep(0))
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # that is what is tested
    loop.close()
    may_go.set()
    eventually(lambda: checked_out(engine) == 0, lambda: engine.pool.status())
    # The worker has come out of it, and takes the next.
    asyncio.run(ask(ASGIRopeMiddleware(asgi_app(lambda: jenny.execute(SELECT)))))


async def test_S3_a_rollback_that_does_not_come_back_holds_a_cancelled_request_for_its_grace(
    jenny: Jenny, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the connection is given up, and the scope is closed."""
    reached, may_go = threading.Event(), threading.Event()

    def freeze(connection: Any) -> None:
        reached.set()
        assert may_go.wait(PATIENCE)

    monkeypatch.setattr(engine.dialect, "do_rollback", freeze)
    scopes: list[Scope] = []

    async def request() -> None:
        async with open_scope(close_timeout=0.2) as scope:
            scopes.append(scope)
            jenny.execute(SELECT)

    task = asyncio.create_task(request())
    await poll(reached.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, PATIENCE)
    assert scopes[0].closed
    assert checked_out(engine) == 0
    may_go.set()


@pytest.mark.parametrize("kind", ["raises", "is itself"])
def test_S3_an_odd_error_keeps_no_session_from_being_closed(
    make_engine: MakeEngine, kind: str
) -> None:
    """The log names the driver's error by `orig`, which may be anything."""

    class OddError(Exception):
        @property
        def orig(self) -> object:
            if kind == "raises":
                raise ValueError("no orig")
            return self

    first, second = make_engine(), make_engine()

    @event.listens_for(first, "rollback")
    def fail(connection: Any) -> None:
        raise OddError

    with open_scope() as scope:
        for engine in (first, second):
            SessionJenny(sessionmaker(engine)).execute(SELECT)
    assert scope.closed
    assert (checked_out(first), checked_out(second)) == (0, 0)


async def test_S3_async_an_exception_passes_and_everything_is_given_back(store: Store) -> None:
    """The application's own error arrives as it was; the ContextVar has its former value."""
    error = LookupError("mine")

    async def handler() -> None:
        store.jenny.add(Row(n=1))
        await store.jenny.flush()
        raise error

    with pytest.raises(LookupError) as caught:
        await serve(handler)
    assert caught.value is error
    assert store.held() == 0
    assert no_scope_here()
    assert store.rows() == []


async def pieces(store: Store) -> AsyncGenerator[int]:
    async with open_scope("pieces"):
        await store.jenny.execute(SELECT)
        yield 1
        yield 2


async def test_S3_a_generator_that_is_closed_early_gives_everything_back(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """`aclose()` can be awaited, so the connection is returned whole and nobody complains."""
    invalidated: list[object] = []
    event.listen(store.engine, "invalidate", lambda *told: invalidated.append(told))
    running = pieces(store)
    assert await anext(running) == 1
    assert store.held() == 1
    await running.aclose()
    assert store.held() == 0
    assert invalidated == []
    assert [record for record in caplog.records if record.name == "rope_middleware"] == []


async def test_S3_a_generator_that_is_forgotten_gives_everything_back(store: Store) -> None:
    """The event loop closes it when it is collected: a client left a stream."""
    running = pieces(store)
    assert await anext(running) == 1
    assert store.held() == 1
    del running
    gc.collect()
    await poll(lambda: store.held() == 0)


async def test_S3_a_coroutine_that_is_closed_gives_everything_back(store: Store) -> None:
    """Nothing can be awaited there: the connection is invalidated, and the pool has its place."""

    waits = False

    async def handler() -> None:
        nonlocal waits
        await store.jenny.execute(SELECT)
        waits = True
        await asyncio.Event().wait()

    for work in (serve(handler), open_scope()(handler)(), serve(handler, commit_on_success=True)):
        waits = False
        step = work.__await__()
        waiting = next(step)
        while not waits:
            while not waiting.done():  # an asyncio future
                await asyncio.sleep(0)
            waiting = next(step)
        step.close()
        assert store.held() == 0
        assert no_scope_here()


class FailingSession(AsyncSession):
    """Its close fails before it gives its connection back."""

    async def close(self) -> None:
        raise OSError("broken close")


async def test_S3_async_a_close_that_fails_is_logged_and_the_next_session_is_closed(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It replaces no exception of the application, and its connection is invalidated."""
    engine = small_async_engine(tmp_path / "failing.db")
    failing = AsyncSessionJenny(async_sessionmaker(engine, class_=FailingSession))
    invalidated: list[object] = []
    event.listen(engine.sync_engine, "invalidate", lambda *told: invalidated.append(told))

    async def handler() -> None:
        for jenny in jennies:
            await jenny.execute(SELECT)
        if len(invalidated) == 1:
            raise LookupError("mine")

    jennies = [store.jenny, failing]
    await serve(handler)
    assert (checked_out(engine), store.held()) == (0, 0)
    assert len(invalidated) == 1
    assert "OSError" in caplog.text
    assert "GET /thing" in caplog.text
    jennies.reverse()
    with pytest.raises(LookupError, match="mine"):
        await serve(handler)
    assert (checked_out(engine), store.held()) == (0, 0)
    assert len(invalidated) == 2
    await engine.dispose()


async def test_S3_async_a_rollback_that_fails_in_the_driver_invalidates_the_connection(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """`Session.close()` forgets its connections before it fails; the scope knows them."""
    arm: bool

    @event.listens_for(store.engine, "rollback")
    def fail(connection: object) -> None:
        if arm:
            raise OSError("broken rollback")

    for arm in (True, False):  # noqa: B007
        await serve(lambda: store.jenny.execute(SELECT))
        assert store.held() == 0
    assert caplog.text.count("OSError: broken rollback") == 1


async def test_S3_in_the_end_the_context_is_as_before(store: Store) -> None:
    """Inside of another scope the outer one is current again, also after an error."""
    async with open_scope() as outer:
        with suppress(LookupError):
            async with open_scope():
                raise LookupError
        assert current_scope() is outer
        with suppress(asyncio.CancelledError):
            async with open_scope():
                raise asyncio.CancelledError
        assert current_scope() is outer


@served("commit")  # after which there is no connection to invalidate
@pytest.mark.parametrize("fail", ["", "before start", "chunk 2", "close"])
def test_S3_a_failing_close_of_a_session_is_logged_only(
    wrap: Wrap, fail: str, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """It replaces neither answer nor error, strands no other session, and frees the connection."""
    first, engine, last = (make_engine() for _ in range(3))
    bad = SessionJenny(sessionmaker(engine, class_=CannotClose))
    invalidated: list[Any] = []
    event.listen(engine, "invalidate", lambda *args: invalidated.append(args))
    before, after = SessionJenny(sessionmaker(first)), SessionJenny(sessionmaker(last))

    class All(Probe):
        def use(self, where: str) -> None:
            touch(before)
            touch(self.jenny)
            touch(after)
            super().use(where)

    probe = All(bad, fail=fail)
    with caplog.at_level(logging.ERROR, logger="rope_middleware"):
        seen = Server()(wrap(probe))
    if fail in ("before start", "chunk 2"):
        assert seen.error == (ValueError, f"failed: {fail}")
    else:
        assert seen.error is None
        assert seen.body == b"123"
        assert seen.close_error == ((ValueError, "failed: close") if fail else None)
    assert probe.scopes[0].closed
    assert [checked_out(each) for each in (first, engine, last)] == [0, 0, 0]
    assert len(invalidated) == 1  # closed, and not used again in an unknown state
    assert any(record.name == "rope_middleware" for record in caplog.records)


@served("commit")  # which fails then, and is an error response
def test_S3_a_lost_connection_is_no_leak(
    wrap: Wrap, jenny: Jenny, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver that fails at rollback: the answer stands, the connection is gone from the pool."""
    broken: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        touch(jenny)
        jenny.session.add(Row(name="x"))
        jenny.session.flush()
        driver = jenny.session.connection().connection.driver_connection
        broken.append(driver)
        driver.close()  # behind SQLAlchemy's back
        start_response("200 OK", HEADERS)
        return [b"fine"]

    with caplog.at_level(logging.ERROR):
        seen = Server()(wrap(app))
    assert seen.body == b"fine"
    assert seen.error is None and seen.close_error is None
    assert checked_out(engine) == 0
    assert rows(engine) == 0


def test_S3_after_any_path_the_next_request_is_served(wrap: Wrap, make_engine: MakeEngine) -> None:
    """A pool of one connection survives every way a request can end, one after the other."""
    engine = make_engine(pool_size=1)
    jenny = SessionJenny(sessionmaker(engine))
    fails = ["", "before start", "after start", "chunk 1", "chunk 3", "close"]
    for kind in BODIES:
        for fail in fails:
            for server in (Server(), Server(take=1), Server(close=2), Server(take=2, close=0)):
                probe = Probe(jenny, kind, fail)
                if fail == "close" and not server.close:
                    continue  # an unraisable error, see W3
                seen = server(wrap(probe))
                assert all(isinstance(session, Session) for session in probe.sessions)
                assert probe.sessions, (kind, fail, seen.error)
                del seen
                if not server.close:
                    gc.collect()
                assert probe.scope.closed
                assert checked_out(engine) == 0


def test_S3_an_error_without_a_text_does_not_keep_the_scope_open(
    jenny: Jenny, engine: Engine
) -> None:
    """Looking for what to note on an error must not raise another one."""

    class MuteError(Exception):
        def __str__(self) -> str:
            raise ValueError

    with pytest.raises(MuteError), open_scope():
        jenny.session.execute(SELECT)
        raise MuteError
    assert checked_out(engine) == 0
    assert no_scope_here()


def test_S3_what_clear_forgets_in_a_transaction_is_closed_all_the_same(
    jenny: Jenny, engine: Engine
) -> None:
    """`registry.clear()` forgets the session; the scope does not."""
    with open_scope():
        jenny.session.execute(SELECT)
        jenny.registry.clear()
        assert checked_out(engine) == 1
    assert checked_out(engine) == 0
