"""Small things that are done with sessions, threads and logs."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from rope_middleware import SessionJenny
from tests.kit.waiting import PATIENCE

Jenny = SessionJenny[Session]
Around = Callable[[], AbstractContextManager[object]]
SELECT = text("SELECT 1")


def use(session: Any) -> Any:
    """Have the session check out a connection."""
    session.execute(SELECT)
    return session


def touch(jenny: SessionJenny[Session]) -> Session:
    """Use the session, so that it holds a connection until somebody ends it."""
    jenny.session.execute(SELECT)
    return jenny.session


def errors_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what our logger has said of level ERROR."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "rope_middleware" and record.levelno >= logging.ERROR
    ]


def in_thread(function: Callable[[], Any]) -> Any:
    """Run `function` in another thread with this context, and return or raise its outcome."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, function).result(60)


@contextmanager
def beside(
    *functions: Callable[[], object], until: threading.Event | None = None
) -> Iterator[None]:
    """Run each function in a thread while the block runs, and wait for their ends.

    Args:
        until: is set first when the block ends, however it does.

    Raises:
        BaseException: what one of them raised.
    """
    errors: list[BaseException] = []

    def guard(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guard, args=[function]) for function in functions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        if until is not None:
            until.set()
        for thread in threads:
            thread.join(10 * PATIENCE)
            assert not thread.is_alive()
    if errors:
        raise errors[0]


def run_threads(functions: Sequence[Callable[[], object]]) -> None:
    """Run each function in a thread, and raise what one of them raised."""
    with beside(*functions):
        pass


def workers(name: str = "rope_middleware") -> list[threading.Thread]:
    """Return the package's threads for work, or others whose name begins with that word."""
    return [t for t in threading.enumerate() if f"{t.name} ".startswith(f"{name} ")]
