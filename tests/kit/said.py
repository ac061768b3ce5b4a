"""What our logger has said of level WARNING and above."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rope_middleware.session import telling


class Said(logging.Handler):
    """Hears what our logger says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def warnings(self) -> list[str]:
        """The warnings, without errors."""
        return [r.getMessage() for r in self.records if r.levelno == logging.WARNING]

    @property
    def unexpected(self) -> list[str]:
        """What is told of the application's code: see H and L of the contract."""
        return [r.getMessage() for r in self.records if r.module in ("telling", "waits")]


@contextmanager
def listening() -> Iterator[Said]:
    """Hear what our logger says, as if nothing had been said before."""
    said, logger = Said(), logging.getLogger("rope_middleware")
    telling._told.clear()
    logger.addHandler(said)
    try:
        yield said
    finally:
        logger.removeHandler(said)
