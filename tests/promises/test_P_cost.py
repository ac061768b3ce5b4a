"""P: what the promises on cost rest on, counted instead of timed: bytes, threads, tasks, cycles.

How long it takes is measured by ``make bench-check``.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import sys
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import scoped_session, sessionmaker

import rope_middleware
from rope_middleware import (
    ASGIRopeMiddleware,
    AsyncSessionJenny,
    SessionJenny,
    WSGIRopeMiddleware,
    open_scope,
)
from tests.kit.asgi import answer
from tests.kit.models import Data
from tests.kit.programs import run_python
from tests.kit.sessions import workers

HEADERS: list[tuple[str, str]] = []


minimal: ContextVar[object] = ContextVar("minimal")


def bytes_of(work: Callable[[], object]) -> int:
    """Return the bytes that `work` has in use at most; what stays of it afterwards is none.

    Of twenty times, as the measuring itself leaves some: its numbers, and what Python keeps of
    context variables. Before that Python has got used to the work.
    """
    for _ in range(50):
        work()
    tracemalloc.start()
    try:
        work()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(20):
            work()
        after, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / 20 < 20
    return most - before


class MinimalBody:
    def __init__(self, body: Any, token: Any) -> None:
        self.body, self.token = body, token

    def __iter__(self) -> Any:
        return iter(self.body)

    def close(self) -> None:
        minimal.reset(self.token)


def minimal_wsgi(app: Any) -> Any:
    def middleware(environ: Any, start_response: Any) -> Any:
        token = minimal.set(object())
        return MinimalBody(app(environ, start_response), token)

    return middleware


def minimal_asgi(app: Any) -> Any:
    async def middleware(scope: Any, receive: Any, send: Any) -> None:
        token = minimal.set(object())
        try:
            await app(scope, receive, send)
        finally:
            minimal.reset(token)

    return middleware


def wsgi(handler: Callable[[], object]) -> Any:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        handler()
        start_response("200 OK", HEADERS)
        return [b""]

    return app


def asgi(handler: Callable[[], Awaitable[object]]) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await handler()
        await answer(send)

    return app


def serve_wsgi(app: Any) -> Callable[[], None]:
    def start_response(status: Any, headers: Any, exc_info: Any = None) -> Any:
        pass

    def request() -> None:
        body = app({"REQUEST_METHOD": "GET", "PATH_INFO": "/"}, start_response)
        for _ in body:
            pass
        if hasattr(body, "close"):
            body.close()

    return request


async def send(message: Any) -> None:
    pass


def serve_asgi(app: Any) -> Callable[[], None]:
    """Requests without an event loop: one that has to wait for anything would fail."""

    def request() -> None:
        call = app({"type": "http", "method": "GET", "path": "/"}, None, send)
        try:
            call.send(None)
        except StopIteration:  # `pytest.raises` would leave a tuple each time
            return
        raise AssertionError("it waits for an event loop")

    return request


async def nothing() -> None:
    pass


def check_untouched(**options: Any) -> None:
    """Check what a request takes that touches no database."""
    before = workers()
    bare = wsgi(lambda: None)
    least = bytes_of(serve_wsgi(minimal_wsgi(bare)))
    assert bytes_of(serve_wsgi(WSGIRopeMiddleware(bare, **options))) <= least + 512

    bare = asgi(nothing)
    least = bytes_of(serve_asgi(minimal_asgi(bare)))
    assert bytes_of(serve_asgi(ASGIRopeMiddleware(bare, **options))) <= least + 512
    assert workers() == before


@pytest.mark.parametrize("options", ["", "commit_on_success=True"], ids=["plain", "commit"])
def test_P1_a_request_without_a_database_takes_next_to_nothing(options: str) -> None:
    """No thread, no event loop, and half a kilobyte more than the smallest middleware takes.

    In a process of its own: once scopes of `retries` have lived, Python 3.11 makes each one larger.
    """
    check = f"from tests.promises.test_P_cost import *; check_untouched({options})"
    run_python("-c", check)


def test_P2_what_has_nothing_open_ends_without_a_thread(engine: Engine) -> None:
    """A sync session whose transaction the application ended, in an async app."""
    jenny = SessionJenny(sessionmaker(engine))

    async def handler() -> None:
        jenny.execute(text("SELECT 1"))
        jenny.commit()

    before = workers()
    serve_asgi(ASGIRopeMiddleware(asgi(handler)))()  # which has no event loop to wait in
    assert workers() == before


@pytest.fixture
async def memory_jenny() -> AsyncIterator[AsyncSessionJenny[Any]]:
    engine = create_async_engine("sqlite+aiosqlite://")
    yield AsyncSessionJenny(async_sessionmaker(engine))
    await engine.dispose()


def counts_tasks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Note each task that the running loop makes from here on."""
    loop, tasks = asyncio.get_running_loop(), list[object]()
    make = loop.create_task
    monkeypatch.setattr(loop, "create_task", lambda *a, **k: tasks.append(a) or make(*a, **k))
    return tasks


