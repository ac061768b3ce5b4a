"""Every code block of the migration pages runs, and the blocks before differ as they say."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

PAGES = Path(__file__).parents[1] / "docs" / "migration"
NAMES = ["fastapi-sqlalchemy", "flask-sqlalchemy-session", "scoped-session", "sqlalchemy-rope"]

# What is replaced where a page says that only the import changes.
IMPORTS = {
    "sqlalchemy-rope": ("from sqlalchemy_rope import", "from rope_middleware import"),
    "flask-sqlalchemy-session": (
        "from flask_sqlalchemy_session import",
        "from rope_middleware.flask import",
    ),
}


@dataclass
class Block:
    """A fenced block of a page."""

    heading: str
    language: str
    line: int
    code: str


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a page, each with the heading that it stands under."""
    blocks: list[Block] = []
    heading, inside = "", None
    path = PAGES / f"{page}.md"
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if inside is None:
            if line.startswith("#"):
                heading = line.lstrip("# ")
            elif line.startswith("```"):
                inside = Block(heading, line[3:].strip(), number, "")
        elif line.startswith("```"):
            blocks.append(inside)
            inside = None
        else:
            inside.code += line + "\n"
    assert inside is None, f"{path.name}: the block of line {inside} does not end"
    return blocks


def run(page: str, blocks: list[Block]) -> dict[str, Any]:
    """Run the blocks one after the other, as a reader would, and return their names."""
    namespace: dict[str, Any] = {"__name__": "application"}
    for block in blocks:
        source = "\n" * block.line + block.code  # an error names the line of the page
        exec(compile(source, PAGES / f"{page}.md", "exec", dont_inherit=True), namespace)
    return namespace


@pytest.fixture(autouse=True)
def elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> Iterator[list[dict[str, Any]]]:
    """Run in an empty folder, where the pages make their databases; close them afterwards."""
    monkeypatch.chdir(tmp_path)
    namespaces: list[dict[str, Any]] = []
    yield namespaces
    for namespace in namespaces:
        engines = [value for value in namespace.values() if isinstance(value, Engine)]
        assert engines
        namespace.clear()
        gc.collect()
        for engine in engines:
            assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            engine.dispose()


def test_the_pages_are_all_here() -> None:
    """A page that is not tested would be noticed."""
    assert sorted(path.stem for path in PAGES.glob("*.md")) == NAMES


@pytest.mark.parametrize("page", NAMES)
def test_each_page_tells_the_same_story(page: str) -> None:
    """Before, after, what changes, what gets better; and every block is in a known language."""
    text = (PAGES / f"{page}.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    wanted = ["Before", "After", "What changes", "What gets better"]
    assert [heading for heading in headings if heading in wanted] == wanted
    assert {block.language for block in blocks_of(page)} <= {"python", "console"}
    assert sum(block.heading == "Before" for block in blocks_of(page)) == 1
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 100


@pytest.mark.parametrize("page", NAMES)
def test_each_block_runs(page: str, elsewhere: list[dict[str, Any]]) -> None:
    """The blocks of a page, without the one before, run in their order."""
    blocks = [b for b in blocks_of(page) if b.language == "python" and b.heading != "Before"]
    assert blocks
    elsewhere.append(run(page, blocks))


@pytest.mark.parametrize("page", IMPORTS)
def test_only_the_import_changes(page: str) -> None:
    """The block before with the other import is the block after, to the letter."""
    before, after = (
        next(block for block in blocks_of(page) if block.heading == heading)
        for heading in ("Before", "After")
    )
    old, new = IMPORTS[page]
    assert before.code.count(old) == 1
    assert before.code.replace(old, new) == after.code


def test_the_scoped_session_before_runs(elsewhere: list[dict[str, Any]]) -> None:
    """SQLAlchemy and Flask alone: what the page starts from works."""
    before = next(b for b in blocks_of("scoped-session") if b.heading == "Before")
    elsewhere.append(run("scoped-session", [before]))


@pytest.mark.parametrize("page", NAMES)
def test_the_block_before_compiles(page: str) -> None:
    """Also where its package is not installed."""
    before = next(block for block in blocks_of(page) if block.heading == "Before")
    compile(before.code, page, "exec")
