"""Every code block of the documentation and of the README runs; what the pages say is so."""

from __future__ import annotations

import ast
import asyncio
import inspect
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import greenlet
import httpx
import pytest
from anyio import create_task_group, to_thread
from anyio import run as anyio_run
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.orm import sessionmaker

import rope_middleware
from rope_middleware import NoScopeError, RopeMiddleware, SessionJenny, current_scope, open_scope
from rope_middleware.scope.options import Options
from tests.doc_pages import ROOT, Page, check_output, pages
from tests.kit.engines import MakeEngine
from tests.kit.leaks import no_scope_open
from tests.kit.waiting import PATIENCE
from tests.servers.postgres import postgres_server

TUTORIAL = "docs/tutorial.md"
FAQ = "docs/faq.md"
WRONG = "docs/wrong.md"
TENANTS = "docs/howto/tenants.md"
GUIDE = ROOT / "docs" / "guide.md"
MIGRATION = "docs/migration/"  # tests/test_migration_docs.py runs their blocks
PAGES = [
    page
    for page in pages()
    if page not in (TUTORIAL, FAQ, WRONG, TENANTS) and not page.startswith(MIGRATION)
]
ASKED = [
    page for page in PAGES if re.search(r"^\$ (curl|python count)", (ROOT / page).read_text(), re.M)
]
"""Pages whose commands are all there: they are run as a reader would, nothing is imported here."""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be a reader in an empty folder, who has set none of the variables that the pages read."""
    monkeypatch.chdir(tmp_path)
    for name in "DATABASE_URL", "NOTES_URL", "BROKER_URL", "DJANGO_SETTINGS_MODULE":
        monkeypatch.delenv(name, raising=False)
    # It cannot be taken back, and this process goes on when the page is over.
    monkeypatch.setattr(os, "register_at_fork", lambda **functions: None)
    # Litestar configures the logging of the whole process.
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    _forget_models()
    yield
    _forget_models()
    root.setLevel(level)
    for handler in root.handlers[:]:
        if handler not in handlers and not type(handler).__module__.startswith("_pytest"):
            root.removeHandler(handler)


def _forget_models() -> None:
    """SQLModel has one registry for the process, and two pages have models of the same name."""
    if "sqlmodel" in sys.modules:
        from sqlmodel.main import default_registry

        default_registry.metadata.clear()
        default_registry.dispose()


# Pyramid's own imports.
@pytest.mark.filterwarnings("ignore:'cgi' is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:pkg_resources is deprecated as an API:UserWarning")
@pytest.mark.filterwarnings("ignore:Deprecated call to .pkg_resources:DeprecationWarning")
@pytest.mark.parametrize("name", [page for page in PAGES if page not in ASKED])
def test_the_blocks_of_a_page_run_one_after_the_other(
    name: str, elsewhere: None, no_leaks: None
) -> None:
    """A reader who types them in gets no error."""
    Page(name).run()


@pytest.mark.parametrize("name", ASKED)
def test_the_commands_of_a_page_print_what_it_shows(
    name: str, elsewhere: None, no_leaks: None
) -> None:
    """Its files, its servers and its `curl`, for real."""
    Page(name, served=True).run()


def test_the_tutorial_leads_to_a_counter(elsewhere: None, no_leaks: None) -> None:
    """Its files, its commands and its servers, for real, with a PostgreSQL at the end."""
    with postgres_server().new_database() as database:
        page = Page(
            TUTORIAL, served=True, environment={"DATABASE_URL": database.text_url("psycopg")}
        )
        page.run()
        assert database.query("SELECT count FROM counter") == [(200,)]


def test_the_page_on_tenants(
    elsewhere: None, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a PostgreSQL, and a role that does not own the tables."""
    with postgres_server().new_database() as database, database.role() as url:
        urls = {
            "DATABASE_URL": url.render_as_string(hide_password=False),
            "OWNER_URL": database.text_url("psycopg"),
        }
        monkeypatch.setenv("DATABASE_URL", urls["DATABASE_URL"])
        Page(TENANTS, environment=urls).run()


# A server would be needed to provoke them.
NOT_PROVOKED = {"idle in transaction", "MySQL server has gone away", "attached to a different loop"}


