"""Every error that this package raises on its own account."""

from __future__ import annotations

__all__ = ["CrossLoopError", "NoScopeError", "RopeError", "ScopeClosedError"]


class RopeError(Exception):
    """Base of every error raised by this package."""


class NoScopeError(RopeError, LookupError):
    """A scope is needed, and none is open.

    Wrap the application in `RopeMiddleware`, or open a scope by hand with `open_scope`.
    """


class ScopeClosedError(RopeError):
    """The scope has ended; what belonged to it cannot be used any more.

    Code that outlives its request (a thread, a task, a timed-out handler) meets it in
    ``jenny.session``, in `current_scope`, and where a session that it kept would begin a
    transaction. Give such work a scope of its own with `open_scope`.
    """


class CrossLoopError(RopeError):
    """An async session was reached from another event loop than its scope's.

    Its connection belongs to the loop it was made in. Open a scope in the other loop, or send
    the work to the first one (`asyncio.run_coroutine_threadsafe`).
    """
