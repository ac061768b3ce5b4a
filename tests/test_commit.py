"""Commit on success and trying again (C1-C7, S5) in ASGI, in WSGI and in `open_scope`.

One handler is written once, as a coroutine function, and is served in three ways: under ASGI with
an `AsyncSession`, under ASGI with a `Session`, and under WSGI with a `Session`. The client's side
of each protocol is played here to the letter, so that a test can look at the database at the very
moment when a status becomes visible.
"""

from __future__ import annotations

import asyncio
import io
import logging
import sqlite3
import threading
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import ForeignKey, create_engine, event, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker
from sqlalchemy.util import await_only

from rope_middleware import (
    ASGIRopeMiddleware,
    AsyncSessionJenny,
    RopeError,
    Scope,
    SessionJenny,
    WSGIRopeMiddleware,
    current_scope,
    open_scope,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
    from pathlib import Path

LIMIT = 30.0
KINDS = ["asgi-async", "asgi-sync", "wsgi"]


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "row"
    n: Mapped[int] = mapped_column(primary_key=True)


class Child(Base):
    """A row whose missing parent is found out by the commit alone."""

    __tablename__ = "child"
    n: Mapped[int] = mapped_column(primary_key=True)
    parent: Mapped[int] = mapped_column(ForeignKey("row.n", deferrable=True, initially="DEFERRED"))


# --------------------------------------------------------------------------------------------
# The two sides of the protocols


class Store:
    """A database file, an engine on it, and a jenny; sync or async behind the same coroutines."""

    def __init__(self, path: Path, *, is_async: bool) -> None:
        self.path = path
        self.is_async = is_async
        options: dict[str, Any] = {
            "pool_size": 2,
            "max_overflow": 0,
            "pool_timeout": LIMIT,
            "connect_args": {"timeout": 0.05},  # seconds until "database is locked"
        }
        if is_async:
            self.async_engine = create_async_engine(f"sqlite+aiosqlite:///{path}", **options)
            self.engine = self.async_engine.sync_engine
            self.jenny: Any = AsyncSessionJenny(
                async_sessionmaker(self.async_engine, expire_on_commit=False)
            )
        else:
            self.engine = create_engine(f"sqlite:///{path}", **options)
            self.jenny = SessionJenny(sessionmaker(self.engine, expire_on_commit=False))

        @event.listens_for(self.engine, "connect")
        def enforce(connection: Any, record: object) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA foreign_keys=ON")
            cursor.close()

        self.commits: list[str] = []
        event.listen(self.engine, "commit", lambda connection: self.commits.append(path.stem))

    async def _do(self, name: str, *arguments: object) -> Any:
        found = getattr(self.jenny.session, name)(*arguments)
        return await found if self.is_async else found

    async def add(self, n: int) -> None:
        self.jenny.session.add(Row(n=n))
        await self._do("flush")

    async def add_orphan(self, n: int) -> None:
        self.jenny.session.add(Child(n=n, parent=10**6 + n))
        await self._do("flush")

    async def read(self) -> int:
        return len(list(await self._do("scalars", text("SELECT n FROM row"))))

    async def commit(self) -> None:
        await self._do("commit")

    async def rollback(self) -> None:
        await self._do("rollback")

    def rows(self) -> list[int]:
        """What another client of the database sees."""
        with sqlite3.connect(self.path) as other:
            found = [n for (n,) in other.execute("SELECT n FROM row ORDER BY n")]
        other.close()
        return found

    def orphans(self) -> int:
        with sqlite3.connect(self.path) as other:
            ((found,),) = other.execute("SELECT count(*) FROM child")
        other.close()
        return int(found)

    def held(self) -> int:
        return int(self.engine.pool.checkedout())  # type: ignore[attr-defined]


@types.coroutine
def _hand_out(chunk: bytes) -> Generator[bytes, None, None]:
    yield chunk


@dataclass
class Exchange:
    """What a handler gets: the request's body, and the way to answer."""

    _start: Callable[[int, list[tuple[str, str]]], Awaitable[None]]
    _chunk: Callable[[bytes], Awaitable[None]]
    _body: Callable[[], Awaitable[bytes]]
    carrier: dict[str, Any]

    async def start(self, status: int, *headers: tuple[str, str]) -> None:
        await self._start(status, [("content-type", "text/plain"), *headers])

    async def chunk(self, data: bytes) -> None:
        await self._chunk(data)

    async def answer(self, status: int, data: bytes = b"x", *headers: tuple[str, str]) -> None:
        await self.start(status, *headers)
        await self.chunk(data)

    async def body(self) -> bytes:
        return await self._body()


@dataclass
class Answer:
    """What the client sees, as far as the server can tell from what the application did."""

    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    complete: bool = False
    error: BaseException | None = None

    @property
    def seen(self) -> int:
        """The status on the wire: a server answers 500 for an app that raises before it starts."""
        return self.status or (500 if self.error is not None else 0)

    @property
    def whole(self) -> bool:
        """Is it one complete response? The server's own always is."""
        return self.complete or (not self.status and self.error is not None)


Handler = Any  # async def handler(exchange: Exchange) -> None


class Web:
    """One of the ways to serve a handler."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        self.wsgi = kind == "wsgi"
        self.loop = asyncio.Runner()
        self.store = Store(path, is_async=kind == "asgi-async")
        create_tables(path)

    def other_store(self, path: Path) -> Store:
        create_tables(path)
        return Store(path, is_async=self.store.is_async)

    def close(self) -> None:
        if self.store.is_async:
            self.loop.run(self.store.async_engine.dispose())
        else:
            self.store.engine.dispose()
        self.loop.close()

    def ask(
        self,
        handler: Handler,
        *,
        method: str = "GET",
        path: str = "/thing",
        body: Iterable[bytes] = (b"",),
        at_start: Callable[[int], object] = lambda status: None,
        lazily: bool = False,
        **options: Any,
    ) -> Answer:
        """Send one request to `handler` behind the middleware and return what was seen.

        `at_start` is called when the status can go out on the wire; `lazily` makes a WSGI app do
        all of its work in its generator.
        """
        if self.wsgi:
            return self._ask_wsgi(handler, method, path, b"".join(body), at_start, lazily, options)
        return self.loop.run(
            asyncio.wait_for(
                self._ask_asgi(handler, method, path, list(body), at_start, options), LIMIT
            )
        )

    async def _ask_asgi(
        self,
        handler: Handler,
        method: str,
        path: str,
        body: list[bytes],
        at_start: Callable[[int], object],
        options: dict[str, Any],
    ) -> Answer:
        async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
            async def start(status: int, headers: list[tuple[str, str]]) -> None:
                raw = [(name.encode(), value.encode()) for name, value in headers]
                await send({"type": "http.response.start", "status": status, "headers": raw})

            async def chunk(data: bytes) -> None:
                await send({"type": "http.response.body", "body": data, "more_body": True})

            async def read() -> bytes:
                found, more = b"", True
                while more:
                    message = await receive()
                    assert message["type"] == "http.request", message
                    found += message.get("body", b"")
                    more = message.get("more_body", False)
                return found

            await handler(Exchange(start, chunk, read, scope))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        answer = Answer()
        pieces = [
            {"type": "http.request", "body": piece, "more_body": number < len(body)}
            for number, piece in enumerate(body, 1)
        ]

        async def receive() -> dict[str, Any]:
            if pieces:
                return pieces.pop(0)
            await asyncio.sleep(3600)  # the client stays
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            assert not answer.complete, f"after the end of the response: {message}"
            if message["type"] == "http.response.start":
                assert not answer.status, "a second response"
                answer.status = message["status"]
                answer.headers = [
                    (name.decode(), value.decode()) for name, value in message["headers"]
                ]
                at_start(answer.status)
            else:
                assert message["type"] == "http.response.body", message
                assert answer.status, "a body without a start"
                answer.body += message.get("body", b"")
                answer.complete = not message.get("more_body", False)

        wrapped = ASGIRopeMiddleware(app, **options)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"secret=1",
            "headers": [],
            "client": None,
            "server": None,
        }
        try:
            await wrapped(scope, receive, send)
        except Exception as error:
            answer.error = error
        return answer

    def _ask_wsgi(
        self,
        handler: Handler,
        method: str,
        path: str,
        body: bytes,
        at_start: Callable[[int], object],
        lazily: bool,
        options: dict[str, Any],
    ) -> Answer:
        def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            async def start(status: int, headers: list[tuple[str, str]]) -> None:
                start_response(f"{status} Status", headers)

            async def chunk(data: bytes) -> None:
                await _hand_out(data)

            async def read() -> bytes:
                data: bytes = environ["wsgi.input"].read()
                return data

            running = handler(Exchange(start, chunk, read, environ))

            def rest() -> Iterator[bytes]:
                try:
                    while True:
                        try:
                            piece = running.send(None)
                        except StopIteration:
                            return
                        yield piece
                finally:
                    running.close()

            pieces = rest()
            if lazily:
                return pieces
            first = next(pieces, b"")

            def whole() -> Iterator[bytes]:
                try:
                    yield first
                    yield from pieces
                finally:
                    pieces.close()  # type: ignore[attr-defined]

            return whole()

        answer = Answer()
        told: list[tuple[str, list[tuple[str, str]]]] = []
        sent = False

        def start_response(
            status: str, headers: list[tuple[str, str]], exc_info: Any = None
        ) -> Callable[[bytes], object]:
            if exc_info is not None and sent:
                raise exc_info[1].with_traceback(exc_info[2])
            assert exc_info is not None or not told, "a second response"
            told[:] = [(status, list(headers))]
            return write

        def write(data: bytes) -> None:
            nonlocal sent
            assert told, "a body without a start"
            if data and not sent:
                sent = True
                answer.status, answer.headers = int(told[0][0].split()[0]), told[0][1]
                at_start(answer.status)
            answer.body += data

        wrapped = WSGIRopeMiddleware(app, **options)
        environ = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": path,
            "QUERY_STRING": "secret=1",
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": io.StringIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        pieces: Any = None
        try:
            try:
                pieces = wrapped(environ, start_response)
                for piece in pieces:
                    write(piece)
                if not sent and told:
                    sent = True
                    answer.status, answer.headers = int(told[0][0].split()[0]), told[0][1]
                    at_start(answer.status)
                answer.complete = True
            finally:
                if hasattr(pieces, "close"):
                    pieces.close()
        except Exception as error:
            answer.error = error
        return answer


@pytest.fixture(params=KINDS)
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Web]:
    found = Web(request.param, tmp_path / "first.db")
    yield found
    held = found.store.held()
    found.close()
    assert held == 0, "a connection is still out of its pool"


def create_tables(path: Path) -> None:
    engine = create_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    engine.dispose()


class Lock:
    """Another client of an SQLite database that holds the write lock until it is told to go."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("BEGIN IMMEDIATE")

    def release(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self.release()
        self._connection.close()


@pytest.fixture
def lock(web: Web) -> Iterator[Lock]:
    found = Lock(web.store.path)
    yield found
    found.close()


# --------------------------------------------------------------------------------------------
# C1: the application commits


def test_C1_what_is_committed_stays_and_the_rest_is_rolled_back(web: Web) -> None:
    """Without the option the application's own commit counts, and nothing after it."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await web.store.commit()
        await web.store.add(2)
        await exchange.answer(200)
        await web.store.add(3)

    answer = web.ask(handler)
    assert (answer.status, answer.complete, answer.error) == (200, True, None)
    assert web.store.rows() == [1]


# --------------------------------------------------------------------------------------------
# C2: which outcome commits


@pytest.mark.parametrize("status", [200, 201, 204, 302, 304, 399])
def test_C2_a_status_under_400_commits(web: Web, status: int) -> None:
    """The row of a successful request is there."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(status, b"")

    answer = web.ask(handler, commit_on_success=True)
    assert (answer.status, answer.complete) == (status, True)
    assert web.store.rows() == [1]


@pytest.mark.parametrize("status", [400, 404, 422, 500, 503])
def test_C2_a_status_of_400_and_above_rolls_back(web: Web, status: int) -> None:
    """The answer passes as it is, and its row is not there."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(status, b"sorry")

    answer = web.ask(handler, commit_on_success=True)
    assert (answer.status, answer.body, answer.complete) == (status, b"sorry", True)
    assert web.store.rows() == []


@pytest.mark.parametrize("lazily", [False, True])
def test_C2_the_commit_comes_before_the_client_can_see_a_success(web: Web, lazily: bool) -> None:
    """When the status goes out on the wire, another connection already reads the row."""
    seen: list[list[int]] = []

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)

    answer = web.ask(
        handler,
        at_start=lambda status: seen.append(web.store.rows()),
        lazily=lazily,
        commit_on_success=True,
    )
    assert answer.status == 200
    assert seen == [[1]]


def test_C2_what_is_written_between_start_and_body_is_committed_too(web: Web) -> None:
    """An application may start its response first and write afterwards."""

    async def handler(exchange: Exchange) -> None:
        await exchange.start(200)
        await web.store.add(1)
        await exchange.chunk(b"x")

    answer = web.ask(handler, commit_on_success=True)
    assert (answer.status, answer.complete) == (200, True)
    assert web.store.rows() == [1]


@pytest.mark.parametrize("vetoed", [False, True])
def test_C2_the_veto_gets_an_int_and_pairs_of_str_and_decides(web: Web, vetoed: bool) -> None:
    """`commit_veto(status, headers)` is asked with plain values in both protocols."""
    asked: list[tuple[int, list[tuple[str, str]]]] = []

    def veto(status: int, headers: list[tuple[str, str]]) -> bool:
        asked.append((status, headers))
        return vetoed

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200, b"x", ("x-commit", "no"))

    answer = web.ask(handler, commit_on_success=True, commit_veto=veto)
    assert (answer.status, answer.body) == (200, b"x")
    assert asked == [(200, [("content-type", "text/plain"), ("x-commit", "no")])]
    assert type(asked[0][0]) is int
    assert web.store.rows() == ([] if vetoed else [1])


def test_C2_a_veto_that_raises_commits_nothing(web: Web) -> None:
    """A broken veto is no permission: one error response, and no row."""

    def veto(status: int, headers: list[tuple[str, str]]) -> bool:
        raise LookupError("broken veto")

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True, commit_veto=veto)
    assert answer.seen == 500
    assert answer.whole
    assert web.store.rows() == []


def test_C2_a_doomed_scope_does_not_commit(web: Web) -> None:
    """After `Scope.doom()` a success is sent and nothing is written."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        current_scope().doom()
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True)
    assert (answer.status, answer.body, answer.complete) == (200, b"x", True)
    assert web.store.rows() == []


@pytest.mark.parametrize("why", ["status", "veto", "doom"])
def test_C2_after_a_refusal_nothing_later_commits(web: Web, why: str) -> None:
    """What the stream writes after a 4xx, a veto or a doom is rolled back as well."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        if why == "doom":
            current_scope().doom()
        await exchange.answer(404 if why == "status" else 200)
        await web.store.add(2)
        await exchange.chunk(b"y")
        await web.store.add(3)

    answer = web.ask(
        handler, commit_on_success=True, commit_veto=lambda status, headers: why == "veto"
    )
    assert (answer.body, answer.complete) == (b"xy", True)
    assert web.store.rows() == []


def test_C2_work_after_the_start_is_a_second_transaction(web: Web) -> None:
    """What a stream writes is committed when the scope ends."""
    seen: list[list[int]] = []

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)
        await web.store.add(2)
        seen.append(web.store.rows())
        await exchange.chunk(b"y")
        await web.store.add(3)

    answer = web.ask(handler, commit_on_success=True)
    assert (answer.body, answer.complete, answer.error) == (b"xy", True, None)
    assert seen == [[1]]
    assert web.store.rows() == [1, 2, 3]


def test_C2_work_after_the_start_is_rolled_back_if_it_raises(web: Web) -> None:
    """A stream that breaks keeps the first transaction and loses the second."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)
        await web.store.add(2)
        await exchange.chunk(b"y")
        raise LookupError("in the stream")

    answer = web.ask(handler, commit_on_success=True)
    assert isinstance(answer.error, LookupError)
    assert web.store.rows() == [1]


def test_C2_a_doom_after_the_start_rolls_the_second_transaction_back(web: Web) -> None:
    """The first transaction stands; the doomed rest does not."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)
        await web.store.add(2)
        current_scope().doom()
        await exchange.chunk(b"y")

    assert web.ask(handler, commit_on_success=True).complete
    assert web.store.rows() == [1]


def test_C2_without_a_response_nothing_is_committed(web: Web) -> None:
    """An application that raises before it answers has written nothing; its error passes."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        raise LookupError("no answer")

    answer = web.ask(handler, commit_on_success=True)
    assert answer.seen == 500
    assert answer.whole
    if answer.error is not None:
        assert isinstance(answer.error, LookupError)
    assert web.store.rows() == []


def test_C2_a_session_first_used_after_the_start_commits_at_the_end(web: Web) -> None:
    """A session need not exist when the response starts."""

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(200)
        await web.store.add(1)

    assert web.ask(handler, commit_on_success=True).status == 200
    assert web.store.rows() == [1]


def test_C2_a_removed_session_is_not_committed(web: Web) -> None:
    """`remove()` closes, and so rolls back, what it removes; the next session is committed."""

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        removed = web.store.jenny.remove()
        if web.store.is_async:
            await removed
        await web.store.add(2)
        await exchange.answer(200)

    assert web.ask(handler, commit_on_success=True).status == 200
    assert web.store.rows() == [2]


def websocket_scope() -> dict[str, Any]:
    return {
        "type": "websocket",
        "asgi": {"version": "3.0"},
        "path": "/ws",
        "query_string": b"",
        "headers": [],
        "subprotocols": [],
    }


@pytest.mark.parametrize("kind", ["asgi-async", "asgi-sync"])
@pytest.mark.parametrize("fails", [False, True])
def test_C2_a_websocket_commits_when_its_call_ends_without_an_error(
    kind: str, fails: bool, tmp_path: Path
) -> None:
    """The scope of a WebSocket has one transaction: its call."""
    web = Web(kind, tmp_path / "ws.db")
    sent: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await web.store.add(1)
        assert web.store.rows() == []
        await send({"type": "websocket.send", "text": "hello"})
        assert web.store.rows() == []
        if fails:
            raise LookupError("in the socket")

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def receive() -> Any:
        await asyncio.sleep(3600)

    async def run() -> None:
        wrapped = ASGIRopeMiddleware(app, commit_on_success=True)
        if fails:
            with pytest.raises(LookupError, match="in the socket"):
                await wrapped(websocket_scope(), receive, send)
        else:
            await wrapped(websocket_scope(), receive, send)

    web.loop.run(run())
    assert sent == ["websocket.accept", "websocket.send"]
    assert web.store.rows() == ([] if fails else [1])
    assert web.store.held() == 0
    web.close()


def test_C2_a_cancelled_request_commits_nothing(tmp_path: Path) -> None:
    """A client that goes away before the answer leaves no row."""
    web = Web("asgi-async", tmp_path / "cancel.db")
    reached = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await web.store.add(1)
        reached.set()
        await asyncio.sleep(3600)

    async def run() -> None:
        wrapped = ASGIRopeMiddleware(app, commit_on_success=True)
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        task = asyncio.ensure_future(wrapped(scope, None, None))  # type: ignore[arg-type]
        await asyncio.wait_for(reached.wait(), LIMIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert web.store.held() == 0

    web.loop.run(run())
    assert web.store.rows() == []
    web.close()


def test_C2_a_wsgi_body_that_is_dropped_without_close_commits_no_more(tmp_path: Path) -> None:
    """What was written after the start goes when the server forgets the body."""
    web = Web("wsgi", tmp_path / "drop.db")

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"x"
        web.store.jenny.session.add(Row(n=1))
        web.store.jenny.session.flush()
        yield b"y"

    wrapped = WSGIRopeMiddleware(app, commit_on_success=True)
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": "/", "SCRIPT_NAME": "", "wsgi.input": io.BytesIO(),
    }  # fmt: skip
    pieces = iter(wrapped(environ, lambda status, headers, exc_info=None: lambda data: None))
    assert [next(pieces), next(pieces)] == [b"x", b"y"]
    del pieces
    import gc

    gc.collect()
    assert web.store.held() == 0
    assert web.store.rows() == []
    web.close()


def test_C2_a_wsgi_body_that_is_closed_early_keeps_its_first_transaction(tmp_path: Path) -> None:
    """A client that leaves in the middle of a stream does not undo what its status told."""
    web = Web("wsgi", tmp_path / "early.db")

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        web.store.jenny.session.add(Row(n=1))
        start_response("200 OK", [])
        yield b"x"
        yield b"y"

    wrapped = WSGIRopeMiddleware(app, commit_on_success=True)
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": "/", "SCRIPT_NAME": "", "wsgi.input": io.BytesIO(),
    }  # fmt: skip
    body: Any = wrapped(environ, lambda status, headers, exc_info=None: lambda data: None)
    assert next(iter(body)) == b"x"
    body.close()
    assert web.store.rows() == [1]
    assert web.store.held() == 0
    web.close()


