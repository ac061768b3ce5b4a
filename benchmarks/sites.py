"""The site that every contestant serves, on each framework.

=========  ==========================================
none       answers, and touches no database
touch      asks for the session, and looks at it
select     reads one row by its ORM class
insert     adds one row, and has it committed
=========  ==========================================
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Annotated, Any

import anyio.to_thread
from sqlalchemy import select

from benchmarks.database import Item, Note

Handlers = dict[str, Callable[[], str]]
AsyncHandlers = dict[str, Callable[[], Awaitable[str]]]


# -- what is done with a session ---------------------------------------------------------------


def _touch(session: Any, commit: bool) -> str:
    session.is_active  # noqa: B018
    return "touch"


def _select(session: Any, commit: bool) -> str:
    session.scalars(select(Item).where(Item.id == 1)).one()
    return "select"


def _insert(session: Any, commit: bool) -> str:
    session.add(Note(text="a note"))
    if commit:
        session.commit()
    return "insert"


async def _async_touch(session: Any, commit: bool) -> str:
    session.is_active  # noqa: B018
    return "touch"


async def _async_select(session: Any, commit: bool) -> str:
    (await session.scalars(select(Item).where(Item.id == 1))).one()
    return "select"


async def _async_insert(session: Any, commit: bool) -> str:
    session.add(Note(text="a note"))
    if commit:
        await session.commit()
    return "insert"


WORK = {"touch": _touch, "select": _select, "insert": _insert}
ASYNC_WORK = {"touch": _async_touch, "select": _async_select, "insert": _async_insert}


def _none() -> str:
    return "none"


async def _async_none() -> str:
    return "none"


# -- how a handler comes by it -----------------------------------------------------------------


def by_hand(factory: Callable[[], AbstractContextManager[Any]]) -> Handlers:
    """Return handlers that each open a session and close it."""

    def handler(work: Callable[[Any, bool], str]) -> Callable[[], str]:
        def handle() -> str:
            with factory() as session:
                return work(session, True)

        return handle

    return {"none": _none} | {name: handler(work) for name, work in WORK.items()}


def from_context(get: Callable[[], Any], commit: bool = True) -> Handlers:
    """Return handlers that take the session from where `get` finds it.

    Args:
        get: returns the current session.
        commit: whether the handlers have to commit.
    """

    def handler(work: Callable[[Any, bool], str]) -> Callable[[], str]:
        def handle() -> str:
            return work(get(), commit)

        return handle

    return {"none": _none} | {name: handler(work) for name, work in WORK.items()}


def async_by_hand(factory: Callable[[], AbstractAsyncContextManager[Any]]) -> AsyncHandlers:
    """Return async handlers that each open a session and close it."""

    def handler(work: Callable[[Any, bool], Awaitable[str]]) -> Callable[[], Awaitable[str]]:
        async def handle() -> str:
            async with factory() as session:
                return await work(session, True)

        return handle

    return {"none": _async_none} | {name: handler(work) for name, work in ASYNC_WORK.items()}


def async_from_context(get: Callable[[], Any], commit: bool = True) -> AsyncHandlers:
    """`from_context`, async; `get` is a plain function."""

    def handler(work: Callable[[Any, bool], Awaitable[str]]) -> Callable[[], Awaitable[str]]:
        async def handle() -> str:
            return await work(get(), commit)

        return handle

    return {"none": _async_none} | {name: handler(work) for name, work in ASYNC_WORK.items()}


def async_from_awaitable(get: Callable[[], Awaitable[Any]], commit: bool) -> AsyncHandlers:
    """`async_from_context` for a `get` that has to be awaited."""

    def handler(work: Callable[[Any, bool], Awaitable[str]]) -> Callable[[], Awaitable[str]]:
        async def handle() -> str:
            return await work(await get(), commit)

        return handle

    return {"none": _async_none} | {name: handler(work) for name, work in ASYNC_WORK.items()}


# -- frameworks --------------------------------------------------------------------------------

_HEADERS = [("content-type", "text/plain")]
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/plain")],
}


def wsgi(handlers: Handlers) -> Any:
    """Make a WSGI app."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        body = handlers[environ["PATH_INFO"][1:]]().encode()
        start_response("200 OK", _HEADERS)
        return [body]

    return app


def asgi(handlers: AsyncHandlers) -> Any:
    """Make an ASGI app."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await handlers[scope["path"][1:]]()).encode()
        await send(START)
        await send({"type": "http.response.body", "body": body})

    return app


def asgi_threads(handlers: Handlers) -> Any:
    """Make an ASGI app whose sync handlers run in threads."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        handler = handlers[scope["path"][1:]]
        body = (await anyio.to_thread.run_sync(handler)).encode()
        await send(START)
        await send({"type": "http.response.body", "body": body})

    return app


def flask(handlers: Handlers, app: Any = None) -> Any:
    """Add the routes to a Flask app, or make one."""
    from flask import Flask

    app = Flask("bench") if app is None else app
    app.config["PROPAGATE_EXCEPTIONS"] = True  # an error page would hide what is wrong
    for path, handler in handlers.items():
        app.add_url_rule(f"/{path}", path, handler)
    return app


def pyramid(views: dict[str, Callable[[Any], str]], **settings: Any) -> Any:
    """Make a Pyramid configurator of views that take the request."""
    from pyramid.config import Configurator
    from pyramid.response import Response

    def view(work: Callable[[Any], str]) -> Callable[[Any], Any]:
        return lambda request: Response(work(request), content_type="text/plain")

    config = Configurator(settings=settings)
    for path, work in views.items():
        config.add_route(path, f"/{path}")
        config.add_view(view(work), route_name=path)
    return config


def pyramid_views(handlers: Handlers) -> dict[str, Callable[[Any], str]]:
    """Return views that ignore the request."""

    def view(handler: Callable[[], str]) -> Callable[[Any], str]:
        return lambda request: handler()

    return {path: view(handler) for path, handler in handlers.items()}


def fastapi(handlers: Any) -> Any:
    """Make a FastAPI app; sync handlers run in threads."""
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse

    app = FastAPI(openapi_url=None)
    for path, handler in handlers.items():
        app.get(f"/{path}", response_class=PlainTextResponse)(handler)
    return app


def fastapi_injected(dependency: Any, commit: bool = True, *, is_async: bool) -> Any:
    """Make a FastAPI app whose handlers get the session as a parameter.

    Args:
        dependency: what stands in ``Depends()``.
        commit: whether the handlers have to commit.
        is_async: whether it is an AsyncSession.
    """
    from fastapi import Depends

    # FastAPI evaluates annotations: a name that only this function knows would not be found.
    injected = Annotated[Any, Depends(dependency)]

    def handler(work: Any) -> Any:
        def handle(session: Any) -> str:
            return str(work(session, commit))

        async def async_handle(session: Any) -> str:
            return str(await work(session, commit))

        made = async_handle if is_async else handle
        made.__annotations__["session"] = injected
        return made

    work = ASYNC_WORK if is_async else WORK
    handlers = {"none": _async_none if is_async else _none}
    return fastapi(handlers | {path: handler(one) for path, one in work.items()})
