"""fastapi-sqlalchemy."""

from __future__ import annotations

from contextlib import AsyncExitStack

from fastapi_sqlalchemy import DBSessionMiddleware, db

from benchmarks import sites
from benchmarks.contestants import FASTAPI_THREADS, Contestant, Site
from benchmarks.database import Database


def _threads(database: Database, stack: AsyncExitStack) -> Site:
    engine = database.engine()
    stack.callback(engine.dispose)
    app = sites.fastapi(sites.from_context(lambda: db.session))
    app.add_middleware(DBSessionMiddleware, custom_engine=engine)
    return Site(app)


CONTESTANTS = [
    Contestant("fastapi-sqlalchemy", FASTAPI_THREADS, _threads, ("FastAPI-SQLAlchemy", "fastapi"))
]