def test_C2_the_write_callable_commits_before_it_writes(tmp_path: Path) -> None:
    """PEP 3333's `write()` is a way to show a success, so the commit stands before it."""
    web = Web("wsgi", tmp_path / "write.db")
    seen: list[list[int]] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        web.store.jenny.session.add(Row(n=1))
        write = start_response("200 OK", [])
        write(b"x")
        return []

    wrapped = WSGIRopeMiddleware(app, commit_on_success=True)
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": "/", "SCRIPT_NAME": "", "wsgi.input": io.BytesIO(),
    }  # fmt: skip
    body: Any = wrapped(
        environ,
        lambda status, headers, exc_info=None: lambda data: seen.append(web.store.rows()),
    )
    assert b"".join(body) == b""
    if hasattr(body, "close"):
        body.close()
    assert seen == [[1]]
    web.close()


# --------------------------------------------------------------------------------------------
# C2 and open_scope


def test_C2_open_scope_commits_when_the_block_ends_without_an_error(tmp_path: Path) -> None:
    """`with open_scope(commit_on_success=True)` is one transaction."""
    web = Web("wsgi", tmp_path / "with.db")
    with open_scope(commit_on_success=True):
        web.store.jenny.session.add(Row(n=1))
        assert web.store.rows() == []
    assert web.store.rows() == [1]
    with pytest.raises(LookupError), open_scope(commit_on_success=True):
        web.store.jenny.session.add(Row(n=2))
        web.store.jenny.session.flush()
        raise LookupError
    with open_scope(commit_on_success=True) as scope:
        web.store.jenny.session.add(Row(n=3))
        scope.doom()
    with open_scope():
        web.store.jenny.session.add(Row(n=4))
        web.store.jenny.session.flush()
    assert web.store.rows() == [1]
    assert web.store.held() == 0
    web.close()


