"""R3: a client reads its own writes, from a replica that has them or from the primary."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Iterator
from http.cookies import SimpleCookie
from typing import Any

import anyio.to_thread
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from rope_middleware import ASGIRopeMiddleware, WSGIRopeMiddleware
from tests.kit.asgi import ASGIClient, answer, http_scope
from tests.kit.either import Either, now
from tests.kit.models import Base, Data
from tests.kit.waiting import eventually
from tests.kit.wsgi import Server as WSGIServer
from tests.kit.wsgi import make_environ
from tests.servers.postgres import Database
from tests.servers.replicas import Cluster, Delays, Server, cluster, paused, watching

REQUESTS = int(os.environ.get("REQUESTS", "2000"))
KINDS = ["asgi-async", "asgi-sync", "wsgi"]
AROUND = "commit_on_success of another middleware around it"
WAYS = ["commit", "commit_on_success", AROUND, "open_scope"]
SERVER = text("SELECT current_setting('cluster_name')")
NUMBERS = itertools.count(1)  # what is written as it was is not written
Headers = list[tuple[str, str]]


@pytest.fixture(scope="module")
def database(servers: Cluster) -> Iterator[Database]:
    """A database on all of them, with one counter."""
    with servers.primary.running.new_database() as found:
        prepare(found)
        servers.catch_up()
        yield found


def prepare(database: Database) -> None:
    """Make a table with one row."""
    engine = create_engine(database.url("psycopg"))
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Data(id=1, count=0))
        session.commit()
    engine.dispose()


class Site(Either):
    """An application that writes a number by POST and reads it by GET, in one of the ways."""

    def __init__(
        self, kind: str, database: Database, servers: list[Server], user: str = "postgres"
    ) -> None:
        self.kind = kind
        self.loop = asyncio.Runner()
        driver = "asyncpg" if kind == "asgi-async" else "psycopg"
        urls = [server.database(database).url(driver).set(username=user) for server in servers]
        super().__init__(urls, is_async=kind == "asgi-async", engine={})
        self.scopes_are_async = kind != "wsgi"

    def close(self) -> None:
        """Nothing may be out."""
        self.loop.run(self.__aexit__(None))
        self.loop.close()

    # The application, written once; `run` carries a sync function out in the kind's way.

    def write(self, session: Session, number: int | None) -> None:
        if number is not None:
            session.get_one(Data, 1).count = number
            session.flush()

    def read(self, session: Session) -> str:
        session.expire_all()
        return f"{session.get_one(Data, 1).count} {session.scalar(SERVER)}"

    async def handle(self, method: str, way: str, number: int | None) -> str:
        async def run(body: Any, *arguments: Any) -> Any:
            if self.kind == "asgi-sync":
                return await anyio.to_thread.run_sync(lambda: body(self.jenny.session, *arguments))
            return await self.run_sync(body, *arguments)

        seen = ""
        if method == "GET" and way == "read":
            return str(await run(self.read))
        if way in ("open_scope", "read, open_scope, read"):
            if way != "open_scope":
                seen = f"{await run(self.read)} then "
            async with self.scope():
                await run(self.write, number)
                await run(lambda session: session.commit())
            if way != "open_scope":
                return seen + str(await run(self.read))
        elif way == "commit, read-only scope":
            await run(self.write, number)
            await run(lambda session: session.commit())
            async with self.scope(read_only=True):
                return str(await run(self.read))
        else:
            await run(self.write, number)
            if way == "commit":
                await run(lambda session: session.commit())
        return "written"

    # The client's side.

    def ask(
        self, method: str, way: str, number: int | None = None, headers: Any = (), **options: Any
    ) -> tuple[str, Headers]:
        """Send one request; return the body and the headers of the response."""
        options = {"read_only": ("GET", "HEAD"), **options}
        if way == "commit_on_success":
            options["commit_on_success"] = True
        if self.kind == "wsgi":
            return self._ask_wsgi(method, way, number, headers, options)
        return self.loop.run(self._ask_asgi(method, way, number, headers, options))

    def _ask_wsgi(
        self, method: str, way: str, number: int | None, headers: Headers, options: Any
    ) -> tuple[str, Headers]:
        def app(environ: Any, start_response: Any) -> list[bytes]:
            body = now(self.handle(method, way, number))
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [body.encode()]

        environ = make_environ("/", REQUEST_METHOD=method)
        for name, value in headers:
            key = f"HTTP_{name.upper().replace('-', '_')}"
            environ[key] = f"{environ[key]}; {value}" if key in environ else value
        seen = WSGIServer()(wrapped(WSGIRopeMiddleware, app, way, options), environ)
        if seen.raised is not None:
            raise seen.raised
        status, told, _ = seen.starts[-1]
        assert status == "200 OK"
        return seen.body.decode(), told

    async def _ask_asgi(
        self, method: str, way: str, number: int | None, headers: Headers, options: Any
    ) -> tuple[str, Headers]:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await answer(send, body=(await self.handle(method, way, number)).encode())

        raw = [(name.lower().encode(), value.encode()) for name, value in headers]
        client = ASGIClient()
        await client(wrapped(ASGIRopeMiddleware, app, way, options), "/", method, headers=raw)
        return client.body.decode(), client.headers


def wrapped(middleware: Any, app: Any, way: str, options: Any) -> Any:
    """Put the middleware around `app`, and one that commits around both where the way says so."""
    inner = middleware(app, **options)
    return middleware(inner, commit_on_success=True) if way == AROUND else inner


class Browser:
    """A client with a cookie."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.position = ""

    def post(self, way: str, number: int, **options: Any) -> Headers:
        """Write."""
        body, headers = self.site.ask("POST", way, number, self.headers, **options)
        assert body == "written"
        self._keep(headers)
        return headers

    def get(self) -> tuple[int, str]:
        """Read; return the number and the server."""
        body, headers = self.site.ask("GET", "read", None, self.headers)
        self._keep(headers)
        number, server = body.split()
        return int(number), server

    @property
    def headers(self) -> Headers:
        """What it sends."""
        return [("Cookie", f"a=b; Rope-Position={self.position}; c=d")] if self.position else []

    def _keep(self, headers: Headers) -> None:
        for name, value in headers:
            if name.lower() == "set-cookie":
                self.position = SimpleCookie(value)["Rope-Position"].value


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest, servers: Cluster, database: Database) -> Iterator[Site]:
    """The application, in one of the three ways."""
    servers.catch_up()
    found = Site(request.param, database, [servers.primary, *servers.replicas])
    yield found
    found.close()


