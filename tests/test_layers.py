"""The order of the house: what may import what, read from the modules themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rope_middleware"

# A module imports only from lower floors. A new one finds its floor here.
FLOORS = (
    {"errors", "finish"},
    {"scope"},
    {"registry"},
    {"rope", "refusal"},
    {"jenny"},
    {"async_jenny"},
    {"middleware"},
    {"asgi", "wsgi"},
    {"flask"},
    {"__init__"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

# What each module may import besides the standard library, at its top or later.
FOREIGN: dict[str, set[str]] = {
    "errors": set(),
    "scope": set(),
    "finish": {"anyio"},
    "asgi": {"anyio"},
    "wsgi": set(),
    "middleware": set(),
    "__init__": set(),
    "flask": {"flask", "sqlalchemy", "werkzeug"},
}
SQLALCHEMY = {"sqlalchemy"}


def _imports(module: str) -> list[ast.Import | ast.ImportFrom]:
    """Return every import that runs; those for type checkers only bind nobody."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def _names(module: str) -> set[str]:
    """Return the dotted names that `module` imports from."""
    names: set[str] = set()
    for node in _imports(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif node.module == "rope_middleware":
            names |= {f"rope_middleware.{alias.name}" for alias in node.names}
        else:
            names.add(node.module or "")
    return names


def test_every_module_has_its_floor() -> None:
    """A module that the table above does not know is a decision that was not made."""
    assert set(MODULES) <= set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_upwards(module: str) -> None:
    """Each module imports from lower floors only, and never relatively."""
    assert not [
        node for node in _imports(module) if isinstance(node, ast.ImportFrom) and node.level
    ]
    own = {name.split(".")[1] for name in _names(module) if name.startswith("rope_middleware.")}
    upwards = {name for name in own if FLOOR[name] >= FLOOR[module]}
    assert not upwards, f"{module} imports {upwards}"


@pytest.mark.parametrize("module", MODULES)
def test_the_scope_knows_no_sqlalchemy_and_the_adapters_no_framework(module: str) -> None:
    """Of other packages a module imports what its floor is there for, and nothing else."""
    tops = {name.split(".")[0] for name in _names(module)}
    foreign = tops - sys.stdlib_module_names - {"rope_middleware", "__future__", "_typeshed"}
    assert foreign <= FOREIGN.get(module, SQLALCHEMY)


_IMPORT_WITHOUT = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import rope_middleware
for name in set(rope_middleware.__all__) - {{"AsyncSessionJenny"}}:
    getattr(rope_middleware, name)
try:
    rope_middleware.AsyncSessionJenny  # SQLAlchemy 2.0 asks for greenlet at the first use only
except ImportError as error:
    assert "pip install 'rope-middleware[asyncio]'" in str(error), error
print("imported")
"""


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_Q_the_core_imports_without_any_framework_or_driver() -> None:
    """Frameworks and drivers are extras: the core imports where none of them is there."""
    blocked = [
        *("starlette", "flask", "werkzeug", "responder", "fastapi", "django", "pyramid"),
        *("aiosqlite", "asyncpg", "psycopg", "trio", "uvicorn", "httpx", "greenlet"),
    ]
    done = _python(_IMPORT_WITHOUT.format(blocked=blocked))
    assert done.stdout == "imported\n", done.stderr


def test_Q_an_optional_module_without_its_package_names_the_cure() -> None:
    """`rope_middleware.flask` fails at import where Flask is absent, and says what to install."""
    done = _python("import sys; sys.modules['flask'] = None; import rope_middleware.flask")
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "pip install 'rope-middleware[flask]'" in done.stderr
