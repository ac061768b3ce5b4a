"""Wrong uses are errors: an ignore that ignores nothing is an error in both type checkers."""

from __future__ import annotations

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import sessionmaker
from starlette.applications import Starlette
from starlette.middleware import Middleware

from rope_middleware import (
    ASGIRopeMiddleware,
    AsyncSessionJenny,
    RopeMiddleware,
    Scope,
    SessionJenny,
    WSGIRopeMiddleware,
    open_scope,
)
from tests.typing.middlewares import asgi_app, wsgi_app
from tests.typing.scopes import async_job, job


def print_nothing() -> None:
    pass


def sessions(engine: Engine, async_engine: AsyncEngine) -> None:
    SessionJenny()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    SessionJenny(engine)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SessionJenny(sessionmaker(engine), strict="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SessionJenny(sessionmaker(engine), None, True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    SessionJenny(async_sessionmaker(async_engine))  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    AsyncSessionJenny(sessionmaker(engine))  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    jenny = SessionJenny(sessionmaker(engine))
    jenny.session = jenny.session  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    jenny.remove(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    jenny._rope_name_callback = "a name"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    jenny.query_by_magic()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


async def not_awaited(jenny: AsyncSessionJenny[AsyncSession]) -> None:
    jenny.remove()  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]


def scopes(scope: Scope) -> None:
    open_scope(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    open_scope(commit_on_success="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    open_scope(read_only=("GET",))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    open_scope("a name", True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    scope.name = "another"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    scope.closed = True  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    scope.info = {}  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    scope.on_close(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    scope.on_commit(print, "an argument")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def decorated() -> None:
    job("one")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    job(1, names="a")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    job()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await job(1)  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    async_job(1).append("a")  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    await async_job("one")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def middlewares() -> None:
    RopeMiddleware()  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    RopeMiddleware(None)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    RopeMiddleware(print_nothing)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    RopeMiddleware(wsgi_app, commit_on_sucess=True)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    RopeMiddleware(asgi_app, retries="3")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    RopeMiddleware(asgi_app, commit_veto=wsgi_app)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    RopeMiddleware(asgi_app, read_only=True)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    RopeMiddleware(asgi_app, (), True)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    ASGIRopeMiddleware(wsgi_app)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    WSGIRopeMiddleware(asgi_app)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ASGIRopeMiddleware(asgi_app, commit_on_sucess=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Middleware(WSGIRopeMiddleware)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Middleware(RopeMiddleware, commit_on_sucess=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Middleware(ASGIRopeMiddleware, retries="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Starlette().add_middleware(WSGIRopeMiddleware)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Starlette().add_middleware(RopeMiddleware, retries="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
