"""C3: an IntegrityError at the commit is a 409 in three lines, in every framework."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import sessionmaker

from rope_middleware import RopeMiddleware, SessionJenny
from tests.kit.django import serve
from tests.kit.engines import MakeEngine
from tests.kit.models import Row
from tests.kit.sessions import Jenny

OPTIONS: dict[str, Any] = {"commit_on_success": True}


def add(jenny: Jenny) -> None:
    jenny.session.add(Row(n=1))  # found to be there already by the commit alone


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


def starlette(jenny: Jenny) -> Any:
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    def create(request: Any) -> Any:
        add(jenny)
        return JSONResponse({}, 201)

    app = Starlette(routes=[Route("/", create, methods=["POST", "HEAD"])])
    app.add_middleware(RopeMiddleware, on_commit_error=asgi_conflict, **OPTIONS)
    return app


def fastapi(jenny: Jenny) -> Any:
    from fastapi import FastAPI

    app = FastAPI()
    app.add_middleware(RopeMiddleware, on_commit_error=asgi_conflict, **OPTIONS)

    @app.post("/", status_code=201)
    def create() -> dict[str, str]:
        add(jenny)
        return {}

    return app


def responder(jenny: Jenny) -> Any:
    import responder

    api = responder.API()
    api.add_middleware(RopeMiddleware, on_commit_error=asgi_conflict, **OPTIONS)

    @api.route("/")
    def create(req: Any, resp: Any) -> None:
        add(jenny)
        resp.status_code = 201

    return api


def litestar(jenny: Jenny) -> Any:
    from litestar import Litestar, post

    @post("/", sync_to_thread=True)
    def create() -> None:
        add(jenny)

    return RopeMiddleware(Litestar([create]), on_commit_error=asgi_conflict, **OPTIONS)


def quart(jenny: Jenny) -> Any:
    from quart import Quart

    app = Quart(__name__)

    @app.post("/")
    def create() -> Any:
        add(jenny)
        return {}, 201

    app.asgi_app = RopeMiddleware(app.asgi_app, on_commit_error=asgi_conflict, **OPTIONS)  # type: ignore[method-assign]
    return app


def flask(jenny: Jenny) -> Any:
    from flask import Flask

    app = Flask(__name__)

    @app.post("/")
    def create() -> Any:
        add(jenny)
        return {}, 201

    app.wsgi_app = RopeMiddleware(app.wsgi_app, on_commit_error=wsgi_conflict, **OPTIONS)  # type: ignore[method-assign]
    return app


def django(jenny: Jenny) -> Any:
    from django.core.handlers.wsgi import WSGIHandler
    from django.http import HttpResponse

    def create(request: Any) -> Any:
        add(jenny)
        return HttpResponse(status=201)

    serve("", create)
    return RopeMiddleware(WSGIHandler(), on_commit_error=wsgi_conflict, **OPTIONS)


def pyramid(jenny: Jenny) -> Any:
    from pyramid.config import Configurator
    from pyramid.response import Response

    def create(request: Any) -> Any:
        add(jenny)
        return Response(status=201)

    def conflict(error: Exception) -> Any:
        if isinstance(error, IntegrityError):
            return Response(json_body={"detail": "exists already"}, status=409)
        return None

    with Configurator() as config:
        config.add_route("root", "/")
        config.add_view(create, route_name="root")
    return RopeMiddleware(config.make_wsgi_app(), on_commit_error=conflict, **OPTIONS)


def ask_wsgi(app: Any) -> list[httpx.Response]:
    with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://t") as web:
        return [web.post("/"), web.post("/")]


async def ask_asgi(app: Any) -> list[httpx.Response]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        return [await client.post("/"), await client.post("/")]


ASGI = [starlette, fastapi, responder, litestar, quart]
WSGI = [flask, django, pyramid]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:pkg_resources:UserWarning")  # Pyramid's
@pytest.mark.parametrize("framework", [*ASGI, *WSGI], ids=lambda framework: framework.__name__)
def test_C3_an_integrity_error_at_the_commit_is_a_409(
    make_engine: MakeEngine, framework: Callable[[Jenny], Any]
) -> None:
    """The second row 1 is refused by its commit: the client reads why."""
    engine = make_engine()
    app = framework(SessionJenny(sessionmaker(engine)))

    first, second = ask_wsgi(app) if framework in WSGI else asyncio.run(ask_asgi(app))
    assert first.status_code == 201
    assert (second.status_code, second.json()) == (409, {"detail": "exists already"})
