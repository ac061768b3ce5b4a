"""A jenny of either kind, with its engines and scopes, behind the same coroutines.

A text that awaits `do` and `scope` holds for a `Session` and for an `AsyncSession`::

    async with Either([url], is_async=is_async) as either:
        async with either.scope(read_only=True):
            row = await either.do("get", Row, 7)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from inspect import isawaitable
from typing import Any

from sqlalchemy import URL, Engine, create_engine, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from rope_middleware import AsyncSessionJenny, SessionJenny, open_scope
from tests.kit.leaks import checked_out
from tests.kit.models import Row

ONE = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5}
"""The options of an engine with one connection."""


def now(coroutine: Any) -> Any:
    """Run a coroutine that waits for nothing, as one with a `Session` does not."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


class Either:
    """The jenny.

    Args:
        urls: of the primary, and of its replicas.
        is_async: of AsyncSessions?
        engine: options of the engines; else one connection, which nobody waits for in vain.
        factory: options of the session factory.
    """

    def __init__(
        self, urls: list[URL], *, is_async: bool, engine: Any = None, **factory: Any
    ) -> None:
        self.is_async = is_async
        self.scopes_are_async = is_async
        options = (
            {"pool_size": 1, "max_overflow": 0, "pool_timeout": 5} if engine is None else engine
        )
        make: Any = create_async_engine if is_async else create_engine
        self.engines: list[Any] = [make(url, **options) for url in urls]
        maker: Any = (async_sessionmaker if is_async else sessionmaker)(self.engines[0], **factory)
        kind: Any = AsyncSessionJenny if is_async else SessionJenny
        self.jenny: Any = kind(maker, replicas=self.engines[1:])

    @property
    def engine(self) -> Engine:
        """The primary's, the sync one within."""
        engine: Engine = getattr(self.engines[0], "sync_engine", self.engines[0])
        return engine

    async def do(self, name: str, *arguments: Any) -> Any:
        """Call a method of the session."""
        found = getattr(self.jenny.session, name)(*arguments)
        return await found if isawaitable(found) else found

    async def rows(self) -> list[int]:
        """Read the numbers of all `Row`s in a scope of its own."""
        async with self.scope():
            return sorted(await self.do("scalars", select(Row.n)))

    async def run_sync(self, body: Callable[..., Any], *arguments: Any) -> Any:
        """Call `body` with the session, as a plain function has it."""
        session = self.jenny.session
        if self.is_async:
            return await session.run_sync(body, *arguments)
        return body(session, *arguments)

    @asynccontextmanager
    async def scope(self, **options: Any) -> AsyncIterator[None]:
        """Open a scope as code of that kind does."""
        if self.scopes_are_async:
            async with open_scope(**options):
                yield
        else:
            with open_scope(**options):
                yield

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, error: object, *_: object) -> None:
        try:
            if error is None:
                assert [checked_out(engine) for engine in self.engines] == [0] * len(self.engines)
        finally:
            for engine in self.engines:
                found = engine.dispose()
                if isawaitable(found):
                    await found
