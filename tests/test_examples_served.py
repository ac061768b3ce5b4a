"""Every application that README, the pages and examples/ show, asked as its reader would ask it.

`tests/test_docs.py` runs the blocks of a page. That an application can be made says little: here a
real server runs it, each of its addresses is asked three times, and nothing may be logged.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from sybil import Example
from werkzeug.serving import make_server

from rope_middleware import ASGIRopeMiddleware, WSGIRopeMiddleware
from tests.doc_pages import ROOT, Page
from tests.kit.waiting import PATIENCE
from tests.servers.asgi import HOST, serve
from tests.test_docs import PAGES, elsewhere  # noqa: F401 - a fixture

# A page that shows no application, or one that another test serves (the tutorial, the migrations).
SHOWS_ONE = re.compile(r"^\w+ = (?:Flask|Starlette|FastAPI|Quart|Litestar|responder\.API)\(", re.M)
ADDRESS = re.compile(
    r"""(?:@\w+\.(?:get|route)|\bRoute|@get|\bpath|add_route)\((?:"\w+", )?"(/?[\w./-]*)" ?[,)]"""
)
NOT_ASKED = {
    "docs/howto/graphql.md": "it shows on purpose what is logged as an error; its tests ask it",
    "docs/howto/health.md": "its inner application needs the outer one; its tests ask both",
    "docs/howto/opentelemetry.md": "it has no address for GET; its tests ask it",
    "docs/howto/order.md": "it shows orders that are wrong, too",
    "docs/howto/jobs.md": "its view is asked by POST, and needs a broker",
    "docs/howto/streams.md": "its tests make its tables, and ask all of it",
    "docs/howto/testing.md": "its applications are those of its tests",
    "docs/truth.md": "its application has no address",
    "docs/waiting.md": "its view waits for a model",
}
ALONE = {"README.md"}  # its examples have nothing to do with each other
WRITE_AND_READ = {"README.md", "docs/index.md"}  # what a stranger pastes first


def is_wsgi(app: Any) -> bool:
    return hasattr(app, "wsgi_app") or isinstance(app, WSGIRopeMiddleware)


def is_app(thing: Any) -> bool:
    if isinstance(thing, type):
        return False
    names = {f"{one.__module__.partition('.')[0]}.{one.__name__}" for one in type(thing).__mro__}
    known = {"starlette.Starlette", "flask.Flask", "quart.Quart", "litestar.Litestar"}
    is_known = bool(names & {*known, "responder.API"})
    return is_known or isinstance(thing, (ASGIRopeMiddleware, WSGIRopeMiddleware))


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Run `app` on a real server of its protocol; give its address."""
    if not is_wsgi(app):
        with serve(app) as server:
            yield server.url
        return
    wsgi_server = make_server(HOST, 0, app, threaded=True)
    thread = threading.Thread(target=wsgi_server.serve_forever)
    thread.start()
    try:
        yield f"http://{HOST}:{wsgi_server.server_port}"
    finally:
        wsgi_server.shutdown()
        thread.join(PATIENCE)
        wsgi_server.server_close()


class Asked(Page):
    """A page whose applications are asked."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.apps: dict[int, tuple[Any, str]] = {}
        self.answers: list[tuple[str, int]] = []
        self.written: list[int] = []

    def _run_python(self, example: Example, caption: str) -> None:
        super()._run_python(example, caption)
        for thing in list(self.names.values()):
            if is_app(thing) and id(thing) not in self.apps:
                self.apps[id(thing)] = thing, example.parsed
                if self.name in ALONE:
                    self.ask(thing, example.parsed)

    def _dispose(self) -> None:
        if self.name not in ALONE:
            source = (ROOT / self.name).read_text()
            for app, _ in self.apps.values():
                self.ask(app, source)
        self.apps.clear()
        super()._dispose()

    def ask(self, app: Any, source: str) -> None:
        with served(app) as url:
            for address in dict.fromkeys(ADDRESS.findall(source)):
                for _ in range(3):
                    answer = httpx.get(f"{url}/{address.lstrip('/')}", timeout=PATIENCE)
                    self.answers.append((address, answer.status_code))
            if self.name in WRITE_AND_READ:
                self.write_and_read(url)

    def write_and_read(self, url: str) -> None:
        before = httpx.get(f"{url}/notes").json()
        for text in ("milk", "bread"):
            self.written.append(httpx.post(f"{url}/notes/{text}", timeout=PATIENCE).json()["id"])
            assert httpx.get(f"{url}/notes", timeout=PATIENCE).json()[-1] == text
        assert httpx.get(f"{url}/notes", timeout=PATIENCE).json() == [*before, "milk", "bread"]


def shows_one(page: str) -> bool:
    return page not in NOT_ASKED and SHOWS_ONE.search((ROOT / page).read_text()) is not None


@pytest.mark.filterwarnings("ignore:'cgi' is deprecated:DeprecationWarning")
# Of Litestar's plugin.
@pytest.mark.filterwarnings("ignore:The declarative_mixin decorator:DeprecationWarning")
@pytest.mark.parametrize("name", [page for page in PAGES if shows_one(page)])
def test_the_applications_of_a_page_answer_and_log_nothing(
    name: str,
    elsewhere: None,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    no_leaks: None,
) -> None:
    """The first program a user types works, the second time as well, and is silent."""
    page = Asked(name)
    with caplog.at_level(logging.WARNING):
        page.run()
    told = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert told == []
    assert page.answers
    assert [answer for answer in page.answers if answer[1] >= 500] == []
    # Each example twice, and nobody's row was lost: the numbers are those of one table.
    assert (name in WRITE_AND_READ) == bool(page.written)
    assert page.written == list(range(1, len(page.written) + 1))
