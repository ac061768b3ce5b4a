"""advanced-alchemy's FastAPI extension."""

from __future__ import annotations

from contextlib import AsyncExitStack

from advanced_alchemy.extensions.fastapi import (
    AdvancedAlchemy,
    SQLAlchemyAsyncConfig,
    SQLAlchemySyncConfig,
)

from benchmarks import sites
from benchmarks.contestants import FASTAPI_ASYNC, FASTAPI_THREADS, Contestant, Site
from benchmarks.database import Database


def _threads(database: Database, stack: AsyncExitStack) -> Site:
    engine = database.engine()
    stack.callback(engine.dispose)
    alchemy = AdvancedAlchemy(SQLAlchemySyncConfig(engine_instance=engine))
    app = sites.fastapi_injected(alchemy.provide_sync_session(), is_async=False)
    alchemy.init_app(app)
    return Site(app)


def _async(database: Database, stack: AsyncExitStack) -> Site:
    engine = database.async_engine()
    stack.push_async_callback(engine.dispose)
    alchemy = AdvancedAlchemy(SQLAlchemyAsyncConfig(engine_instance=engine))
    app = sites.fastapi_injected(alchemy.provide_async_session(), is_async=True)
    alchemy.init_app(app)
    return Site(app)


CONTESTANTS = [
    Contestant("advanced-alchemy", FASTAPI_THREADS, _threads, ("advanced-alchemy", "fastapi")),
    Contestant("advanced-alchemy", FASTAPI_ASYNC, _async, ("advanced-alchemy", "fastapi")),
]
