"""Libraries that take a scoped_session or a session, given a jenny: a small real use of each.

Each use is made of requests: some write, one fails, and the next ones see what they should. After
each test every connection is back in its pool, and no scope is open (`make_engine`). `libraries`
is the table, which the page on compatibility shows.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import factory
import pytest
from factory.alchemy import SQLAlchemyModelFactory
from flask import Flask, request
from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from rope_middleware import (
    AsyncSessionJenny,
    RopeMiddleware,
    SessionJenny,
    current_scope,
    open_scope,
)
from tests.kit.engines import MakeEngine, small_async_engine
from tests.kit.models import Row
from tests.kit.sessions import Jenny
from tests.matrix.libraries import LIBRARIES
from tests.servers.asgi import serve


def names(engine: Engine) -> list[str]:
    """What is committed."""
    with Session(engine) as session:
        return list(session.scalars(select(Row.name).order_by(Row.n)))


@pytest.fixture
def strict(engine: Engine) -> Jenny:
    """What is used outside of the requests is an error."""
    return SessionJenny(sessionmaker(engine), strict=True)


@pytest.fixture
def async_jenny(engine: Engine) -> Iterator[AsyncSessionJenny[Any]]:
    """For the same file."""
    twin = small_async_engine(Path(str(engine.url.database)))
    jenny: AsyncSessionJenny[Any] = AsyncSessionJenny(
        async_sessionmaker(twin, expire_on_commit=False)
    )
    yield jenny
    assert twin.pool.checkedout() == 0  # type: ignore[attr-defined]
    asyncio.run(twin.dispose())


def site(**options: Any) -> Flask:
    """A Flask application inside of RopeMiddleware."""
    app = Flask("libraries")
    app.secret_key = "of the tests"
    app.wsgi_app = RopeMiddleware(app.wsgi_app, **options)  # type: ignore[method-assign]
    return app


def ask(app: Flask, method: str, path: str, **kw: Any) -> Any:
    return app.test_client().open(path, method=method, buffered=True, **kw)


def asgi(*routes: Any, **options: Any) -> Starlette:
    """A Starlette application inside of RopeMiddleware."""
    app = Starlette(routes=list(routes))
    app.add_middleware(RopeMiddleware, **options)
    return app


def test_every_library_has_its_test() -> None:
    """One that is added without a test is found here."""
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert tests - {"every_library_has_its_test"} == set(LIBRARIES)


# -- flavours of sessions, and what calls many functions at once ---------------------------------


def test_sqlmodel(engine: Engine, async_jenny: AsyncSessionJenny[Any]) -> None:
    """Its session classes are the jenny's, and `exec()` works in requests."""
    sqlmodel = pytest.importorskip("sqlmodel")
    from sqlmodel.ext.asyncio.session import AsyncSession

    jenny = SessionJenny(sessionmaker(engine, class_=sqlmodel.Session), strict=True)
    bind = async_jenny.session_factory.kw["bind"]
    twin = AsyncSessionJenny(async_sessionmaker(bind, class_=AsyncSession, expire_on_commit=False))

    class Hero(sqlmodel.SQLModel, table=True):  # type: ignore[name-defined, misc, call-arg]
        __tablename__ = "matrix_hero"  # its metadata is one for the whole process
        id: int | None = sqlmodel.Field(default=None, primary_key=True)
        name: str

    tables = [Hero.__table__]
    Hero.metadata.create_all(engine, tables)

    def add(request: Request) -> Response:
        jenny.session.add(Hero(name=request.path_params["name"]))
        return PlainTextResponse("", 201)

    async def add_async(request: Request) -> Response:
        twin.session.add(Hero(name=request.path_params["name"]))
        await twin.session.flush()
        raise RuntimeError("after the flush")

    def read(request: Request) -> Response:
        return PlainTextResponse(jenny.session.exec(sqlmodel.select(Hero.name)).one())

    async def read_async(request: Request) -> Response:
        return PlainTextResponse((await twin.session.exec(sqlmodel.select(Hero.name))).one())

    app = asgi(
        Route("/sync", read),
        Route("/async", read_async),
        Route("/sync/{name}", add, methods=["POST"]),
        Route("/async/{name}", add_async, methods=["POST"]),
        commit_on_success=True,
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.post("/sync/kept").status_code == 201
        assert client.post("/async/gone").status_code == 500
        assert client.get("/sync").text == client.get("/async").text == "kept"
    Hero.metadata.remove(Hero.__table__)


def test_strawberry(engine: Engine, async_jenny: AsyncSessionJenny[Any]) -> None:
    """Resolvers at the same time have scopes of their own; a mutation that fails is doomed."""
    strawberry = pytest.importorskip("strawberry")
    from strawberry.asgi import GraphQL
    from strawberry.extensions import SchemaExtension

    @strawberry.type
    class Query:
        @strawberry.field  # type: ignore[untyped-decorator]
        @open_scope()
        async def names(self, first: int) -> list[str]:
            query = select(Row.name).where(Row.n >= first).order_by(Row.n)
            return list(await async_jenny.session.scalars(query))

    @strawberry.type
    class Mutation:
        @strawberry.mutation  # type: ignore[untyped-decorator]
        async def add(self, n: int) -> int:
            async_jenny.session.add(Row(n=n, name=f"row {n}"))
            await async_jenny.session.flush()
            return n

    class DoomOnError(SchemaExtension):
        def on_operation(self) -> Iterator[None]:
            yield
            result = self.execution_context.result
            if result is None or result.errors:
                current_scope().doom()

    # The annotations of this module are texts, which it looks up in its globals.
    schema = strawberry.Schema(Query, Mutation, extensions=[DoomOnError])
    app = asgi(Mount("/", GraphQL(schema)), commit_on_success=True)

    with TestClient(app) as client:

        def send(query: str) -> Any:
            answer = client.post("/", json={"query": query})
            assert answer.status_code == 200
            return answer.json()

        assert send("mutation { a: add(n: 1) b: add(n: 2) }")["data"] == {"a": 1, "b": 2}
        assert send("mutation { a: add(n: 3) b: add(n: 2) }")["errors"]
        fields = " ".join(f"of{n}: names(first: {n})" for n in range(1, 9))
        found = send(f"{{ {fields} }}")
        assert found["data"]["of1"] == ["row 1", "row 2"], found
        assert "errors" not in found
    assert names(engine) == ["row 1", "row 2"]


def test_socketio(engine: Engine, async_jenny: AsyncSessionJenny[Any]) -> None:
    """Events at the same time, by WebSocket and by long polling, have a scope each."""
    socketio = pytest.importorskip("socketio")
    import httpx
    from websockets.sync.client import connect

    sio = socketio.AsyncServer(async_mode="asgi")

    @sio.event  # type: ignore[untyped-decorator]
    @open_scope("add", commit_on_success=True)
    async def add(sid: str, n: int) -> int:
        async_jenny.session.add(Row(n=n, name=f"row {n}"))
        await async_jenny.session.flush()
        if n % 5 == 0:
            await async_jenny.session.rollback()
        return n

    # Inside of ours on purpose: the scope of the connection is not that of its events.
    app = RopeMiddleware(socketio.ASGIApp(sio))
    with serve(app) as server:
        address = f"127.0.0.1:{server.port}/socket.io/?EIO=4&transport="
        with connect(f"ws://{address}websocket") as socket:
            assert str(socket.recv()).startswith("0")
            socket.send("40")
            assert str(socket.recv()).startswith("40")
            for n in range(1, 11):
                socket.send(f'42{n}["add",{n}]')
            answers = {str(socket.recv()) for _ in range(10)}
            assert answers == {f"43{n}[{n}]" for n in range(1, 11)}
        polling = f"http://{address}polling"
        with httpx.Client(trust_env=False) as client:
            polling += f"&sid={json.loads(client.get(polling).text[1:])['sid']}"
            client.post(polling, content="40")
            assert client.get(polling).text.startswith("40")
            client.post(polling, content='421["add",11]')
            assert client.get(polling).text == "431[11]"
        assert names(engine) == [f"row {n}" for n in range(1, 12) if n % 5]


# -- libraries that are given the jenny ----------------------------------------------------------


def test_flask_admin(engine: Engine, strict: Jenny) -> None:
    """Its pages write and read by the jenny, and an error of the database leaves nothing."""
    pytest.importorskip("flask_admin")
    from flask_admin import Admin
    from flask_admin.contrib.sqla import ModelView

    class View(ModelView):
        form_columns = ("n", "name")
        column_list = ("n", "name")

    app = site()
    with open_scope("set-up"):  # it looks at `jenny.session`, which `strict` refuses elsewhere
        Admin(app).add_view(View(Row, strict, endpoint="row"))
    for n in 1, 2:
        form = {"n": str(n), "name": f"row {n}"}
        assert ask(app, "POST", "/admin/row/new/", data=form).status_code == 302
    twice = ask(app, "POST", "/admin/row/new/", data={"n": "2", "name": "twice"})
    assert twice.status_code == 200
    page = ask(app, "GET", "/admin/row/").text
    assert "row 1" in page
    assert "twice" not in page
    ask(app, "POST", "/admin/row/edit/?id=1", data={"n": "1", "name": "changed"})
    assert ask(app, "POST", "/admin/row/delete/", data={"id": "2"}).status_code == 302
    assert names(engine) == ["changed"]


def test_wtforms(engine: Engine, strict: Jenny) -> None:
    """A form of a model, and a choice of what the request's session finds."""
    pytest.importorskip("wtforms_sqlalchemy")
    from wtforms import Form
    from wtforms_sqlalchemy.fields import QuerySelectField
    from wtforms_sqlalchemy.orm import model_form

    app = site(commit_on_success=True)
    row_form = model_form(Row, db_session=strict)

    class Choice(Form):  # type: ignore[misc]
        row = QuerySelectField(query_factory=lambda: strict.query(Row), get_label="name")

    @app.post("/<int:n>")
    def add(n: int) -> tuple[str, int]:
        row = Row(n=n)
        form = row_form(request.form)
        if not form.validate():
            return "", 422
        form.populate_obj(row)
        strict.session.add(row)
        return "", 201

    @app.get("/")
    def choose() -> str:
        form = Choice(request.args)
        return form.row.data.name if form.validate() else str(form.row())

    assert ask(app, "POST", "/1", data={"name": "kept"}).status_code == 201
    assert ask(app, "POST", "/2", data={}).status_code == 422
    assert "kept" in ask(app, "GET", "/").text
    assert ask(app, "GET", "/?row=1").text == "kept"
    assert names(engine) == ["kept"]


def test_marshmallow(engine: Engine, strict: Jenny) -> None:
    """A schema finds and makes rows in the request's session."""
    pytest.importorskip("marshmallow_sqlalchemy")
    from marshmallow import ValidationError
    from marshmallow_sqlalchemy import SQLAlchemyAutoSchema

    class RowSchema(SQLAlchemyAutoSchema):  # type: ignore[misc]
        class Meta:
            model = Row
            sqla_session = strict
            load_instance = True

    app = site(commit_on_success=True)

    @app.post("/")
    def put() -> Any:
        try:
            row = RowSchema().load(request.json)
        except ValidationError as error:
            return error.messages, 422
        strict.session.add(row)
        strict.session.flush()
        return RowSchema().dump(row), 201

    assert ask(app, "POST", "/", json={"n": 1, "name": "new"}).json == {"n": 1, "name": "new"}
    assert ask(app, "POST", "/", json={"n": 1, "name": "changed"}).status_code == 201
    assert ask(app, "POST", "/", json={"n": "one"}).status_code == 422
    assert names(engine) == ["changed"]


def test_factory_boy(engine: Engine, strict: Jenny) -> None:
    """A factory makes rows in the request that calls it."""

    class RowFactory(SQLAlchemyModelFactory):  # type: ignore[misc]
        class Meta:
            model = Row
            sqlalchemy_session = strict
            sqlalchemy_session_persistence = "flush"

        n = factory.Sequence(lambda n: n + 1)
        name = factory.LazyAttribute(lambda row: f"row {row.n}")

    app = site(commit_on_success=True)

    @app.post("/<int:status>")
    def add(status: int) -> tuple[str, int]:
        return RowFactory().name, status

    RowFactory.reset_sequence(0)
    assert ask(app, "POST", "/201").text == "row 1"
    assert ask(app, "POST", "/400").text == "row 2"
    assert ask(app, "POST", "/201").text == "row 3"
    assert names(engine) == ["row 1", "row 3"]


def test_mixins(make_engine: MakeEngine) -> None:
    """Active records find their session by themselves, and it is the request's."""
    mixins = pytest.importorskip("sqlalchemy_mixins")

    class Own(DeclarativeBase):
        pass

    class Note(Own, mixins.ActiveRecordMixin, mixins.SmartQueryMixin):  # type: ignore[misc, name-defined]
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    engine = make_engine()
    Own.metadata.create_all(engine)
    jenny = SessionJenny(sessionmaker(engine), strict=True)
    Note.set_session(jenny)
    app = site(commit_on_success=True)

    @app.post("/<text>")
    def add(text: str) -> tuple[str, int]:
        note = Note.create(text=text, commit=False)
        note.update(text=text.upper(), commit=False)
        jenny.session.flush()
        return str(note.id), 400 if text == "bad" else 201

    @app.get("/<text>")
    def find(text: str) -> list[int]:
        return [note.id for note in Note.where(text__startswith=text).all()]

    assert ask(app, "POST", "/milk").text == "1"
    assert ask(app, "POST", "/bad").status_code == 400
    assert ask(app, "GET", "/MI").json == [1]
    assert ask(app, "GET", "/BAD").json == []


def test_pagination(engine: Engine, async_jenny: AsyncSessionJenny[Any]) -> None:
    """Pages of a query, with a Session and with an AsyncSession."""
    pytest.importorskip("fastapi_pagination")
    from fastapi import FastAPI
    from fastapi_pagination import Page, add_pagination
    from fastapi_pagination.ext.sqlalchemy import apaginate, paginate
    from pydantic import BaseModel, ConfigDict

    with Session(engine) as session:
        session.add_all(Row(n=n) for n in range(1, 31))
        session.commit()
    jenny = SessionJenny(sessionmaker(engine), strict=True)
    app = FastAPI()
    app.add_middleware(RopeMiddleware)

    class Out(BaseModel):
        model_config = ConfigDict(from_attributes=True)
        n: int

    query = select(Row).order_by(Row.n)

    @app.get("/sync", response_model=Page[Out])
    def sync_page() -> Any:
        return paginate(jenny.session, query)

    @app.get("/facade", response_model=Page[Out])
    def page_of_the_jenny() -> Any:
        return paginate(jenny, query)

    @app.get("/async", response_model=Page[Out])
    async def async_page() -> Any:
        return await apaginate(async_jenny.session, query)

    add_pagination(app)
    with TestClient(app) as client:
        pages = [client.get(f"/{way}?page=3&size=8").json() for way in ("sync", "facade", "async")]
    assert [item["n"] for item in pages[0]["items"]] == list(range(17, 25))
    assert pages[0]["total"] == 30
    assert pages[0] == pages[1] == pages[2]


# -- libraries that stand beside it --------------------------------------------------------------


def test_continuum(make_engine: MakeEngine) -> None:
    """Each commit of a request that changes a row makes a version; what is rolled back, none."""
    continuum = pytest.importorskip("sqlalchemy_continuum")
    from sqlalchemy.orm import configure_mappers

    continuum.make_versioned(user_cls=None)
    try:

        class Own(DeclarativeBase):
            pass

        class Note(Own):
            __tablename__ = "note"
            __versioned__: dict[str, Any] = {}  # noqa: RUF012 - its own way to say so
            id: Mapped[int] = mapped_column(primary_key=True)
            text: Mapped[str]

        configure_mappers()
        engine = make_engine()
        Own.metadata.create_all(engine)
        jenny = SessionJenny(sessionmaker(engine), strict=True)
        app = site(commit_on_success=True)

        @app.post("/<text>")
        def put(text: str) -> tuple[str, int]:
            note = jenny.session.get(Note, 1) or Note(id=1)
            note.text = text
            jenny.session.add(note)
            jenny.session.flush()
            return "", 400 if text == "bad" else 201

        @app.get("/")
        def versions() -> list[str]:
            note: Any = jenny.session.get_one(Note, 1)
            return [version.text for version in note.versions]

        for text in "one", "bad", "two":
            ask(app, "POST", f"/{text}")
        assert ask(app, "GET", "/").json == ["one", "two"]
    finally:
        continuum.remove_versioning()


def test_sqladmin(engine: Engine, strict: Jenny) -> None:
    """Its pages have sessions of their own, inside of our scope, and both see what is committed."""
    pytest.importorskip("sqladmin")
    from sqladmin import Admin, ModelView

    class RowAdmin(ModelView, model=Row):  # type: ignore[misc, call-arg]
        column_list = (Row.n, Row.name)
        form_columns = (Row.n, Row.name)
        form_include_pk = True

    def add(request: Request) -> Response:
        strict.session.add(Row(n=int(request.path_params["n"]), name="ours"))
        return PlainTextResponse("", 201)

    app = asgi(Route("/rows/{n}", add, methods=["POST"]), commit_on_success=True)
    Admin(app, engine).add_view(RowAdmin)
    with TestClient(app) as client:
        assert client.post("/rows/1").status_code == 201
        form = {"n": "2", "name": "its own"}
        assert client.post("/admin/row/create", data=form).status_code == 200
        page = client.get("/admin/row/list").text
    assert "ours" in page
    assert "its own" in page
    assert names(engine) == ["ours", "its own"]


def test_queryspy(engine: Engine, strict: Jenny) -> None:
    """Inside and outside of ours it counts the same statements, under ASGI and under WSGI."""
    pytest.importorskip("queryspy")
    import queryspy.asgi
    import queryspy.wsgi

    reports: list[Any] = []

    def spy(module: Any) -> Callable[[Any], Any]:
        return lambda app: module.QuerySpyMiddleware(app, on_report=reports.append)

    def rope(app: Any) -> Any:
        return RopeMiddleware(app, commit_on_success=True)

    def work() -> None:
        for n in range(3):
            strict.session.get(Row, n)
        strict.session.add(Row(n=len(names(engine)) + 1))

    def view(request: Request) -> Response:
        work()
        return PlainTextResponse("", 201)

    flask = Flask("queryspy")

    @flask.post("/")
    def flask_view() -> tuple[str, int]:
        work()
        return "", 201

    routes = Starlette(routes=[Route("/", view, methods=["POST"])])
    for module, app in (queryspy.asgi, routes), (queryspy.wsgi, flask.wsgi_app):
        for inner, outer in (spy(module), rope), (rope, spy(module)):
            spied = outer(inner(app))
            if module is queryspy.asgi:
                assert TestClient(spied).post("/").status_code == 201
            else:
                flask.wsgi_app = spied  # type: ignore[method-assign]
                assert ask(flask, "POST", "/").status_code == 201
    assert len(names(engine)) == 4
    assert all(len(report.findings) == 1 for report in reports)  # N + 1
    # SELECTs, and the INSERT of the commit, which happens in the application's `send`.
    assert [report.query_count for report in reports] == [5] * 4
