"""Writes the outcome of the tables down as a page of the documentation: the results first."""

from __future__ import annotations

import platform
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from inspect import cleandoc
from pathlib import Path

import pytest

from tests.kit.frameworks import FRAMEWORKS
from tests.matrix.checks import Checks
from tests.matrix.databases import DRIVERS
from tests.matrix.libraries import LIBRARIES, Library
from tests.matrix.rows import ROWS, Row, version_of
from tests.matrix.servers import SERVERS

DATABASE = "database"
"""The property of a test that says which database it was run on."""

TEXT = """\
# Compatibility

{summary}

## Frameworks, servers and databases

Each cell names the server. *(async)* means an `AsyncSession`, everything else a `Session`. What is
empty was not tried: it is each framework, each server and each driver, not each combination.

{grid}

{problems}

## Libraries

Each is used in requests: some write, one fails, and the next ones see what they should.

{libraries}

## Versions

{versions}

## What is checked

Each framework runs on real servers, in processes of their own, with real databases: with each kind
of session that it can have, and each database by each of its drivers. The application has six
routes (read, write, raise, stream, slow, concurrent). A cell is ticked if all of this holds:

{checks}

After each of them no session has been mixed up, no scope is open, no connection is out of the
pool, the database itself sees none that is in a transaction, and neither SQLAlchemy's pool nor
asyncio has complained.

{notes}

`make compatibility` writes this page. A row is skipped, with its reason, if its server or database
is not there. PostgreSQL comes with the packages of the tests. `make get-servers` installs MariaDB
on Debian and Ubuntu; `DATABASE_URL_MARIADB` may name a running one, such as that of `make mariadb`.
"""

SYSTEMS = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "mariadb": "MariaDB"}
PASSED = "passed"


def names_of(checks: type[Checks]) -> list[str]:
    return [name for name in vars(checks) if name.startswith("test_")]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table that keeps within a phone: see `docs/_static/pages.css`."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f":::{{table}}\n:class: grid\n\n{text}\n:::"


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
        if not found and name.removeprefix("test_") in LIBRARIES:
            found = name.removeprefix("test_")
        elif found not in self.by_id or name not in names_of(Checks):
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
        documents = [cleandoc(vars(Checks)[name].__doc__) for name in names_of(Checks)]
        libraries = (
            (f"{self.mark(name)}&nbsp;{_named(one.distribution)}", one.given, one.use)
            for name, one in LIBRARIES.items()
        )
        head = ("", *(f"{name} {self.version_of_system(key)}" for key, name in SYSTEMS.items()))
        return TEXT.format(
            summary=self.summary(),
            grid=table(head, map(self.cells, FRAMEWORKS)),
            problems="\n".join(self.problems()),
            libraries=table(("", "is given", "in requests"), libraries),
            versions="\n".join(_versions()),
            checks="\n".join(f"- {document}" for document in documents),
            notes="\n".join(_notes()),
        )

    def summary(self) -> str:
        wanted = [*self.by_id, *LIBRARIES]
        good = sum(self.result(name) == PASSED for name in wanted)
        many = "All" if good == len(wanted) else f"{good} of"
        return textwrap.fill(
            f"**{many} {len(wanted)} passed**: {len(ROWS)} combinations of {len(FRAMEWORKS)} "
            f"frameworks, {len(SERVERS)} servers and {len(DRIVERS)} drivers, and "
            f"{len(LIBRARIES)} libraries. {platform.python_implementation()} "
            f"{platform.python_version()} on {platform.system()}, {_named('SQLAlchemy')}, "
            f"{_named('rope-middleware')}.",
            100,
        )

    def cells(self, framework: str) -> list[str]:
        cells = [f"**{framework}**"]
        for system in SYSTEMS:
            rows = [
                row
                for row in ROWS
                if row.framework == framework and row.driver.startswith(f"{system}+")
            ]
            cells.append("<br>".join(map(self.cell, rows)))
        return cells

    def cell(self, row: Row) -> str:
        return f"{self.mark(str(row))}&nbsp;{row.server}{' (async)' if row.is_async else ''}"

    def mark(self, name: str) -> str:
        result = self.result(name)
        return {"passed": "✓", "failed": "✗"}.get(result.partition(":")[0], "-")

    def version_of_system(self, system: str) -> str:
        for name, row in self.by_id.items():
            if row.driver.startswith(f"{system}+") and name in self.databases:
                return self.databases[name].partition(" ")[2]
        return ""

    def result(self, name: str) -> str:
        if self.failed[name]:
            return f"failed: {', '.join(sorted(self.failed[name]))}"
        if name in self.skipped:
            return f"skipped: {self.skipped[name]}"
        wanted = {f"test_{name}"} if name in LIBRARIES else set(names_of(Checks))
        missing = wanted - self.passed[name]
        return f"not run: {', '.join(sorted(missing))}" if missing else PASSED

    def problems(self) -> list[str]:
        told = {name: self.result(name) for name in [*self.by_id, *LIBRARIES]}
        return [f"- {name}: {result}" for name, result in told.items() if result != PASSED]


