"""L1 to L3: nothing is lost in silence, and nothing is said where all is well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from rope_middleware import (
    ASGIRopeMiddleware,
    RopeError,
    RopeMiddleware,
    SessionJenny,
    current_scope,
    open_scope,
)
from tests.kit.asgi import asgi_app, ask, client
from tests.kit.models import Data, Row
from tests.kit.said import Said
from tests.kit.sessions import SELECT, Jenny, run_threads
from tests.kit.stores import Store
from tests.kit.web import Exchange, Web
from tests.kit.wsgi import serve_wsgi

pytestmark = pytest.mark.anyio


@pytest.mark.told
def test_L1_a_forgotten_commit_is_told_with_its_line(web: Web, said: Said) -> None:
    """201 and no row: one WARNING with the scope, the classes, the line and the cure."""

    async def handler(exchange: Exchange) -> None:
        web.store.jenny.session.add(Row(n=1, name="secret"))
        web.store.jenny.session.add(Row(n=2))
        await web.store._do("flush")
        await exchange.answer(201)

    for _ in range(3):
        assert web.ask(handler, method="POST").status == 201
    assert web.store.rows() == []
    (warning,) = said.warnings
    assert "'POST /thing' ended without a commit" in warning
    assert "2 Row added" in warning and "secret" not in warning
    assert f"{Path(__file__).name}:{handler.__code__.co_firstlineno + 1}" in warning
    assert "rollback()" in warning


@pytest.mark.told
def test_L1_pending_changes_are_told_too(web: Web, said: Said) -> None:
    """Added, changed, deleted, and never flushed."""

    async def write(exchange: Exchange) -> None:
        web.store.jenny.session.add_all([Row(n=1), Row(n=2), Data(count=1)])
        await web.store.commit()
        await exchange.answer(200)

    async def forget(exchange: Exchange) -> None:
        session = web.store.jenny.session
        one, two = [(await web.store._do("get", Row, n)) for n in (1, 2)]
        one.name = "other"
        await web.store._do("delete", two)
        session.add(Row(n=3))
        await exchange.answer(200)

    web.ask(write)
    web.ask(forget)
    (warning,) = said.warnings
    assert "1 Row added, 1 Row changed, 1 Row deleted" in warning


SILENT: dict[str, Callable[[Web, Exchange], Any]] = {}


def silent(function: Any) -> Any:
    SILENT[function.__name__] = function
    return function


@silent
async def committed(web: Web, exchange: Exchange) -> None:
    await web.store.add(1)
    await web.store.commit()
    await exchange.answer(200)


@silent
async def rolled_back(web: Web, exchange: Exchange) -> None:
    await web.store.add(1)
    await web.store.rollback()
    await exchange.answer(200)


@silent
async def only_read(web: Web, exchange: Exchange) -> None:
    await web.store.read()
    await exchange.answer(200)


@silent
async def set_to_what_it_was(web: Web, exchange: Exchange) -> None:
    await web.store.add(1)
    await web.store.commit()
    row = await web.store._do("get", Row, 1)
    row.name = str(row.name)
    await exchange.answer(200)


@silent
async def failed(web: Web, exchange: Exchange) -> None:
    await web.store.add(1)
    raise ZeroDivisionError


@silent
async def savepoint_rolled_back(web: Web, exchange: Exchange) -> None:
    session = web.store.jenny.session
    if isinstance(session, AsyncSession):
        async with session.begin_nested() as savepoint:
            await web.store.add(1)
            await savepoint.rollback()
    else:
        with session.begin_nested() as point:
            await web.store.add(1)
            point.rollback()
    await exchange.answer(200)


@silent
async def a_flush_that_fails(web: Web, exchange: Exchange) -> None:
    await web.store.add(1)
    await web.store.commit()
    web.store.jenny.session.expunge_all()
    try:
        await web.store.add(1)
    except Exception:
        await exchange.answer(409)


@pytest.mark.parametrize("name", SILENT)
def test_L1_nothing_is_said_where_all_is_well(web: Web, said: Said, name: str) -> None:
    """Committed, rolled back, read, failed: silence, by the application's own commit."""

    async def handler(exchange: Exchange) -> None:
        await SILENT[name](web, exchange)

    web.ask(handler)
    assert said.warnings == []


