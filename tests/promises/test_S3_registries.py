"""`RopeMiddleware(app, registries=[...])`: plain scoped_sessions that end with the request."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import IllegalStateChangeError, InvalidRequestError, OperationalError
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from rope_middleware import (
    ASGIRopeMiddleware,
    NoScopeError,
    RopeMiddleware,
    ScopeClosedError,
    SessionJenny,
    current_scope,
    open_scope,
)
from tests.kit.asgi import ASGIClient, answer, serve
from tests.kit.engines import MakeEngine, counts
from tests.kit.leaks import checked_out
from tests.kit.models import Data
from tests.kit.sessions import SELECT, Jenny, errors_in, use
from tests.kit.waiting import PATIENCE
from tests.kit.ways import REQUESTS, Way, by_wsgi_request


async def nobody_calls(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("never called")


@pytest.mark.parametrize("bad", [[object()], ["Session"], [None], [Session]])
def test_registries_that_are_no_scoped_sessions_are_refused(bad: Any) -> None:
    """At once, and by a TypeError that says what is asked for."""
    with pytest.raises(TypeError, match="scoped_session"):
        RopeMiddleware(nobody_calls, registries=bad)


def test_registries_is_a_list(jenny: Jenny) -> None:
    """A single one that is not in a list is refused in words; of a jenny: it needs no mention."""
    with pytest.raises(TypeError, match="needs no mention"):
        RopeMiddleware(nobody_calls, registries=jenny)
    plain: Any = scoped_session(sessionmaker(), scopefunc=current_scope)
    with pytest.raises(TypeError, match="list"):
        RopeMiddleware(nobody_calls, registries=plain)


@pytest.fixture(params=REQUESTS, ids=lambda f: f.__name__)
def ask(request: pytest.FixtureRequest) -> Way:
    """Serve one request by an application of either protocol."""
    return request.param  # type: ignore[no-any-return]


def scoped(engine: Engine, **options: Any) -> scoped_session[Session]:
    """Make the scoped_session that the documentation tells to make."""
    return scoped_session(sessionmaker(engine, **options), scopefunc=current_scope)


def test_S3_a_plain_scoped_session_ends_with_the_request(ask: Way, engine: Engine) -> None:
    """It has one session for each request, and leaves nothing in its registry."""
    plain = scoped(engine)
    seen: list[Session] = []

    def view() -> None:
        seen.append(plain())
        use(plain)
        plain.add(Data(count=9))
        plain.flush()
        assert plain() is seen[-1]
        assert checked_out(engine) == 1

    for _ in range(2):
        ask(view, registries=[plain])
        assert checked_out(engine) == 0
    assert seen[0] is not seen[1]
    registry: Any = plain.registry
    assert registry.registry == {}
    assert counts(engine) == [0]


def test_S3_without_registries_it_stays(engine: Engine) -> None:
    """What the list is for: a registry that it does not name keeps the session, and the scope."""
    plain = scoped(engine)
    by_wsgi_request(lambda: use(plain), registries=[])
    registry: Any = plain.registry
    assert len(registry.registry) == 1
    assert checked_out(engine) == 1
    for session in registry.registry.values():
        session.close()


def test_S3_a_request_that_does_not_use_it_makes_no_session(ask: Way, engine: Engine) -> None:
    """Nor does the end of the request."""
    made: list[Session] = []

    def factory() -> Session:
        made.append(Session(engine))
        return made[-1]

    plain = scoped_session(factory, scopefunc=current_scope)  # type: ignore[arg-type]
    ask(lambda: None, registries=[plain])
    assert made == []


def test_S3_many_registries_and_a_jenny(ask: Way, make_engine: MakeEngine) -> None:
    """Each is removed, in one request with a jenny, which needs no mention."""
    engines = [make_engine() for _ in range(4)]
    plains = [scoped(engine) for engine in engines[:3]]
    jenny = SessionJenny(sessionmaker(engines[3]))

    def view() -> None:
        for each in (*plains, jenny):
            use(each())
        assert [checked_out(engine) for engine in engines] == [1, 1, 1, 1]

    ask(view, registries=iter(plains))
    assert [checked_out(engine) for engine in engines] == [0, 0, 0, 0]
    ask(view, registries=tuple(plains))
    assert [checked_out(engine) for engine in engines] == [0, 0, 0, 0]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_S3_one_whose_remove_raises_does_not_keep_the_others(
    ask: Way, make_engine: MakeEngine, position: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, the response stands, and its connection is back as well."""

    class CannotClose(Session):
        def close(self) -> None:
            raise RuntimeError("cannot close")

    engines = [make_engine(pool_size=1) for _ in range(3)]
    plains = [
        scoped(engine, class_=CannotClose if number == position else Session)
        for number, engine in enumerate(engines)
    ]

    def view() -> None:
        for plain in plains:
            use(plain)

    for _ in range(2):
        caplog.clear()
        ask(view, registries=plains)
        assert [checked_out(engine) for engine in engines] == [0, 0, 0]
        assert len(errors_in(caplog)) == 1
        assert "RuntimeError" in errors_in(caplog)[0]


