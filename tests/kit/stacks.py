"""Stacks of Starlette's, in which the response is sent by another task than the endpoint's."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response

from rope_middleware import RopeMiddleware
from tests.kit.asgi import client


class Passing(BaseHTTPMiddleware):
    """Runs the endpoint in a task of its own, and sends its response from another one."""

    async def dispatch(self, request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response


def stack(*routes: Any) -> Any:
    """Make an application with a BaseHTTPMiddleware inside of ours, which commits."""
    rope = Middleware(RopeMiddleware, commit_on_success=True)  # type: ignore[arg-type]
    return Starlette(routes=list(routes), middleware=[rope, Middleware(Passing)])


async def twenty(app: Any, at_once: int = 1) -> list[tuple[int, str]]:
    """Ask 20 times, so many at once; return status and text of each answer."""
    async with client(app) as web:

        async def ask() -> tuple[int, str]:
            answer: httpx.Response = await web.get("/")
            return answer.status_code, answer.text

        return [
            one
            for _ in range(20 // at_once)
            for one in await asyncio.gather(*(ask() for _ in range(at_once)))
        ]
