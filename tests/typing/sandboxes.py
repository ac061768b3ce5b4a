"""The types of rope_middleware.testing, as a test writes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, assert_type

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from starlette.applications import Starlette

from rope_middleware import AsyncSessionJenny, RopeMiddleware, SessionJenny
from rope_middleware.testing import Sandbox, SandboxMiddleware

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

jenny = SessionJenny(sessionmaker(create_engine("sqlite://")))
ajenny = AsyncSessionJenny(async_sessionmaker(create_async_engine("sqlite+aiosqlite://")))


def sync_test() -> None:
    with Sandbox(jenny, ajenny, name="mine", wait=1) as sandbox:
        assert_type(sandbox, Sandbox)
        assert_type(sandbox.name, str)
        assert_type(sandbox.token, str)
        assert_type(sandbox.headers, dict[str, str])
        assert_type(sandbox.cookies, dict[str, str])


async def async_test() -> None:
    async with Sandbox(ajenny) as sandbox:
        assert_type(sandbox, Sandbox)


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    app = SandboxMiddleware(RopeMiddleware(Starlette()), jenny, ajenny, path="/here", idle=5)
    await app(scope, receive, send)


def wsgi(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    return SandboxMiddleware(RopeMiddleware(wsgi), jenny)(environ, start_response)
