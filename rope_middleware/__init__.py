"""One session for each request, in any ASGI and any WSGI application."""

from rope_middleware.asgi import ASGIRopeMiddleware
from rope_middleware.errors import CrossLoopError, NoScopeError, RopeError, ScopeClosedError
from rope_middleware.jenny import AsyncSessionJenny, SessionJenny
from rope_middleware.middleware import RopeMiddleware
from rope_middleware.rope import SessionRope
from rope_middleware.scope import Scope, current_scope, open_scope
from rope_middleware.wsgi import WSGIRopeMiddleware

__all__ = [
    "ASGIRopeMiddleware",
    "AsyncSessionJenny",
    "CrossLoopError",
    "NoScopeError",
    "RopeError",
    "RopeMiddleware",
    "Scope",
    "ScopeClosedError",
    "SessionJenny",
    "SessionRope",
    "WSGIRopeMiddleware",
    "current_scope",
    "open_scope",
]
