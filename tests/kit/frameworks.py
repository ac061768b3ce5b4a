"""The frameworks: each the same routes, with RopeMiddleware as its users add it.

To add one, write a function that takes `Views` and what makes the middleware, and returns the
application; name it in `FRAMEWORKS`. A view has ``views(route, token)``, to be awaited where
``views.is_async``: a str is the text of the response, anything else an iterator of its chunks; in
WSGI a Path is a file to send. Elsewhere in ASGI it runs in a worker thread, as its framework has
that.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any, Protocol

import anyio.to_thread

from rope_middleware import RopeMiddleware
from tests.kit import django as kit_django


class Views(Protocol):
    """What an application does, whatever the framework."""

    is_async: bool

    def __call__(self, route: str, token: str) -> Any: ...


class View:
    """One function for all routes, of either kind: it is given the route."""

    def __init__(self, answer: Callable[[str], Any]) -> None:
        self.answer = answer
        self.is_async = iscoroutinefunction(answer)

    def __call__(self, route: str, token: str) -> Any:
        return self.answer(route)


@dataclass(frozen=True)
class Framework:
    """One of them.

    Args:
        protocol: ``asgi`` or ``wsgi``.
        distribution: what it is installed as.
        app: makes the application.
        tells_of_leaving: does a stream whose client has gone away end? Otherwise it goes on to
            its own end, as its framework has it.
        note: what its users have to know.
    """

    protocol: str
    distribution: str
    app: Callable[[Views, Any], Any]
    tells_of_leaving: bool = True
    note: str = ""

    def make(self, views: Views, **options: Any) -> Any:
        """Make the application with the middleware, and its options."""
        return self._made(views, partial(RopeMiddleware, **options) if options else RopeMiddleware)

    def bare(self, views: Views) -> Any:
        """Make it without."""
        return self._made(views, lambda app: app)

    def _made(self, views: Views, middleware: Any) -> Any:
        with warnings.catch_warnings():  # a framework's own habits are not ours
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.filterwarnings("ignore", "pkg_resources", UserWarning)
            return self.app(views, middleware)


async def in_threads(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """A sync iterator for frameworks that stream async ones only."""
    while (chunk := await anyio.to_thread.run_sync(next, chunks, None)) is not None:
        yield chunk


# -- ASGI --------------------------------------------------------------------------------------


def responder(views: Views, middleware: Any) -> Any:
    import responder

    api = responder.API(secret_key="of the tests")

    def respond(resp: Any, answer: Any) -> None:
        if isinstance(answer, str):
            resp.text = answer
            return
        resp.headers["Content-Type"] = "text/plain"

        @resp.stream
        async def body() -> AsyncIterator[bytes]:
            async for chunk in answer if views.is_async else in_threads(answer):
                yield chunk

    if views.is_async:

        @api.route("/{route}")
        async def async_view(req: Any, resp: Any, *, route: str) -> None:
            respond(resp, await views(route, req.params.get("token", "")))

    else:

        @api.route("/{route}")
        def view(req: Any, resp: Any, *, route: str) -> None:
            respond(resp, views(route, req.params.get("token", "")))

    api.add_middleware(middleware)
    return api


def starlette(views: Views, middleware: Any) -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    def respond(answer: Any) -> Any:
        return (PlainTextResponse if isinstance(answer, str) else StreamingResponse)(answer)

    async def async_view(request: Request) -> Any:
        return respond(
            await views(request.path_params["route"], request.query_params.get("token", ""))
        )

    def view(request: Request) -> Any:
        return respond(views(request.path_params["route"], request.query_params.get("token", "")))

    app = Starlette(routes=[Route("/{route}", async_view if views.is_async else view)])
    app.add_middleware(middleware)
    return app


def fastapi(views: Views, middleware: Any) -> Any:
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse, StreamingResponse

    app = FastAPI()

    def respond(answer: Any) -> Any:
        return (PlainTextResponse if isinstance(answer, str) else StreamingResponse)(answer)

    if views.is_async:

        @app.get("/{route}")
        async def async_view(route: str, token: str = "") -> Any:
            return respond(await views(route, token))

    else:

        @app.get("/{route}")
        def view(route: str, token: str = "") -> Any:
            return respond(views(route, token))

    app.add_middleware(middleware)
    return app


def litestar(views: Views, middleware: Any) -> Any:
    import litestar
    from litestar.response import Response, Stream

    def respond(answer: Any) -> Any:
        kind = Response if isinstance(answer, str) else Stream
        return kind(answer, media_type="text/plain")

    if views.is_async:

        @litestar.get("/{route:str}")
        async def handler(route: str, token: str = "") -> Any:
            return respond(await views(route, token))

    else:

        @litestar.get("/{route:str}", sync_to_thread=True)
        def handler(route: str, token: str = "") -> Any:
            return respond(views(route, token))

    return litestar.Litestar([handler], middleware=[middleware], openapi_config=None)


def quart(views: Views, middleware: Any) -> Any:
    from quart import Quart, Response, request

    app = Quart("quart")

    def respond(answer: Any) -> Response:
        return Response(answer, content_type="text/plain")

    if views.is_async:

        @app.get("/<route>")
        async def async_view(route: str) -> Response:
            return respond(await views(route, request.args.get("token", "")))

    else:

        @app.get("/<route>")
        def view(route: str) -> Response:
            return respond(views(route, request.args.get("token", "")))

    app.asgi_app = middleware(app.asgi_app)  # type: ignore[method-assign]
    return app


def falcon_asgi(views: Views, middleware: Any) -> Any:
    import falcon.asgi

    class Resource:
        async def on_get(self, req: Any, resp: Any, route: str) -> None:
            token = req.get_param("token", default="")
            if views.is_async:
                answer = await views(route, token)
            else:
                # falcon.sync_to_async() takes no context variable along, see the note.
                answer = await asyncio.to_thread(views, route, token)
            resp.content_type = "text/plain"
            if isinstance(answer, str):
                resp.text = answer
            else:
                resp.stream = answer if views.is_async else in_threads(answer)

    app = falcon.asgi.App()
    app.add_route("/{route}", Resource())
    return middleware(app)


# -- WSGI --------------------------------------------------------------------------------------


def flask(views: Views, middleware: Any) -> Any:
    from flask import Flask, Response, request, send_file

    app = Flask("flask")
    app.logger.disabled = True  # of errors that are made on purpose

    @app.get("/<route>")
    def view(route: str) -> Response:
        answer = views(route, request.args.get("token", ""))
        if isinstance(answer, Path):
            return send_file(answer, mimetype="text/plain")
        return Response(answer, content_type="text/plain")

    app.wsgi_app = middleware(app.wsgi_app)  # type: ignore[method-assign]
    return app


def django(views: Views, middleware: Any) -> Any:
    import django.core.wsgi
    from django.http import FileResponse, HttpRequest, HttpResponse, StreamingHttpResponse

    def view(request: HttpRequest, route: str) -> Any:
        answer = views(route, request.GET.get("token", ""))
        if isinstance(answer, Path):
            return FileResponse(answer.open("rb"))
        return (HttpResponse if isinstance(answer, str) else StreamingHttpResponse)(answer)

    kit_django.serve("<route>", view)
    return middleware(django.core.wsgi.get_wsgi_application())


def pyramid(views: Views, middleware: Any) -> Any:
    from pyramid.config import Configurator
    from pyramid.response import FileResponse, Response

    def view(request: Any) -> Any:
        answer = views(request.matchdict["route"], request.GET.get("token", ""))
        if isinstance(answer, Path):
            return FileResponse(str(answer), request=request)
        if isinstance(answer, str):
            return Response(text=answer, content_type="text/plain")
        return Response(app_iter=answer, content_type="text/plain")

    with Configurator() as config:
        config.add_route("all", "/{route}")
        config.add_view(view, route_name="all")
        return middleware(config.make_wsgi_app())


def bottle(views: Views, middleware: Any) -> Any:
    import bottle

    app = bottle.Bottle()

    @app.get("/<route>")
    def view(route: str) -> Any:
        answer = views(route, bottle.request.query.get("token", ""))
        if isinstance(answer, Path):
            return bottle.static_file(answer.name, root=str(answer.parent))
        return answer

    return middleware(app)


def falcon(views: Views, middleware: Any) -> Any:
    import falcon

    class Resource:
        def on_get(self, req: Any, resp: Any, route: str) -> None:
            answer = views(route, req.get_param("token", default=""))
            resp.content_type = "text/plain"
            if isinstance(answer, str):
                resp.text = answer
            else:
                resp.stream = answer.open("rb") if isinstance(answer, Path) else answer

    app = falcon.App()
    app.add_route("/{route}", Resource())
    return middleware(app)


FRAMEWORKS: dict[str, Framework] = {
    "responder": Framework("asgi", "responder", responder),
    "starlette": Framework("asgi", "starlette", starlette),
    "fastapi": Framework("asgi", "fastapi", fastapi),
    "litestar": Framework("asgi", "litestar", litestar),
    "quart": Framework("asgi", "quart", quart),
    # It watches for the client's leaving in its server-sent events only.
    "falcon-asgi": Framework(
        "asgi",
        "falcon",
        falcon_asgi,
        tells_of_leaving=False,
        note="`falcon.sync_to_async()` takes no context variables along, so the request's scope "
        "is not found in its thread. `asyncio.to_thread()` does.",
    ),
    "flask": Framework("wsgi", "flask", flask),
    "django": Framework("wsgi", "django", django),
    "pyramid": Framework("wsgi", "pyramid", pyramid),
    "bottle": Framework("wsgi", "bottle", bottle),
    "falcon": Framework("wsgi", "falcon", falcon),
}
