"""One WSGI application that the servers of `tests.servers.wsgi` run: six frameworks side by side.

`/flask/stream`, `/django/stream` and so on lead to the same views (`tests.matrix.app`), and each
framework's application has a RopeMiddleware of its own. Besides the routes of the matrix there are

- `break`, which raises in the middle of its body,
- `file`, which answers with a file, by `wsgi.file_wrapper` where the server has one,
- `slow`, here without writing: it tells that its body was closed when its client went away.

`/state` stands outside of all the middlewares. It tells what is checked out of the pools, which
scopes are open, what was mixed up, and how often a scope showed where none should.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from wsgiref.util import shift_path_info

from sqlalchemy import create_engine, make_url, select, text

from rope_middleware import NoScopeError, RopeMiddleware, current_scope
from tests.kit.frameworks import FRAMEWORKS
from tests.kit.leaks import open_scopes
from tests.matrix.app import DATA, SLOW_SECONDS, Claim, Views

URL = make_url(f"sqlite:///{os.environ['WSGI_APPS_DATABASE']}")
FILE = Path(os.environ["WSGI_APPS_FILE"])
OPTIONS: dict[str, Any] = {
    "pool_size": 20,
    "max_overflow": 0,
    "pool_timeout": 20,
    "connect_args": {"timeout": 30, "check_same_thread": False},
}


class Site(Views):
    """The views of one framework; each counts for itself."""

    pause = 0.001
    looks = 1

    def __init__(self, name: str) -> None:
        super().__init__(URL, OPTIONS, name)
        self.cut: list[str] = []
        self.routes |= {"break": self.broken, "file": self.file}

    async def broken(self, token: str) -> AsyncIterator[bytes]:
        claim = Claim(self, token)

        async def chunks() -> AsyncIterator[bytes]:
            await self.look(claim)
            yield token.encode()
            await self.look(claim)
            raise RuntimeError("breaks as it should")

        return chunks()

    async def file(self, token: str) -> Path:
        await self.look(Claim(self, token))
        return FILE

    async def slow(self, token: str) -> AsyncIterator[bytes]:
        claim = Claim(self, token)

        async def chunks() -> AsyncIterator[bytes]:
            end = time.monotonic() + SLOW_SECONDS
            try:
                yield token.encode()
                while time.monotonic() < end:
                    await self.look(claim)
                    yield b"." * 65536
            except GeneratorExit:
                await self.look(claim)  # in close() the scope is still there
                self.cut.append(token)
                raise

        return chunks()


def bare(views: Views) -> Any:
    """PEP 3333 without a framework."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        token = parse_qs(environ["QUERY_STRING"])["token"][0]
        answer = views(environ["PATH_INFO"].strip("/"), token)
        write = start_response("200 OK", [("Content-Type", "text/plain")])
        if isinstance(answer, str):
            write(answer.encode())  # the old way
            return []
        if isinstance(answer, Path):
            opened = answer.open("rb")
            if "wsgi.file_wrapper" in environ:
                return environ["wsgi.file_wrapper"](opened, 8192)
            return iter(lambda: opened.read(8192), b"")
        return answer

    return RopeMiddleware(app)


MAKE: dict[str, Callable[[Any], Any]] = {
    "bare": bare,
    **{name: found.make for name, found in FRAMEWORKS.items() if found.protocol == "wsgi"},
}


def make_database() -> None:
    engine = create_engine(URL)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE data (name VARCHAR PRIMARY KEY, count INTEGER)"))
        connection.execute(DATA.insert(), [{"name": name, "count": 0} for name in MAKE])
    engine.dispose()


def report(sites: Iterable[Site], showing: list[str]) -> dict[str, Any]:
    engine = create_engine(URL)
    with engine.connect() as connection:
        counts = dict(connection.execute(select(DATA.c.name, DATA.c.count)).tuples().all())
    engine.dispose()
    return {
        "checked_out": sum(site.pool.checkedout() for site in sites),
        "open": [scope.name for scope in open_scopes()],
        "seen": sum(site.state.seen for site in sites),
        "mixed_up": list(chain(*(site.state.mixed_up for site in sites))),
        "showing": showing,
        "cut": list(chain(*(site.cut for site in sites))),
        "counts": counts,
    }


def dispatcher() -> Any:
    """The application outside of all the middlewares."""
    make_database()
    sites = {name: Site(name) for name in MAKE}
    apps = {name: make(sites[name]) for name, make in MAKE.items()}
    showing: list[str] = []

    def nothing_shows(where: str) -> None:
        try:
            showing.append(f"{where}: {current_scope().name}")
        except NoScopeError:
            pass
        except Exception as error:  # a scope that has ended shows as well
            showing.append(f"{where}: {error}")

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        nothing_shows(f"before {path}")
        if path == "/state":
            body = json.dumps(report(sites.values(), showing)).encode()
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
            start_response("200 OK", headers)
            return [body]
        name = shift_path_info(environ)
        assert name is not None
        try:
            # Whatever this is goes to the server as it is.
            return apps[name](environ, start_response)
        finally:
            nothing_shows(f"after {path}")

    return application


application = dispatcher()
