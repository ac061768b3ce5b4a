"""Writes the outcome of the table down as a page of the documentation."""

from __future__ import annotations

import platform
import textwrap
from collections import defaultdict
from inspect import cleandoc
from pathlib import Path

import pytest

from tests.matrix.checks import Checks
from tests.matrix.databases import DRIVERS
from tests.matrix.frameworks import FRAMEWORKS
from tests.matrix.rows import ROWS, Row, version_of
from tests.matrix.servers import SERVERS

DATABASE = "database"
"""The property of a test that says which database it was run on."""

TEXT = """\
# Compatibility

RopeMiddleware is run with real frameworks on real servers, each a process of its own, and with
real databases: each framework on a server with each kind of session that it can have, each server
with a framework, each database by each of its drivers. A row is one small application with six
routes (read, write, raise, stream, slow, concurrent), and passes where all of this holds:

{checks}

After each of them no session has been mixed up, no scope is open, no connection is out of the
pool, the database itself sees none that is in a transaction, and neither SQLAlchemy's pool nor
asyncio has complained.

This page is made by `make compatibility`. A row whose server or database is not there is skipped
and says why. PostgreSQL comes with the tests' own dependencies. For MariaDB its server has to be
installed (on Debian and Ubuntu `make get-servers` does that; the package `mariadb-server-core` is
enough), and the tests start one; or a running one is named in `DATABASE_URL_MARIADB`, such as that
of `make mariadb`, which several runs can share.

{python}

{rows}

{notes}
"""

HEAD = ("Framework", "Server", "Session", "Driver", "Database", "Result")


def names_of(checks: type[Checks]) -> list[str]:
    return [name for name in vars(checks) if name.startswith("test_")]


class Page:
    """A pytest plugin: listens to the reports and writes the page at the end."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.passed: dict[str, set[str]] = defaultdict(set)
        self.failed: dict[str, set[str]] = defaultdict(set)
        self.skipped: dict[str, str] = {}
        self.databases: dict[str, str] = {}
        self.by_id = {str(row): row for row in ROWS}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name, _, found = report.nodeid.rpartition("::")[2].removesuffix("]").partition("[")
        if found not in self.by_id or name not in names_of(Checks):
            return
        for key, value in report.user_properties:
            if key == DATABASE:
                self.databases[found] = str(value)
        if report.failed:
            self.failed[found].add(name)
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self.skipped[found] = str(reason).removeprefix("Skipped: ")
        elif report.when == "call":
            self.passed[found].add(name)

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(self.text(), encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"The outcome is in {self.file}.")

    def text(self) -> str:
        python = (
            f"{platform.python_implementation()} {platform.python_version()} on "
            f"{platform.system()}, SQLAlchemy {version_of('SQLAlchemy')}, "
            f"rope-middleware {version_of('rope-middleware')}:"
        )
        documents = [cleandoc(vars(Checks)[name].__doc__) for name in names_of(Checks)]
        rows = [HEAD, ("---",) * len(HEAD), *map(self.cells, ROWS)]
        return TEXT.format(
            checks="\n".join(f"- {document}" for document in documents),
            python=python,
            rows="\n".join(f"| {' | '.join(cells)} |" for cells in rows),
            notes="\n".join(self.notes()),
        )

    def cells(self, row: Row) -> tuple[str, ...]:
        server, driver = SERVERS[row.server], DRIVERS[row.driver]
        return (
            f"{row.framework} {version_of(FRAMEWORKS[row.framework].distribution)}",
            f"{row.server} {version_of(server.distribution)}",
            "AsyncSession" if row.is_async else "Session",
            f"`{row.driver}` {version_of(driver) if driver else ''}".strip(),
            self.databases.get(str(row), "").strip(),
            self.result(str(row)),
        )

    def result(self, row: str) -> str:
        if self.failed[row]:
            return f"**failed**: {', '.join(sorted(self.failed[row]))}"
        if row in self.skipped:
            return f"skipped: {self.skipped[row]}"
        missing = set(names_of(Checks)) - self.passed[row]
        return f"not run: {', '.join(sorted(missing))}" if missing else "passed"

    def notes(self) -> list[str]:
        notes = []
        if one := [name for name, kind in SERVERS.items() if not kind.overlaps]:
            notes.append(f"{', '.join(one)}: serves one request at a time, so none overlap there.")
        if deaf := [name for name, found in FRAMEWORKS.items() if not found.tells_of_leaving]:
            notes.append(
                f"{', '.join(deaf)}: the framework does not tell a stream that its client has "
                "gone. It goes on to its own end, and its scope with it."
            )
        notes += [f"{name}: {found.note}" for name, found in FRAMEWORKS.items() if found.note]
        return [textwrap.fill(f"- {note}", 100, subsequent_indent="  ") for note in notes]
