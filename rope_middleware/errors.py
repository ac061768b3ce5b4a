"""Every error that this package raises on its own account."""

from __future__ import annotations

__all__ = ["CrossLoopError", "NoScopeError", "RopeError", "ScopeClosedError"]


class RopeError(Exception):
    """Base of every error raised by this package."""


class NoScopeError(RopeError, LookupError):
    """A scope is needed, and none is open."""


class ScopeClosedError(RopeError):
    """The scope has ended; what belonged to it cannot be used any more."""


class CrossLoopError(RopeError):
    """An async session was reached from another event loop than its scope's."""
