"""R2: read-only scopes read from a replica, all others from the primary; a lost one is left out."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, inspect, select, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from rope_middleware import (
    AsyncSessionJenny,
    ReadOnlyError,
    RopeError,
    RopeMiddleware,
    SessionJenny,
    open_scope,
)
from rope_middleware.testing import Sandbox
from tests.kit.either import Either, now
from tests.kit.engines import MakeEngine, fill
from tests.kit.models import Row
from tests.kit.sessions import Jenny
from tests.kit.waiting import eventually
from tests.kit.wsgi import HEADERS, Server
from tests.servers.postgres import Database
from tests.servers.replicas import Cluster

NAME = select(Row.name)


def named(make_engine: MakeEngine, name: str) -> Engine:
    """Make a database of its own that tells its name: a test sees where it reads."""
    engine = make_engine()
    with Session(engine) as session:
        session.add(Row(n=1, name=name))
        session.commit()
    return engine


@pytest.fixture
def three(make_engine: MakeEngine) -> Jenny:
    """A jenny with two replicas."""
    primary = named(make_engine, "primary")
    replicas = [named(make_engine, "one"), named(make_engine, "two")]
    return SessionJenny(sessionmaker(primary), replicas=replicas)


def test_R2_read_only_scopes_use_a_replica_and_all_others_the_primary(three: Jenny) -> None:
    """One of the replicas at random; a rope and an inner scope that writes use the primary."""
    seen: Counter[str | None] = Counter()
    for _ in range(60):
        with open_scope(read_only=True):
            seen[three.session.scalar(NAME)] += 1
            with open_scope():
                assert three.session.scalar(NAME) == "primary"
    assert set(seen) == {"one", "two"}
    assert min(seen.values()) > 5
    assert three.session.scalar(NAME) == "primary"  # by rope
    with open_scope():
        assert three.session.scalar(NAME) == "primary"


def test_R2_a_scope_reads_from_one(three: Jenny) -> None:
    """One choice for a scope, whatever its sessions and their transactions."""
    for _ in range(10):
        seen: set[str | None] = set()
        with open_scope(read_only=True):
            for _ in range(5):
                seen.add(three.session.scalar(NAME))
                three.session.commit()
                seen.add(three.session.connection().scalar(NAME))
                seen.add(three.session.get_one(Row, 1).name)
                three.remove()
        assert len(seen) == 1


def test_R2_a_replica_is_not_written_to(three: Jenny) -> None:
    """What would write is refused there, too."""
    with open_scope(read_only=True):
        three.session.add(Row(n=2))
        with pytest.raises(ReadOnlyError):
            three.session.flush()
        with pytest.raises(ReadOnlyError):
            three.session.connection().exec_driver_sql("DELETE FROM row")
        three.session.rollback()


def test_R2_requests_of_the_methods_read_from_replicas(three: Jenny) -> None:
    """The middleware's read_only says which."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", HEADERS)
        return [str(three.session.scalar(NAME)).encode()]

    wrapped = RopeMiddleware(app, read_only=("GET",))
    assert Server()(wrapped, REQUEST_METHOD="GET").body in (b"one", b"two")
    assert Server()(wrapped, REQUEST_METHOD="POST").body == b"primary"


def test_R2_no_replicas_is_the_primary(make_engine: MakeEngine) -> None:
    """An empty list, from a setting of the application's, say, changes nothing."""
    jenny = SessionJenny(sessionmaker(named(make_engine, "primary")), replicas=[])
    with open_scope(read_only=True):
        assert jenny.session.scalar(NAME) == "primary"


def test_R2_a_statement_that_names_its_engine_goes_there(three: Jenny) -> None:
    """`bind_arguments` is the application's word."""
    primary: Any = three.session_factory.kw["bind"]
    with open_scope(read_only=True):
        three.session.scalar(NAME)
        assert three.session.scalar(NAME, bind_arguments={"bind": primary}) == "primary"