@pytest.mark.told
# A connection that is left to the garbage collector ends in aiosqlite's thread, perhaps after its
# event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
# What SQLAlchemy leaves behind where it finds that nothing can be awaited.
@pytest.mark.filterwarnings("ignore:coroutine .Connection.cursor. was never awaited:RuntimeWarning")
def test_the_errors_of_the_faq_are_the_ones_that_come(elsewhere: None) -> None:
    """The text in a heading is what the blocks below it print, to the letter; the cures work."""
    page = Page(FAQ)
    page.run()
    no_scope_open()
    headings = {
        number: heading.replace("GET /notes", "...")
        for number, line in enumerate((ROOT / FAQ).read_text().splitlines(), 1)
        for heading in re.findall(r"^### `(.*)`$", line)
    }
    starts = [*headings, 10**6]
    for start, end in itertools.pairwise(starts):
        printed = "\n".join(text for line, text in page.printed if start < line < end)
        if headings[start] not in NOT_PROVOKED:
            check_output(headings[start], printed)


@pytest.mark.told
def test_what_is_told_of_something_wrong(elsewhere: None) -> None:
    """The page shows what the package says, to the letter."""
    ours = logging.getLogger("rope_middleware")
    handlers = ours.handlers[:]
    try:
        Page(WRONG).run()
    finally:
        ours.handlers = handlers
    no_scope_open()


HOW_TO = {path.stem: path for path in (ROOT / "docs" / "howto").glob("*.md")}
# Of the server, or of several libraries, and not of one application: an order of their own.
NOT_ONE_APPLICATION = {"injection", "interfaces", "order", "pgbouncer", "workers"}


@pytest.mark.parametrize("name", sorted(HOW_TO.keys() - NOT_ONE_APPLICATION))
def test_the_how_to_pages_have_one_order(name: str) -> None:
    """Install, set up, use, test, deploy."""
    headings = re.findall(r"^## (.*)$", HOW_TO[name].read_text(), re.MULTILINE)
    assert headings == ["Install", "Set up", "Use", "Test", "Deploy"]


BLOCK = re.compile(r"^```(.*)\n((?:(?!```).*\n)*)```$", re.M)
STARTS = re.compile(
    r"^\$ (?:uvicorn|gunicorn|hypercorn|waitress-serve|celery|rq|flask .* run)\b", re.M
)


@pytest.mark.parametrize("name", sorted(HOW_TO))
def test_a_how_to_page_can_be_pasted(name: str) -> None:
    """Each block says which file it goes to; a server is alone in its block."""
    for language, source in BLOCK.findall(HOW_TO[name].read_text()):
        assert language != "python", f"which file? {source}"
        if language == "{code-block} python":
            assert source.startswith(":caption: "), source
        if STARTS.search(source):
            assert len(re.findall(r"^\$ ", source, re.M)) == 1, source


REFERENCE = sorted(path.name for path in (ROOT / "docs" / "reference").glob("*.md"))


@pytest.mark.parametrize("name", [name for name in REFERENCE if name != "index.md"])
def test_each_page_of_the_reference_begins_with_an_example(name: str) -> None:
    """Who looks a name up sees it in use first."""
    page = (ROOT / "docs" / "reference" / name).read_text()
    assert 0 < page.index("```python") < page.find("```{eval-rst}") % 10**6


ABOUT_ROPES = {"docs/howto/scripts.md"}


@pytest.mark.parametrize("page", [page for page in pages() if page not in (FAQ,)])
def test_the_examples_are_made_as_we_advise(page: str) -> None:
    """A strict jenny; objects of an AsyncSession stay readable; no race for tables."""
    source = (ROOT / page).read_text()
    for made in re.findall(r"\basync_sessionmaker\((?!\))[^)]*\)", source):
        assert "expire_on_commit=False" in made, made
    for made in re.findall(r"^\w+ = SessionJenny\(.*?\)$", source, re.M | re.S):
        is_shown = page.startswith(("docs/howto/", "README", "docs/index", "docs/tutorial"))
        assert "strict=True" in made or not is_shown or page in ABOUT_ROPES, made
    starts = re.findall(
        r"^(?:async )?def (?:lifespan|startup)\b.*\n(?:    .*\n|\n(?=    ))*", source, re.M
    )
    assert not [start for start in starts if "create_all" in start]


