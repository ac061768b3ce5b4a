"""Are the promises on cost kept? Exits with 1 where one is broken.

    python -m benchmarks.check            as promised; about three minutes
    python -m benchmarks.check --short    wider margins, under 90 seconds, for a noisy machine
    python -m benchmarks.check --only P1 P3

Every figure is a ratio of two things measured side by side, see `benchmarks.measure`. A ratio
is compared with its bound after it is rounded to the two decimals that the bounds have.

What runs in one thread and waits for nothing (P1, P3, P4, a SELECT from SQLite under WSGI) is
measured in CPU time of that thread, so that other people's work on the machine counts less; what
waits for threads or for a server, by the clock on the wall.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, Protocol

import anyio.to_thread
from sqlalchemy import select
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from benchmarks import database
from benchmarks.database import Database, Item
from benchmarks.drivers import (
    Clock,
    asgi_answer,
    asgi_batch,
    asgi_scope,
    receive,
    send,
    wsgi_answer,
    wsgi_batch,
    wsgi_call,
    wsgi_environ,
)
from benchmarks.measure import (
    AsyncBatch,
    Batch,
    Spread,
    Times,
    cyclic_garbage,
    interleave,
    interleave_async,
    per_request,
    ratio,
    ratio_of_added,
    resident_bytes,
    surroundings,
)
from rope_middleware import (
    ASGIRopeMiddleware,
    AsyncSessionJenny,
    SessionJenny,
    WSGIRopeMiddleware,
    open_scope,
)

PROMISES = ("P1", "P2", "P3", "P4")


@dataclass(frozen=True)
class Effort:
    """How much is measured, and how much noise is forgiven.

    Batches are short, a few milliseconds: somebody else's work on the machine then disturbs some
    of the many rounds, which the median does not heed, and not each of them a little.
    """

    name: str
    rounds: int
    requests: int
    """Per batch where no database is touched."""
    reads: int
    """Requests per batch with a SELECT in each."""
    lookups: int
    """Of ``jenny.session`` per batch."""
    memory_requests: int
    margin: float
    """What every bound is multiplied with."""
    growth: float
    """What "does not grow" forgives, as a factor."""


FULL = Effort("full", 301, 1_000, 10, 20_000, 1_000_000, margin=1.0, growth=1.10)
SHORT = Effort("short", 61, 1_000, 10, 20_000, 100_000, margin=1.25, growth=1.35)


@dataclass(frozen=True)
class Result:
    """One line of the answer."""

    promise: str
    what: str
    measured: float
    bound: float
    promised: float
    """The bound without the margin."""
    spread: str = ""
    note: str = ""

    @property
    def kept(self) -> bool:
        """Tell whether the promise is kept."""
        return round(self.measured, 2) <= self.bound

    def __str__(self) -> str:
        text = (
            f"{'pass' if self.kept else 'FAIL'}  {self.promise}  {self.what:<64}"
            f"{self.measured:7.2f} of at most {self.bound:.2f}"
        )
        return (
            text
            + (f"  {self.spread}" if self.spread else "")
            + (f"  ({self.note})" if self.note else "")
        )


Results = Iterator[Result]


class Serve(Protocol):
    """Serves requests that each have a session, some of which read with it."""

    def __call__(self, requests: int, reads_every: int = 100) -> None: ...


class Check:
    """Measures one promise after the other."""

    def __init__(self, effort: Effort) -> None:
        self.effort = effort

    def result(
        self, promise: str, what: str, measured: Spread, bound: float, note: str = ""
    ) -> Result:
        """Judge a ratio."""
        return Result(
            promise,
            what,
            measured.median,
            round(bound * self.effort.margin, 2),
            bound,
            f"[{measured.low:.2f} .. {measured.high:.2f}]",
            note,
        )

    def all(self, promises: Sequence[str] = PROMISES) -> Results:
        """Measure these promises."""
        for promise in promises:
            yield from getattr(self, promise.lower())()

    # -- P1: no database touched ---------------------------------------------------------------

    def p1(self) -> Results:
        """What the middleware adds, in units of what a minimal one adds."""
        yield from asyncio.run(self._p1_asgi())
        yield from self._p1_wsgi("list body", bare_wsgi, 2.0, 3.5)
        yield from self._p1_wsgi("generator body", bare_wsgi_generator, 4.0, None)

    async def _p1_asgi(self) -> list[Result]:
        apps = {
            "bare": bare_asgi,
            "minimal": MinimalASGI(bare_asgi),
            "ours": ASGIRopeMiddleware(bare_asgi),
            "commit": ASGIRopeMiddleware(bare_asgi, commit_on_success=True),
        }
        for app in apps.values():
            assert await asgi_answer(app, asgi_scope()) == (200, b"ok")
        requests = self.effort.requests
        batches = {name: _asgi_batch(app, requests, thread_time) for name, app in apps.items()}
        times = await interleave_async(batches, self.effort.rounds)
        return self._p1_results("ASGI", times, 2.0, 3.5)

    def _p1_wsgi(
        self, body: str, bare: Any, bound: float, commit_bound: float | None
    ) -> list[Result]:
        apps = {
            "bare": bare,
            "minimal": MinimalWSGI(bare),
            "ours": WSGIRopeMiddleware(bare),
            "commit": WSGIRopeMiddleware(bare, commit_on_success=True),
        }
        for app in apps.values():
            assert wsgi_answer(app, wsgi_environ()) == (200, b"ok")
        requests = self.effort.requests
        batches = {name: _wsgi_batch(app, requests, thread_time) for name, app in apps.items()}
        times = interleave(batches, self.effort.rounds)
        return self._p1_results(f"WSGI, {body}", times, bound, commit_bound)

    def _p1_results(
        self, what: str, times: Times, bound: float, commit_bound: float | None
    ) -> list[Result]:
        requests = self.effort.requests
        bare = per_request(times["bare"], requests).median
        results = []
        for name, label, promised in (
            ("ours", f"{what}: added", bound),
            ("commit", f"{what}, commit_on_success: added", commit_bound),
        ):
            measured = ratio_of_added(times, name, "minimal", "bare")
            added, least = (
                f"{per_request(times[one], requests).median - bare:.2f} us"
                for one in (name, "minimal")
            )
            if promised is None:
                print(f"      P1  {label} {measured.median:.2f}, not promised ({added} to {least})")
            else:
                note = f"{added} to {least}"
                results.append(self.result("P1", label, measured, promised, note))
        return results

    # -- P2: one SELECT ------------------------------------------------------------------------

    def p2(self) -> Results:
        """What a request with one SELECT takes, in units of the same handler by hand."""
        with ExitStack() as stack:
            sqlite = stack.enter_context(database.sqlite())
            yield from self._p2_wsgi(sqlite)
            yield from asyncio.run(self._p2_threads(sqlite))
            yield from asyncio.run(self._p2_async(sqlite))
            try:
                postgresql = stack.enter_context(database.postgresql())
            except (ImportError, RuntimeError) as error:
                print(f"      P2  PostgreSQL is not measured: {error}")
                return
            yield from self._p2_wsgi(postgresql)
            yield from asyncio.run(self._p2_threads(postgresql))
            yield from asyncio.run(self._p2_async(postgresql))

    def _p2_result(self, what: str, times: Times, bound: float) -> Result:
        requests = self.effort.reads
        note = " to ".join(
            f"{per_request(times[name], requests).median:.0f} us" for name in ("ours", "by hand")
        )
        return self.result("P2", what, ratio(times, "ours", "by hand"), bound, note)

    def _p2_wsgi(self, where: Database) -> Results:
        engine = where.engine()
        factory = sessionmaker(engine)
        jenny = SessionJenny(factory)

        def by_hand(environ: Any, start_response: Any) -> list[bytes]:
            with factory() as session:
                name = read(session)
            start_response("200 OK", HEADERS)
            return [name]

        def handler(environ: Any, start_response: Any) -> list[bytes]:
            name = read(jenny.session)
            start_response("200 OK", HEADERS)
            return [name]

        apps = {"by hand": by_hand, "ours": WSGIRopeMiddleware(handler)}
        for app in apps.values():
            assert wsgi_answer(app, wsgi_environ()) == (200, b"rope")
        # SQLite works in this thread and waits for nothing; PostgreSQL works elsewhere.
        clock = thread_time if where.name == "SQLite" else perf_counter
        batches = {name: _wsgi_batch(app, self.effort.reads, clock) for name, app in apps.items()}
        times = interleave(batches, self.effort.rounds)
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        engine.dispose()
        yield self._p2_result(f"{where.name}, WSGI", times, 1.03)

    async def _p2_threads(self, where: Database) -> list[Result]:
        engine = where.engine()
        factory = sessionmaker(engine)
        jenny = SessionJenny(factory)

        def by_hand() -> bytes:
            with factory() as session:
                return read(session)

        def by_hand_and_commit() -> bytes:
            with factory() as session:
                name = read(session)
                session.commit()
                return name

        def handler() -> bytes:
            return read(jenny.session)

        def handler_and_commit() -> bytes:
            name = read(jenny.session)
            jenny.session.commit()
            return name

        results = []
        for what, base, ours, bound in (
            ("nothing left open", by_hand_and_commit, handler_and_commit, 1.05),
            ("a transaction left open", by_hand, handler, 1.20),
        ):
            apps = {
                "by hand": asgi_app(in_thread(base)),
                "ours": ASGIRopeMiddleware(asgi_app(in_thread(ours))),
            }
            times = await self._p2_asgi(apps)
            what = f"{where.name}, sync handler in an async app, {what}"
            results.append(self._p2_result(what, times, bound))
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        engine.dispose()
        return results

    async def _p2_async(self, where: Database) -> list[Result]:
        engine = where.async_engine()
        factory = async_sessionmaker(engine)
        jenny = AsyncSessionJenny(factory)

        async def by_hand() -> bytes:
            async with factory() as session:
                return await aread(session)

        async def by_hand_and_commit() -> bytes:
            async with factory() as session:
                name = await aread(session)
                await session.commit()
                return name

        async def handler() -> bytes:
            return await aread(jenny.session)

        async def handler_and_commit() -> bytes:
            name = await aread(jenny.session)
            await jenny.session.commit()
            return name

        results = []
        for what, base, ours in (
            ("nothing left open", by_hand_and_commit, handler_and_commit),
            ("a transaction left open", by_hand, handler),
        ):
            apps = {"by hand": asgi_app(base), "ours": ASGIRopeMiddleware(asgi_app(ours))}
            times = await self._p2_asgi(apps)
            results.append(self._p2_result(f"{where.name}, AsyncSession, {what}", times, 1.00))
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
        await engine.dispose()
        return results

    async def _p2_asgi(self, apps: dict[str, Any]) -> Times:
        for app in apps.values():
            assert await asgi_answer(app, asgi_scope()) == (200, b"rope")
        batches = {name: _asgi_batch(app, self.effort.reads) for name, app in apps.items()}
        return await interleave_async(batches, self.effort.rounds)

    # -- P3: jenny.session ---------------------------------------------------------------------

    def p3(self) -> Results:
        """What ``jenny.session`` takes in a scope, in units of ``scoped_session.registry()``."""
        factory = sessionmaker()
        jenny, scoped = SessionJenny(factory), scoped_session(factory)
        lookups = self.effort.lookups

        def ours() -> float:
            started = thread_time()
            for _ in repeat(None, lookups):
                jenny.session  # noqa: B018
            return thread_time() - started

        def theirs() -> float:
            started = thread_time()
            for _ in repeat(None, lookups):
                scoped.registry()
            return thread_time() - started

        with open_scope("P3"):
            assert jenny.session is jenny.session
            assert scoped.registry() is scoped.registry()
            times = interleave({"ours": ours, "theirs": theirs}, self.effort.rounds)
        scoped.remove()
        note = " to ".join(
            f"{per_request(times[name], lookups).median * 1000:.0f} ns"
            for name in ("ours", "theirs")
        )
        yield self.result(
            "P3", "jenny.session to scoped_session.registry()", ratio(times, "ours", "theirs"),
            1.00, note,
        )  # fmt: skip

    # -- P4: many requests, many scopes --------------------------------------------------------

    def p4(self) -> Results:
        """Memory is flat, and the cost does not grow with the number of open scopes."""
        with database.sqlite() as sqlite:
            for what, serve in (
                ("WSGI", self._wsgi_requests(sqlite)),
                ("ASGI", self._asgi_requests(sqlite)),
            ):
                # The collector is off while P1 to P3 are measured: nothing may be left to it.
                left = cyclic_garbage(partial(serve, 2_000, reads_every=1), 2_000)
                yield self._flat(f"{what}: objects per SELECT for the garbage collector", left, 0.5)
            yield from self._p4_memory("WSGI", self._wsgi_requests(sqlite))
            yield from self._p4_memory("ASGI", self._asgi_requests(sqlite))
        yield from self._p4_open_wsgi()
        yield from asyncio.run(self._p4_open_asgi())

    def _p4_memory(self, what: str, serve: Serve) -> Results:
        """Count memory blocks, which is exact, and resident memory, which is what people see."""
        half = self.effort.memory_requests // 2  # one half by each protocol
        serve(max(2_000, half // 20))  # caches and free lists fill up
        gc.collect()
        blocks, resident = sys.getallocatedblocks(), resident_bytes()
        serve(half)
        gc.collect()
        grown = sys.getallocatedblocks() - blocks
        note = f"{grown:+d} memory blocks"
        if resident is not None:
            grown_kib = ((resident_bytes() or 0) - resident) / 1024
            note += f", resident memory {grown_kib:+.0f} KiB"
            yield self._flat(f"{what}: KiB of memory per 1,000 of {half:,} requests",
                             grown_kib / half * 1000, 5.0, note)  # fmt: skip
        yield self._flat(
            f"{what}: memory blocks per 1,000 of {half:,} requests", grown / half * 1000, 5.0, note
        )

    def _flat(self, what: str, measured: float, bound: float, note: str = "") -> Result:
        return Result("P4", what, measured, bound, bound, note=note)

    def _wsgi_requests(self, where: Database) -> Serve:
        jenny = SessionJenny(sessionmaker(where.engine()))

        def handler(environ: Any, start_response: Any) -> list[bytes]:
            session = jenny.session
            start_response("200 OK", HEADERS)
            return [read(session) if environ["PATH_INFO"] == "/read" else b"ok"]

        app = WSGIRopeMiddleware(handler)
        touch, reading = wsgi_environ("/touch"), wsgi_environ("/read")

        def serve(requests: int, reads_every: int = 100) -> None:
            for _ in repeat(None, requests // reads_every):
                wsgi_call(app, reading.copy())
                wsgi_batch(app, touch, reads_every - 1)

        return serve

    def _asgi_requests(self, where: Database) -> Serve:
        async def main(requests: int, reads_every: int) -> None:
            engine = where.async_engine()
            jenny = AsyncSessionJenny(async_sessionmaker(engine))

            async def handler(scope: Any, receive: Any, send: Any) -> None:
                session = jenny.session
                body = await aread(session) if scope["path"] == "/read" else b"ok"
                await send(START)
                await send({"type": "http.response.body", "body": body})

            app = ASGIRopeMiddleware(handler)
            touch, reading = asgi_scope("/touch"), asgi_scope("/read")
            for _ in repeat(None, requests // reads_every):
                await app(reading.copy(), receive, send)
                await asgi_batch(app, touch, reads_every - 1)
            await engine.dispose()

        return lambda requests, reads_every=100: asyncio.run(main(requests, reads_every))

    def _p4_open_wsgi(self) -> Results:
        """Open scopes: requests whose body nobody has closed yet."""
        jenny = SessionJenny(sessionmaker())

        def handler(environ: Any, start_response: Any) -> list[bytes]:
            jenny.session  # noqa: B018
            start_response("200 OK", HEADERS)
            return [b"ok"]

        app = WSGIRopeMiddleware(handler)
        environ = wsgi_environ()
        requests = self.effort.requests // 5
        held: list[Any] = []

        def hold(count: int) -> None:
            while len(held) < count:
                held.append(app(environ.copy(), lambda *args: None))
            while len(held) > count:
                held.pop().close()

        def at(count: int) -> Batch:
            def batch() -> float:
                hold(count)
                gc.collect()
                return wsgi_batch(app, environ, requests, thread_time)

            return batch

        times = interleave({str(n): at(n) for n in (1, 100, 10_000)}, self._p4_rounds)
        hold(0)
        yield from self._p4_open("WSGI", times, requests)

    async def _p4_open_asgi(self) -> list[Result]:
        """Open scopes: requests whose app waits for something."""
        jenny = SessionJenny(sessionmaker())
        go_on = asyncio.Event()

        async def handler(scope: Any, receive: Any, send: Any) -> None:
            jenny.session  # noqa: B018
            if scope["path"] == "/wait":
                await go_on.wait()
            await send(START)
            await send({"type": "http.response.body", "body": b"ok"})

        app = ASGIRopeMiddleware(handler)
        waiting, scope = asgi_scope("/wait"), asgi_scope()
        requests = self.effort.requests // 5
        held: list[asyncio.Task[None]] = []

        async def one() -> None:
            await app(waiting.copy(), receive, send)

        async def hold(count: int) -> None:
            if len(held) > count:
                go_on.set()
                await asyncio.gather(*held)
                held.clear()
                go_on.clear()
            while len(held) < count:
                held.append(asyncio.create_task(one()))
            await asyncio.sleep(0)

        def at(count: int) -> AsyncBatch:
            async def batch() -> float:
                await hold(count)
                gc.collect()
                return await asgi_batch(app, scope, requests, thread_time)

            return batch

        times = await interleave_async({str(n): at(n) for n in (1, 100, 10_000)}, self._p4_rounds)
        await hold(0)
        return list(self._p4_open("ASGI", times, requests))

    @property
    def _p4_rounds(self) -> int:
        # To open 10,000 scopes takes longer than to measure.
        return max(5, self.effort.rounds // 20)

    def _p4_open(self, what: str, times: Times, requests: int) -> Results:
        for count in ("100", "10000"):
            measured = ratio(times, count, "1")
            note = " to ".join(
                f"{per_request(times[n], requests).median:.1f} us" for n in (count, "1")
            )
            yield Result(
                "P4",
                f"{what}: a request with {int(count):,} open scopes, to one with 1",
                measured.median,
                self.effort.growth,
                1.0,
                f"[{measured.low:.2f} .. {measured.high:.2f}]",
                note,
            )


# -- the apps ----------------------------------------------------------------------------------

HEADERS: list[tuple[str, str]] = [("content-type", "text/plain")]
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/plain")],
}
BODY = {"type": "http.response.body", "body": b"ok"}


async def bare_asgi(scope: Any, receive: Any, send: Any) -> None:
    """The least that answers."""
    await send(START)
    await send(BODY)


def bare_wsgi(environ: Any, start_response: Any) -> list[bytes]:
    """The least that answers."""
    start_response("200 OK", HEADERS)
    return [b"ok"]


def bare_wsgi_generator(environ: Any, start_response: Any) -> Iterator[bytes]:
    """The least that answers with a generator: one chunk."""
    start_response("200 OK", HEADERS)
    yield b"ok"


minimal: ContextVar[object] = ContextVar("minimal")


class MinimalASGI:
    """By hand: sets and resets a ContextVar, no more."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        token = minimal.set(object())
        try:
            await self.app(scope, receive, send)
        finally:
            minimal.reset(token)


