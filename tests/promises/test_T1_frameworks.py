"""T1: the application's code and options are the production ones, whatever client calls it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import anyio
import factory
import httpx
import pytest
from fastapi import Depends, FastAPI
from flask import Flask
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from rope_middleware import (
    AsyncSessionJenny,
    ReadOnlyError,
    RopeError,
    RopeMiddleware,
    SessionJenny,
    current_scope,
    open_scope,
)
from rope_middleware.testing import Sandbox
from tests.kit.django import serve
from tests.kit.sandboxes import COUNT, Place, Row
from tests.kit.sessions import in_thread
from tests.servers.postgres import postgres_server

# By psycopg and asyncpg.
pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("place", ["postgresql"], indirect=True)]


@pytest.fixture(autouse=True)
def nothing_is_left(place: Place) -> Iterator[None]:
    yield
    assert place.rows() == 0


def app_of(place: Place, **options: Any) -> Any:
    """A Starlette application with endpoints of both kinds."""
    jenny, ajenny = options.pop("jennies", (place.jenny, place.ajenny))

    def add(request: Request) -> Response:
        jenny.session.add(Row(n=int(request.path_params["n"])))
        return Response(status_code=int(request.query_params.get("status", "201")))

    async def aadd(request: Request) -> Response:
        ajenny.session.add(Row(n=int(request.path_params["n"])))

        async def later() -> None:
            ajenny.session.add(Row(n=int(request.path_params["n"]) + 100))

        return Response(status_code=201, background=BackgroundTask(later))

    def count(request: Request) -> Response:
        return JSONResponse(jenny.session.scalar(COUNT))

    async def acount(request: Request) -> Response:
        return JSONResponse(await ajenny.session.scalar(COUNT))

    routes = [
        Route("/sync/{n}", add, methods=["POST"]),
        Route("/async/{n}", aadd, methods=["POST"]),
        Route("/sync", count),
        Route("/async", acount),
    ]
    return RopeMiddleware(Starlette(routes=routes), **({"commit_on_success": True} | options))


def test_T1_starlettes_test_client(place: Place) -> None:
    """A loop in a thread of its own for each request; background tasks are committed, too."""
    with Sandbox(place.jenny, place.ajenny):
        client = TestClient(app_of(place))
        assert client.post("/sync/1").status_code == 201
        assert client.post("/sync/2?status=400").status_code == 400
        assert client.get("/sync").json() == 1
        assert client.post("/async/5").status_code == 201
        assert client.get("/async").json() == 2
        assert place.jenny.session.scalar(COUNT) == 1


def test_T1_starlettes_test_client_with_a_lifespan(place: Place) -> None:
    """One loop for all requests, begun before the sandbox."""
    with TestClient(app_of(place)) as client:
        for _ in range(2):
            with Sandbox(place.jenny, place.ajenny):
                assert client.post("/sync/1").status_code == 201
                assert client.post("/async/5").status_code == 201
                assert client.get("/sync").json() == 1


async def test_T1_httpx_asgi_transport(place: Place) -> None:
    """The app runs in the test's own task, and many of them at once."""
    async with (
        Sandbox(place.jenny, place.ajenny),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app_of(place)), base_url="http://test"
        ) as client,
    ):
        place.jenny.session.add(Row(n=1000))
        place.jenny.session.commit()
        answers = await asyncio.gather(
            *(client.post(f"/{kind}/{n}") for n in range(1, 9) for kind in ("sync", "async")[:1])
        )
        assert {answer.status_code for answer in answers} == {201}
        assert (await client.get("/sync")).json() == 9
        answers = await asyncio.gather(*(client.post(f"/async/{n}") for n in range(11, 19)))
        assert {answer.status_code for answer in answers} == {201}
        assert (await client.get("/async")).json() == 16
        assert await place.ajenny.session.scalar(COUNT) == 16


