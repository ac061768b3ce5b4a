"""The order of the house: what may import what, read from the modules themselves."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path

import pytest

from tests.kit.programs import run_python

PACKAGE = Path(__file__).parents[1] / "rope_middleware"

# The house from its ground up. A module imports only from those above it in this list; a new one
# finds its place here.
HOUSE = (
    "errors",
    "signature",
    "elsewhere",
    "protocols",
    "position",
    "running",
    "running.forks",
    "running.deadlines",
    "running.finish",
    "running.line",
    "running.places",
    "running.call",
    "running.anyio_threads",
    "running.threads",
    "running.ticker",
    "scope",
    "scope.context",
    "scope.options",
    "scope.kind",
    "scope.scope",
    "scope.outcome",
    "scope.loop",
    "scope.reading",
    "scope.settling",
    "scope.response",
    "scope.hands",
    "scope.order",
    "scope.short",
    "scope.ending",
    "scope.async_hands",
    "scope.hop",
    "scope.async_ending",
    "scope.opening",
    "session",
    "session.connections",
    "session.sql",
    "session.sql.literals",
    "session.sql.statements",
    "session.sql.taking",
    "session.sql.notes",
    "session.sql.writes",
    "session.code",
    "session.code.stacks",
    "session.code.lines",
    "session.code.bodies",
    "session.code.telling",
    "session.code.where",
    "session.holding",
    "session.holding.pools",
    "session.holding.begun",
    "session.holding.ended",
    "session.holding.door",
    "session.holding.holders",
    "session.holding.giving_way",
    "session.holding.stuck",
    "session.holding.waits",
    "session.holding.held",
    "session.unsaved",
    "session.tie",
    "session.guard",
    "session.guard.turns",
    "session.guard.by_error",
    "session.guard.sessions",
    "session.guard.blocks",
    "session.guard.busy",
    "session.failures",
    "session.failures.codes",
    "session.failures.aborted",
    "session.failures.lost",
    "session.failures.trial",
    "session.failures.doubt",
    "session.failures.unanswered",
    "session.failures.refusal",
    "session.failures.locks",
    "session.failures.listening",
    "session.failures.shared_at",
    "session.failures.loading",
    "session.failures.sharing",
    "session.notice",
    "session.closed_early",
    "session.beginning",
    "session.listeners",
    "session.factories",
    "session.closing",
    "session.idle",
    "session.committing",
    "session.kinds",
    "session.async_kind",
    "session.reading",
    "session.reading.switches",
    "session.reading.autocommit",
    "session.reading.sessions",
    "session.reading.positions",
    "session.reading.replicas",
    "session.reading.failover",
    "session.registry",
    "session.release",
    "session.plain",
    "rope",
    "rope.frames",
    "rope.rope",
    "rope.registry",
    "jenny",
    "async_jenny",
    "answer",
    "apps",
    "middleware",
    "asgi.line",
    "asgi.replay",
    "asgi.position",
    "asgi.handshake",
    "asgi.commit",
    "asgi",
    "wsgi.files",
    "wsgi.replay",
    "wsgi.begun",
    "wsgi.body",
    "wsgi.late",
    "wsgi.position",
    "wsgi.commit",
    "wsgi",
    "flask.popped",
    "flask",
    "testing.errors",
    "testing.sql",
    "testing.statement",
    "testing.database",
    "testing.mariadb",
    "testing.postgresql",
    "testing.sqlite",
    "testing.lanes",
    "testing.cursor",
    "testing.turn",
    "testing.shared",
    "testing.virtual",
    "testing.watch",
    "testing.stock",
    "testing.connections",
    "testing.routes",
    "testing.scopes",
    "testing.sandbox",
    "testing.desk",
    "testing.middleware",
    "testing",
    "pytest_plugin",
    "__init__",
)
PLACE = {name: number for number, name in enumerate(HOUSE)}


def _path(module: str) -> Path:
    path = PACKAGE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _modules() -> list[str]:
    names = [path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")]
    return sorted(
        ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        for parts in names
    )


MODULES = _modules()

# What each floor may import besides the standard library, at the top of a module or later.
FOREIGN: dict[str, set[str]] = {
    "errors": {"sqlalchemy"},  # an error of ours is a TimeoutError of SQLAlchemy's
    "elsewhere": set(),
    "protocols": set(),
    "position": set(),
    "running": {"anyio"},
    "scope": {"anyio"},
    "answer": set(),
    "apps": set(),
    "middleware": set(),
    "asgi": {"anyio", "trio"},  # trio where it runs: then it is installed
    "wsgi": set(),
    "flask": {"flask", "sqlalchemy", "werkzeug"},
    "pytest_plugin": {"pytest"},
    "__init__": set(),
}
SQLALCHEMY = {"sqlalchemy"}


@functools.cache
def _tree(module: str) -> ast.Module:
    """Return what runs of a module; imports for type checkers only bind nobody."""
    tree = ast.parse(_path(module).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    return tree


def _imports(module: str) -> list[ast.Import | ast.ImportFrom]:
    nodes = ast.walk(_tree(module))
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def _names(module: str) -> set[str]:
    """Return the dotted names that `module` imports from."""
    names: set[str] = set()
    for node in _imports(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            is_module = full.removeprefix("rope_middleware.") in PLACE
            names.add(full if is_module else node.module or "")
    return names


def test_every_module_has_its_place() -> None:
    """A module that the list above does not know is a decision that was not made."""
    assert set(MODULES) == set(HOUSE)


def test_the_modules_of_a_folder_stand_together() -> None:
    """The order of the folders is the order of imports, too."""
    inner = [name.rpartition(".")[0] for name in HOUSE if name.count(".") > 1]
    changes = [folder for before, folder in pairwise(["", *inner]) if folder != before]
    assert len(changes) == len(set(changes))


FOLDERS = sorted({name.rpartition(".")[0] for name in HOUSE if name.count(".") > 1})


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_tells_what_is_in_it(folder: str) -> None:
    """The docstring of its __init__ is a table of contents: "- a, b: what they are. c: what it is".

    It names each module, and none that is not there.
    """
    named = re.findall(r"(?:^- |[.;] )((?:\w+, )*\w+):", _path(folder).read_text(), re.MULTILINE)
    inside = [name.rpartition(".")[2] for name in HOUSE if name.startswith(f"{folder}.")]
    assert sorted(", ".join(named).split(", ")) == sorted(inside)


def _found(look: Callable[[str], Collection[object]]) -> dict[str, Collection[object]]:
    """Return what `look` finds in each module, of those in which it finds something."""
    return {module: found for module in MODULES if (found := look(module))}


def test_nothing_imports_upwards() -> None:
    """Each module imports from lower floors only, and never relatively."""

    def upwards(module: str) -> list[object]:
        prefix = "rope_middleware."
        own = {name.removeprefix(prefix) for name in _names(module) if name.startswith(prefix)}
        relative = [
            node for node in _imports(module) if isinstance(node, ast.ImportFrom) and node.level
        ]
        return [*(name for name in own if PLACE[name] >= PLACE[module]), *relative]

    assert _found(upwards) == {}


def test_the_scope_knows_no_sqlalchemy_and_the_boundaries_no_framework() -> None:
    """Of other packages a module imports what its floor is there for, and nothing else."""

    def foreign(module: str) -> set[str]:
        tops = {name.split(".")[0] for name in _names(module)}
        known = sys.stdlib_module_names | {"rope_middleware", "__future__", "_typeshed"}
        return tops - known - FOREIGN.get(module.split(".")[0], SQLALCHEMY)

    assert _found(foreign) == {}


def test_no_module_is_too_long() -> None:
    """A module that has outgrown 300 lines has two subjects."""
    assert _found(lambda module: _path(module).read_text().splitlines()[300:]) == {}


# Who touches a private attribute of somebody else's object, and why. In `scope` all modules know
# the Scope; the plain ways of the boundaries and of the jennies save a call for each request.
PRIVATE: dict[str, set[str]] = {
    "middleware": {"_protocols"},  # its own class's
    "asgi": {"_gate", "_name", "_options", "_sessions", "_state", "_thread"},
    "wsgi": {
        *("_name", "_options", "_sessions", "_state"),
        *("_body", "_commits", "_owns", "_read", "_scope"),  # of a body of ours
    },
    "jenny": {"_sessions"},
    "async_jenny": {"_loop", "_sessions", "_thread"},
    "answer": {"_doomed", "_is_refused", "_options", "_sessions"},
    "running.forks": {"_at_fork_reinit"},  # of the locks: the tests of S8 pin it
    "session.connections": {"_connections"},  # SQLAlchemy's: see `made_connections`
    # What `Session._is_clean()` asks, in each request that commits.
    "session.closing": {
        *("_deleted", "_modified", "_new"),
        "_connections",  # as `session.connections`, at the end of each request
    },
    "session.idle": {
        *("_deleted", "_modified", "_new"),
        "_state",  # of the scope that ends, in each request that commits
    },
    "session.beginning": {"_is_async", "_settling", "_state"},  # as the first use
    "session.listeners": {"_modified"},
    # The first use in each request is one function.
    "session.registry": {"_is_async", "_options", "_sessions", "_settling", "_state"},
    "session.guard.busy": {"_flushing"},  # SQLAlchemy's; the tests of C10 pin it
    "session.committing": {
        *("_flushing", "_connections"),  # SQLAlchemy's, as `session.closing`
        *("_deleted", "_modified", "_new"),  # as `session.closing`
        *("_is_broken", "_is_committing"),  # of the scope, in each request that commits
    },
    "session.unsaved": {"_is_clean"},  # SQLAlchemy's; the tests of L1 pin it
    "rope.rope": {"_session"},  # its own class's
    "rope.registry": {"_session"},  # of the ropes that it makes
    "wsgi.commit": {
        *("_doomed", "_is_refused", "_options", "_sessions"),
        *("_body", "_commits", "_owns", "_read", "_scope"),  # of a body of ours
    },
    "wsgi.body": {
        *("_body", "_commits", "_owns", "_read", "_scope"),  # of what it makes
        *("_sessions", "_state"),  # each chunk, and the end, ask the scope
    },
    "flask": {"_get_current_object"},  # documented by Werkzeug
    "session.reading.autocommit": {"_has_events"},  # SQLAlchemy's way to ask for listeners
    "testing.stock": {"_proxied"},  # SQLAlchemy's way from an engine to that of its pool
}


def test_private_attributes_are_touched_where_they_belong() -> None:
    """A private attribute of another object is that object's own affair."""

    def touched(module: str) -> set[str]:
        if module.split(".")[0] == "scope":
            return set()
        return {
            node.attr
            for node in ast.walk(_tree(module))
            if isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
            and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "sys"))
            and not ast.unparse(node.value).startswith("super()")
        } - PRIVATE.get(module, set())

    assert _found(touched) == {}


