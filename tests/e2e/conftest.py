"""Each end-to-end test is searched for leaks."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from tests.servers.postgres import Database


@pytest.fixture(autouse=True)
def _search_for_leaks(no_leaks: None) -> None:
    """See `no_leaks`."""


@pytest.fixture
def database(emptied: Callable[[], Database]) -> Database:
    """A database of PostgreSQL with the kit's tables, and the counter's row."""
    found = emptied()
    found.query("INSERT INTO data (id, count) VALUES (1, 0)")
    return found


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """No test reads what uvicorn says of errors that are made on purpose."""
    caplog.set_level(logging.CRITICAL, "uvicorn.error")
