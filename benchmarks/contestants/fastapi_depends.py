"""FastAPI's dependency with yield, as its documentation has it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker

from benchmarks import sites
from benchmarks.contestants import FASTAPI_ASYNC, FASTAPI_THREADS, Contestant, Site
from benchmarks.database import Database


def _threads(database: Database, stack: AsyncExitStack) -> Site:
    engine = database.engine()
    stack.callback(engine.dispose)
    factory = sessionmaker(engine)

    def get_session() -> Iterator[Any]:
        with factory() as session:
            yield session

    return Site(sites.fastapi_injected(get_session, is_async=False))


def _async(database: Database, stack: AsyncExitStack) -> Site:
    engine = database.async_engine()
    stack.push_async_callback(engine.dispose)
    factory = async_sessionmaker(engine)

    async def get_session() -> AsyncIterator[Any]:
        async with factory() as session:
            yield session

    return Site(sites.fastapi_injected(get_session, is_async=True))


CONTESTANTS = [
    Contestant("FastAPI's dependency with yield", FASTAPI_THREADS, _threads, ("fastapi",)),
    Contestant("FastAPI's dependency with yield", FASTAPI_ASYNC, _async, ("fastapi",)),
]
