"""One WSGI application that the servers of `wsgi_servers` run: six frameworks side by side.

`/flask/count`, `/django/count` and so on lead to the same few routes in each framework, and each
framework's application has a RopeMiddleware of its own:

- `count` counts and answers with the number,
- `stream` answers in several chunks, each of which uses the session,
- `fail` writes, does not commit, and raises,
- `break` raises in the middle of its body,
- `file` answers with a file, by `wsgi.file_wrapper` where the server has one,
- `slow` streams until its client goes away.

Every request brings a `token`. It is written into its session and its scope, and looked for again
at each step, so that a request that gets another's session is noticed.

`/state` stands outside of all the middlewares. It tells what is checked out of the pool, which
scopes are open, what was mixed up, and how often a scope showed where none should.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qs
from wsgiref.util import shift_path_info

from sqlalchemy import create_engine, literal, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlalchemy.pool import QueuePool

from rope_middleware import NoScopeError, RopeMiddleware, Scope, SessionJenny, current_scope

DATABASE = os.environ["WSGI_APPS_DATABASE"]
FILE = Path(os.environ["WSGI_APPS_FILE"])
CHUNKS = 5
SLOW_SECONDS = 30.0
"""An end for streams whose client stays; no test waits for it."""


class Base(DeclarativeBase):
    pass


class Data(Base):
    __tablename__ = "data"

    name: Mapped[str] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(default=0)


engine = create_engine(
    f"sqlite:///{DATABASE}",
    poolclass=QueuePool,
    pool_size=20,
    max_overflow=0,
    pool_timeout=20,
    connect_args={"timeout": 30, "check_same_thread": False},
)
jenny = SessionJenny(sessionmaker(engine))


class State:
    """What the process has seen."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.mixed_up: list[str] = []
        self.showing: list[str] = []
        self.cut: list[str] = []

    def report(self) -> dict[str, Any]:
        assert isinstance(engine.pool, QueuePool)
        out = engine.pool.checkedout()
        with Session(engine) as session:
            counts = dict(session.execute(select(Data.name, Data.count)).tuples().all())
        return {
            "checked_out": out,
            "open": [scope.name for scope in self.scopes if not scope.closed],
            "seen": len(self.scopes),
            "mixed_up": self.mixed_up,
            "showing": self.showing,
            "cut": self.cut,
            "counts": counts,
        }


state = State()

# -- what every framework's view does --------------------------------------------------------


class Request:
    """The token's claim on the session and the scope of its request."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.scope = current_scope()
        self.session = jenny.session
        state.scopes.append(self.scope)
        if "token" in self.session.info or self.scope.info:
            state.mixed_up.append(f"{token} got what belongs to {self.session.info.get('token')}")
        self.session.info["token"] = self.scope.info["token"] = token

    def check(self) -> None:
        """Use the session, let others run, and see whether it is still this request's own."""
        found = jenny.session.scalar(select(literal(self.token)))
        time.sleep(0.001)  # other threads and greenlets run
        mine = (
            jenny.session is self.session
            and current_scope() is self.scope
            and self.session.info.get("token") == self.scope.info.get("token") == self.token
            and found == self.token
        )
        if not mine:
            state.mixed_up.append(f"{self.token} sees {jenny.session.info.get('token')}, {found}")


def add_one(name: str) -> int:
    # One statement, so that nothing is read before the write lock is held.
    change = update(Data).where(Data.name == name).values(count=Data.count + 1)
    return jenny.session.scalars(change.returning(Data.count)).one()


def count(name: str, token: str) -> bytes:
    request = Request(token)
    request.check()
    jenny.session.rollback()
    number = add_one(name)
    jenny.session.commit()
    request.check()
    return b"%d" % number


def stream(name: str, token: str) -> Iterator[bytes]:
    request = Request(token)
    request.check()

    def chunks() -> Iterator[bytes]:
        for _ in range(CHUNKS):
            request.check()
            yield token.encode()

    return chunks()


def fail(name: str, token: str) -> NoReturn:
    request = Request(token)
    request.check()
    jenny.session.rollback()
    add_one(name)
    raise RuntimeError(f"{name} fails as it should")


def broken(name: str, token: str) -> Iterator[bytes]:
    request = Request(token)

    def chunks() -> Iterator[bytes]:
        request.check()
        yield token.encode()
        request.check()
        raise RuntimeError(f"{name} breaks as it should")

    return chunks()


def file(name: str, token: str) -> Path:
    Request(token).check()
    return FILE


def slow(name: str, token: str) -> Iterator[bytes]:
    request = Request(token)

    def chunks() -> Iterator[bytes]:
        end = time.monotonic() + SLOW_SECONDS
        try:
            yield token.encode()
            while time.monotonic() < end:
                request.check()
                yield b"." * 65536
        except GeneratorExit:
            request.check()  # in close() the scope is still there
            state.cut.append(token)
            raise

    return chunks()


