"""T2 in a real browser: two tabs of two sandboxes, forms, a WebSocket, server-sent events."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.pool import NullPool
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from rope_middleware import RopeMiddleware, open_scope
from rope_middleware.testing import Sandbox, SandboxMiddleware
from tests.kit.chromium import MISSING, PROGRAM, browser
from tests.kit.programs import ROOT
from tests.kit.sandboxes import COUNT, Base, Place, Row, open_place
from tests.servers.asgi import Server, serve
from tests.servers.postgres import postgres_server

pytestmark = pytest.mark.slow

PAGE = """<!doctype html>
<form method="post" action="/"><input name="n"><input name="name"><button>Add</button></form>
<ul>{rows}</ul>
<p id="socket"></p><p id="events"></p>
<script>
const socket = new WebSocket(location.href.replace("http", "ws") + "socket");
socket.onmessage = message => document.getElementById("socket").textContent = message.data;
const events = new EventSource("/events");
events.onmessage = message => document.getElementById("events").textContent = message.data;
</script>
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with open_place("postgresql", tmp_path_factory.mktemp("place")) as found:
        yield found
        assert found.rows() == 0


@pytest.fixture(scope="module")
def server(place: Place) -> Iterator[Server]:
    """A page whose WebSocket and events tell the number of rows as it changes."""
    ajenny = place.ajenny

    async def counts() -> AsyncIterator[int]:
        last = -1
        for _ in range(2000):
            async with open_scope():
                now: int = await ajenny.session.scalar(COUNT)
            if now != last:
                yield now
            last = now
            await asyncio.sleep(0.02)

    async def show(request: Request) -> Response:
        rows = await ajenny.session.scalars(select(Row).order_by(Row.n))
        return HTMLResponse(PAGE.format(rows="".join(f"<li>{row.name}" for row in rows)))

    async def add(request: Request) -> Response:
        form = await request.form()
        ajenny.session.add(Row(n=int(str(form["n"])), name=str(form["name"])))
        return RedirectResponse("/", status_code=303)

    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            async for count in counts():
                await websocket.send_text(str(count))
        except Exception:  # the page has gone
            pass

    async def events(request: Request) -> Response:
        async def stream() -> AsyncIterator[str]:
            async for count in counts():
                yield f"data: {count}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    routes = [
        Route("/", show),
        Route("/", add, methods=["POST"]),
        Route("/events", events),
        WebSocketRoute("/socket", socket),
    ]
    app = RopeMiddleware(Starlette(routes=routes), commit_on_success=True)
    with serve(SandboxMiddleware(app, ajenny), grace=1) as found:
        yield found


@pytest.mark.skipif(PROGRAM is None, reason=MISSING)
def test_T2_two_tabs_of_two_sandboxes(server: Server, tmp_path: Any) -> None:
    """Each opens its own by one fetch(); the cookie does the rest."""

    def submit(n: int, name: str) -> str:
        return (
            f"document.forms[0].n.value = {n}; document.forms[0].name.value = '{name}';"
            "document.forms[0].submit()"
        )

    with browser(tmp_path / "profile") as found:
        tabs = {name: found.new_page() for name in ("Emma", "Persuasion")}
        for number, (name, tab) in enumerate(tabs.items()):
            tab.go(f"{server.url}/rope-sandbox")  # 405, but of this origin
            assert tab.run("fetch('/rope-sandbox', {method: 'POST'}).then(a => a.status)") == 201
            tab.go(f"{server.url}/")
            tab.wait_for("document.getElementById('socket').textContent === '0'")
            tab.run(submit(number + 1, name))
            tab.wait_for(f"document.querySelector('ul')?.innerText === '{name}'")
        for name, tab in tabs.items():
            tab.wait_for("document.getElementById('socket').textContent === '1'")
            tab.wait_for("document.getElementById('events').textContent === '1'")
            assert tab.run("document.querySelector('ul').innerText") == name
            assert tab.run("document.cookie") == ""  # HttpOnly
        for tab in tabs.values():
            assert tab.run("fetch('/rope-sandbox', {method: 'DELETE'}).then(a => a.status)") == 204


@pytest.mark.skipif(PROGRAM is None, reason=MISSING)
def test_T2_a_browser_in_the_sandbox_of_a_test(server: Server, place: Place, tmp_path: Any) -> None:
    """The test makes the rows and reads what the page has written."""
    with browser(tmp_path / "profile") as found, Sandbox(place.ajenny) as sandbox:
        asyncio.run(_write(place))
        tab = found.new_page()
        tab.go(f"{server.url}/rope-sandbox")
        tab.run(f"document.cookie = 'Rope-Sandbox={sandbox.token}; path=/'")
        tab.go(f"{server.url}/")
        assert tab.run("document.querySelector('ul').innerText") == "by the test"
        tab.go("about:blank")  # its streams end before their sandbox does


async def _write(place: Place) -> None:
    async with open_scope():
        place.ajenny.session.add(Row(n=1, name="by the test"))
        await place.ajenny.session.commit()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_T2_by_curl_from_a_shell(server: Server, tmp_path: Any) -> None:
    """The lines of the documentation, and what is seen between and after them."""
    page = (ROOT / "docs" / "howto" / "testing.md").read_text()
    opened, asked, ended = re.findall(r"^curl .+$", page, re.MULTILINE)
    asked = asked.replace("/notes/milk", "/ --data 'n=1&name=Emma'")
    show = f"curl --cookie jar {server.url}/ | grep -o '<li>[A-Za-z]*' || true"
    script = "\n".join([opened, asked, show, ended, show.replace("--cookie jar ", "")])
    script = re.sub(r"http://127.0.0.1:8000", server.url, script)
    script = script.replace("curl ", "curl --silent --show-error ")
    done = subprocess.run(
        ["sh", "-euc", script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    told, *shown = done.stdout.split("}}")
    assert json.loads(told + "}}")["name"] == "by curl"
    assert shown == ["<li>Emma\n"]


def test_T4_the_recipe_with_a_template(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database for each worker, by the block of the documentation."""
    page = (ROOT / "docs" / "howto" / "testing.md").read_text()
    (block,) = re.findall(r":caption: template.py\n\n(.+?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "template.py", "exec"), names)
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw3")
    with postgres_server().new_database() as template:
        url = template.url("psycopg")
        engine = create_engine(url)
        Base.metadata.create_all(engine)
        engine.dispose()
        found = names["database_of_this_worker"](url.set(database="postgres"), template.name)
        assert found.database == f"{template.name}_gw3"
        own = create_engine(found)
        with own.begin() as connection:
            assert connection.scalar(COUNT) == 0
        own.dispose()
        with create_engine(
            url.set(database="postgres"), isolation_level="AUTOCOMMIT", poolclass=NullPool
        ).connect() as connection:
            connection.exec_driver_sql(f'DROP DATABASE "{found.database}"')