@pytest.mark.parametrize("way", WAYS)
def test_R3_a_client_reads_its_own_write(site: Site, servers: Cluster, way: str) -> None:
    """While no replica has it the primary serves; then one that has it; then any."""
    browser, first = Browser(site), servers.replicas[0]
    with paused(*servers.replicas):
        browser.post(way, next(NUMBERS))
        number = next(NUMBERS)
        browser.post(way, number)
        assert browser.get() == (number, "primary")
        assert Browser(site).get()[1].startswith("replica")  # who has written nothing reads any
        first.resume()
        eventually(lambda: browser.get() == (number, "replica1"), "the replica has it")
        assert {browser.get() for _ in range(5)} == {(number, "replica1")}
    eventually(lambda: browser.get() == (number, "replica2"), "the other one has it, too")


def test_R3_the_cookie_and_the_header(site: Site) -> None:
    """Both carry the position; the cookie is HttpOnly, SameSite=Lax, and lasts for a minute."""
    headers = dict(Browser(site).post("commit", next(NUMBERS)))
    value = headers["Rope-Position"]
    assert [len(part) > 0 for part in value.split("-")] == [True, True, True]
    assert headers["Set-Cookie"] == (
        f"Rope-Position={value}; Max-Age=60; Path=/; HttpOnly; SameSite=Lax"
    )


def test_R3_the_request_header_counts_as_well(site: Site, servers: Cluster) -> None:
    """For clients without cookies; where both come, the higher one wins."""
    browser = Browser(site)
    browser.post("commit", next(NUMBERS))
    old = browser.position
    with paused(*servers.replicas):
        number = next(NUMBERS)
        browser.post("commit", number)
        for headers in (
            [("Rope-Position", browser.position)],
            [("Rope-Position", old), *browser.headers],
            [("Rope-Position", browser.position), ("Cookie", f"Rope-Position={old}")],
            [("Cookie", f"Rope-Position={browser.position}; Rope-Position={old}")],
            [("Cookie", f"Rope-Position={old}; Rope-Position={browser.position}")],
        ):
            assert site.ask("GET", "read", None, headers)[0] == f"{number} primary", headers