def test_C2_async_open_scope_commits_when_the_block_ends_without_an_error(tmp_path: Path) -> None:
    """`async with open_scope(commit_on_success=True)` is one transaction."""
    web = Web("asgi-async", tmp_path / "with.db")

    async def run() -> None:
        async with open_scope(commit_on_success=True):
            await web.store.add(1)
            assert web.store.rows() == []
        assert web.store.rows() == [1]
        with pytest.raises(LookupError):
            async with open_scope(commit_on_success=True):
                await web.store.add(2)
                raise LookupError
        async with open_scope(commit_on_success=True) as scope:
            await web.store.add(3)
            scope.doom()
        async with open_scope():
            await web.store.add(4)
        assert web.store.rows() == [1]
        assert web.store.held() == 0

    web.loop.run(run())
    web.close()


def test_C2_the_decorators_commit(tmp_path: Path) -> None:
    """`@open_scope(commit_on_success=True)` works on functions of both colours, call by call."""
    sync, other = Web("wsgi", tmp_path / "one.db"), Web("asgi-async", tmp_path / "two.db")

    @open_scope(commit_on_success=True)
    def work(n: int) -> int:
        sync.store.jenny.session.add(Row(n=n))
        return n

    @open_scope(commit_on_success=True)
    async def async_work(n: int) -> int:
        await other.store.add(n)
        return n

    assert [work(1), work(2)] == [1, 2]
    assert other.loop.run(async_work(1)) == 1
    assert other.loop.run(async_work(2)) == 2
    assert sync.store.rows() == other.store.rows() == [1, 2]
    assert sync.store.held() == other.store.held() == 0
    sync.close()
    other.close()