def test_T1_flasks_test_client(place: Place) -> None:
    """WSGI: the request runs in the test's thread."""
    app = Flask(__name__)
    jenny = place.jenny

    @app.post("/<int:n>")
    def add(n: int) -> tuple[str, int]:
        jenny.session.add(Row(n=n))
        return "", 201

    app.wsgi_app = RopeMiddleware(  # type: ignore[method-assign]
        app.wsgi_app, commit_on_success=True
    )
    with Sandbox(jenny):
        assert app.test_client().post("/1").status_code == 201
        assert jenny.session.scalar(COUNT) == 1


def test_T1_fastapis_dependency_overrides(place: Place) -> None:
    """The session as a dependency, overridden or not, is one of the sandbox."""
    app = FastAPI()
    jenny = place.jenny

    def number() -> int:
        return 1

    @app.post("/")
    def add(n: int = Depends(number), session: Any = Depends(lambda: jenny.session)) -> int:
        session.add(Row(n=n))
        session.commit()
        return int(session.scalar(COUNT))

    app.dependency_overrides[number] = lambda: 7
    with Sandbox(jenny):
        assert TestClient(RopeMiddleware(app)).post("/").json() == 1
        assert jenny.session.get(Row, 7) is not None


def test_T1_djangos_test_client_around_a_mounted_app(place: Place) -> None:
    """Django's handler is a WSGI application like any other."""
    from django.core.handlers.wsgi import WSGIHandler
    from django.http import HttpResponse
    from django.test import Client

    jenny = place.jenny

    def add(request: Any, n: int) -> HttpResponse:
        jenny.session.add(Row(n=n))
        jenny.session.commit()
        return HttpResponse(str(jenny.session.scalar(COUNT)))

    serve("<int:n>", add)
    with Sandbox(jenny):
        assert Client().get("/1").content == b"1"  # in no scope: by rope
        app = RopeMiddleware(WSGIHandler())
        client = httpx.Client(transport=httpx.WSGITransport(app), base_url="http://test")
        assert client.get("/2").text == "2"


def test_T1_factory_boy(place: Place) -> None:
    """Factories write by the jenny, which is a scoped_session."""
    jenny = place.jenny

    class RowFactory(factory.alchemy.SQLAlchemyModelFactory):  # type: ignore[misc]
        class Meta:
            model = Row
            sqlalchemy_session = jenny
            sqlalchemy_session_persistence = "commit"

        n = factory.Sequence(lambda n: n + 1)

    with Sandbox(jenny):
        RowFactory.create_batch(3)
        with open_scope():
            assert jenny.session.scalar(COUNT) == 3


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_T1_sync_sessions_under_anyio(place: Place, anyio_backend: str) -> None:
    """asyncio and trio, in the loop's thread and in others."""
    jenny = place.jenny

    def work(n: int) -> None:
        with open_scope():
            jenny.session.add(Row(n=n))
            jenny.session.commit()

    async with Sandbox(jenny):
        async with anyio.create_task_group() as group:
            for n in range(1, 5):
                group.start_soon(anyio.to_thread.run_sync, work, n)
        assert jenny.session.scalar(COUNT) == 4
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app_of(place)), base_url="http://test"
        ) as client:
            assert (await client.get("/sync")).json() == 4


def test_T1_on_commit_runs_when_it_would(place: Place) -> None:
    """After the commit, never after a rollback; what it starts sees the row."""
    seen: list[int] = []

    def look() -> None:
        with open_scope():
            seen.append(place.jenny.session.scalar(COUNT))

    with Sandbox(place.jenny):
        with open_scope(commit_on_success=True) as scope:
            place.jenny.session.add(Row(n=1))
            scope.on_commit(look)
        with contextlib.suppress(ZeroDivisionError), open_scope(commit_on_success=True) as scope:
            place.jenny.session.add(Row(n=2))
            scope.on_commit(look)
            raise ZeroDivisionError
    assert seen == [1]


def test_T1_retries_run_the_request_again(place: Place) -> None:
    """A refused transaction is rolled back in the sandbox, and tried anew."""
    tries: list[int] = []
    app = Flask(__name__)

    @app.post("/")
    def add() -> tuple[str, int]:
        tries.append(1)
        place.jenny.session.add(Row(n=1))
        place.jenny.session.flush()
        if len(tries) == 1:
            place.jenny.session.execute(
                text("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$")
            )
        return "", 201

    wrapped = RopeMiddleware(app.wsgi_app, commit_on_success=True, retries=2)
    app.wsgi_app = wrapped  # type: ignore[method-assign]
    with Sandbox(place.jenny):
        assert app.test_client().post("/").status_code == 201
        assert place.jenny.session.scalar(COUNT) == 1
    assert len(tries) == 2