def test_R3_nothing_is_told_where_nothing_was_written(site: Site) -> None:
    """A request that reads, one that rolls back, one whose commit has nothing to commit."""
    for way in WAYS:
        _, headers = site.ask("POST", way, None)
        assert "Rope-Position" not in dict(headers), way
    for method in ("GET", "POST"):
        _, headers = site.ask(method, "read")
        assert "Rope-Position" not in dict(headers)


def test_R3_an_answer_never_tells_less_than_its_request_brought(site: Site) -> None:
    """A tab that was open for long does not take back what another one has written."""
    browser = Browser(site)
    browser.post("commit", next(NUMBERS))
    system, timeline, lsn = browser.position.split("-")
    later = f"{system}-{timeline}-{int(lsn, 16) + 10**9:x}"
    _, headers = site.ask("POST", "commit", next(NUMBERS), [("Rope-Position", later)])
    assert dict(headers)["Rope-Position"] == later
    _, headers = site.ask("POST", "commit", next(NUMBERS), [("Rope-Position", browser.position)])
    assert dict(headers)["Rope-Position"] > browser.position
    _, headers = site.ask("POST", "commit", next(NUMBERS), [("Rope-Position", "7-1-5")])
    assert "7-1-5" in dict(headers)["Rope-Position"].split(".")  # of another system


@pytest.mark.parametrize(
    "forged", ["0-0-0", "ffff-1-1", f"{1:x}-ffffffff-ffffffffffffffff", "7-1-1.8-1-1"]
)
def test_R3_a_forged_position_sends_its_sender_to_the_primary(site: Site, forged: str) -> None:
    """And does no harm to anybody."""
    assert site.ask("GET", "read", None, [("Rope-Position", forged)])[0].endswith("primary")
    assert site.ask("GET", "read")[0].split()[1].startswith("replica")


@pytest.mark.parametrize(
    "wrong",
    ["", "x", "1-2", "1-2-3-4", "g-1-1", "-", ".", "1" * 10_000, "é-1-1", "1 -1-1", "--" * 99],
)
def test_R3_what_is_no_position_is_nothing(site: Site, wrong: str) -> None:
    """Whatever comes, the request is served."""
    for headers in ([("Cookie", f"Rope-Position={wrong}")], [("Rope-Position", wrong)]):
        raw = [(name, value.encode().decode("latin-1")) for name, value in headers]
        assert site.ask("GET", "read", None, raw)[0].split()[1].startswith("replica")


def test_R3_a_request_reads_what_it_has_written_itself(site: Site, servers: Cluster) -> None:
    """An inner scope writes in a request that reads; a read-only scope reads in one that writes."""
    with paused(*servers.replicas):
        first, second = next(NUMBERS), next(NUMBERS)
        body, headers = site.ask("GET", "read, open_scope, read", first)
        before, after = body.split(" then ")
        assert before.split()[1].startswith("replica")
        assert after == f"{first} primary"
        assert "Rope-Position" in dict(headers)
        body, _ = site.ask("POST", "commit, read-only scope", second)
        assert body == f"{second} primary"


def test_R3_two_middlewares_tell_once(site: Site) -> None:
    """Whichever of two asks for it."""
    if site.kind == "wsgi":
        return
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await site.handle("POST", "commit", next(NUMBERS))
        await answer(send)

    async def send(message: Any) -> None:
        sent.append(message)

    reads: dict[str, Any] = {"read_only": ["GET"]}
    commits: dict[str, Any] = {"commit_on_success": True}
    for inner, outer in ((reads, {}), ({}, reads), (reads, commits), (commits, reads)):
        both = ASGIRopeMiddleware(ASGIRopeMiddleware(app, **inner), **outer)
        sent.clear()
        site.loop.run(both(http_scope("/", "POST"), anyio.sleep_forever, send))
        assert [name for name, _ in sent[0]["headers"]] == [b"Rope-Position", b"Set-Cookie"]


def test_R3_retries_keep_what_an_earlier_try_has_committed(site: Site, servers: Cluster) -> None:
    """With `retries` the position is told as well."""
    with paused(*servers.replicas):
        browser = Browser(site)
        number = next(NUMBERS)
        browser.post("commit_on_success", number, retries=2)
        assert browser.get() == (number, "primary")


