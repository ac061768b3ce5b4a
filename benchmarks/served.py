"""The app that a real server serves; the environment names the contestant. See `sockets`.

python -m benchmarks.served DESCRIPTOR    serve it by uvicorn on that socket
"""

from __future__ import annotations

import inspect
import os
import socket
import sys
from contextlib import AsyncExitStack
from typing import Any

from benchmarks.contestants import Contestant, find
from benchmarks.database import Database


def _wanted() -> Contestant:
    for one in find():
        if (
            isinstance(one, Contestant)
            and one.title == os.environ["BENCH_TITLE"]
            and one.setting == os.environ["BENCH_SETTING"]
        ):
            return one
    raise LookupError(os.environ["BENCH_TITLE"])


_stack = AsyncExitStack()  # the process ends with its connections
_made = _wanted().build(
    Database("", os.environ["BENCH_URL"], os.environ["BENCH_ASYNC_URL"]), _stack
)


class _Late:
    """An ASGI app that is finished in the event loop, with the state of its lifespan."""

    def __init__(self, made: Any) -> None:
        self.made = made
        self.site: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            self.site = await self.made if inspect.isawaitable(self.made) else self.made
            scope["state"].update(self.site.state)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await self.site.app(scope, receive, send)


app: Any = _made.app if _wanted().is_wsgi else _Late(_made)


def main() -> None:
    """Serve by uvicorn."""
    import uvicorn

    # Not uvicorn's own --fd: it takes every descriptor for a Unix socket, so that asyncio does
    # not set TCP_NODELAY, and each answer waits 40 ms for an acknowledgement.
    listener = socket.socket(fileno=int(sys.argv[1]))
    config = uvicorn.Config(app, loop="asyncio", http="h11", log_level="error", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
