"""Frameworks and servers whose types of a scope and a message are their own."""

from __future__ import annotations

from typing import assert_type

import falcon
import falcon.asgi
import uvicorn
from a2wsgi import ASGIMiddleware
from litestar import Litestar
from litestar.middleware import DefineMiddleware
from quart import Quart

from rope_middleware import ASGIRopeMiddleware, RopeMiddleware, WSGIRopeMiddleware
from tests.typing.middlewares import asgi_app

assert_type(RopeMiddleware(falcon.App()), WSGIRopeMiddleware)
assert_type(RopeMiddleware(falcon.asgi.App()), ASGIRopeMiddleware)

assert_type(RopeMiddleware(Litestar()), ASGIRopeMiddleware)
Litestar(middleware=[RopeMiddleware, ASGIRopeMiddleware])
Litestar(middleware=[DefineMiddleware(RopeMiddleware, commit_on_success=True)])

app = Quart(__name__)
assert_type(RopeMiddleware(app), ASGIRopeMiddleware)
# As with Flask: mypy lets nobody assign to a method.
app.asgi_app = RopeMiddleware(app.asgi_app)  # type: ignore[method-assign]

uvicorn.run(RopeMiddleware(asgi_app))
ASGIMiddleware(RopeMiddleware(asgi_app))