def test_the_overview_lists_every_how_to_page() -> None:
    """A page that nobody finds helps nobody."""
    listed = re.findall(r"^\| \[.*?\]\(howto/(\w+)\.md\)", GUIDE.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(HOW_TO)


# What shows that a row of the table "Who sees which session" is so.
SEEN = {
    "in a view, in what it calls, in hooks, dependencies, templates": (
        "e2e/test_responder.py::test_S2_dependencies_and_view_share_the_session"
    ),
    "in a streamed body, in a background task of the framework": (
        "e2e/test_responder.py::test_A4_resp_background_runs_in_the_scope"
    ),
    "in a worker thread of the framework, `asyncio.to_thread`, `anyio.to_thread`": (
        "promises/test_Y_async.py::test_Y1_the_first_use_in_a_worker_thread_is_seen_by_the_middleware"
    ),
    "in a task that the request started (`create_task`, `gather`, a task group)": (
        "promises/test_Y_async.py::test_Y1_a_session_made_in_a_child_task_is_closed_by_the_middleware"
    ),
    "in a `threading.Thread`, a `ThreadPoolExecutor`, `loop.run_in_executor`": (
        "test_docs.py::test_what_a_request_starts_by_hand_has_no_scope"
    ),
    "in a greenlet that serves a request (gevent, eventlet)": (
        "promises/test_W_wsgi.py::test_W4_greenlets_switched_in_the_middle_of_everything"
    ),
    "in a greenlet that a view has started (`gevent.spawn`)": (
        "test_docs.py::test_what_a_request_starts_by_hand_has_no_scope"
    ),
    "in a thread or task that has outlived its request": (
        "promises/test_S4_too_late.py::test_S4_a_task_that_outlived_its_request_is_told_so"
    ),
    "in a background job (Celery, RQ)": (
        "promises/test_S_scope.py::test_S7_outside_of_any_scope_there_is_no_current_one"
    ),
    "in a generator that opens a scope around its chunks": (
        "promises/test_S6_nested.py::test_S6_a_scope_around_several_chunks_is_current_for_each"
    ),
    "in a WebSocket": (
        "e2e/test_responder.py::test_A1_a_websocket_has_one_scope_for_its_connection"
    ),
    "in the lifespan, in startup and shutdown functions": (
        "promises/test_A_asgi.py::test_A1_a_lifespan_uses_open_scope_by_hand"
    ),
    "inside `with open_scope():`": (
        "promises/test_S6_nested.py::test_S6_an_inner_scope_has_sessions_of_its_own"
    ),
    "in an application that is mounted in another": (
        "e2e/test_responder.py::test_S6_a_mounted_asgi_app_shares_the_scope"
    ),
    "in a request that a client in the same process makes": (
        "promises/test_S6_nested.py::test_S6_another_request_of_a_client_in_the_same_process_has_its_own_scope"
    ),
    "in another event loop than the request's": (
        "promises/test_Y_async.py::test_Y4_another_event_loop_is_refused"
    ),
}


def test_each_row_of_who_sees_which_session_has_its_test() -> None:
    """A row that nothing shows, or whose test has gone, would be noticed."""
    page = (ROOT / "docs" / "concepts.md").read_text()
    table = page.partition("## Who sees which session")[2].partition("*No scope*")[0]
    rows = re.findall(r"^\| (in.*?) \| .* \|$", table, re.MULTILINE)
    assert rows == list(SEEN)
    for test in SEEN.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test


def test_each_claim_of_the_security_page_has_its_test() -> None:
    """A test that the page names is there."""
    page = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"^\| .* \| `([\w/]+\.py)::(\w+)` \|$", page, re.MULTILINE)
    assert len(named) == page.count(".py::")
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name


START_BY_HAND: dict[str, Callable[[Callable[[], None]], object]] = {
    "greenlet": lambda work: greenlet.greenlet(work).switch(),
    "ThreadPoolExecutor": lambda work: ThreadPoolExecutor(1).submit(work).result(PATIENCE),
    "run_in_executor": lambda work: asyncio.run(_in_executor(work)),
}


async def _in_executor(work: Callable[[], None]) -> None:
    async with open_scope():
        await asyncio.get_running_loop().run_in_executor(None, work)


