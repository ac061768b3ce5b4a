"""fastapi-sqla: sync and async; commits by itself. Configured by environment variables."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack

from fastapi_sqla import AsyncSessionDependency, SessionDependency, async_sqla, sqla

from benchmarks import sites
from benchmarks.contestants import FASTAPI_ASYNC, FASTAPI_THREADS, Contestant, Site
from benchmarks.database import POOL, Database, tune


def _configure(url: str, stack: AsyncExitStack) -> None:
    variables = {"sqlalchemy_url": url} | {f"sqlalchemy_{k}": str(v) for k, v in POOL.items()}
    os.environ.update(variables)

    def forget() -> None:
        for name in variables:
            os.environ.pop(name, None)

    stack.callback(forget)


def _threads(database: Database, stack: AsyncExitStack) -> Site:
    _configure(database.url, stack)
    sqla.startup()
    engine = sqla._session_factories["default"].kw["bind"]
    tune(engine)
    stack.callback(engine.dispose)
    app = sites.fastapi_injected(SessionDependency(), commit=False, is_async=False)
    app.add_middleware(sqla.SessionMiddleware)
    return Site(app)


async def _async(database: Database, stack: AsyncExitStack) -> Site:
    _configure(database.async_url, stack)
    await async_sqla.startup()
    engine = async_sqla._async_session_factories["default"].kw["bind"]
    tune(engine.sync_engine)
    stack.push_async_callback(engine.dispose)
    app = sites.fastapi_injected(AsyncSessionDependency(), commit=False, is_async=True)
    app.add_middleware(async_sqla.AsyncSessionMiddleware)
    return Site(app)


CONTESTANTS = [
    Contestant("fastapi-sqla", FASTAPI_THREADS, _threads, ("fastapi-sqla", "fastapi")),
    Contestant("fastapi-sqla", FASTAPI_ASYNC, _async, ("fastapi-sqla", "fastapi")),
]
