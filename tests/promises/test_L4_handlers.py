"""L4: the session in error handlers and dependencies: what works, and errors that say what does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import flask
import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import PlainTextResponse
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event, func, select
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker

from rope_middleware import (
    AsyncSessionJenny,
    NoScopeError,
    RopeError,
    RopeMiddleware,
    SessionJenny,
    open_scope,
)
from tests.kit.engines import create_tables, rows, small_async_engine
from tests.kit.leaks import checked_out
from tests.kit.models import Child, Row
from tests.kit.sessions import Jenny

COUNT = select(func.count()).select_from(Row)


@pytest.fixture
def jenny(engine: Engine) -> Jenny:
    jenny = SessionJenny(sessionmaker(engine), strict=True)
    with open_scope(commit_on_success=True):
        jenny.add(Row(n=1))
    return jenny


def fails(jenny: Jenny) -> None:
    jenny.add(Row(n=1))
    jenny.flush()


@pytest.mark.parametrize("rolls_back", [True, False])
def test_L4_a_handler_rolls_back_and_reads(rolls_back: bool, jenny: Jenny, engine: Engine) -> None:
    """It has the request's session; without the rollback the error says what to call."""
    app = FastAPI()
    app.add_middleware(RopeMiddleware, commit_on_success=True)
    app.get("/")(lambda: fails(jenny))

    @app.exception_handler(IntegrityError)
    def conflict(request: Any, error: Any) -> PlainTextResponse:
        if rolls_back:
            jenny.rollback()
        return PlainTextResponse(str(jenny.scalar(COUNT)), 409)

    if rolls_back:
        answer = TestClient(app).get("/")
        assert (answer.status_code, answer.text) == (409, "1")
    else:
        with pytest.raises(PendingRollbackError) as caught:
            TestClient(app).get("/")
        assert any("jenny.rollback()" in note for note in caught.value.__notes__)
    assert checked_out(engine) == 0


@pytest.mark.parametrize("rolls_back", [True, False])
def test_L4_an_async_handler_rolls_back_and_reads(rolls_back: bool, tmp_path: Path) -> None:
    """The twin."""
    create_tables(tmp_path / "async.sqlite")
    engine = small_async_engine(tmp_path / "async.sqlite")
    jenny = AsyncSessionJenny(async_sessionmaker(engine))
    app = FastAPI()
    app.add_middleware(RopeMiddleware, commit_on_success=True)

    @app.get("/")
    async def view() -> None:
        jenny.add_all([Row(n=1), Row(n=1)])
        await jenny.flush()

    @app.exception_handler(IntegrityError)
    async def conflict(request: Any, error: Any) -> PlainTextResponse:
        if rolls_back:
            await jenny.rollback()
        return PlainTextResponse(str(await jenny.scalar(COUNT)), 409)

    @app.exception_handler(Exception)
    async def broken(request: Any, error: Exception) -> PlainTextResponse:
        assert any("jenny.rollback()" in note for note in error.__notes__)
        async with open_scope():
            return PlainTextResponse(f"sorry, {await jenny.scalar(COUNT)}", 500)

    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/")
        assert client.portal is not None
        client.portal.call(engine.dispose)
    wanted = (409, "0") if rolls_back else (500, "sorry, 0")
    assert (answer.status_code, answer.text) == wanted


def test_L4_the_page_of_500_opens_a_scope(jenny: Jenny, engine: Engine) -> None:
    """Starlette's handler of Exception stands around every middleware, and the error says so."""
    app = FastAPI()
    app.add_middleware(RopeMiddleware)
    app.get("/")(lambda: fails(jenny))

    @app.exception_handler(Exception)
    def broken(request: Any, error: Any) -> PlainTextResponse:
        with pytest.raises(NoScopeError, match="Starlette's handler of Exception"):
            jenny.scalar(COUNT)
        with open_scope():
            return PlainTextResponse(f"sorry, {jenny.scalar(COUNT)}", 500)

    answer = TestClient(app, raise_server_exceptions=False).get("/")
    assert (answer.status_code, answer.text) == (500, "sorry, 1")
    assert checked_out(engine) == 0


