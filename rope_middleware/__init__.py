"""One session for each request, in any ASGI and any WSGI application."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from rope_middleware.asgi import ASGIRopeMiddleware
    from rope_middleware.async_jenny import AsyncSessionJenny
    from rope_middleware.session.holding.holders import holders
    from rope_middleware.wsgi import WSGIRopeMiddleware

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


def _has_greenlet() -> bool:
    try:
        return find_spec("greenlet") is not None
    except ValueError:  # somebody has put something else in its place
        return False


if not _has_greenlet():  # `import *` asks for every name
    globals()["__all__"] = [name for name in __all__ if name != "AsyncSessionJenny"]


_ON_DEMAND = {
    "ASGIRopeMiddleware": "asgi",
    "AsyncSessionJenny": "async_jenny",
    "WSGIRopeMiddleware": "wsgi",
    "holders": "session.holding.holders",
}


def __getattr__(name: str) -> Any:
    # Imported on demand: SQLAlchemy's asyncio extension needs greenlet and takes its time, an
    # application needs one of the two boundaries, and few ask who holds connections.
    if name in _ON_DEMAND:
        return getattr(import_module(f"rope_middleware.{_ON_DEMAND[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
