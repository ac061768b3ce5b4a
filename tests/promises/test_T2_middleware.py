"""T2: many sandboxes at once against one live server; header, cookie, POST and DELETE."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from flask import Flask
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from rope_middleware import RopeMiddleware, ScopeClosedError
from rope_middleware.testing import Sandbox, SandboxMiddleware
from tests.kit.asgi import answer
from tests.kit.sandboxes import COUNT, Place, Row, open_place
from tests.kit.waiting import eventually
from tests.servers.asgi import Server, serve

TOKEN = "Rope-Sandbox"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """PostgreSQL, by psycopg and asyncpg."""
    with open_place("postgresql", tmp_path_factory.mktemp("place")) as found:
        yield found
        assert found.rows() == 0


def starlette_app(place: Place) -> Any:
    """An application that writes by both kinds of session."""
    jenny, ajenny = place.jenny, place.ajenny

    def add(request: Request) -> Response:
        jenny.session.add(Row(n=int(request.path_params["n"])))
        return Response(status_code=201)

    def count(request: Request) -> Response:
        return JSONResponse(jenny.session.scalar(COUNT))

    async def aadd(request: Request) -> Response:
        ajenny.session.add(Row(n=int(request.path_params["n"])))
        return Response(status_code=201)

    async def acount(request: Request) -> Response:
        return JSONResponse(await ajenny.session.scalar(COUNT))

    async def stream(request: Request) -> Response:
        async def chunks() -> Any:
            for _ in range(2):
                yield f"{await ajenny.session.scalar(COUNT)};"

        return StreamingResponse(chunks())

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json(await ajenny.session.scalar(COUNT))
        await websocket.close()

    return RopeMiddleware(
        Starlette(
            routes=[
                Route("/sync/{n}", add, methods=["POST"]),
                Route("/sync", count),
                Route("/async/{n}", aadd, methods=["POST"]),
                Route("/async", acount),
                Route("/stream", stream),
                WebSocketRoute("/socket", socket),
            ]
        ),
        commit_on_success=True,
    )


@pytest.fixture(scope="module")
def server(place: Place) -> Iterator[Server]:
    """A live uvicorn, for all tests of this module."""
    app = SandboxMiddleware(starlette_app(place), place.jenny, place.ajenny, idle=1.0)
    with serve(app) as found:
        yield found


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as found:
        yield found


def test_T2_each_test_sees_its_own_rows(client: httpx.Client, place: Place) -> None:
    """Two sandboxes at once, by header and by cookie, sync and async sessions, a stream."""
    one, two = (Sandbox(place.jenny, place.ajenny, name=name) for name in ("one", "two"))
    with one, two:
        # Rows of their own: a key that somebody else has written would be waited for.
        for kind, first in (("sync", 1), ("async", 4)):
            for n in (first, first + 1):
                assert client.post(f"/{kind}/{n}", headers=one.headers).status_code == 201
            cookie = {"Cookie": f"theme=dark; {TOKEN}={two.token}"}
            assert client.post(f"/{kind}/{first + 2}", headers=cookie).status_code == 201
            assert client.get(f"/{kind}", headers=one.headers).json() == 2
            assert client.get(f"/{kind}", headers=cookie).json() == 1
            # The header wins.
            assert client.get(f"/{kind}", headers=cookie | one.headers).json() == 2
        assert client.get("/stream", headers=one.headers).text == "2;2;"
    assert place.rows() == 0


def test_T2_the_test_and_its_requests_see_each_other(client: httpx.Client, place: Place) -> None:
    """What the block has committed a request reads, and the other way round."""
    with Sandbox(place.jenny) as sandbox:
        place.jenny.session.add(Row(n=1))
        place.jenny.session.commit()
        assert client.get("/sync", headers=sandbox.headers).json() == 1
        client.post("/sync/2", headers=sandbox.headers)
        assert place.jenny.session.scalar(COUNT) == 2


def test_T2_a_websocket_names_its_sandbox(server: Server, place: Place) -> None:
    """By cookie, as a browser does; one that is not open is refused before it is accepted."""
    with Sandbox(place.ajenny) as sandbox:
        httpx.post(f"{server.url}/async/1", headers=sandbox.headers)
        with connect(
            f"{server.ws_url}/socket", additional_headers={"Cookie": f"{TOKEN}={sandbox.token}"}
        ) as socket:
            assert json.loads(socket.recv()) == 1
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{server.ws_url}/socket", additional_headers=sandbox.headers)
    assert refused.value.response.status_code == 403


def test_T2_a_token_that_is_not_open_is_gone(client: httpx.Client, place: Place) -> None:
    """410, before the application is called, in words."""
    with Sandbox(place.jenny) as sandbox:
        pass
    for token in (sandbox.token, "", "ä".encode().decode("latin-1"), "x" * 1000):
        answer = client.post("/sync/1", headers={TOKEN: token.encode("latin-1")})
        assert answer.status_code == 410
        assert TOKEN in answer.json()["detail"]
    assert place.rows() == 0


def test_T2_a_client_without_python_opens_and_ends_a_sandbox(
    client: httpx.Client, place: Place
) -> None:
    """POST, cookies, DELETE: what a browser test needs."""
    opened = client.post("/rope-sandbox?name=from%20outside")
    assert opened.status_code == 201
    told = opened.json()
    assert told["name"] == "from outside"
    assert told["headers"] == told["cookies"] == {TOKEN: told["token"]}
    cookie = opened.headers["set-cookie"]
    assert cookie == f"{TOKEN}={told['token']}; Path=/; HttpOnly; SameSite=Lax"
    assert client.post("/sync/1").status_code == 201  # the client keeps the cookie
    assert client.get("/sync").json() == 1
    assert client.put("/rope-sandbox").status_code == 405
    assert client.get("/rope-sandbox").headers["allow"] == "POST, DELETE"
    ended = client.delete("/rope-sandbox")
    assert (ended.status_code, ended.content) == (204, b"")
    assert client.delete("/rope-sandbox").status_code == 410
    assert client.get("/sync").status_code == 410
    assert place.rows() == 0


def _idle_in_transaction(place: Place) -> list[int]:
    with Session(place.engine) as session:
        found = session.connection().exec_driver_sql(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND starts_with(state, 'idle in transaction') AND pid <> pg_backend_pid()"
        )
        return [pid for (pid,) in found]


def test_T2_one_that_idles_ends_by_itself(
    client: httpx.Client, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """After `idle` seconds without a request nothing stays open; of no other is that told."""
    caplog.set_level(logging.INFO, "rope_middleware")
    ended = client.post("/rope-sandbox?name=ended").json()
    assert client.delete("/rope-sandbox", headers=ended["headers"]).status_code == 204
    client.cookies.clear()
    told = client.post("/rope-sandbox?name=idles").json()
    assert client.post("/sync/1", headers=told["headers"]).status_code == 201
    assert _idle_in_transaction(place)
    eventually(lambda: not _idle_in_transaction(place), "the sandbox has ended")
    assert client.get("/sync", headers=told["headers"]).status_code == 410
    (line,) = (text for text in caplog.messages if "without a request" in text)
    assert "'idles'" in line


def test_T2_wsgi_does_the_same(place: Place) -> None:
    """Flask's test client, by header and cookie; POST and DELETE."""
    app = Flask(__name__)
    jenny = place.jenny

    @app.post("/<int:n>")
    def add(n: int) -> tuple[str, int]:
        jenny.session.add(Row(n=n))
        return "", 201

    @app.get("/")
    def count() -> Any:
        return iter([str(jenny.session.scalar(COUNT))])  # read when the body is

    app.wsgi_app = SandboxMiddleware(  # type: ignore[method-assign]
        RopeMiddleware(app.wsgi_app, commit_on_success=True), jenny
    )
    client = app.test_client()
    with Sandbox(jenny) as other:
        told = client.post("/rope-sandbox").json
        assert told is not None
        client.set_cookie(TOKEN, told["token"])
        assert client.post("/1").status_code == 201
        assert client.get("/").text == "1"
        assert client.get("/", headers=other.headers).text == "0"
        assert client.delete("/rope-sandbox").status_code == 204
        assert client.get("/").status_code == 410
    assert place.rows() == 0