@pytest.mark.parametrize("is_async", [False, True])
def test_C2_a_commit_that_fails_in_open_scope_raises_out_of_the_block(
    is_async: bool, tmp_path: Path
) -> None:
    """The caller of a block whose commit failed is told so."""
    web = Web("asgi-async" if is_async else "wsgi", tmp_path / "fails.db")
    closed: list[bool] = []

    async def run_async() -> None:
        async with open_scope(commit_on_success=True) as scope:
            scope.on_close(lambda: closed.append(scope.closed))
            await web.store.add_orphan(1)

    def run() -> None:
        with open_scope(commit_on_success=True) as scope:
            scope.on_close(lambda: closed.append(scope.closed))
            web.store.jenny.session.add(Child(n=1, parent=99))

    with pytest.raises(IntegrityError):
        web.loop.run(run_async()) if is_async else run()
    assert web.store.orphans() == 0
    assert web.store.held() == 0
    assert len(closed) == 1
    web.close()


def test_C2_an_inner_scope_commits_for_itself(tmp_path: Path) -> None:
    """The inner scope's commit stands when the outer one is rolled back."""
    web = Web("wsgi", tmp_path / "inner.db")
    with pytest.raises(LookupError), open_scope(commit_on_success=True):
        assert web.store.jenny.session.get(Row, 1) is None
        with open_scope(commit_on_success=True):
            web.store.jenny.session.add(Row(n=1))
        assert web.store.rows() == [1]
        web.store.jenny.session.add(Row(n=2))
        raise LookupError
    assert web.store.rows() == [1]
    web.close()


# --------------------------------------------------------------------------------------------
# C3: a commit that fails


@pytest.mark.parametrize("lazily", [False, True])
def test_C3_a_commit_that_fails_is_one_complete_error_response(web: Web, lazily: bool) -> None:
    """A deferred constraint shows at the commit: a 500, whole and alone, and no row."""
    raised: list[BaseException] = []

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await web.store.add_orphan(1)
        try:
            await exchange.answer(200, b"done")
        except Exception as error:
            raised.append(error)
            raise

    answer = web.ask(handler, commit_on_success=True, lazily=lazily)
    assert answer.seen == 500
    assert answer.whole
    assert b"done" not in answer.body
    if not web.wsgi:
        assert len(raised) == 1, "the error is raised inside the app's send"
        assert isinstance(raised[0], IntegrityError)
    assert web.store.rows() == []
    assert web.store.orphans() == 0


@pytest.mark.parametrize("later", ["goes on", "another success", "another failure"])
def test_C3_an_app_that_swallows_the_error_cannot_turn_it_into_a_success(
    later: str, tmp_path: Path
) -> None:
    """Body that belongs to the refused start is dropped; a new 2xx becomes a 500; a 4xx passes."""
    for kind in ("asgi-async", "asgi-sync"):
        web = Web(kind, tmp_path / f"{kind}.db")

        async def handler(exchange: Exchange, web: Web = web) -> None:
            await web.store.add(1)
            await web.store.add_orphan(1)
            with pytest.raises(IntegrityError):
                await exchange.start(200)
            if later == "another success":
                await exchange.start(201)
            elif later == "another failure":
                await exchange.start(409)
            await exchange.chunk(b"text of the app")

        answer = web.ask(handler, commit_on_success=True)
        assert answer.whole
        if later == "another failure":
            assert (answer.seen, answer.body) == (409, b"text of the app")
        else:
            assert answer.seen == 500
            assert b"text of the app" not in answer.body
        assert web.store.rows() == []
        assert web.store.orphans() == 0
        assert web.store.held() == 0
        web.close()


def test_C3_a_wsgi_app_that_swallows_the_error_cannot_turn_it_into_a_success(
    tmp_path: Path,
) -> None:
    """Whatever a WSGI app does around its start, nobody reads a 2xx without its row."""
    web = Web("wsgi", tmp_path / "swallow.db")

    async def handler(exchange: Exchange) -> None:
        await web.store.add_orphan(1)
        for _ in range(2):
            try:
                await exchange.start(200)
            except Exception:
                pass
            else:
                break
        try:
            await exchange.chunk(b"text of the app")
        except GeneratorExit:
            raise
        except Exception:
            pass

    answer = web.ask(handler, commit_on_success=True)
    assert answer.seen == 500
    assert answer.whole
    assert web.store.orphans() == 0
    assert web.store.held() == 0
    web.close()


