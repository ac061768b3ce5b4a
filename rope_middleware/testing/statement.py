"""A statement on its way to the real connection, and what the watch knows of it."""

from __future__ import annotations

from asyncio import Task
from collections.abc import Callable
from typing import Any

from rope_middleware.errors import RopeError
from rope_middleware.testing.sql import Kind, Said

__all__ = ["Statement"]


class Statement:
    """A statement of the application's, on its way to the real connection."""

    __slots__ = (
        *("is_cancelled", "is_looked_at", "is_told", "kind", "line", "parameters", "run", "said"),
        *("since", "task", "text", "thread", "verdict"),
    )

    def __init__(
        self, said: Said, text: str, parameters: Any, run: Callable[[], Any], line: str
    ) -> None:
        self.said = said
        self.kind: Kind = said.kind
        self.text = text
        self.parameters = parameters
        self.run = run
        self.line = line
        self.thread = 0
        self.is_cancelled: bool = False
        self.task: Task[Any] | None = None  # on the sandboxes' loop, once it runs
        # Of the watch.
        self.since: float = 0.0
        self.is_looked_at = self.is_told = False
        self.verdict: RopeError | None = None

    def cancel(self) -> None:
        """Stop it: whoever sent it was cancelled. Runs on the sandboxes' loop."""
        self.is_cancelled = True
        if self.task is not None:
            self.task.cancel()