class MinimalWSGI:
    """By hand: sets a ContextVar, and wraps the body to reset it in its ``close()``."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, environ: Any, start_response: Any) -> Any:
        token = minimal.set(object())
        try:
            return MinimalBody(self.app(environ, start_response), token)
        except BaseException:
            minimal.reset(token)
            raise


class MinimalBody:
    """A body with a ``close()``."""

    def __init__(self, body: Any, token: Any) -> None:
        self.body = body
        self.token = token

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.body)

    def close(self) -> None:
        try:
            close = getattr(self.body, "close", None)
            if close is not None:
                close()
        finally:
            minimal.reset(self.token)


def read(session: Session) -> bytes:
    """Read one row by its ORM class."""
    return session.scalars(select(Item).where(Item.id == 1)).one().name.encode()


async def aread(session: Any) -> bytes:
    """`read`, async."""
    return (await session.scalars(select(Item).where(Item.id == 1))).one().name.encode()


def in_thread(work: Callable[[], bytes]) -> Callable[[], Awaitable[bytes]]:
    """Return an async handler that calls a sync one in a thread, as frameworks do."""

    async def call() -> bytes:
        return await anyio.to_thread.run_sync(work)

    return call


def asgi_app(handler: Callable[[], Awaitable[bytes]]) -> Any:
    """Return the app that answers with what `handler` returns."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = await handler()
        await send(START)
        await send({"type": "http.response.body", "body": body})

    return app


