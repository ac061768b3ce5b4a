"""S1, S2, S7: the key, the ContextVar, and nothing global."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import Engine, event, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker

from rope_middleware import NoScopeError, RopeError, Scope, SessionJenny, current_scope, open_scope
from tests.kit.asgi import serve
from tests.kit.engines import MakeEngine
from tests.kit.leaks import checked_out, no_scope_here
from tests.kit.models import Data
from tests.kit.sessions import Jenny, in_thread, touch, use
from tests.kit.stores import Store
from tests.kit.ways import Way
from tests.kit.wsgi import HEADERS, Probe, Server, Wrap, make_environ, served

pytestmark = pytest.mark.anyio


def test_S1_the_key_is_the_scope_itself() -> None:
    """Two scopes are equal only if they are one object; thirty at a time, then again."""
    with ExitStack() as stack:
        scopes = [stack.enter_context(open_scope("same name")) for _ in range(30)]
        assert len(set(scopes)) == 30
        assert [scopes.index(scope) for scope in scopes] == list(range(30))


def test_S1_the_session_of_a_scope_that_is_gone_never_comes_back(engine: Engine) -> None:
    """A scope at the address of an earlier one has a session of its own."""
    addresses: set[int] = set()
    made: list[int] = []

    class Counted(Session):
        def __init__(self, *args: Any, **kw: Any) -> None:
            made.append(1)
            super().__init__(*args, **kw)

    jenny = SessionJenny(sessionmaker(engine, class_=Counted))
    scopes = 0
    while len(addresses) == scopes:  # until an address has come again
        scopes += 1
        assert scopes < 20_000, "no address came again"
        with open_scope() as scope:
            addresses.add(id(scope))
            assert use(jenny.session) is jenny.session
        del scope
    assert len(made) == scopes


def test_S2_inside_a_scope_the_session_is_one(jenny: Jenny, way: Way) -> None:
    """However it was opened, and from another thread: the scope has one session."""

    def body() -> Session:
        session = jenny.session
        assert jenny.session is session
        assert in_thread(lambda: jenny.session) is session
        assert current_scope() is in_thread(current_scope)
        return session

    assert way(body) is not way(body)


def test_S2_a_session_made_in_a_thread_is_closed_with_the_scope(
    jenny: Jenny, engine: Engine, way: Way
) -> None:
    """It is kept in the scope, so whoever opened the scope closes it."""

    def body() -> None:
        in_thread(lambda: use(jenny.session))
        assert checked_out(engine) == 1

    way(body)
    assert checked_out(engine) == 0


def test_S2_the_context_variable_is_undone_in_the_same_block(way: Way) -> None:
    """Before and after the block no scope is current."""
    assert no_scope_here()
    scope = way(current_scope)
    assert isinstance(scope, Scope)
    assert scope.closed
    assert no_scope_here()


def test_S2_a_thread_that_is_started_without_the_context_has_no_scope(jenny: Jenny) -> None:
    """Nothing is thread-local: what is not handed over is not there."""
    with open_scope(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(contextvars.Context().run, no_scope_here).result(30)


def test_S7_several_jennies_and_databases_side_by_side(make_engine: MakeEngine, way: Way) -> None:
    """Each jenny has a session of its own in the scope, on its own database."""
    engines = [make_engine(), make_engine()]
    jennies = [SessionJenny(sessionmaker(engine)) for engine in engines]
    again = SessionJenny(jennies[0].session_factory)

    def body() -> None:
        sessions = [use(jenny.session) for jenny in (*jennies, again)]
        assert len(set(sessions)) == 3
        assert [checked_out(engine) for engine in engines] == [2, 1]
        jennies[0].remove()
        assert [checked_out(engine) for engine in engines] == [1, 1]
        assert jennies[1].session is sessions[1]
        assert again.session is sessions[2]

    way(body)
    assert [checked_out(engine) for engine in engines] == [0, 0]


def test_S7_the_class_of_a_body_goes_with_its_request(wrap: Wrap) -> None:
    """What kind of body a class makes is remembered, but of no class that a request has made."""
    made: list[weakref.ref[type]] = []

    def app(environ: Any, start_response: Any) -> Any:
        class Export:
            def __iter__(self) -> Any:
                yield environ["PATH_INFO"].encode()

        made.append(weakref.ref(Export))
        start_response("200 OK", HEADERS)
        return Export()

    assert Server()(wrap(app)).body == b"/"
    gc.collect()
    assert [one() for one in made] == [None]


def test_S7_outside_of_any_scope_there_is_no_current_one() -> None:
    """`current_scope()` raises NoScopeError, a LookupError that names both cures."""
    with pytest.raises(NoScopeError, match=r"RopeMiddleware.*open_scope") as caught:
        current_scope()
    assert isinstance(caught.value, LookupError)
    assert isinstance(caught.value, RopeError)


def test_S7_threads_at_work_in_scopes_of_their_own(make_engine: MakeEngine) -> None:
    """A thousand scopes in eight threads: every increment is there, nothing is left out."""
    engine = make_engine(pool_size=2, writer=True)
    jenny = SessionJenny(sessionmaker(engine))

    def work(_: int) -> None:
        with open_scope():
            row = jenny.session.get(Data, 1)
            assert row is not None
            row.count += 1
            jenny.session.commit()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(400)))
    assert checked_out(engine) == 0
    with Session(engine) as session:
        assert session.scalar(select(Data.count)) == 400


async def test_S7_three_hundred_requests_share_a_pool_of_two(store: Store) -> None:
    """On a pool of 2, each request has its own session and all succeed."""
    sessions: set[int] = set()
    alive: list[AsyncSession] = []

    async def handler() -> None:
        await store.jenny.execute(text("SELECT 1"))
        sessions.add(id(store.jenny.session))
        alive.append(store.jenny.session)

    for _ in range(10):
        await asyncio.gather(*(serve(handler) for _ in range(30)))
    assert len(sessions) == 300
    assert store.held() == 0


def test_S1_every_request_has_a_scope_and_sessions_of_its_own(
    wrap: Wrap, jenny: Jenny, engine: Engine
) -> None:
    """Ids are reused from request to request; nothing of one request shows in the next."""
    keep: list[str] = []

    def app(environ: Any, start_response: Any) -> Any:
        assert "mark" not in jenny.session.info
        assert current_scope().info == {}
        jenny.session.info["mark"] = current_scope().info["mark"] = environ["PATH_INFO"]
        touch(jenny)
        keep.append(jenny.session.info["mark"])
        start_response("200 OK", HEADERS)
        return [b""]

    middleware = wrap(app)
    for number in range(200):
        assert Server()(middleware, make_environ(f"/{number}")).error is None
    assert keep == [f"/{number}" for number in range(200)]
    assert checked_out(engine) == 0


def test_S1_the_scope_has_the_name_of_its_request(wrap: Wrap) -> None:
    """Method and path, with the part where the app is mounted, without the query string."""
    names: list[str] = []

    def app(environ: Any, start_response: Any) -> Any:
        names.append(current_scope().name)
        start_response("200 OK", HEADERS)
        return [b""]

    middleware = wrap(app)
    Server()(middleware, make_environ("/a/b", QUERY_STRING="secret=1"))
    Server()(middleware, make_environ("/b", SCRIPT_NAME="/a", REQUEST_METHOD="POST"))
    assert names == ["GET /a/b", "POST /a/b"]


@served("commit")  # after which a second transaction begins
def test_S2_events_of_the_session_still_reach_their_listeners(wrap: Wrap, jenny: Jenny) -> None:
    """after_begin and friends fire for the request's session as they always do."""
    begun: list[Session] = []

    def note(session: Session, transaction: Any, connection: Any) -> None:
        begun.append(session)

    event.listen(Session, "after_begin", note)
    try:
        probe = Probe(jenny)
        Server()(wrap(probe))
    finally:
        event.remove(Session, "after_begin", note)
    assert begun == [probe.sessions[0]]
