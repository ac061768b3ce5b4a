"""HTTP/2: bodies in both directions, many streams on one connection, streams that are reset."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anyio.to_thread
import httpx
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from rope_middleware import ASGIRopeMiddleware, SessionJenny
from tests.e2e.async_app import until_gone
from tests.kit.engines import MakeEngine
from tests.kit.leaks import checked_out, nothing_checked_out
from tests.kit.models import Row
from tests.kit.waiting import PATIENCE, eventually
from tests.servers.asgi import Server, serve

CHUNK = b"x" * 10_000
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "commit": {"commit_on_success": True},
    "retries": {"commit_on_success": True, "retries": 1},
}


class Site:
    """An application that stores how long a body was, and streams."""

    def __init__(self, make_engine: MakeEngine) -> None:
        self.engine = make_engine(20)
        self.jenny = SessionJenny(sessionmaker(self.engine))
        self.versions: set[str] = set()
        self.streaming = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.versions.add(scope["http_version"])
        await (self.upload if scope["method"] == "POST" else self.stream)(receive, send)

    async def upload(self, receive: Any, send: Any) -> None:
        length, more = 0, True
        while more:
            message = await receive()
            length += len(message.get("body", b""))
            more = message.get("more_body", False)
        await asyncio.to_thread(self.jenny.add, Row(name=str(length)))
        await asyncio.to_thread(self.jenny.commit)
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % length})

    async def stream(self, receive: Any, send: Any) -> None:
        async def work() -> None:
            count = select(func.count()).select_from(Row)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(50):
                await anyio.to_thread.run_sync(self.jenny.scalar, count)
                await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        self.streaming += 1
        try:
            # hypercorn lets send() wait for ever for the window of a stream that was reset.
            await until_gone(receive, work)
        finally:
            self.streaming -= 1


@pytest.fixture
def site(make_engine: MakeEngine) -> Site:
    return Site(make_engine)


@pytest.fixture(params=OPTIONS)
def server(request: pytest.FixtureRequest, site: Site) -> Iterator[Server]:
    with serve(ASGIRopeMiddleware(site, **OPTIONS[request.param]), "hypercorn") as running:
        yield running
        nothing_checked_out(site.engine)


def client(server: Server) -> httpx.AsyncClient:
    """Speak HTTP/2 from the first byte on, without TLS."""
    return httpx.AsyncClient(
        http1=False, http2=True, base_url=server.url, timeout=PATIENCE, verify=False
    )


@pytest.mark.parametrize("length", [0, 1, 3_000_000])
def test_A2_a_body_of_any_length_reaches_the_application_whole(
    server: Server, site: Site, length: int
) -> None:
    """Also one that outgrows the replay."""

    async def main() -> None:
        async with client(server) as http:
            response = await http.post("/", content=b"x" * length)
            assert (response.status_code, response.text) == (201, str(length))

    asyncio.run(main())
    assert site.versions == {"2"}
    with Session(site.engine) as session:
        assert session.scalars(select(Row.name)).all() == [str(length)]


def test_A4_many_streams_on_one_connection_have_a_scope_each(server: Server, site: Site) -> None:
    """Uploads and downloads side by side."""

    async def main() -> None:
        async with client(server) as http:
            uploads = [http.post("/", content=CHUNK * 20) for _ in range(8)]
            downloads = [http.get("/") for _ in range(8)]
            for response in await asyncio.gather(*uploads, *downloads):
                assert response.content in (b"%d" % (20 * len(CHUNK)), CHUNK * 50)

    asyncio.run(main())
    with Session(site.engine) as session:
        assert session.scalar(select(func.count()).select_from(Row)) == 8


def test_S3_a_stream_that_the_client_resets_gives_its_connection_back(
    server: Server, site: Site
) -> None:
    """RST_STREAM ends one stream; the others of the connection go on."""

    async def main() -> None:
        async with client(server) as http:
            for _ in range(5):
                async with http.stream("GET", "/") as response:
                    async for _ in response.aiter_raw():
                        break
            response = await http.get("/")
            assert response.content == CHUNK * 50

    asyncio.run(main())
    eventually(lambda: site.streaming == 0, "all streams ended")
    eventually(lambda: checked_out(site.engine) == 0, "all connections back")
