"""Each row of the table is started once for all its checks, and its outcome can be written down.

``--compatibility FILE`` writes the page; ``make compatibility`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.matrix.checks import Running, running
from tests.matrix.compatibility import DATABASE, Page
from tests.matrix.rows import Row

OPTION = "--compatibility"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option is there where tests/matrix is named on the command line."""
    parser.addoption(
        OPTION, type=Path, metavar="FILE", help="write the outcome of the rows to FILE"
    )


def pytest_configure(config: pytest.Config) -> None:
    """One process writes the page: with pytest-xdist the one that has no `workerinput`."""
    file = config.getoption(OPTION, default=None)
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Page(file), "compatibility-page")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each row of the class is a parameter."""
    rows: tuple[Row, ...] = getattr(metafunc.cls, "rows", ())
    if rows:
        metafunc.parametrize("_row", rows, ids=str, indirect=True, scope="class")


@pytest.fixture(scope="class")
def _row(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    with running(request.param, tmp_path_factory) as started:
        yield started


@pytest.fixture
def it(_row: Running, record_property: Callable[[str, object], None]) -> Running:
    """The row that is up."""
    record_property(DATABASE, _row.database.version)
    return _row
