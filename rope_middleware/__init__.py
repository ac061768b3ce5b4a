"""One session for each request, in any ASGI and any WSGI application."""

from typing import TYPE_CHECKING, Any

from rope_middleware.asgi import ASGIRopeMiddleware
from rope_middleware.errors import (
    CommitInDoubtError,
    CrossLoopError,
    NoScopeError,
    PoolDeadlockError,
    ReadOnlyError,
    RopeError,
    ScopeClosedError,
)
from rope_middleware.jenny import SessionJenny
from rope_middleware.middleware import RopeMiddleware
from rope_middleware.rope.rope import SessionRope
from rope_middleware.scope.opening import current_scope, open_scope
from rope_middleware.scope.scope import Scope
from rope_middleware.session.holders import holders
from rope_middleware.wsgi import WSGIRopeMiddleware

if TYPE_CHECKING:
    from rope_middleware.async_jenny import AsyncSessionJenny

__all__ = [
    "ASGIRopeMiddleware",
    "AsyncSessionJenny",
    "CommitInDoubtError",
    "CrossLoopError",
    "NoScopeError",
    "PoolDeadlockError",
    "ReadOnlyError",
    "RopeError",
    "RopeMiddleware",
    "Scope",
    "ScopeClosedError",
    "SessionJenny",
    "SessionRope",
    "WSGIRopeMiddleware",
    "current_scope",
    "holders",
    "open_scope",
]


def __getattr__(name: str) -> Any:
    # Imported on demand: SQLAlchemy's asyncio extension needs greenlet, and takes its time.
    if name == "AsyncSessionJenny":
        from rope_middleware.async_jenny import AsyncSessionJenny

        return AsyncSessionJenny
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