def test_S3_one_whose_scoped_session_itself_cannot_remove(
    ask: Way, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """An overridden `remove()` that raises does no harm, either."""

    class Broken(scoped_session[Session]):
        def remove(self) -> None:
            raise RuntimeError("cannot remove")

    engines = [make_engine(pool_size=1), make_engine(pool_size=1)]
    plains = [Broken(sessionmaker(engines[0]), scopefunc=current_scope), scoped(engines[1])]

    def view() -> None:
        for plain in plains:
            use(plain)

    ask(view, registries=plains)
    assert [checked_out(engine) for engine in engines] == [0, 0]
    assert len(errors_in(caplog)) == 1


def test_S3_an_error_of_the_application_comes_out(ask: Way, engine: Engine) -> None:
    """And its session is removed."""
    plain = scoped(engine)

    def view() -> None:
        use(plain)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        ask(view, registries=[plain])
    assert checked_out(engine) == 0


def test_S6_outside_of_a_request_there_is_no_session(engine: Engine) -> None:
    """`scopefunc=current_scope` refuses, where a thread-local registry would make one."""
    with pytest.raises(NoScopeError):
        scoped(engine)()


def test_C2_a_plain_scoped_session_is_committed(ask: Way, engine: Engine) -> None:
    """With `commit_on_success` it takes part in the commit, and in the roll-back."""
    plain = scoped(engine)

    def view() -> None:
        plain.add(Data(count=9))

    def doomed() -> None:
        plain.add(Data(count=10))
        plain.flush()
        current_scope().doom()

    ask(view, registries=[plain], commit_on_success=True)
    ask(doomed, registries=[plain], commit_on_success=True)
    assert checked_out(engine) == 0
    assert counts(engine) == [0, 9]


def test_S5_when_on_close_runs_the_registries_are_empty(ask: Way, engine: Engine) -> None:
    """They belong to the scope's sessions, which are closed by then."""
    plain = scoped(engine)
    seen: list[int] = []

    def view() -> None:
        use(plain)
        current_scope().on_close(lambda: seen.append(checked_out(engine)))

    ask(view, registries=[plain])
    assert seen == [0]


def test_S4_a_scoped_session_that_is_reached_too_late(ask: Way, engine: Engine) -> None:
    """`current_scope()` is its key, and raises there; no session is made or kept."""
    plain = scoped(engine)
    contexts: list[contextvars.Context] = []
    ask(lambda: contexts.append(contextvars.copy_context()), registries=[plain])
    with pytest.raises(ScopeClosedError):
        contexts[0].run(plain)
    registry: Any = plain.registry
    assert registry.registry == {}


def test_Y1_a_plain_async_scoped_session_ends_with_the_request(
    tmp_path: Path, engine: Engine, no_leaks: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside a sync one, also where its `remove()` raises."""

    async def main() -> None:
        async_engine = create_async_engine(
            f"sqlite+aiosqlite:///{tmp_path}/async.sqlite", pool_size=1, max_overflow=0
        )
        pool: Any = async_engine.pool
        plain = scoped(engine)
        fine = async_scoped_session(async_sessionmaker(async_engine), scopefunc=current_scope)
        broken = Broken(async_sessionmaker(async_engine), scopefunc=current_scope)
        used: list[Any] = [fine]

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await used[0].execute(text("SELECT 1"))
            assert pool.checkedout() == 1
            await anyio.to_thread.run_sync(use, plain)
            await answer(send)

        wrapped = ASGIRopeMiddleware(app, [broken, fine, plain])
        try:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=wrapped)) as client:
                for each, errors in ((fine, 0), (broken, 1), (fine, 1)):
                    used[0] = each
                    assert (await client.get("http://test/")).status_code == 200
                    assert pool.checkedout() == 0
                    assert checked_out(engine) == 0
                    assert len(errors_in(caplog)) == errors
        finally:
            await async_engine.dispose()

    class Broken(async_scoped_session[Any]):
        async def remove(self) -> None:
            raise RuntimeError("cannot remove")

    anyio.run(main)


def test_S6_an_inner_scope_ends_the_plain_sessions_that_are_used_in_it(
    ask: Way, engine: Engine
) -> None:
    """The registries of a request are those of its inner scopes, too."""
    plain = scoped_session(sessionmaker(engine), scopefunc=current_scope)

    def view() -> None:
        with open_scope():
            plain.execute(SELECT)
        assert checked_out(engine) == 0

    ask(view, registries=[plain])
    assert not plain.registry.registry


@pytest.mark.parametrize("begun", [True, False])
def test_S4_a_plain_session_that_was_kept_is_refused(ask: Way, engine: Engine, begun: bool) -> None:
    """A session of `registries=` knows its scope, too, also where it was never used there."""
    plain = scoped(engine)
    contexts: list[contextvars.Context] = []

    def view() -> Session:
        contexts.append(contextvars.copy_context())
        return use(plain()) if begun else plain()

    kept = ask(view, registries=[plain])
    for _ in range(2):
        with pytest.raises(ScopeClosedError):
            contexts[0].run(kept.execute, SELECT)
    assert checked_out(engine) == 0


def test_S3_a_removed_plain_session_that_is_used_on_is_closed_with_its_request(
    ask: Way, engine: Engine
) -> None:
    """The scoped_session does not know it any more; the request does."""
    plain = scoped(engine)

    def view() -> Session:
        session = use(plain())
        plain.remove()
        for _ in range(2):
            use(session).rollback()
        return use(session)

    kept = ask(view, registries=[plain])
    assert checked_out(engine) == 0
    with pytest.raises(ScopeClosedError):
        use(kept)


def _outlive(
    ask: Way, plain: Any, work: Callable[[], None], inside: threading.Event, go_on: threading.Event
) -> None:
    """Serve a request whose thread is `inside` of `work` at its end, and may go on after it."""
    with ThreadPoolExecutor(1) as pool:

        def view() -> Future[None]:
            future = pool.submit(contextvars.copy_context().run, work)
            assert inside.wait(30)
            return future

        try:
            future = ask(view, registries=[plain])
        finally:
            go_on.set()
        future.result(30)
    assert plain.registry.registry == {}


def test_S3_a_plain_session_in_use_by_a_thread_when_the_request_ends(
    ask: Way, make_engine: MakeEngine
) -> None:
    """SQLAlchemy refuses to close it under the thread's hands; nothing stays out.

    Bridges from ASGI to WSGI work in threads that outlive a client who hangs up.
    """
    engine = make_engine(pool_size=2)
    plain = scoped(engine)
    inside, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        inside.set()
        assert go_on.wait(30)

    def work() -> None:
        with suppress(ScopeClosedError, IllegalStateChangeError):
            plain().connection()

    event.listen(engine, "checkout", slow)
    _outlive(ask, plain, work, inside, go_on)
    assert checked_out(engine) == 0


def test_S4_a_plain_session_that_is_made_while_the_request_ends(ask: Way, engine: Engine) -> None:
    """Its factory takes longer than the request: nobody removes it any more, and it is refused."""
    made, ended = threading.Event(), threading.Event()

    def factory() -> Session:
        made.set()
        assert ended.wait(30)
        return Session(engine)

    plain: Any = scoped_session(factory, scopefunc=current_scope)  # type: ignore[arg-type]

    def work() -> None:
        session = plain()
        for _ in range(2):
            with pytest.raises(ScopeClosedError):
                session.execute(SELECT)
        assert checked_out(engine) == 0

    _outlive(ask, plain, work, made, ended)


@pytest.mark.told
@pytest.mark.parametrize("commits", [False, True])
def test_Y1_a_plain_async_session_in_use_by_a_task_when_the_request_ends(
    tmp_path: Path, no_leaks: None, commits: bool
) -> None:
    """The task gets its connection only after the end, and gives it back.

    Neither a commit nor its rollback is possible meanwhile, and the session is not forgotten then.
    """

    async def main() -> None:
        engine = create_async_engine(
            f"sqlite+aiosqlite:///{tmp_path}/a.sqlite", pool_size=1, max_overflow=0
        )
        plain = async_scoped_session(async_sessionmaker(engine), scopefunc=current_scope)
        tasks: list[asyncio.Task[Any]] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            tasks.append(asyncio.create_task(plain().execute(SELECT)))
            await asyncio.sleep(0)  # it waits for the pool now
            await answer(send)

        async with engine.connect():
            with pytest.raises(InvalidRequestError) if commits else nullcontext():
                wrapped = ASGIRopeMiddleware(app, [plain], commit_on_success=commits)
                await ASGIClient()(wrapped, "/")
        with pytest.raises((ScopeClosedError, IllegalStateChangeError)):
            await tasks[0]
        pool: Any = engine.pool
        assert pool.checkedout() == 0
        await engine.dispose()

    asyncio.run(main())


def test_C6_what_a_plain_session_committed_is_not_written_again(ask: Way, engine: Engine) -> None:
    """A commit of a session of `registries=` ends the retries."""
    plain = scoped_session(sessionmaker(engine), scopefunc=current_scope)
    runs: list[int] = []

    def view() -> None:
        runs.append(1)
        plain.add(Data(count=7))
        plain.commit()
        plain.execute(text("INSERT INTO nowhere VALUES (1)"))

    @event.listens_for(engine, "handle_error")
    def refuse(context: Any) -> None:
        context.original_exception.sqlite_errorcode = 5

    with pytest.raises(OperationalError):
        ask(view, registries=[plain], retries=3)
    assert len(runs) == 1
    assert counts(engine) == [0, 7]


@pytest.mark.parametrize("is_plain", [False, True], ids=["jenny", "registries"])
def test_S4_a_session_that_waits_for_a_connection_at_the_end_is_no_error(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture, is_plain: bool
) -> None:
    """Who waits is refused when the connection comes; nothing has failed, and nothing stays out."""
    engine = make_engine(1)
    maker = sessionmaker(engine)
    sessions: Any = (
        scoped_session(maker, scopefunc=current_scope) if is_plain else SessionJenny(maker)
    )
    said: list[object] = []

    def straggle() -> None:
        try:
            sessions.execute(SELECT)
        except ScopeClosedError as error:
            said.append(type(error))

    threads: list[threading.Thread] = []

    def work() -> None:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(straggle,))
        threads.append(thread)
        thread.start()
        time.sleep(0.3)  # by then it waits for the only connection

    with engine.connect():
        asyncio.run(serve(work, registries=[sessions] if is_plain else []))
        assert len(threads) == 1
        assert said == []
    threads[0].join(PATIENCE)
    assert said == [ScopeClosedError]
    assert checked_out(engine) == 0
    assert [record.getMessage() for record in caplog.records if record.levelno > 20] == []
    if is_plain:
        assert not sessions.registry.registry