def _asgi_batch(app: Any, requests: int, clock: Clock = perf_counter) -> AsyncBatch:
    scope = asgi_scope()
    return lambda: asgi_batch(app, scope, requests, clock)


def _wsgi_batch(app: Any, requests: int, clock: Clock = perf_counter) -> Batch:
    environ = wsgi_environ()
    return lambda: wsgi_batch(app, environ, requests, clock)


# -- the command -------------------------------------------------------------------------------


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="wider margins, under 90 seconds")
    parser.add_argument("--only", nargs="+", choices=PROMISES, metavar="PROMISE")
    parser.add_argument("--memory-requests", type=int, help="requests for the memory of P4")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    effort = SHORT if options.short else FULL
    if options.memory_requests:
        effort = Effort(**asdict(effort) | {"memory_requests": options.memory_requests})
    where = surroundings(("asyncpg", "psycopg"))
    print(f"{where['python']}, {where['machine']}")
    print(", ".join(f"{name} {version}" for name, version in where["versions"].items()))
    print(
        f"{effort.name}: {effort.rounds} rounds, bounds times {effort.margin:g}, growth up to "
        f"{effort.growth:g}, {effort.memory_requests:,} requests for the memory"
    )
    print(f"gc: {where['gc']}")
    started = time.monotonic()
    check = Check(effort)
    results: list[Result] = []
    for result in check.all(options.only or PROMISES):
        results.append(result)
        print(result, flush=True)
    broken = [result for result in results if not result.kept]
    print(f"{len(results) - len(broken)} kept, {len(broken)} broken, "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip
    if options.json:
        rows = [asdict(result) | {"kept": result.kept} for result in results]
        options.json.write_text(json.dumps({"where": where, "results": rows}, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