def test_T1_events_of_engine_and_session_hear_what_they_would(place: Place) -> None:
    """Listeners of the application's, put on its engine and factory."""
    heard: list[str] = []

    def hear(name: str) -> Any:
        return lambda *_: heard.append(name)

    told = [
        *((place.engine, name, hear(name)) for name in ("begin", "commit", "rollback")),
        *((place.engine, name, hear(name)) for name in ("checkout", "checkin")),
        *((place.maker, name, hear(f"session {name}")) for name in ("after_begin", "after_commit")),
    ]
    for target, name, listener in told:
        event.listen(target, name, listener)
    try:
        with Sandbox(place.jenny), open_scope(commit_on_success=True):
            place.jenny.session.add(Row(n=1))
    finally:
        for target, name, listener in told:
            event.remove(target, name, listener)
    assert heard == [
        *("checkout", "begin", "session after_begin", "commit", "session after_commit", "checkin")
    ]


def test_T1_the_block_is_the_current_scope(place: Place) -> None:
    """With the sandbox's name; the former one is current again afterwards."""
    with open_scope("outer") as outer:
        with Sandbox(place.jenny, name="mine"):
            assert current_scope().name == "mine"
            assert in_thread(lambda: current_scope().name) == "mine"
            session = place.jenny.session
        assert current_scope() is outer
        assert place.jenny.session is not session


async def test_T1_streams_are_read_whole(place: Place) -> None:
    """A result that is streamed holds nobody up, and is read all the same."""
    async with Sandbox(place.jenny, place.ajenny):
        place.ajenny.session.add_all(Row(n=n) for n in range(1, 60))
        await place.ajenny.session.commit()
        result = await place.ajenny.session.stream_scalars(Row.__table__.select())
        async with open_scope():
            place.ajenny.session.add(Row(n=100))
            await place.ajenny.session.commit()
        assert len([row async for row in result]) == 59
        place.jenny.session.add(Row(n=200))
        place.jenny.session.commit()
        found = place.jenny.session.connection().execution_options(stream_results=True)
        assert len(found.execute(Row.__table__.select()).all()) == 1


def test_T1_an_engine_in_autocommit_commits_each_statement(place: Place) -> None:
    """Its statements are transactions of their own, in the sandbox."""
    autocommit = place.engine.execution_options(isolation_level="AUTOCOMMIT")
    with Sandbox(place.jenny):
        session = place.jenny(bind=autocommit) if not place.jenny.registry.has() else None
        assert session is not None
        session.execute(text("INSERT INTO row VALUES (1, '')"))
        with pytest.raises(DBAPIError):
            session.execute(text("INSERT INTO row VALUES (1, '')"))
        with open_scope():
            assert place.jenny.session.scalar(COUNT) == 1
        session.rollback()
        assert session.scalar(COUNT) == 1


def test_T1_a_bulk_of_rows_and_returning(place: Place) -> None:
    """insertmanyvalues, executemany, RETURNING."""
    with Sandbox(place.jenny):
        place.jenny.session.add_all(Row(n=n) for n in range(1, 2001))
        place.jenny.session.commit()
        connection = place.jenny.session.connection()
        connection.exec_driver_sql(
            "INSERT INTO row VALUES (%(n)s, '')", [{"n": n} for n in range(3000, 3010)]
        )
        assert place.jenny.session.scalar(COUNT) == 2010


async def test_T1_a_cancelled_statement_leaves_the_sandbox_usable(place: Place) -> None:
    """The connection is everybody's, so it must outlive a request that is cancelled."""
    async with Sandbox(place.ajenny):
        place.ajenny.session.add(Row(n=1))
        await place.ajenny.session.commit()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1), open_scope():
                    place.ajenny.session.add(Row(n=2))
                    await place.ajenny.session.flush()
                    await place.ajenny.session.execute(text("SELECT pg_sleep(30)"))
            assert await place.ajenny.session.scalar(COUNT) == 1