def _named(distribution: str) -> str:
    return f"{distribution} {version_of(distribution)}".strip()


def _versions() -> list[str]:
    kinds: dict[str, Iterable[str]] = {
        "Frameworks": (found.distribution for found in FRAMEWORKS.values()),
        "Servers": (kind.distribution for kind in SERVERS.values()),
        "Drivers": filter(None, DRIVERS.values()),
    }
    return [
        textwrap.fill(
            f"- {kind}: {', '.join(_named(name) for name in dict.fromkeys(found))}.",
            100,
            subsequent_indent="  ",
        )
        for kind, found in kinds.items()
    ]


OTHERS = """\
granian: a body that breaks off reaches the application as one that has ended. Compare its length
    with Content-Length.
granian (WSGI), hypercorn (WSGI): `start_response()` returns no `write()`, so what calls it fails.
    With `commit_on_success` it works: what is written begins the body. hypercorn answers an
    empty WSGI body by a 500, whatever the application has said.
granian (ASGI): the start of a response waits for its first chunk. A stream that raises before that
    is a 500 for the client, though the commit, which comes before the start, stands.
bjoern: where clients hang up while a file is sent by `wsgi.file_wrapper`, others get each other's
    answers, or the process ends; with handlers by hand as well.
Litestar, Falcon, Quart, Sanic, BlackSheep: answer an error of a WebSocket handler themselves, and
    the call ends without one, so that `commit_on_success` commits what it has written. Put
    `async with open_scope(commit_on_success=True):` around each message.
Litestar, BlackSheep: where the connection of a WebSocket breaks off, uvicorn's error for their
    close message leaves the application, so that `commit_on_success` rolls back.
Sanic: does not tell a stream that its client has gone, either.
""".replace("\n    ", " ").splitlines()
"""Of servers and frameworks that were tried by hand and are not in the table."""


def _notes() -> list[str]:
    notes = []
    if one := [name for name, kind in SERVERS.items() if not kind.overlaps]:
        notes.append(f"{', '.join(one)}: serves one request at a time, so none overlap there.")
    if deaf := [name for name, found in FRAMEWORKS.items() if not found.tells_of_leaving]:
        notes.append(
            f"{', '.join(deaf)}: the framework does not tell a stream that its client has "
            "gone. It goes on to its own end, and its scope with it."
        )
    noted: dict[str, Library | object] = {**FRAMEWORKS, **LIBRARIES}
    for name, found in noted.items():
        if note := getattr(found, "note", ""):
            notes.append(f"{getattr(found, 'distribution', name)}: {note}")
    notes += OTHERS
    return [textwrap.fill(f"- {note}", 100, subsequent_indent="  ") for note in notes]