def test_T1_a_sandbox_reads_its_own_transaction_and_no_replica(three: Jenny) -> None:
    """What a test has written is what its read-only requests see."""
    with Sandbox(three):
        with open_scope():
            three.session.add(Row(n=2, name="in the sandbox"))
            three.session.commit()
        with open_scope(read_only=True):
            names = three.session.scalars(NAME.order_by(Row.n)).all()
            assert names == ["primary", "in the sandbox"]
            with pytest.raises(ReadOnlyError):
                three.session.execute(text("DELETE FROM row"))
    with open_scope(read_only=True):
        assert three.session.scalars(NAME).all() in (["one"], ["two"])


class Chooses(Session):
    """Has a get_bind() of its own."""

    def get_bind(self, *args: Any, **kw: Any) -> Any:
        return super().get_bind(*args, **kw)


@pytest.mark.parametrize("how", ["binds", "get_bind", "binds, by a function", "get_bind, async"])
def test_R2_a_second_choice_is_refused_in_words(
    make_engine: MakeEngine, tmp_path: Path, how: str
) -> None:
    """`binds=` or a get_bind() of the application's and `replicas=` do not go together."""
    engine = make_engine()
    words = r"chooses its engine itself, by binds= or get_bind\(\), and the jenny has replicas="
    if how == "binds, by a function":
        jenny = SessionJenny(lambda: Session(binds={Row: engine}), replicas=[engine])
        with open_scope(read_only=True), pytest.raises(RopeError, match=words):
            _ = jenny.session
        return
    with pytest.raises(RopeError, match=words):
        if how == "binds":
            SessionJenny(sessionmaker(binds={Row: engine}), replicas=[engine])
        elif how == "get_bind":
            SessionJenny(sessionmaker(engine, class_=Chooses), replicas=[engine])
        else:
            other = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/x")
            factory = async_sessionmaker(other, sync_session_class=Chooses)
            AsyncSessionJenny(factory, replicas=[other])


@pytest.mark.parametrize("wrong", ["postgresql://replica", None, 1, ["postgresql://replica"]])
def test_L4_wrong_replicas_are_refused(make_engine: MakeEngine, wrong: Any) -> None:
    """Engines of the jenny's kind, in a collection."""
    engine = make_engine()
    for given in (wrong, engine):
        with pytest.raises(TypeError, match="replicas takes a collection of Engine objects"):
            SessionJenny(sessionmaker(engine), replicas=given)
    with pytest.raises(TypeError, match="replicas takes a collection of AsyncEngine objects"):
        AsyncSessionJenny(async_sessionmaker(), replicas=[engine])  # type: ignore[list-item]


# -- on real servers -------------------------------------------------------------------------------

SERVER = text("SELECT current_setting('cluster_name')")


@pytest.fixture(scope="module")
def database(servers: Cluster) -> Iterator[Database]:
    """A database on all of them."""
    with servers.primary.running.new_database() as found:
        fill(found.url("psycopg"), 10, names=True)
        servers.catch_up()
        yield found


class Reader(Either):
    """A jenny with two replicas."""

    def __init__(self, servers: Cluster, database: Database, driver: str) -> None:
        urls = [
            server.database(database).url(driver) for server in (servers.primary, *servers.replicas)
        ]
        options = {"pool_size": 2, "max_overflow": 0}
        super().__init__(urls, is_async=driver == "asyncpg", engine=options, expire_on_commit=False)
        self.loop = asyncio.Runner()

    def run(self, body: Callable[[Session], Any]) -> Any:
        """Run `body` in a read-only scope."""

        async def main() -> Any:
            async with self.scope(read_only=True):
                return await self.run_sync(body)

        return self.loop.run(main()) if self.is_async else now(main())


@pytest.fixture(params=["psycopg", "asyncpg"])
def reader(
    request: pytest.FixtureRequest, servers: Cluster, database: Database
) -> Iterator[Reader]:
    """A jenny of either kind."""
    found = Reader(servers, database, request.param)
    yield found
    found.loop.run(found.__aexit__(None))
    found.loop.close()