@pytest.mark.anyio
async def test_P2_an_async_session_with_nothing_open_ends_without_a_task(
    memory_jenny: AsyncSessionJenny[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a greenlet: the request does not wait for anything after its handler."""
    tasks: list[list[object]] = []

    async def handler() -> None:
        await memory_jenny.execute(text("SELECT 1"))
        await memory_jenny.commit()
        tasks.append(counts_tasks(monkeypatch))

    app = ASGIRopeMiddleware(asgi(handler))
    await app({"type": "http", "method": "GET", "path": "/"}, None, send)  # type: ignore[arg-type]
    monkeypatch.undo()
    assert tasks == [[]]


@pytest.mark.anyio
async def test_P2_a_scope_by_hand_commits_an_async_session_in_one_task(
    memory_jenny: AsyncSessionJenny[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``async with Session.begin()`` does, which has one for its close()."""
    async with open_scope(commit_on_success=True):
        await memory_jenny.execute(text("SELECT 1"))
        tasks = counts_tasks(monkeypatch)
    monkeypatch.undo()
    assert len(tasks) == 1


class Calls:
    """Counts the calls of functions of the package; a coroutine that goes on is no new one."""

    def __init__(self) -> None:
        self.codes: list[CodeType] = []
        # Of coroutines, kept so that no later one is taken for an earlier one. (Of a function's,
        # that would keep its arguments: the cursor of a statement looks unread then.)
        self._frames: list[FrameType] = []
        self._package = str(Path(rope_middleware.__file__).parent)

    def __enter__(self) -> Calls:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self._package):
            return
        if code.co_flags & inspect.CO_COROUTINE:
            if any(frame is one for one in self._frames):
                return
            self._frames.append(frame)
        self.codes.append(code)

    def __str__(self) -> str:
        return ", ".join(code.co_qualname for code in self.codes)


async def calls_of_async_select(path: str, commit: bool = False) -> Calls:
    """Count the calls of a request with an AsyncSession and one SELECT."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    jenny = AsyncSessionJenny(async_sessionmaker(engine))

    async def handler() -> None:
        await jenny.execute(text("SELECT 1"))

    app: Any = ASGIRopeMiddleware(asgi(handler), commit_on_success=commit)
    scopes = [{"type": "http", "method": "GET", "path": "/"} for _ in range(6)]
    for scope in scopes[:3]:
        await app(scope, None, send)
    counted = [Calls() for _ in scopes[3:]]
    for calls, scope in zip(counted, scopes[3:], strict=True):
        with calls:
            await app(scope, None, send)
    await engine.dispose()
    # On a busy machine the ticker comes late: a request then sets a timer of its own.
    return min(counted, key=lambda calls: len(calls.codes))


def calls_of_select(path: str, commit: bool = False) -> Calls:
    """Count the calls of a WSGI request with one SELECT."""
    engine = create_engine(f"sqlite:///{path}")
    jenny = SessionJenny(sessionmaker(engine))
    app = wsgi(lambda: jenny.scalar(text("SELECT 1")))
    request = serve_wsgi(WSGIRopeMiddleware(app, commit_on_success=commit))
    request()
    with Calls() as calls:
        request()
    engine.dispose()
    return calls


# As counted on Python 3.11, on SQLAlchemy 2.0 and 2.1, whichever makes more of them.
# An AsyncSession left open, then committed; then the same in WSGI.
MOST_CALLS = 19, 48, 14, 24

_COUNT = """
import asyncio, sys
from tests.promises.test_P_cost import calls_of_async_select, calls_of_select
path = sys.argv[1]
found = (
    asyncio.run(calls_of_async_select(path)), asyncio.run(calls_of_async_select(path, True)),
    calls_of_select(path), calls_of_select(path, True)
)
print(*(len(one.codes) for one in found))
print(*found, sep="\\n")
"""


def test_P2_a_request_with_a_select_makes_few_calls(tmp_path: Path) -> None:
    """Left open, for us to end or to commit. Alone in a process: others leave sessions behind."""
    done = run_python("-c", _COUNT, tmp_path / "x.sqlite")
    counts = [int(count) for count in done.stdout.splitlines()[0].split()]
    assert all(found <= most for found, most in zip(counts, MOST_CALLS, strict=True)), done.stdout


def test_P3_in_a_scope_the_session_is_at_hand() -> None:
    """To ask for it takes next to no memory, as ``scoped_session.registry()`` does."""
    jenny, scoped = SessionJenny(sessionmaker()), scoped_session(sessionmaker())
    with open_scope():
        assert bytes_of(lambda: jenny.session) <= bytes_of(lambda: scoped.registry()) + 100
    scoped.remove()


@pytest.mark.parametrize("protocol", ["wsgi", "asgi"])
@pytest.mark.parametrize("commit", [False, True])
@pytest.mark.parametrize("work", ["read", "write"])
def test_P4_a_request_leaves_nothing_to_the_garbage_collector(
    engine: Engine, protocol: str, commit: bool, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 requests with a SELECT or an INSERT: no cycles, and nothing for each of them."""
    # The notes on who has just written (H5) come and go with the time: here each drops the last.
    monkeypatch.setattr("rope_middleware.session.holding.ended._SECOND", 0.0)
    jenny = SessionJenny(sessionmaker(engine))

    def use() -> None:
        if work == "write":
            jenny.add(Data())
        else:
            jenny.scalar(text("SELECT 1"))
        jenny.commit()

    async def ause() -> None:
        use()

    if protocol == "wsgi":
        request = serve_wsgi(WSGIRopeMiddleware(wsgi(use), commit_on_success=commit))
    else:
        request = serve_asgi(ASGIRopeMiddleware(asgi(ause), commit_on_success=commit))
    for _ in range(100):
        request()
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(300):
            request()
        after = len(gc.get_objects())
        assert gc.collect() < 30
        assert after - before < 30
    finally:
        gc.enable()