def test_T1_pools_are_left_alone(place: Place) -> None:
    """The application's own pool lends nothing to a sandbox."""
    pool: Any = place.engine.pool
    with Sandbox(place.jenny):
        place.jenny.session.scalar(COUNT)
        assert pool.checkedout() == 0


async def test_T1_release_gives_back_what_this_session_has_only_read(place: Place) -> None:
    """J7 in a sandbox: what other sessions have committed in it is none of this one's writes."""
    async with Sandbox(place.jenny, place.ajenny):
        place.jenny.session.add(Row(n=1))
        place.jenny.session.commit()
        place.ajenny.session.add(Row(n=2))
        await place.ajenny.session.commit()
        with open_scope():
            place.jenny.session.scalar(select(Row).with_for_update())
            place.jenny.release()
            place.jenny.session.execute(text("DELETE FROM row"))
            with pytest.raises(RopeError, match=r"release\(\) would lose"):
                place.jenny.release()
        async with open_scope():
            await place.ajenny.session.scalar(COUNT)
            await place.ajenny.release()
            assert await place.ajenny.session.scalar(COUNT) == 1


@pytest.mark.told
async def test_T1_read_only_scopes_read_the_same_transaction(place: Place) -> None:
    """They see what is committed in the sandbox, hold nobody up, and refuse to write."""
    async with Sandbox(place.jenny, place.ajenny, wait=0.2):
        place.jenny.session.add(Row(n=1))
        place.jenny.session.commit()
        place.ajenny.session.add(Row(n=2))
        await place.ajenny.session.commit()
        with open_scope(read_only=True):
            assert place.jenny.session.scalar(COUNT) == 1
            with pytest.raises(ReadOnlyError):
                place.jenny.session.execute(text("DELETE FROM row"))
            with open_scope():
                place.jenny.session.add(Row(n=3))
                place.jenny.session.commit()
            assert place.jenny.session.scalar(COUNT) == 2
        async with open_scope(read_only=True):
            assert await place.ajenny.session.scalar(COUNT) == 1
            result = await place.ajenny.session.stream_scalars(select(Row))
            assert [row.n async for row in result] == [2]
            place.ajenny.session.add(Row(n=4))
            with pytest.raises(ReadOnlyError):
                await place.ajenny.session.flush()
        assert place.jenny.session.scalar(COUNT) == 2


def test_T1_a_listener_of_the_pool_hears_each_checkout_once(place: Place) -> None:
    """Also where a read-only scope has an engine of its own on the same pool."""
    heard: list[str] = []

    def hear(*_: object) -> None:
        heard.append("checkout")

    event.listen(place.engine, "checkout", hear)
    try:
        with Sandbox(place.jenny):
            for read_only in (True, False):
                with open_scope(read_only=read_only):
                    place.jenny.session.scalar(COUNT)
    finally:
        event.remove(place.engine, "checkout", hear)
    assert heard == ["checkout", "checkout"]


def test_T1_read_only_scopes_never_read_from_a_replica(place: Place) -> None:
    """A replica knows nothing of a sandbox; the application has the options of production."""
    with postgres_server().new_database() as elsewhere:
        replica = create_engine(elsewhere.url("psycopg"))
        async_replica = create_async_engine(elsewhere.url("asyncpg"), poolclass=NullPool)
        jenny = SessionJenny(place.maker, replicas=[replica])
        ajenny = AsyncSessionJenny(place.async_maker, replicas=[async_replica])
        app = app_of(place, jennies=(jenny, ajenny), read_only=("GET", "HEAD"))
        with Sandbox(jenny, ajenny):
            client = TestClient(app)
            assert client.post("/sync/1").status_code == 201
            assert client.get("/sync").json() == 1  # there is no such table on the replica
            assert client.post("/async/5").status_code == 201
            assert client.get("/async").json() == 2
        replica.dispose()