async def test_L1_nothing_is_said_where_commit_on_success_had_no_response(
    store: Store, said: Said
) -> None:
    """The client has hung up, and Django and Quart return: "use commit_on_success" is no cure."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await store.add(1)

    await ask(ASGIRopeMiddleware(app, commit_on_success=True))
    assert store.rows() == []
    assert said.warnings == []


@pytest.mark.parametrize("way", ["status", "veto", "doom"])
def test_L1_nothing_is_said_of_what_commit_on_success_refuses(
    web: Web, said: Said, way: str
) -> None:
    """400 and above, a veto, a doom: everybody knows; also of what is written after that."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        if way == "doom":
            current_scope().doom()
        await exchange.start(400 if way == "status" else 200)
        await web.store.add(2)
        await exchange.chunk(b"x")

    web.ask(handler, commit_on_success=True, commit_veto=(lambda status, headers: way == "veto"))
    assert web.store.rows() == []
    assert said.warnings == []


@pytest.mark.told
def test_L1_a_savepoint_that_is_released_is_not_yet_committed(jenny: Jenny, said: Said) -> None:
    """What a savepoint holds belongs to the transaction around it, and is lost with that."""
    with open_scope():
        with jenny.session.begin_nested():
            jenny.session.add(Row(n=1))
        with jenny.session.begin_nested() as savepoint:
            jenny.session.add(Row(n=2))
            jenny.session.flush()
            savepoint.rollback()
    (warning,) = said.warnings
    assert "1 Row added" in warning


def test_L1_what_the_application_closes_itself_is_its_own_affair(jenny: Jenny, said: Said) -> None:
    """`close()` and `remove()` are as good as `rollback()`: in a scope and by rope."""
    with open_scope("closes"):
        with jenny.session as session:
            session.add(Row(n=1))
            session.flush()
        jenny.session.scalars(select(Row)).all()
    with open_scope("removes"):
        jenny.session.add(Row(n=1))
        jenny.session.flush()
        jenny.remove()

    def by_rope() -> None:
        jenny.session.add(Row(n=1))
        jenny.remove()

    by_rope()
    assert said.warnings == []


@pytest.mark.told
def test_L1_a_rope_that_ends_tells_it(jenny: Jenny, said: Said) -> None:
    """The function that used it has returned, without a commit."""

    def task() -> None:
        jenny.session.add(Row(n=1))
        jenny.session.flush()

    task()
    (warning,) = said.warnings
    assert "outside of scopes" in warning and f"{Path(__file__).name}:" in warning


@pytest.mark.told
def test_L1_once_for_each_line_and_not_for_each_request(jenny: Jenny, said: Said) -> None:
    """A thousand requests of one line say it once; another line says it again."""

    def one() -> None:
        with open_scope():
            jenny.session.add(Row(n=1))

    def other() -> None:
        with open_scope():
            jenny.session.add(Row(n=1))

    for _ in range(10):
        one()
        other()
    assert len(said.warnings) == 2


@pytest.mark.told
@pytest.mark.parametrize("reads", [True, False])
def test_L1_a_read_only_scope_is_not_told_to_commit(web: Web, said: Said, reads: bool) -> None:
    """Nothing could: the cure is a scope that may write, or another method."""

    async def handler(exchange: Exchange) -> None:
        if reads:
            assert await web.store._do("get", Row, 7) is None
        web.store.jenny.session.add(Row(n=7))
        await exchange.answer(200)

    web.ask(handler, read_only=("GET",))
    (warning,) = said.warnings
    assert "'GET /thing' is read-only" in warning and "1 Row added" in warning
    assert "open_scope" in warning and "commit" not in warning


# -- L2 --------------------------------------------------------------------------------------------


@pytest.mark.told
async def test_L2_a_sync_session_on_the_event_loop_is_told(jenny: Jenny, said: Said) -> None:
    """Once for each line; not in a thread, and not in a sync scope."""
    with open_scope("sync"):
        jenny.session.execute(SELECT)
    async with open_scope("thread"):
        await anyio.to_thread.run_sync(lambda: jenny.session.execute(SELECT))
    assert said.blocking == []
    for _ in range(3):
        async with open_scope("loop"):
            one, other = jenny.session.execute, jenny.session.commit
            _ = one(SELECT), other(), one(SELECT)  # two transactions of one line
    (warning,) = said.blocking
    assert "'loop'" in warning and f"{Path(__file__).name}:" in warning
    assert "AsyncSessionJenny" in warning


async def test_L2_an_async_session_is_where_it_belongs(store: Store, said: Said) -> None:
    """Nothing is said of an AsyncSession."""
    async with open_scope():
        await store.read()
    assert said.blocking == []


MODULE = """
session = jenny.session
def view():
    return session.execute(SELECT)
"""