# The glossary is in CONTRIBUTING.md: one word, one meaning.
RETIRED = re.compile(
    r"\b(keeper|proper|abandons?|give up|gives up|let go|take back|facade of a session)\b", re.I
)


def test_retired_words_are_gone() -> None:
    """Each of them had several meanings: see the glossary."""
    assert _found(lambda module: RETIRED.findall(_path(module).read_text())) == {}


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


def test_Q_the_core_imports_without_any_framework_or_driver() -> None:
    """Frameworks and drivers are extras: the core imports where none of them is there."""
    blocked = [
        *("starlette", "flask", "werkzeug", "responder", "fastapi", "django", "pyramid"),
        *("aiosqlite", "asyncpg", "psycopg", "trio", "uvicorn", "httpx", "greenlet"),
    ]
    code = _IMPORT_WITHOUT.format(blocked=blocked)
    assert run_python("-W", "error", "-c", code).stdout == "imported\n"


def test_Q_an_optional_module_without_its_package_names_the_cure() -> None:
    """`rope_middleware.flask` fails at import where Flask is absent, and says what to install."""
    code = "import sys; sys.modules['flask'] = None; import rope_middleware.flask"
    done = run_python("-W", "error", "-c", code, status=1)
    assert "ImportError" in done.stderr
    assert "pip install 'rope-middleware[flask]'" in done.stderr
