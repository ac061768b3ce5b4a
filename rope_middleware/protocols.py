"""The shapes of applications, for type checkers; nothing here runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

__all__ = ["ASGIApp", "ASGIScope", "CommitError", "Message", "Receive", "Send", "Veto"]

# https://asgi.readthedocs.io/en/latest/specs/main.html: a scope and a message are dictionaries with
# keys of str. Frameworks and servers have types of their own for them, some a TypedDict for each
# kind, which do not fit one another: what stands between them takes any.
ASGIScope: TypeAlias = Any
Message: TypeAlias = Any
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[ASGIScope, Receive, Send], Awaitable[None]]

Veto: TypeAlias = Callable[[int, list[tuple[str, str]]], object]
CommitError: TypeAlias = Callable[[Exception], Any]
