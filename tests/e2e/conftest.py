"""Each end-to-end test is searched for leaks."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.e2e.commit_app import create_tables
from tests.servers.postgres import Database, postgres_server


@pytest.fixture(autouse=True)
def _search_for_leaks(no_leaks: None) -> None:
    """See `no_leaks`."""


@pytest.fixture
def database() -> Iterator[Database]:
    """A database of PostgreSQL with the kit's tables, and the counter's row."""
    with postgres_server().new_database() as found:
        create_tables(found.url("psycopg"))
        yield found


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """No test reads what uvicorn says of errors that are made on purpose."""
    caplog.set_level(logging.CRITICAL, "uvicorn.error")
