"""fastapi-async-sqlalchemy."""

from __future__ import annotations

from contextlib import AsyncExitStack

from fastapi_async_sqlalchemy import create_middleware_and_session_proxy

from benchmarks import sites
from benchmarks.contestants import FASTAPI_ASYNC, Contestant, Site
from benchmarks.database import Database


def _async(database: Database, stack: AsyncExitStack) -> Site:
    engine = database.async_engine()
    stack.push_async_callback(engine.dispose)
    # Its module-level `db` serves one engine for the life of the process.
    middleware, db = create_middleware_and_session_proxy()
    app = sites.fastapi(sites.async_from_context(lambda: db.session))
    app.add_middleware(middleware, custom_engine=engine)
    return Site(app)


CONTESTANTS = [
    Contestant(
        "fastapi-async-sqlalchemy", FASTAPI_ASYNC, _async, ("fastapi-async-sqlalchemy", "fastapi")
    )
]
