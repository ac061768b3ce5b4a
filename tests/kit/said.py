"""What our logger has said of level WARNING and above."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rope_middleware.session.code import telling


class Said(logging.Handler):
    """Hears what our logger says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def warnings(self) -> list[str]:
        """The warnings; not those of `blocking` and `held`."""
        return [text for text in self._texts() if _BLOCKING not in text and _HELD not in text]

    @property
    def blocking(self) -> list[str]:
        """What is told of sync sessions on the event loop.

        The tests whose text serves all kinds of session use them there, so nobody minds them.
        """
        return [text for text in self._texts() if _BLOCKING in text]

    @property
    def held(self) -> list[str]:
        """What is told of connections that are held during a wait: see H4.

        On a busy machine a test may wait for others with a connection in its hand, and for long.
        """
        return [text for text in self._texts() if _HELD in text]

    @property
    def unexpected(self) -> list[str]:
        """What is told of the application's code: see H and L of the contract."""
        told = [r.getMessage() for r in self.records if r.module in ("telling", "waits")]
        return [text for text in told if _BLOCKING not in text and _HELD not in text]

    def _texts(self) -> list[str]:
        return [r.getMessage() for r in self.records if r.levelno == logging.WARNING]


_BLOCKING = "on the event loop of"
_HELD = "seconds without using it"


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
