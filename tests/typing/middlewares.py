"""The middlewares, around applications of both protocols and in the frameworks' own calls."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, assert_type
from wsgiref.simple_server import make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from fastapi import FastAPI
from flask import Flask
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import scoped_session, sessionmaker
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from rope_middleware import ASGIRopeMiddleware, RopeMiddleware, WSGIRopeMiddleware, current_scope


def wsgi_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [])
    return []


async def asgi_app(scope: ASGIScope, receive: Receive, send: Send) -> None:
    pass


def conflict(error: Exception) -> ASGIApp | None:
    return asgi_app if isinstance(error, IntegrityError) else None


def veto(status: int, headers: list[tuple[str, str]]) -> bool:
    return status == 304


# -- the class tells the protocol ---------------------------------------------------------------

assert_type(RopeMiddleware(asgi_app), ASGIRopeMiddleware)
assert_type(RopeMiddleware(wsgi_app), WSGIRopeMiddleware)
assert_type(RopeMiddleware(Starlette()), ASGIRopeMiddleware)
assert_type(RopeMiddleware(FastAPI()), ASGIRopeMiddleware)
assert_type(RopeMiddleware(Flask(__name__)), WSGIRopeMiddleware)
assert_type(RopeMiddleware(Flask(__name__).wsgi_app), WSGIRopeMiddleware)
assert_type(RopeMiddleware(RopeMiddleware(asgi_app)), ASGIRopeMiddleware)
assert_type(RopeMiddleware(RopeMiddleware(wsgi_app)), WSGIRopeMiddleware)
assert_type(ASGIRopeMiddleware(asgi_app), ASGIRopeMiddleware)
assert_type(WSGIRopeMiddleware(wsgi_app), WSGIRopeMiddleware)

assert_type(
    RopeMiddleware(
        asgi_app,
        commit_on_success=True,
        commit_veto=veto,
        on_commit_error=conflict,
        retries=3,
        read_only=("GET", "HEAD"),
        close_timeout=2.5,
    ),
    ASGIRopeMiddleware,
)
assert_type(
    RopeMiddleware(
        wsgi_app, commit_on_success=True, commit_veto=veto, retries=3, close_timeout=2.5
    ),
    WSGIRopeMiddleware,
)

# -- the result is an application ---------------------------------------------------------------

served_by_asgi: ASGIApp = RopeMiddleware(asgi_app)
also_served_by_asgi: ASGIApp = ASGIRopeMiddleware(asgi_app)
served_by_wsgi: WSGIApplication = RopeMiddleware(wsgi_app)
also_served_by_wsgi: WSGIApplication = WSGIRopeMiddleware(wsgi_app)
make_server("127.0.0.1", 0, RopeMiddleware(wsgi_app))
Mount("/", app=RopeMiddleware(asgi_app))

# -- Starlette, FastAPI -------------------------------------------------------------------------

Middleware(ASGIRopeMiddleware)
Middleware(ASGIRopeMiddleware, commit_on_success=True, commit_veto=veto, retries=3)
Middleware(RopeMiddleware)
Middleware(RopeMiddleware, commit_on_success=True, commit_veto=veto, retries=3)
Starlette(middleware=[Middleware(RopeMiddleware, close_timeout=2.5, read_only=["GET"])])
FastAPI(middleware=[Middleware(RopeMiddleware, close_timeout=2.5)])

for app in (Starlette(), FastAPI()):
    app.add_middleware(RopeMiddleware)
    app.add_middleware(RopeMiddleware, commit_on_success=True, commit_veto=veto, retries=3)
    app.add_middleware(ASGIRopeMiddleware)
    app.add_middleware(ASGIRopeMiddleware, commit_on_success=True, retries=3)

# -- Flask --------------------------------------------------------------------------------------

flask_app = Flask(__name__)
# Flask documents this assignment, and has wsgi_app as a method: https://flask.palletsprojects.com
# /en/stable/api/#flask.Flask.wsgi_app. pyright takes it; mypy lets nobody assign to a method.
flask_app.wsgi_app = RopeMiddleware(flask_app.wsgi_app)  # type: ignore[method-assign]
# Without an ignore, where the server is told the application:
application = RopeMiddleware(Flask(__name__), commit_on_success=True)
assert_type(application, WSGIRopeMiddleware)

# -- registries ---------------------------------------------------------------------------------


def registries(engine: Engine, async_engine: AsyncEngine) -> None:
    Session = scoped_session(sessionmaker(engine), scopefunc=current_scope)  # noqa: N806
    AsyncSession = async_scoped_session(  # noqa: N806
        async_sessionmaker(async_engine), scopefunc=current_scope
    )
    RopeMiddleware(asgi_app, [Session])
    RopeMiddleware(asgi_app, registries=[Session, AsyncSession])
    RopeMiddleware(wsgi_app, registries=(Session,))
    Middleware(RopeMiddleware, registries=[Session, AsyncSession])
    Starlette().add_middleware(RopeMiddleware, registries=[Session, AsyncSession])


# -- subclasses ---------------------------------------------------------------------------------


class Mine(ASGIRopeMiddleware):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await super().__call__(scope, receive, send)


Starlette().add_middleware(Mine, commit_on_success=True)
mine: ASGIRopeMiddleware = Mine(asgi_app)