def test_T2_one_that_was_committed_behind_is_told_by_409(place: Place) -> None:
    """T3 over HTTP: rolled back as far as it goes, and told in words."""
    app = Flask(__name__)
    jenny = place.jenny

    @app.get("/")
    def commit() -> str:
        connection: Any = jenny.session.connection().connection.dbapi_connection
        jenny.session.scalar(COUNT)
        connection.pgconn.exec_(b"COMMIT")
        return ""

    app.wsgi_app = SandboxMiddleware(RopeMiddleware(app.wsgi_app), jenny)  # type: ignore[method-assign]
    client = app.test_client()
    opened: Any = client.post("/rope-sandbox?name=false").json
    client.get("/", headers=opened["headers"])
    ended = client.delete("/rope-sandbox", headers=opened["headers"])
    assert ended.status_code == 409
    told: Any = ended.json
    assert "'false'" in told["detail"]
    assert client.delete("/rope-sandbox", headers=opened["headers"]).status_code == 410


def test_T2_without_jennies_requests_open_nothing(place: Place) -> None:
    """The path is the application's then."""
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(SandboxMiddleware(starlette_app(place))),
        base_url="http://test",
    )

    async def ask() -> int:
        async with client:
            return (await client.post("/rope-sandbox")).status_code

    assert asyncio.run(ask()) == 404


