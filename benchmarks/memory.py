"""The lanes of P4: memory over many requests, many open scopes, many objects in the process."""

import asyncio
import gc
import os
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from itertools import repeat
from pathlib import Path
from time import thread_time
from typing import Any

from benchmarks.database import Database
from benchmarks.drivers import ENVIRON, SCOPE, asgi_lane, receive, wsgi_lane
from benchmarks.lanes import Lanes
from benchmarks.measure import LINUX
from benchmarks.sites import COROUTINES, OURS, WSGI, ours, site

READS_EVERY = 100
"""One request in so many reads a row; the others only ask for the session."""


async def many_requests(where: Database, stack: AsyncExitStack, kind: str) -> Lanes:
    """Lanes that return no seconds, but what they have counted."""
    lanes = await site(where, stack, kind, OURS, ("touch", "select"))
    touching, reading = lanes.values()

    async def serve(requests: int) -> None:
        for _ in repeat(None, max(1, requests // READS_EVERY)):
            await reading(1)
            await touching(READS_EVERY - 1)

    async def grown(requests: int, count: Callable[[], int]) -> float:
        await serve(max(2_000, requests // 20))  # caches and free lists fill up
        gc.collect()
        before = count()
        await serve(requests)
        gc.collect()
        return count() - before

    async def garbage(requests: int) -> float:
        served = min(requests, 2_000)
        await reading(served)
        gc.collect()
        await reading(served)
        return gc.collect() / served * requests

    return {
        " objects of garbage": garbage,
        " memory blocks": lambda requests: grown(requests, sys.getallocatedblocks),
        " bytes": lambda requests: grown(requests, resident_bytes),
    }


def resident_bytes() -> int:
    """Return the memory that the process holds in RAM; 0 where the system does not tell."""
    pages = Path("/proc/self/statm").read_text().split()[1] if LINUX else 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


async def open_wsgi(where: Database, stack: AsyncExitStack, count: int) -> Lanes:
    """So many scopes are open, each with a session: bodies that nobody has closed yet."""
    app = ours(WSGI, where, stack)
    for _ in repeat(None, count):
        stack.callback(app(ENVIRON | {"PATH_INFO": "/touch"}, lambda *args: None).close)
    return {f"{count:,}": wsgi_lane(app, "/touch", thread_time)}


async def open_asgi(where: Database, stack: AsyncExitStack, count: int) -> Lanes:
    """So many scopes are open, each with a session: a `send` that waits for a slow client."""
    app = ours(COROUTINES, where, stack)
    go_on = asyncio.Event()

    async def wait(message: Any) -> None:
        await go_on.wait()

    waiting = SCOPE | {"path": "/touch"}
    held = [asyncio.ensure_future(app(waiting.copy(), receive, wait)) for _ in range(count)]
    await asyncio.sleep(0)

    async def finish() -> None:
        go_on.set()
        await asyncio.gather(*held)

    stack.push_async_callback(finish)
    return {f"{count:,}": asgi_lane(app, "/touch", thread_time)}


async def crowded(where: Database, stack: AsyncExitStack, objects: int) -> Lanes:
    """A request with one SELECT in a process with so many objects for the collector to look at."""
    (serve,) = (await site(where, stack, WSGI, OURS, ("select",))).values()
    gc.disable()  # it would look at them again and again while they are made
    crowd: list[list[int]] = [[] for _ in range(objects)]
    gc.enable()
    stack.callback(crowd.clear)

    async def lane(requests: int) -> float:
        gc.unfreeze()  # frozen, they would not be looked at
        return await serve(requests)

    return {f"{objects:,}": lane}