def test_C3_a_failed_commit_of_the_second_transaction_does_not_hide(
    web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    """After the start a failed commit cannot change the status: it is logged, no row is there."""
    caplog.set_level(logging.DEBUG, "rope_middleware")

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)
        await web.store.add_orphan(2)

    answer = web.ask(handler, commit_on_success=True)
    assert answer.status == 200
    assert web.store.rows() == [1]
    assert web.store.orphans() == 0
    assert "IntegrityError" in caplog.text


def test_C3_the_log_names_the_request_and_the_class_and_no_value(
    web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    """The line of a failed commit helps and gives nothing away: no values, no query string."""
    caplog.set_level(logging.DEBUG, "rope_middleware")

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        web.store.jenny.session.add(Row(n=77123456))
        await web.store.commit()
        web.store.jenny.session.expunge_all()
        web.store.jenny.session.add(Row(n=77123456))  # refused in the commit's own flush
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True)
    assert answer.seen == 500
    lines = [record for record in caplog.records if record.name == "rope_middleware"]
    assert any(
        "GET /thing" in record.getMessage() and "IntegrityError" in record.getMessage()
        for record in lines
    ), caplog.text
    written = "\n".join(logging.Formatter().format(record) for record in lines)
    assert "77123456" not in written
    assert "secret" not in written


def test_C3_a_rollback_is_logged_with_its_reason(
    web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    """Each rollback that undoes something says which request, and why."""
    caplog.set_level(logging.DEBUG, "rope_middleware")

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(404)

    web.ask(handler, commit_on_success=True)
    messages = [r.getMessage() for r in caplog.records if r.name == "rope_middleware"]
    assert any("GET /thing" in line and "404" in line for line in messages), messages


@pytest.mark.parametrize("retries", [0, 1])
def test_C3_a_commit_that_outlives_a_timeout_is_not_answered_by_an_error(
    retries: int, tmp_path: Path
) -> None:
    """A time limit within the application ends in the middle of the commit, which stands."""
    web = Web("asgi-async", tmp_path / "late.db")
    event.listen(web.store.engine, "commit", lambda connection: await_only(asyncio.sleep(0.3)))
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        await web.store.add(len(tries))
        try:
            async with asyncio.timeout(0.1):
                await exchange.start(200)
        except TimeoutError:
            await exchange.start(504)
        await exchange.chunk(b"late")

    answer = web.ask(handler, commit_on_success=True, retries=retries)
    held = web.store.held()
    web.close()
    assert held == 0
    assert (web.store.rows(), answer.seen, len(tries)) in (([1], 200, 1), ([], 504, 1))


@pytest.mark.parametrize("which", ["starlette", "fastapi", "responder"])
def test_C3_the_frameworks_own_error_page_answers(which: str, tmp_path: Path) -> None:
    """Inside a framework's error handler the failed commit gets the framework's page."""
    web = Web("asgi-async", tmp_path / "page.db")

    async def show(request: Any, error: Exception) -> Any:
        from starlette.responses import JSONResponse

        return JSONResponse({"page": type(error).__name__}, status_code=500)

    app: Any
    if which == "starlette":
        from starlette.applications import Starlette
        from starlette.responses import PlainTextResponse

        app = Starlette(exception_handlers={IntegrityError: show})

        async def endpoint(request: Any) -> PlainTextResponse:
            await web.store.add_orphan(1)
            return PlainTextResponse("done")

        app.add_route("/thing", endpoint)
        app.add_middleware(ASGIRopeMiddleware, commit_on_success=True)
    elif which == "fastapi":
        from fastapi import FastAPI

        app = FastAPI(exception_handlers={500: show})

        @app.get("/thing")
        async def fastapi_endpoint() -> str:
            await web.store.add_orphan(1)
            return "done"

        app.add_middleware(ASGIRopeMiddleware, commit_on_success=True)
    else:
        import responder

        app = responder.API()

        @app.route("/thing")
        async def responder_endpoint(req: Any, resp: Any) -> None:
            await web.store.add_orphan(1)
            resp.text = "done"

        app.add_middleware(ASGIRopeMiddleware, commit_on_success=True)

    async def run() -> tuple[int, str, bytes, int]:
        import httpx

        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            found = await client.get("/thing")
        return found.status_code, found.headers.get("content-type", ""), found.content, 0

    status, kind, body, _ = web.loop.run(run())
    assert status == 500
    assert b"done" not in body
    if which == "starlette":
        # a handler for a class of errors sits inside the middleware; the error comes from it
        assert kind.startswith(("application/json", "text/plain"))
    elif which == "fastapi":
        assert body == b'{"page":"IntegrityError"}'
    else:
        assert kind.startswith("application/problem+json")
    assert web.store.orphans() == 0
    assert web.store.held() == 0
    web.close()


# --------------------------------------------------------------------------------------------
# C4: no connection after the commit


@pytest.mark.parametrize("status", [200, 404])
def test_C4_a_stream_holds_no_connection(web: Web, status: int) -> None:
    """When the response has started, the session's connection is back in the pool."""
    held: list[int] = []

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        held.append(web.store.held())
        await exchange.answer(status)
        held.append(web.store.held())
        await exchange.chunk(b"y")
        held.append(web.store.held())

    web.ask(handler, commit_on_success=True)
    assert held == [1, 0, 0]


def test_C4_a_reader_holds_no_connection_either(web: Web) -> None:
    """A request that only reads gives its connection back before it streams."""
    held: list[int] = []

    async def handler(exchange: Exchange) -> None:
        await web.store.read()
        await exchange.answer(200)
        held.append(web.store.held())

    web.ask(handler, commit_on_success=True)
    assert held == [0]


# --------------------------------------------------------------------------------------------
# C5: on_commit


def test_C5_on_commit_runs_once_after_the_commit_and_before_the_start(web: Web) -> None:
    """In order of registration, when the row is there, and before the client sees the status."""
    order: list[Any] = []

    async def handler(exchange: Exchange) -> None:
        scope = current_scope()
        scope.on_commit(lambda: order.append(("first", web.store.rows())))
        await web.store.add(1)
        scope.on_commit(lambda: order.append(("second", web.store.rows())))
        await exchange.answer(200)

    web.ask(handler, commit_on_success=True, at_start=lambda status: order.append(status))
    assert order == [("first", [1]), ("second", [1]), 200]


@pytest.mark.parametrize("why", ["status", "veto", "doom", "error", "failed commit"])
def test_C5_on_commit_never_runs_after_a_rollback(web: Web, why: str) -> None:
    """No commit, no call."""
    called: list[str] = []

    async def handler(exchange: Exchange) -> None:
        current_scope().on_commit(lambda: called.append(why))
        await web.store.add(1)
        if why == "doom":
            current_scope().doom()
        if why == "error":
            raise LookupError
        if why == "failed commit":
            await web.store.add_orphan(1)
        await exchange.answer(400 if why == "status" else 200)

    web.ask(handler, commit_on_success=True, commit_veto=lambda s, h: why == "veto")
    assert called == []
    assert web.store.rows() == []


def test_C5_on_commit_runs_where_nothing_was_written(web: Web) -> None:
    """A success without a session still is one."""
    called: list[int] = []

    async def handler(exchange: Exchange) -> None:
        current_scope().on_commit(lambda: called.append(1))
        await exchange.answer(204, b"")

    web.ask(handler, commit_on_success=True)
    assert called == [1]


def test_C5_one_registered_after_the_start_runs_after_the_final_commit(web: Web) -> None:
    """It belongs to the second transaction."""
    order: list[Any] = []

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)
        await web.store.add(2)
        current_scope().on_commit(lambda: order.append(web.store.rows()))
        await exchange.chunk(b"y")
        assert order == []

    answer = web.ask(handler, commit_on_success=True)
    assert answer.error is None
    assert order == [[1, 2]]


