"""asgi-sqlalchemy: the session is in the ASGI scope; commits by itself."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from asgi_sqlalchemy import DatabaseContext, SessionMiddleware

from benchmarks import sites
from benchmarks.contestants import ASGI_ASYNC, FASTAPI_ASYNC, Contestant, Site
from benchmarks.database import POOL, Database, tune


def _context(database: Database, stack: AsyncExitStack) -> DatabaseContext:
    context = DatabaseContext(database.async_url, engine_kwargs=dict(POOL))
    tune(context.engine.sync_engine)
    stack.push_async_callback(context.dispose)
    return context


def _asgi(database: Database, stack: AsyncExitStack) -> Site:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"][1:]
        body = "none"
        if path != "none":
            body = await sites.ASYNC_WORK[path](scope["db_session"], False)
        await send(sites.START)
        await send({"type": "http.response.body", "body": body.encode()})

    return Site(SessionMiddleware(app), {"db": _context(database, stack)})


def _fastapi(database: Database, stack: AsyncExitStack) -> Site:
    from asgi_sqlalchemy.fastapi import get_session

    app = sites.fastapi_injected(get_session, commit=False, is_async=True)
    app.add_middleware(SessionMiddleware)
    return Site(app, {"db": _context(database, stack)})


CONTESTANTS = [
    Contestant("asgi-sqlalchemy", ASGI_ASYNC, _asgi, ("asgi-sqlalchemy",)),
    Contestant("asgi-sqlalchemy", FASTAPI_ASYNC, _fastapi, ("asgi-sqlalchemy", "fastapi")),
]
