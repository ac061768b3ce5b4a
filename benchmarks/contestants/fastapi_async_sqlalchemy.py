"""fastapi-async-sqlalchemy."""

from __future__ import annotations

from contextlib import AsyncExitStack

from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, db

from benchmarks import sites
from benchmarks.contestants import FASTAPI_ASYNC, Contestant, Site
from benchmarks.database import Database


def _async(database: Database, stack: AsyncExitStack) -> Site:
    engine = database.async_engine()
    stack.push_async_callback(engine.dispose)
    app = sites.fastapi(sites.async_from_context(lambda: db.session))
    app.add_middleware(SQLAlchemyMiddleware, custom_engine=engine)
    return Site(app)


CONTESTANTS = [
    Contestant(
        "fastapi-async-sqlalchemy", FASTAPI_ASYNC, _async, ("fastapi-async-sqlalchemy", "fastapi")
    )
]