def test_C5_one_registered_after_the_start_does_not_run_if_the_rest_raises(web: Web) -> None:
    """The second transaction was rolled back."""
    order: list[Any] = []

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(200)
        await web.store.add(2)
        current_scope().on_commit(lambda: order.append(1))
        raise LookupError

    web.ask(handler, commit_on_success=True)
    assert order == []


def test_C5_an_error_in_on_commit_is_logged_and_changes_nothing(
    web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    """The response, the row and the other callbacks stay as they are."""
    called: list[int] = []

    def broken() -> None:
        raise LookupError("broken callback")

    async def handler(exchange: Exchange) -> None:
        current_scope().on_commit(broken)
        current_scope().on_commit(lambda: called.append(1))
        await web.store.add(1)
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True)
    assert (answer.status, answer.complete, answer.error) == (200, True, None)
    assert web.store.rows() == [1]
    assert called == [1]
    assert any(
        record.name == "rope_middleware" and record.levelno >= logging.ERROR
        for record in caplog.records
    )
    assert "LookupError" in caplog.text


def test_C5_sync_functions_run_in_a_thread_under_asgi(web: Web) -> None:
    """The event loop does not wait for a callback that blocks."""
    threads: list[int] = []

    async def handler(exchange: Exchange) -> None:
        current_scope().on_commit(lambda: threads.append(threading.get_ident()))
        await web.store.add(1)
        await exchange.answer(200)

    web.ask(handler, commit_on_success=True)
    assert (threads[0] == threading.get_ident()) is web.wsgi


@pytest.mark.parametrize("kind", ["asgi-async", "asgi-sync"])
def test_C5_async_functions_are_awaited_under_asgi(kind: str, tmp_path: Path) -> None:
    """In the loop, mixed with sync ones in order of registration."""
    web = Web(kind, tmp_path / "callbacks.db")
    order: list[Any] = []

    async def tell(what: str) -> None:
        await asyncio.sleep(0)
        order.append((what, web.store.rows()))

    async def handler(exchange: Exchange) -> None:
        scope = current_scope()

        async def first() -> None:
            await tell("async")

        scope.on_commit(first)
        scope.on_commit(lambda: order.append(("sync", web.store.rows())))
        await web.store.add(1)
        await exchange.answer(200)

    web.ask(handler, commit_on_success=True, at_start=order.append)
    assert order == [("async", [1]), ("sync", [1]), 200]
    web.close()


def test_C5_async_functions_are_refused_where_nobody_can_await_them(tmp_path: Path) -> None:
    """In WSGI and in a sync scope the registration itself raises, in words."""
    web = Web("wsgi", tmp_path / "refused.db")

    async def later() -> None: ...

    async def handler(exchange: Exchange) -> None:
        with pytest.raises((RopeError, TypeError), match="async"):
            current_scope().on_commit(later)
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True)
    assert (answer.status, answer.error) == (200, None)
    with open_scope(commit_on_success=True) as scope:
        with pytest.raises((RopeError, TypeError), match="async"):
            scope.on_commit(later)
    web.close()


def test_C5_in_a_scope_that_does_not_commit_it_raises(web: Web) -> None:
    """The error names the option that is missing."""

    async def handler(exchange: Exchange) -> None:
        with pytest.raises(RopeError, match="commit_on_success"):
            current_scope().on_commit(lambda: None)
        await exchange.answer(200)

    answer = web.ask(handler)
    assert (answer.status, answer.error) == (200, None)
    with open_scope() as scope, pytest.raises(RopeError, match="commit_on_success"):
        scope.on_commit(lambda: None)


def test_C5_in_open_scope_on_commit_runs_after_the_commit(tmp_path: Path) -> None:
    """Both colours of block, after the commit and before `on_close`."""
    sync, other = Web("wsgi", tmp_path / "one.db"), Web("asgi-async", tmp_path / "two.db")
    order: list[Any] = []
    with open_scope(commit_on_success=True) as scope:
        scope.on_close(lambda: order.append("closed"))
        scope.on_commit(lambda: order.append(sync.store.rows()))
        sync.store.jenny.session.add(Row(n=1))
    assert order == [[1], "closed"]

    async def run() -> None:
        async def later() -> None:
            order.append(other.store.rows())

        async with open_scope(commit_on_success=True) as scope:
            scope.on_commit(later)
            await other.store.add(2)

    other.loop.run(run())
    assert order == [[1], "closed", [2]]
    sync.close()
    other.close()


# --------------------------------------------------------------------------------------------
# S5: on_close


@pytest.mark.parametrize("outcome", ["success", "client error", "raises"])
@pytest.mark.parametrize("commits", [False, True])
def test_S5_on_close_runs_once_newest_first_when_the_sessions_are_closed(
    web: Web, outcome: str, commits: bool
) -> None:
    """Whatever the outcome was."""
    order: list[Any] = []
    scopes: list[Scope] = []

    async def handler(exchange: Exchange) -> None:
        scope = current_scope()
        scopes.append(scope)
        assert scope.info == {}
        scope.info["user"] = "jenny"
        scope.on_close(lambda: order.append(("first", web.store.held())))
        scope.on_close(lambda: order.append(("second", web.store.held())))
        await web.store.add(1)
        if outcome == "raises":
            raise LookupError
        await exchange.answer(200 if outcome == "success" else 404)
        assert order == []

    web.ask(handler, commit_on_success=commits)
    assert order == [("second", 0), ("first", 0)]
    assert scopes[0].closed
    assert web.store.rows() == ([1] if commits and outcome == "success" else [])


def test_S5_an_error_in_on_close_is_logged_and_the_others_still_run(
    web: Web, caplog: pytest.LogCaptureFixture
) -> None:
    """The response is not touched."""
    order: list[str] = []

    def broken() -> None:
        raise LookupError("broken callback")

    async def handler(exchange: Exchange) -> None:
        scope = current_scope()
        scope.on_close(lambda: order.append("first"))
        scope.on_close(broken)
        scope.on_close(lambda: order.append("last"))
        await web.store.add(1)
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True)
    assert (answer.status, answer.complete, answer.error) == (200, True, None)
    assert order == ["last", "first"]
    assert "LookupError" in caplog.text
    assert web.store.rows() == [1]


def test_S5_async_on_close_only_in_async_scopes(web: Web) -> None:
    """Awaited under ASGI, refused at registration in WSGI and in a sync `open_scope()`."""
    order: list[Any] = []

    async def later() -> None:
        await asyncio.sleep(0)
        order.append(web.store.held())

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        if web.wsgi:
            with pytest.raises((RopeError, TypeError), match="async"):
                current_scope().on_close(later)
        else:
            current_scope().on_close(later)
        await exchange.answer(200)

    answer = web.ask(handler)
    assert (answer.status, answer.error) == (200, None)
    assert order == ([] if web.wsgi else [0])
    with open_scope() as scope, pytest.raises((RopeError, TypeError), match="async"):
        scope.on_close(later)


