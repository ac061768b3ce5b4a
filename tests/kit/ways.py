"""Each way to open a scope around sync code: a function that calls `body` in a new scope.

The sessions of sync code in an async scope are ended in a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread

from rope_middleware import open_scope

Way = Callable[..., Any]


def by_with(body: Callable[[], Any], **options: Any) -> Any:
    with open_scope(**options):
        return body()


def by_decorator(body: Callable[[], Any], **options: Any) -> Any:
    return open_scope(**options)(lambda: body())()


def by_async_with(body: Callable[[], Any], **options: Any) -> Any:
    async def main() -> Any:
        async with open_scope(**options):
            return body()

    return anyio.run(main)


def by_async_with_on_trio(body: Callable[[], Any], **options: Any) -> Any:
    async def main() -> Any:
        async with open_scope(**options):
            return await anyio.to_thread.run_sync(body)

    return anyio.run(main, backend="trio")


def by_async_decorator(body: Callable[[], Any], **options: Any) -> Any:
    @open_scope(**options)
    async def main() -> Any:
        return body()

    return anyio.run(main)


WAYS = [by_with, by_decorator, by_async_with, by_async_with_on_trio, by_async_decorator]