def test_T2_it_says_once_that_it_must_not_go_to_production(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log, when it is made; a token is never logged."""
    SandboxMiddleware(starlette_app(place), place.jenny)
    (record,) = caplog.records
    assert record.name == "rope_middleware"
    assert "production" in record.getMessage()


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((), {}, TypeError),
        ((object(),), {}, TypeError),
        ((lambda *args: None,), {}, TypeError),
        ("app", {"path": 3}, TypeError),
        ("app", {"path": "here"}, ValueError),
        ("app", {"idle": "1"}, TypeError),
        ("app", {"idle": 0}, ValueError),
        ("app and no jenny", {}, TypeError),
    ],
)
def test_T0_wrong_arguments_of_the_middleware_are_errors_in_words(
    place: Place, arguments: Any, options: dict[str, Any], error: type[Exception]
) -> None:
    """Each of them, when it is made."""
    if isinstance(arguments, str):
        arguments = [starlette_app(place), *["no jenny"] * ("no jenny" in arguments)]
    with pytest.raises(error, match=r"\w+ \w+"):
        SandboxMiddleware(*arguments, **options)


def test_T3_a_request_that_outlives_its_sandbox_is_told_so(place: Place) -> None:
    """The end does not wait for requests: their next use is an error with the sandbox's name."""
    told: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await place.ajenny.session.scalar(COUNT)
        begun.set()
        await go_on.wait()
        try:
            await place.ajenny.session.scalar(COUNT)
        except ScopeClosedError as error:
            told.append(str(error))
        await answer(send)

    async def run() -> None:
        transport = httpx.ASGITransport(SandboxMiddleware(RopeMiddleware(app)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            async with Sandbox(place.ajenny, name="short") as sandbox:
                asking = asyncio.create_task(client.get("/", headers=sandbox.headers))
                await begun.wait()
            go_on.set()
            await asking

    begun, go_on = asyncio.Event(), asyncio.Event()
    asyncio.run(run())
    assert "'short'" in told[0]