# --------------------------------------------------------------------------------------------
# C6: retries


@pytest.mark.parametrize("commits", [False, True])
@pytest.mark.parametrize("frame", ["raises", "answers 500"])
def test_C6_a_refused_transaction_is_run_again(
    web: Web, lock: Lock, frame: str, commits: bool
) -> None:
    """SQLite says busy once; the client sees one success, and the row is there once."""
    tries: list[Scope] = []
    closed: list[int] = []

    async def handler(exchange: Exchange) -> None:
        scope = current_scope()
        assert all(scope is not earlier for earlier in tries), "a fresh scope each time"
        assert scope.info == {}
        assert exchange.carrier["rope_middleware.scope"] is scope
        scope.info["try"] = len(tries)
        tries.append(scope)
        number = len(tries)
        scope.on_close(lambda: closed.append(number))
        if number == 2:
            assert closed == [1], "the failed try has been closed"
            assert tries[0].closed
            lock.release()
        try:
            await web.store.add(1)
        except OperationalError:
            if frame == "raises":
                raise
            await exchange.answer(500, b"as a framework does")
            return
        if not commits:
            await web.store.commit()
        await exchange.answer(201, str(number).encode())

    answer = web.ask(handler, commit_on_success=commits, retries=3)
    assert (answer.status, answer.body, answer.complete) == (201, b"2", True)
    assert answer.error is None
    assert web.store.rows() == [1]
    assert closed == [1, 2]


def test_C6_it_gives_up_after_n_tries(web: Web, lock: Lock) -> None:
    """The last error is the answer: `retries=2` is three tries in all."""
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        await web.store.add(1)
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True, retries=2)
    assert len(tries) == 3
    assert answer.seen == 500
    assert answer.whole
    if answer.error is not None:
        assert isinstance(answer.error, OperationalError)
    assert web.store.rows() == []


def test_C6_without_retries_there_is_one_try(web: Web, lock: Lock) -> None:
    """The default is not to try again."""
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        await web.store.add(1)

    assert web.ask(handler, commit_on_success=True).seen == 500
    assert len(tries) == 1


def test_C6_the_last_answer_of_the_framework_is_sent_when_the_tries_are_used_up(
    web: Web, lock: Lock
) -> None:
    """A held 5xx is not lost: it is sent whole."""

    async def handler(exchange: Exchange) -> None:
        try:
            await web.store.add(1)
        except OperationalError:
            await exchange.start(503, ("retry-after", "1"))
            await exchange.chunk(b"one ")
            await exchange.chunk(b"two")

    answer = web.ask(handler, retries=2)
    assert (answer.status, answer.body, answer.complete) == (503, b"one two", True)
    assert ("retry-after", "1") in answer.headers
    assert answer.error is None


@pytest.mark.parametrize("status", [200, 302, 409, 429])
def test_C6_an_answer_under_500_stands(web: Web, lock: Lock, status: int) -> None:
    """An application that dealt with the refusal itself is not run again."""
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        try:
            await web.store.add(1)
        except OperationalError:
            await web.store.rollback()
        await exchange.answer(status, b"dealt with")

    answer = web.ask(handler, retries=3)
    assert (answer.status, answer.body, len(tries)) == (status, b"dealt with", 1)


@pytest.mark.parametrize("frame", ["raises", "answers 500"])
def test_C6_another_error_is_not_tried_again(web: Web, frame: str) -> None:
    """A broken constraint would break again."""
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        try:
            await web.store.add(1)
            web.store.jenny.session.expunge_all()
            await web.store.add(1)
        except IntegrityError:
            if frame == "raises":
                raise
            await exchange.answer(500)

    answer = web.ask(handler, retries=3)
    assert (answer.seen, len(tries)) == (500, 1)


def test_C6_a_plain_500_is_not_tried_again(web: Web) -> None:
    """Without a refused transaction a 5xx is the application's own business."""
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        await web.store.add(1)
        await exchange.answer(500, b"mine")

    answer = web.ask(handler, retries=3)
    assert (answer.status, answer.body, len(tries)) == (500, b"mine", 1)


def test_C6_the_body_is_replayed(web: Web, lock: Lock) -> None:
    """Each try reads the same body from its start."""
    bodies: list[bytes] = []

    async def handler(exchange: Exchange) -> None:
        bodies.append(await exchange.body())
        if len(bodies) == 3:
            lock.release()
        await web.store.add(1)
        await exchange.answer(200, bodies[-1])

    pieces = [b"a" * 1000, b"", b"b" * 50_000, b"c"]
    answer = web.ask(handler, method="POST", body=pieces, commit_on_success=True, retries=3)
    assert bodies == [b"".join(pieces)] * 3
    assert (answer.status, answer.body) == (200, b"".join(pieces))
    assert web.store.rows() == [1]


def test_C6_a_body_read_in_part_is_replayed_whole(web: Web, lock: Lock) -> None:
    """A first try that failed before it had read all leaves the rest for the second."""
    tries: list[bytes] = []

    async def handler(exchange: Exchange) -> None:
        if not tries:
            tries.append(b"")
            await web.store.add(1)
        lock.release()
        tries.append(await exchange.body())
        await web.store.add(1)
        await exchange.answer(200)

    answer = web.ask(
        handler, method="POST", body=[b"one", b"two", b"three"], commit_on_success=True, retries=1
    )
    assert answer.status == 200
    assert tries == [b"", b"onetwothree"]


@pytest.mark.parametrize(("size", "again"), [(2**20, True), (2**20 + 1, False)])
def test_C6_a_body_over_the_replay_limit_is_not_tried_again(
    web: Web, lock: Lock, size: int, again: bool
) -> None:
    """The limit is 1 MiB; a larger body reaches the application whole, once."""
    seen: list[int] = []

    async def handler(exchange: Exchange) -> None:
        seen.append(len(await exchange.body()))
        if len(seen) == 2:
            lock.release()
        await web.store.add(1)
        await exchange.answer(200)

    half = size // 2
    answer = web.ask(
        handler,
        method="POST",
        body=[b"a" * half, b"b" * (size - half)],
        commit_on_success=True,
        retries=1,
    )
    assert seen == ([size, size] if again else [size])
    assert answer.seen == (200 if again else 500)
    assert answer.whole


def test_C6_never_after_the_response_started(web: Web, lock: Lock) -> None:
    """A stream that meets a busy database is not run again under a started response."""
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        await exchange.answer(200, b"x")
        await web.store.add(1)
        await exchange.chunk(b"y")

    answer = web.ask(handler, retries=3)
    assert len(tries) == 1
    assert (answer.status, answer.body, answer.complete) == (200, b"x", False)
    assert isinstance(answer.error, OperationalError)


def test_C6_never_after_a_session_committed(web: Web) -> None:
    """What is committed cannot be taken back, so nothing is run twice."""
    tries: list[int] = []
    locks: list[Lock] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        await web.store.add(len(tries))
        await web.store.commit()
        locks.append(Lock(web.store.path))
        try:
            await web.store.add(100)
        finally:
            locks[-1].close()

    answer = web.ask(handler, retries=3)
    assert len(tries) == 1
    assert answer.seen == 500
    assert web.store.rows() == [1]