@pytest.mark.parametrize("how", START_BY_HAND)
def test_what_a_request_starts_by_hand_has_no_scope(how: str) -> None:
    """Context variables do not go along: such code opens a scope of its own."""
    seen: list[str] = []

    def work() -> None:
        try:
            seen.append(current_scope().name)
        except NoScopeError:
            seen.append("none")
        with open_scope("its own"):
            seen.append(current_scope().name)

    with open_scope("GET /"):
        START_BY_HAND[how](work)
        assert current_scope().name == "GET /"
    assert seen == ["none", "its own"]


TWO_HOPS = {
    # A sync dependency and the endpoint; the endpoint, and the check of what it returns.
    "dependency": False,
    "response model": False,
    "dependency, ended": True,
    "response model, ended": True,
    "no response model": True,
    "dependency, as many connections as requests": True,
}


@pytest.mark.told
@pytest.mark.parametrize("how", TWO_HOPS)
def test_sync_handlers_that_hold_a_transaction_across_two_hops(
    how: str, make_engine: MakeEngine
) -> None:
    """They wait for each other, unless one of the cures is taken."""
    is_served = TWO_HOPS[how]
    engine = make_engine(12 if "as many" in how else 2, pool_timeout=PATIENCE if is_served else 0.2)
    jenny = SessionJenny(sessionmaker(engine))
    app = FastAPI()
    app.add_middleware(RopeMiddleware)

    def work() -> int | None:
        one = jenny.session.scalar(text("SELECT 1"))
        if how.endswith("ended"):
            jenny.session.rollback()
        return one

    depends = [Depends(work)] if "dependency" in how else []
    model = int if "response model" in how and not how.startswith("no") else None
    app.get("/", response_model=model, dependencies=depends)(work)
    statuses: list[int] = []

    async def main() -> None:
        to_thread.current_default_thread_limiter().total_tokens = 4
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def ask() -> None:
                statuses.append((await client.get("/")).status_code)

            async with create_task_group() as group:
                for _ in range(12):
                    group.start_soon(ask)

    anyio_run(main)
    assert len(statuses) == 12
    assert (set(statuses) == {200}) is is_served


def test_the_reference_names_every_message_that_is_logged() -> None:
    """With its level, to the letter; and none that is gone."""
    logged = set()
    for path in (ROOT / "rope_middleware").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("tell_once", "tell_hourly"):  # the third argument is the text
                logged.add(("WARNING", ast.literal_eval(node.args[2])))
            elif called.startswith("logger.") and path.stem != "telling":
                level = called.removeprefix("logger.").replace("exception", "error")
                logged.add((level.upper(), ast.literal_eval(node.args[0])))
    page = (ROOT / "docs" / "reference" / "logging.md").read_text()
    told = re.findall(r"^\| ([A-Z]+) \| `(.*?)` \|", page, re.MULTILINE)
    assert logged
    assert sorted(told) == sorted((level, text.replace("\n", "\\n")) for level, text in logged)


def test_the_reference_has_every_public_name() -> None:
    """What can be imported from the package stands in the overview and is documented."""
    pages = {path.stem: path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md")}
    documented = re.findall(r"^\.\. auto\w+:: (\w+)", "\n".join(pages.values()), re.MULTILINE)
    assert set(rope_middleware.__all__) <= set(documented)
    errors = {name for name in rope_middleware.__all__ if name.endswith("Error")}
    for name in set(rope_middleware.__all__) - errors:
        assert f"`~rope_middleware.{name}`" in pages["index"], name


def test_the_reference_tells_the_options_of_the_middlewares() -> None:
    """Written down there, because `__new__` and its overloads say less than `Options`."""
    page = (ROOT / "docs" / "reference" / "middleware.md").read_text()
    written = re.findall(r"^\.\. autoclass:: (\w+)(\(.*\))$", page, re.MULTILINE)
    assert [name for name, _ in written] == [
        "RopeMiddleware",
        "ASGIRopeMiddleware",
        "WSGIRopeMiddleware",
    ]
    given = inspect.signature(Options).parameters
    options = ", ".join(f"{name}={option.default!r}" for name, option in given.items())
    for _, signature in written:
        assert signature == f"(app, registries=(), *, {options})"
    typed = re.findall(r"^\| `(\w+)` \| ", page, re.MULTILINE)
    assert set(typed) == {"app", "registries", *given}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_the_links_of_the_readme_lead_somewhere(name: str) -> None:
    """Sphinx checks those of the pages; these are read where the code lies."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), target