def test_R3_the_rights_of_a_plain_role_are_enough(
    servers: Cluster, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Without EXECUTE on pg_control_system() the client reads from the primary, which is told."""
    database.query("CREATE ROLE plain LOGIN")
    database.query("GRANT ALL ON data TO plain")
    servers.catch_up()
    everybody = [servers.primary, *servers.replicas]
    sites = {kind: Site(kind, database, everybody, user="plain") for kind in KINDS}
    for kind, site in sites.items():
        browser = Browser(site)
        browser.post("commit", next(NUMBERS))
        eventually(lambda: browser.get()[1].startswith("replica"), kind)  # noqa: B023
        position = browser.position
    assert not caplog.records
    database.query("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC")
    try:
        for site in sites.values():
            browser = Browser(site)
            number = next(NUMBERS)
            browser.post("commit", number)
            assert {browser.get() for _ in range(5)} == {(number, "primary")}
            assert "does not tell its log position" in caplog.text
        with_position = [("Rope-Position", f"{position}0")]  # later than anybody knows of
        for site in sites.values():
            assert site.ask("GET", "read", None, with_position)[0].endswith("primary")
    finally:
        database.query("GRANT EXECUTE ON FUNCTION pg_control_system() TO PUBLIC")
        for site in sites.values():
            site.close()
        database.query("DROP OWNED BY plain")
        database.query("DROP ROLE plain")


@pytest.mark.parametrize("kind", KINDS)
def test_R3_no_stale_read_and_95_of_100_on_a_replica_that_has_it(
    servers: Cluster, database: Database, kind: str
) -> None:
    """Each write is read back at once, while the replay of both replicas is held up at random."""
    site = Site(kind, database, [servers.primary, *servers.replicas])
    stale = could = did = 0
    with watching(servers.replicas) as has_replayed, Delays(servers.replicas, 0.5):
        browser = Browser(site)
        for _ in range(REQUESTS // len(KINDS)):
            number = next(NUMBERS)
            browser.post(random.choice(WAYS), number)
            has_it = has_replayed(int(browser.position.split("-")[2], 16))
            seen, server = browser.get()
            stale += seen != number
            could += has_it
            did += has_it and server.startswith("replica")
    site.close()
    print(
        f"{kind}, {REQUESTS // len(KINDS)} writes: {stale} stale, "
        f"{did} of {could} from a replica that had it"
    )
    assert stale == 0
    assert could > REQUESTS / len(KINDS) / 20
    assert did >= 0.95 * could


def test_R3_after_a_fail_over_the_primary_serves_until_replicas_follow() -> None:
    """Another timeline: what was written before it is read from the new primary."""
    with cluster(replicas=2) as servers:
        servers.primary.query("CREATE DATABASE app")
        database = Database(servers.primary.url, "app")
        prepare(database)
        servers.catch_up()
        old, new, other = servers.primary, *servers.replicas
        before = Site("wsgi", database, [old, new, other])
        browser = Browser(before)
        browser.post("commit", 1)
        servers.catch_up()
        eventually(lambda: browser.get()[1].startswith("replica"), "a replica has it")
        other.pause()
        browser.post("commit", 2)
        eventually(lambda: browser.get() == (2, new.name), "the other replica has it")
        before.close()
        old.kill()
        new.promote()
        after = Site("wsgi", database, [new, other])
        browser.site = after
        assert browser.get() == (2, new.name)  # by its position of the old timeline
        other.resume()
        browser.post("commit", 3)
        assert browser.position.split("-")[1] == "2"
        assert browser.get() == (3, new.name)
        other.follow(new)
        eventually(lambda: browser.get() == (3, other.name), "the replica follows the new primary")
        after.close()


def test_R3_a_replica_on_the_old_timeline_is_not_taken_for_one_that_has_it() -> None:
    """It has come further on the old timeline than the new primary has on its own."""
    with cluster(replicas=2) as servers:
        servers.primary.query("CREATE DATABASE app")
        database = Database(servers.primary.url, "app")
        prepare(database)
        servers.catch_up()
        old, new, other = servers.primary, *servers.replicas
        new.stop()
        old.query("SELECT pg_logical_emit_message(true, 'tests', repeat('x', 1000000))")
        ask = "SELECT pg_last_wal_replay_lsn() - '0/0'"
        [(end,)] = old.query("SELECT pg_current_wal_flush_lsn() - '0/0'")
        eventually(lambda: other.query(ask)[0][0] >= end, "the other replica has it all")
        old.kill()
        new.start()
        new.promote()
        site = Site("wsgi", database, [new, other])
        browser = Browser(site)
        browser.post("commit", 1)
        assert int(browser.position.split("-")[2], 16) < end
        assert {browser.get() for _ in range(10)} == {(1, new.name)}
        site.close()