def test_C6_a_commit_that_only_read_forbids_a_retry_as_well(web: Web) -> None:
    """ "A session of this scope committed" is told by the commit, not by what it wrote."""
    tries: list[int] = []
    locks: list[Lock] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        await web.store.read()
        await web.store.commit()
        locks.append(Lock(web.store.path))
        try:
            await web.store.add(100)
        finally:
            locks[-1].close()

    assert web.ask(handler, retries=3).seen == 500
    assert len(tries) == 1


def test_C6_another_scopes_commit_does_not_forbid_a_retry(web: Web, lock: Lock) -> None:
    """Only sessions of the request's own scope count."""
    tries: list[int] = []
    web_of_inner = web.other_store(web.store.path.with_name("inner.db"))

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        if web.store.is_async:
            async with open_scope():
                await web_of_inner.add(len(tries))
                await web_of_inner.commit()
        else:
            with open_scope():
                await web_of_inner.add(len(tries))
                await web_of_inner.commit()
        if len(tries) == 2:
            lock.release()
        await web.store.add(1)
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True, retries=2)
    assert (answer.status, len(tries)) == (200, 2)
    assert web_of_inner.rows() == [1, 2]
    if web_of_inner.is_async:
        web.loop.run(web_of_inner.async_engine.dispose())
    else:
        web_of_inner.engine.dispose()


def test_C6_on_commit_runs_for_the_try_that_committed(web: Web, lock: Lock) -> None:
    """Callbacks of a try that was given up are gone with it."""
    called: list[int] = []
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        number = len(tries)
        current_scope().on_commit(lambda: called.append(number))
        if number == 3:
            lock.release()
        await web.store.add(1)
        await exchange.answer(200)

    assert web.ask(handler, commit_on_success=True, retries=5).status == 200
    assert called == [3]


def test_C6_each_retry_is_logged(web: Web, lock: Lock, caplog: pytest.LogCaptureFixture) -> None:
    """The line says which request, which try and the error's class."""
    caplog.set_level(logging.DEBUG, "rope_middleware")
    tries: list[int] = []

    async def handler(exchange: Exchange) -> None:
        tries.append(1)
        if len(tries) == 3:
            lock.release()
        await web.store.add(1)
        await exchange.answer(200)

    assert web.ask(handler, commit_on_success=True, retries=5).status == 200
    lines = [
        record.getMessage()
        for record in caplog.records
        if record.name == "rope_middleware" and "OperationalError" in record.getMessage()
    ]
    assert len([line for line in lines if "GET /thing" in line]) >= 2, caplog.text


def test_C6_the_carrier_is_a_copy_for_each_try(web: Web, lock: Lock) -> None:
    """What the first try put into `scope` or `environ` is not there in the second."""
    carriers: list[dict[str, Any]] = []

    async def handler(exchange: Exchange) -> None:
        assert "mine" not in exchange.carrier
        exchange.carrier["mine"] = True
        carriers.append(exchange.carrier)
        if len(carriers) == 2:
            lock.release()
        await web.store.add(1)
        await exchange.answer(200)

    assert web.ask(handler, commit_on_success=True, retries=2).status == 200
    assert len(carriers) == 2
    assert carriers[0] is not carriers[1]


def test_C6_a_stream_is_not_held_back(web: Web) -> None:
    """With `retries` a success that streams reaches the client chunk by chunk."""
    seen: list[int] = []

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)
        assert seen == [200] or web.wsgi
        await exchange.chunk(b"y")
        assert seen == [200]

    answer = web.ask(handler, commit_on_success=True, retries=3, at_start=seen.append)
    assert (answer.body, answer.error) == (b"xy", None)


def test_C6_a_disconnect_reaches_an_app_behind_the_replay(tmp_path: Path) -> None:
    """After the body `receive` still tells that the client has gone."""
    for kind in ("asgi-async", "asgi-sync"):
        web = Web(kind, tmp_path / f"{kind}.db")
        messages = [
            {"type": "http.request", "body": b"a", "more_body": False},
            {"type": "http.disconnect"},
        ]
        seen: list[str] = []

        async def app(scope: Any, receive: Any, send: Any, seen: list[str] = seen) -> None:
            seen.append((await receive())["type"])
            seen.append((await receive())["type"])

        async def receive(messages: list[dict[str, Any]] = messages) -> dict[str, Any]:
            return messages.pop(0)

        async def send(message: Any) -> None: ...

        wrapped: Any = ASGIRopeMiddleware(app, retries=2)
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        web.loop.run(asyncio.wait_for(wrapped(scope, receive, send), LIMIT))
        assert seen == ["http.request", "http.disconnect"]
        web.close()


def test_C6_negative_retries_are_refused() -> None:
    """A number of tries that makes no sense is an error at once."""

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    def wsgi_app(environ: Any, start_response: Any) -> list[bytes]:
        return []

    with pytest.raises((ValueError, TypeError)):
        ASGIRopeMiddleware(app, retries=-1)
    with pytest.raises((ValueError, TypeError)):
        WSGIRopeMiddleware(wsgi_app, retries=-1)


# --------------------------------------------------------------------------------------------
# C7: several sessions


def test_C7_sessions_commit_in_the_order_they_were_made(web: Web, tmp_path: Path) -> None:
    """The order of first use decides, not the order of the jennies' birth."""
    second = web.other_store(tmp_path / "second.db")
    third = web.other_store(tmp_path / "third.db")
    order: list[str] = []
    web.store.commits = second.commits = third.commits = order

    async def handler(exchange: Exchange) -> None:
        await third.add(1)
        await web.store.add(1)
        await second.add(1)
        await exchange.answer(200)

    assert web.ask(handler, commit_on_success=True).status == 200
    assert order == ["third", "first", "second"]
    for store in (second, third):
        assert store.rows() == [1]
        assert store.held() == 0
        web.loop.run(store.async_engine.dispose()) if store.is_async else store.engine.dispose()


def test_C7_after_a_commit_that_fails_the_later_sessions_are_rolled_back(
    web: Web, tmp_path: Path
) -> None:
    """What can still be undone is undone, and the client is told of the failure."""
    second = web.other_store(tmp_path / "second.db")

    async def handler(exchange: Exchange) -> None:
        await web.store.add_orphan(1)
        await second.add(1)
        await exchange.answer(200)

    answer = web.ask(handler, commit_on_success=True)
    assert answer.seen == 500
    assert answer.whole
    assert web.store.orphans() == 0
    assert second.rows() == []
    assert second.held() == 0
    web.loop.run(second.async_engine.dispose()) if second.is_async else second.engine.dispose()


def test_C7_sync_and_async_sessions_of_one_scope_commit_together(tmp_path: Path) -> None:
    """Two jennies of two colours side by side under ASGI."""
    web = Web("asgi-async", tmp_path / "async.db")
    sync = Web("asgi-sync", tmp_path / "sync.db")
    order: list[str] = []
    web.store.commits = sync.store.commits = order

    async def handler(exchange: Exchange) -> None:
        await sync.store.add(1)
        await web.store.add(1)
        await exchange.answer(200)

    assert web.ask(handler, commit_on_success=True).status == 200
    assert order == ["sync", "async"]
    assert web.store.rows() == sync.store.rows() == [1]
    assert web.store.held() == sync.store.held() == 0
    web.close()
    sync.close()