def _server(session: Session) -> str:
    return str(session.scalar(SERVER))


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "rope_middleware" and record.levelno >= logging.WARNING
    ]


def test_R2_the_statement_that_found_it_dead_goes_to_another_engine(
    servers: Cluster, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of a scope: nothing loaded is lost, no error is seen, and it is told once."""
    dead: list[Any] = []

    def body(session: Session) -> None:
        loaded = session.get_one(Row, 3)
        first = _server(session)
        dead.extend(server for server in servers.replicas if server.name == first)
        dead[0].kill()
        second = _server(session)
        assert second != first
        assert second.startswith("replica")
        assert session.get_one(Row, 4).name == "4"
        assert [row.n for row in session.scalars(select(Row).order_by(Row.n))] == list(range(10))
        session.commit()
        assert loaded in session
        assert loaded.name == "3"
        assert _server(session) == second

    try:
        reader.run(body)
        for _ in range(10):
            assert reader.run(_server) != dead[0].name
        assert len(_warnings(caplog)) == 1
        assert f"/{dead[0].name}" in _warnings(caplog)[0] or dead[0].name in _warnings(caplog)[0]
        assert "cannot be reached" in _warnings(caplog)[0]
    finally:
        for server in dead:
            server.start()


def test_R2_a_commit_after_a_loss_expires_as_any_commit_does(
    servers: Cluster, reader: Reader
) -> None:
    """With `expire_on_commit`, the default: what is loaded is read again, not detached."""
    dead: list[Any] = []

    def body(session: Session) -> None:
        session.expire_on_commit = True
        loaded = session.get_one(Row, 3)
        first = _server(session)
        dead.extend(server for server in servers.replicas if server.name == first)
        dead[0].kill()
        assert _server(session) != first
        session.commit()
        assert inspect(loaded).expired
        assert loaded.name == "3"

    try:
        reader.run(body)
    finally:
        for server in dead:
            server.start()


def test_R2_a_connection_that_broke_while_it_idled_is_no_error(
    servers: Cluster, reader: Reader
) -> None:
    """The replica was restarted: its pooled connections are dead, the statement goes elsewhere."""
    for _ in range(20):
        reader.run(_server)
    for server in servers.replicas:
        server.kill()
        server.start()
    for _ in range(5):
        assert reader.run(_server) in ("replica1", "replica2", "primary")


def test_R2_left_out_for_30_seconds_and_tried_again(
    servers: Cluster,
    reader: Reader,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is not asked before its time, and used again after it."""
    import time

    now = time.monotonic()
    passed = 0.0
    monkeypatch.setattr("rope_middleware.session.reading.replicas.monotonic", lambda: now + passed)
    dead = servers.replicas[0]
    dead.kill()
    eventually(lambda: reader.run(_server) and _warnings(caplog), "nobody has met the dead one")
    dead.start()
    assert {reader.run(_server) for _ in range(20)} == {"replica2"}
    passed = 29.0
    assert {reader.run(_server) for _ in range(20)} == {"replica2"}
    passed = 30.5
    eventually(lambda: reader.run(_server) == "replica1", "it does not come back")
    assert len(_warnings(caplog)) == 1


def test_R2_none_left_is_the_primary(
    servers: Cluster, reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    """With every replica dead the primary serves; each is told once."""
    for server in servers.replicas:
        server.kill()
    try:
        assert {reader.run(_server) for _ in range(10)} == {"primary"}
        assert len(_warnings(caplog)) == 2
    finally:
        for server in servers.replicas:
            server.start()


def test_R2_an_error_of_the_statement_is_the_applications(reader: Reader) -> None:
    """Only a lost server is a reason to go elsewhere."""

    def wrong(session: Session) -> None:
        with pytest.raises(Exception, match="nowhere"):
            session.execute(text("SELECT * FROM nowhere"))
        assert _server(session).startswith("replica")

    reader.run(wrong)
