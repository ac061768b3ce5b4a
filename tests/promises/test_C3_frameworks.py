"""C3: an IntegrityError at the commit is a 409 in three lines, in every framework."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import sessionmaker

from rope_middleware import SessionJenny
from tests.kit.engines import MakeEngine
from tests.kit.frameworks import FRAMEWORKS, View
from tests.kit.models import Row


def asgi_conflict(error: Exception) -> Any:
    from starlette.responses import JSONResponse

    if isinstance(error, IntegrityError):
        return JSONResponse({"detail": "exists already"}, 409)
    return None


def wsgi_conflict(error: Exception) -> Any:
    from werkzeug.wrappers import Response

    if isinstance(error, IntegrityError):
        return Response('{"detail": "exists already"}', 409, mimetype="application/json")
    return None


def pyramid_conflict(error: Exception) -> Any:
    from pyramid.response import Response

    if isinstance(error, IntegrityError):
        return Response(json_body={"detail": "exists already"}, status=409)
    return None


CONFLICTS = {"asgi": asgi_conflict, "wsgi": wsgi_conflict}


def ask_wsgi(app: Any) -> list[httpx.Response]:
    with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://t") as web:
        return [web.get("/create"), web.get("/create")]


async def ask_asgi(app: Any) -> list[httpx.Response]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        return [await client.get("/create"), await client.get("/create")]


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_C3_an_integrity_error_at_the_commit_is_a_409(make_engine: MakeEngine, name: str) -> None:
    """The second row 1 is refused by its commit: the client reads why."""
    jenny = SessionJenny(sessionmaker(make_engine()))

    def create(route: str) -> str:
        jenny.session.add(Row(n=1))  # found to be there already by the commit alone
        return "made"

    framework = FRAMEWORKS[name]
    conflict = pyramid_conflict if name == "pyramid" else CONFLICTS[framework.protocol]
    app = framework.make(View(create), commit_on_success=True, on_commit_error=conflict)
    first, second = asyncio.run(ask_asgi(app)) if framework.protocol == "asgi" else ask_wsgi(app)
    assert (first.status_code, first.text) == (200, "made")
    assert (second.status_code, second.json()) == (409, {"detail": "exists already"})