def test_L4_flasks_handlers_roll_back_and_read(jenny: Jenny, engine: Engine) -> None:
    """All of them, that of 500 too, run within the request."""
    app = flask.Flask("application")
    app.wsgi_app = RopeMiddleware(app.wsgi_app)  # type: ignore[method-assign]

    @app.get("/<name>")
    def view(name: str) -> str:
        fails(jenny) if name == "duplicate" else int(name)
        return ""

    @app.errorhandler(IntegrityError)
    @app.errorhandler(500)
    def answer(error: Exception) -> tuple[str, int]:
        jenny.rollback()
        return f"{jenny.scalar(COUNT)}", 409 if isinstance(error, IntegrityError) else 500

    client = app.test_client()
    for path, status in ("/duplicate", 409), ("/bug", 500):
        with client.get(path) as response:
            assert (response.status_code, response.text) == (status, "1")
    assert checked_out(engine) == 0


# -- a scope as a dependency -----------------------------------------------------------------------


async def async_scope() -> AsyncIterator[None]:
    async with open_scope(commit_on_success=True):
        yield


def sync_scope() -> Iterator[None]:
    with open_scope(commit_on_success=True):
        yield


@contextmanager
def inner() -> Iterator[None]:
    with open_scope(commit_on_success=True):
        yield


def nested_scope() -> Iterator[None]:
    with inner():
        yield


@pytest.mark.parametrize("is_async", [False, True])
def test_L4_an_async_dependency_gives_its_scope_to_endpoints(
    is_async: bool, jenny: Jenny, engine: Engine
) -> None:
    """Without any middleware; `def` and `async def` endpoints alike."""
    app = FastAPI()

    def view() -> None:
        jenny.add(Row(n=2))

    async def async_view() -> None:
        jenny.add(Row(n=2))

    scope: Any = Depends(async_scope, scope="function")
    app.post("/", status_code=201, dependencies=[scope])(async_view if is_async else view)
    assert TestClient(app).post("/").status_code == 201
    assert rows(engine) == 2
    assert checked_out(engine) == 0


@pytest.mark.parametrize("dependency", [sync_scope, nested_scope])
def test_L4_a_scope_that_nobody_would_find_is_refused(
    dependency: Any, jenny: Jenny, engine: Engine
) -> None:
    """FastAPI runs a plain dependency in a copy of the context: a 201 would have no row."""
    app = FastAPI()

    @app.post("/", status_code=201, dependencies=[Depends(dependency)])
    async def view() -> None:
        jenny.add(Row(n=2))

    with pytest.raises(RopeError, match='Make the dependency an "async def"'):
        TestClient(app).post("/")
    assert rows(engine) == 1


def test_L4_generators_that_keep_their_context_are_not_refused(
    jenny: Jenny, engine: Engine
) -> None:
    """A context manager in a worker thread, whose block runs there, has its scope."""

    def work() -> None:
        with inner(), contextmanager(nested_scope)():
            jenny.add(Row(n=2))

    async def main() -> None:
        await anyio.to_thread.run_sync(work)
        for _ in sync_scope():
            jenny.add(Row(n=3))

    anyio.run(main)
    assert rows(engine) == 3


def test_L4_a_dependency_of_scope_function_commits_before_the_answer(
    jenny: Jenny, engine: Engine
) -> None:
    """A commit that fails is no success then."""

    @event.listens_for(engine, "connect")
    def check_foreign_keys(connection: Any, record: object) -> None:
        connection.execute("PRAGMA foreign_keys = ON")

    engine.dispose()
    app = FastAPI()

    @app.post("/", status_code=201)
    async def view(_: Annotated[None, Depends(async_scope, scope="function")]) -> None:
        jenny.add(Child(parent=7))

    answer = TestClient(app, raise_server_exceptions=False).post("/")
    assert answer.status_code == 500
    assert checked_out(engine) == 0