STREAMS: dict[str, Callable[[str, str], Iterator[bytes]]] = {
    "stream": stream,
    "break": broken,
    "slow": slow,
}

# -- the frameworks ----------------------------------------------------------------------------


def bare() -> Any:
    """PEP 3333 without a framework."""

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        route = environ["PATH_INFO"].strip("/")
        token = parse_qs(environ["QUERY_STRING"])["token"][0]
        headers = [("Content-Type", "text/plain")]
        if route in STREAMS:
            body = STREAMS[route]("bare", token)
            start_response("200 OK", headers)
            return body
        if route == "file":
            opened = file("bare", token).open("rb")
            start_response("200 OK", headers)
            if "wsgi.file_wrapper" in environ:
                return environ["wsgi.file_wrapper"](opened, 8192)
            return iter(lambda: opened.read(8192), b"")
        if route == "fail":
            fail("bare", token)
        number = count("bare", token)
        start_response("200 OK", headers)(number)  # write(), the old way
        return []

    return RopeMiddleware(app)


def flask() -> Any:
    from flask import Flask, request, send_file

    app = Flask("flask")

    @app.get("/count")
    def view_count() -> bytes:
        return count("flask", request.args["token"])

    @app.get("/fail")
    def view_fail() -> bytes:
        fail("flask", request.args["token"])

    @app.get("/file")
    def view_file() -> Any:
        return send_file(file("flask", request.args["token"]), mimetype="text/plain")

    @app.get("/<route>")
    def view_stream(route: str) -> Any:
        return app.response_class(STREAMS[route]("flask", request.args["token"]))

    app.wsgi_app = RopeMiddleware(app.wsgi_app)  # type: ignore[method-assign]
    return app


def pyramid() -> Any:
    from pyramid.config import Configurator
    from pyramid.response import FileResponse, Response

    def view(request: Any) -> Any:
        route, token = request.matchdict["route"], request.GET["token"]
        if route in STREAMS:
            return Response(app_iter=STREAMS[route]("pyramid", token), content_type="text/plain")
        if route == "file":
            return FileResponse(str(file("pyramid", token)), request=request)
        if route == "fail":
            fail("pyramid", token)
        return Response(body=count("pyramid", token))

    with Configurator() as config:
        config.add_route("all", "/{route}")
        config.add_view(view, route_name="all")
        return RopeMiddleware(config.make_wsgi_app())


def bottle() -> Any:
    import bottle

    app = bottle.Bottle()

    @app.get("/<route>")
    def view(route: str) -> Any:
        token = bottle.request.query["token"]
        if route in STREAMS:
            return STREAMS[route]("bottle", token)
        if route == "file":
            path = file("bottle", token)
            return bottle.static_file(path.name, root=str(path.parent))
        if route == "fail":
            fail("bottle", token)
        return count("bottle", token)

    return RopeMiddleware(app)


def falcon() -> Any:
    import falcon

    class Resource:
        def on_get(self, req: Any, resp: Any, route: str) -> None:
            token = req.get_param("token", required=True)
            resp.content_type = "text/plain"
            if route in STREAMS:
                resp.stream = STREAMS[route]("falcon", token)
            elif route == "file":
                resp.stream = file("falcon", token).open("rb")
            elif route == "fail":
                fail("falcon", token)
            else:
                resp.data = count("falcon", token)

    app = falcon.App()
    app.add_route("/{route}", Resource())
    return RopeMiddleware(app)


def django() -> Any:
    import django.conf
    import django.core.wsgi
    import django.http
    import django.urls

    def view(request: Any, route: str) -> Any:
        token = request.GET["token"]
        if route in STREAMS:
            return django.http.StreamingHttpResponse(STREAMS[route]("django", token))
        if route == "file":
            return django.http.FileResponse(file("django", token).open("rb"))
        if route == "fail":
            fail("django", token)
        return django.http.HttpResponse(count("django", token))

    django.conf.settings.configure(
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF=(django.urls.path("<route>", view),),
        SECRET_KEY="of the tests",
    )
    return RopeMiddleware(django.core.wsgi.get_wsgi_application())


def make_database() -> None:
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all(Data(name=name, count=0) for name in FRAMEWORKS)
        session.commit()
    engine.dispose()


FRAMEWORKS: dict[str, Callable[[], Any]] = {
    "bare": bare,
    "flask": flask,
    "pyramid": pyramid,
    "bottle": bottle,
    "falcon": falcon,
    "django": django,
}


def dispatcher() -> Any:
    """The application outside of all the middlewares."""
    make_database()
    apps = {name: make() for name, make in FRAMEWORKS.items()}

    def nothing_shows(where: str) -> None:
        try:
            state.showing.append(f"{where}: {current_scope().name}")
        except NoScopeError:
            pass
        except Exception as error:  # a scope that has ended shows as well
            state.showing.append(f"{where}: {error}")

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        nothing_shows(f"before {path}")
        if path == "/state":
            body = json.dumps(state.report()).encode()
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