@pytest.mark.told
def test_L2_a_rope_on_a_modules_frame_is_told_where_requests_are_served(
    jenny: Jenny, said: Said
) -> None:
    """`session = jenny.session` at the top of a module keeps one connection for ever."""
    module: dict[str, Any] = {"jenny": jenny, "SELECT": SELECT}
    exec(compile(MODULE, "shop.py", "exec"), module)
    module["view"]()  # in a script: nobody minds
    module["session"].rollback()
    assert said.warnings == []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        module["view"]()
        start_response("200 OK", [])
        return [b""]

    for _ in range(3):
        serve_wsgi(app)
    (warning,) = said.warnings
    assert "shop.py:2" in warning and "strict=True" in warning
    module.clear()


@pytest.mark.told
def test_L2_also_where_the_request_uses_the_jenny(jenny: Jenny, said: Said) -> None:
    """The module's session may hold its connection since before the first request."""
    module: dict[str, Any] = {"jenny": jenny, "SELECT": SELECT}
    exec(compile("jenny.session.execute(SELECT)", "shop.py", "exec"), module)

    def app(environ: Any, start_response: Any) -> list[bytes]:
        jenny.session.execute(SELECT)
        start_response("200 OK", [])
        return [b""]

    serve_wsgi(app)
    (warning,) = said.warnings
    assert "shop.py:1" in warning
    module.clear()


# -- L3 --------------------------------------------------------------------------------------------


@pytest.fixture
def jenny_for() -> Iterator[Callable[..., Any]]:
    """Make jennies for databases, and close what their pools have at the end."""
    engines: list[Engine] = []

    def make(url: str = "sqlite://", **options: Any) -> Any:
        engines.append(create_engine(url, **options))
        return SessionJenny(sessionmaker(engines[-1]))

    yield make
    for engine in engines:
        engine.dispose()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///file::memory:?uri=true"])
async def test_L3_a_database_for_each_thread_is_refused_in_an_async_scope(
    url: str, jenny_for: Callable[..., Any]
) -> None:
    """At its first use, with the two arguments that cure it; and again at the next."""
    jenny = jenny_for(url, poolclass=SingletonThreadPool)
    for _ in range(2):
        async with open_scope():
            with pytest.raises(RopeError, match=r"StaticPool.*check_same_thread"):
                jenny.session.execute(SELECT)


def test_L3_a_database_for_each_thread_is_refused_where_a_second_thread_uses_it(
    jenny_for: Callable[..., Any],
) -> None:
    """One thread alone has one database: a script, a test."""
    jenny = jenny_for()
    for _ in range(2):
        with open_scope():
            jenny.session.execute(SELECT)

    def another() -> None:
        with open_scope(), pytest.raises(RopeError, match="StaticPool"):
            jenny.session.execute(SELECT)

    run_threads([another])
    with open_scope():
        jenny.session.execute(SELECT)


async def test_L3_other_pools_and_files_are_as_they_were(
    tmp_path: Path, jenny_for: Callable[..., Any]
) -> None:
    """StaticPool, a file, and a shared cache are one database."""
    told: dict[str, Any] = {"connect_args": {"check_same_thread": False}}
    cured = jenny_for(poolclass=StaticPool, **told)
    file = jenny_for(f"sqlite:///{tmp_path}/f.sqlite", poolclass=SingletonThreadPool, **told)
    for jenny in (cured, file):
        with open_scope():
            jenny.session.execute(SELECT)
        run_threads([lambda one=jenny: one.execute(SELECT)])  # type: ignore[misc]
    async with open_scope():
        cured.session.execute(SELECT)


# -- L4 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
async def test_L4_depends_on_a_jenny_simply_works(tmp_path: Path, is_async: bool) -> None:
    """FastAPI's `Depends(jenny)` gives the session of the request, and asks for no parameter."""
    found = Store(tmp_path / "depends.sqlite", is_async=is_async)
    app = FastAPI()
    seen: list[Any] = []

    @app.get("/")
    def view(session: Any = Depends(found.jenny)) -> int:
        seen.append(session is found.jenny.session)
        return 1

    answer = await client(RopeMiddleware(app)).get("/")
    assert (answer.status_code, answer.text, seen) == (200, "1", [True])
    assert app.openapi()["paths"]["/"]["get"].get("parameters", []) == []
    await found.dispose()


def test_L4_a_jenny_needs_no_mention(jenny: Jenny) -> None:
    """`add_middleware(RopeMiddleware, jenny)`: the text names the cure."""
    with pytest.raises(TypeError, match="a jenny needs no mention"):
        RopeMiddleware(asgi_app(lambda: None), jenny)
