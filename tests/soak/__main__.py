"""Does anything stay behind? Exits with 1 where it does, or where an answer is not the right one.

    python -m tests.soak                      a million requests; about 20 minutes
    python -m tests.soak --requests 20000     as CI has it; under half a minute
    python -m tests.soak --seed 7             the same plan again

Requests go through the ASGI and the WSGI middleware in process, several at a time, onto SQLite
files. Each is drawn at random: its protocol, its kind of session (sync in the event loop, sync in
threads, async), its work and its fault. The faults are real ones: a commit that a constraint
refuses, a connection that was closed under its session, a transaction that SQLite refuses as out
of date, a task that is cancelled or a coroutine that is closed at any await, a client that has
gone, a body that is never closed, code that outlives its request.

The run is cut into ten laps. After each, everything must have come to rest: no scope open, no
connection checked out, no write lost or invented. Memory is compared with the end of the first
lap, when every cache is warm.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import random
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import QueuePool

from rope_middleware import (
    ASGIRopeMiddleware,
    AsyncSessionJenny,
    ScopeClosedError,
    SessionJenny,
    WSGIRopeMiddleware,
    current_scope,
    open_scope,
)
from tests.kit.asgi import http_scope
from tests.kit.leaks import checked_out, open_scopes
from tests.kit.wsgi import make_environ

LAPS = 10
TASKS = 12
THREADS = 4
RETRIES = 3
PAGE = 4096 if not hasattr(os, "sysconf") else os.sysconf("SC_PAGE_SIZE")

MORE_BLOCKS = 4_000
"""Memory blocks of Python that may be in use more than after the first lap, however many requests
there were: one block for every fifth request of the short run, for every 225th of the long one."""

MORE_RSS = 24 * 1024 * 1024
"""Bytes that the process may have grown by since then: heaps fragment."""

# What is drawn, with its weight.
PROTOCOLS = {"wsgi": 46, "asgi-direct": 28, "asgi-thread": 20, "asgi-async": 6}
WORK = {"read": 40, "write": 25, "none": 10, "nested": 10, "tasks": 10, "stream": 5}
FAULTS = {
    "well": 46,
    "raise": 10,
    "orphan": 6,  # the commit fails
    "broken": 6,  # the close fails
    "cancel": 8,  # ASGI: the task, at some await
    "close": 4,  # ASGI: the coroutine, at some await; WSGI: the body, in the middle
    "leave": 6,  # the client; WSGI: nobody closes the body
    "doom": 4,
    "veto": 4,
    "busy": 4,  # the transaction is refused
    "late": 2,  # something outlives the request
}


class FaultError(Exception):
    """The application's own."""


class GoneError(OSError):
    """The server's, where the client has gone."""


@dataclass
class Plan:
    """One request, and what became of it."""

    protocol: str
    work: str
    fault: str
    turns: int  # after how many steps the fault comes
    tries: int = 0
    wrote: int = 0  # in the last try
    status: int | None = None
    late: list[Callable[[], Any]] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Can it only succeed?"""
        return self.fault in ("well", "late")


READ = text("SELECT n FROM counter")
WRITE = text("UPDATE counter SET n = n + 1")
ORPHAN = text("INSERT INTO child (parent) VALUES (-1)")


def listen(engine: Engine) -> None:
    """Have SQLite begin and check as other databases do."""

    @event.listens_for(engine, "connect")
    def _(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("foreign_keys = ON", "synchronous = OFF"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")


async def refuse() -> None:
    """Fail as a rollback does on a broken disk."""
    raise sqlite3.OperationalError("disk I/O error")


async def within(cancel_scope: anyio.CancelScope, call: Awaitable[object]) -> None:
    with cancel_scope:
        await call


def veto(status: int, headers: list[tuple[str, str]]) -> bool:
    """Forbid what asks for it."""
    return any(name.lower() == "x-veto" for name, _ in headers)


class Soak:
    """The applications, their databases, and the account of what they were asked for."""

    def __init__(self, folder: Path) -> None:
        options: dict[str, Any] = {"max_overflow": 0, "pool_timeout": 60}
        url = f"sqlite:///{folder / 'soak.sqlite'}"
        self.engine = create_engine(
            url,
            poolclass=QueuePool,
            pool_size=TASKS + 2 * THREADS,
            connect_args={"timeout": 60, "check_same_thread": False},
            **options,
        )
        self.other = create_engine(url, connect_args={"timeout": 60, "check_same_thread": False})
        self.async_engine = create_async_engine(
            url.replace("sqlite:", "sqlite+aiosqlite:"),
            pool_size=TASKS,
            connect_args={"timeout": 60},
            **options,
        )
        for engine in (self.engine, self.other, self.async_engine.sync_engine):
            listen(engine)
        with self.engine.connect() as connection:
            connection.connection.driver_connection.execute("PRAGMA journal_mode = WAL")  # type: ignore[union-attr]
        with self.engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE counter (n INTEGER NOT NULL)")
            connection.exec_driver_sql("INSERT INTO counter VALUES (0)")
            connection.exec_driver_sql(
                "CREATE TABLE child (id INTEGER PRIMARY KEY, parent INTEGER NOT NULL"
                " REFERENCES child (id) DEFERRABLE INITIALLY DEFERRED)"
            )
        self.jenny = SessionJenny(sessionmaker(self.engine))
        self.async_jenny = AsyncSessionJenny(async_sessionmaker(self.async_engine))
        told: dict[str, Any] = {"commit_on_success": True, "commit_veto": veto, "retries": RETRIES}
        self.asgi = ASGIRopeMiddleware(self.asgi_app, **told)
        self.wsgi = WSGIRopeMiddleware(self.wsgi_app, **told)
        self.helpers = ThreadPoolExecutor(4)
        self.drawn: Counter[str] = Counter()
        self.surprises: Counter[str] = Counter()
        self.refused = 0
        self.least = self.most = 0  # what the counter may be
        self._lock = threading.Lock()

    # -- what handlers do ----------------------------------------------------------------------

    def work(self, plan: Plan) -> None:
        """Use the session of the scope."""
        session = self.jenny.session
        if plan.fault == "busy":
            session.execute(READ)  # from here on the transaction sees this state of the file
            if plan.tries == 1:
                Context().run(self.write_beside)
            plan.wrote = 1
            session.execute(WRITE)
        elif plan.work in ("read", "stream"):
            session.execute(READ).scalar_one()
        elif plan.work == "write":
            plan.wrote = 1
            session.execute(WRITE)
        elif plan.work == "nested":
            with open_scope("inner"):
                self.jenny.execute(READ)
                if plan.fault == "raise" and plan.turns % 2:
                    raise FaultError
            if self.jenny.session is not session:
                raise AssertionError("an inner scope has changed the outer one")
        elif plan.work == "tasks":
            found = [self.helpers.submit(copy_context().run, self.same_session) for _ in range(2)]
            if any(one.result() is not session for one in found):
                raise AssertionError("a thread of the request has another session")
            session.execute(READ)
        if plan.fault == "orphan":
            session.execute(ORPHAN)
        elif plan.fault == "broken":
            session.connection().connection.driver_connection.close()  # type: ignore[union-attr]
        self.end_work(plan)

    async def awork(self, plan: Plan) -> None:
        """The same, with the AsyncSession."""
        session = self.async_jenny.session
        if plan.fault == "busy":
            await session.execute(READ)
            if plan.tries == 1:
                await asyncio.get_running_loop().run_in_executor(None, self.write_beside)
            plan.wrote = 1
            await session.execute(WRITE)
        elif plan.work in ("read", "stream"):
            await session.execute(READ)
        elif plan.work == "write":
            plan.wrote = 1
            await session.execute(WRITE)
        elif plan.work == "nested":
            async with open_scope("inner"):
                await self.async_jenny.execute(READ)
                if plan.fault == "raise" and plan.turns % 2:
                    raise FaultError
        elif plan.work == "tasks":
            await asyncio.gather(self.own_scope(), self.own_scope())
        if plan.fault == "orphan":
            await session.execute(ORPHAN)
        elif plan.fault == "broken":
            connection = await session.connection()
            # Closed beforehand, it would say nothing and go back to its pool.
            (await connection.get_raw_connection()).driver_connection.rollback = refuse  # type: ignore[union-attr]
        self.end_work(plan)

    def same_session(self) -> Any:
        return self.jenny.session

    def write_beside(self) -> None:
        with self.other.begin() as connection:
            connection.execute(WRITE)
        self.count(1, 1)

    @open_scope()
    async def own_scope(self) -> None:
        await self.async_jenny.execute(READ)

    def end_work(self, plan: Plan) -> None:
        if plan.fault == "raise":
            raise FaultError
        if plan.fault == "doom":
            current_scope().doom()

    def begin_try(self, plan: Plan) -> None:
        plan.tries += 1
        plan.wrote = 0
        scope = current_scope()
        if scope.info:
            raise AssertionError("a scope is not empty at its start")
        scope.info["plan"] = plan

    async def asgi_app(self, scope: Any, receive: Any, send: Any) -> None:
        plan: Plan = scope["plan"]
        self.begin_try(plan)
        await receive()
        if plan.fault == "late" and plan.protocol == "asgi-direct":
            context = copy_context()
            plan.late.append(lambda: context.run(self.same_session))
        if plan.fault in ("cancel", "close"):
            await asyncio.sleep(0)
        if plan.work != "none" or plan.fault in ("orphan", "broken", "busy"):
            if plan.protocol == "asgi-async":
                await self.awork(plan)
            elif plan.protocol == "asgi-thread":
                await anyio.to_thread.run_sync(self.work, plan)
            else:
                self.work(plan)
        else:
            self.end_work(plan)
        headers = [(b"x-veto", b"1")] if plan.fault == "veto" else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(3 if plan.work == "stream" else 0):
            await asyncio.sleep(0)
            if plan.protocol == "asgi-async":
                await self.async_jenny.execute(READ)
            else:
                self.jenny.execute(READ)
            await send({"type": "http.response.body", "body": b".", "more_body": True})
        await send({"type": "http.response.body", "body": b"done"})

    def wsgi_app(self, environ: Any, start_response: Any) -> Any:
        plan: Plan = environ["plan"]
        self.begin_try(plan)
        if plan.fault == "late":
            context = copy_context()
            plan.late.append(lambda: context.run(self.same_session))
        if plan.work != "none" or plan.fault in ("orphan", "broken", "busy"):
            self.work(plan)
        else:
            self.end_work(plan)
        start_response("200 OK", [("X-Veto", "1")] if plan.fault == "veto" else [])
        return self.body() if plan.work == "stream" else [b"do", b"ne"]

    def body(self) -> Iterator[bytes]:
        for _ in range(3):
            self.jenny.execute(READ)
            yield b"."
        yield b"done"

    # -- what servers and clients do -----------------------------------------------------------

    async def serve_asgi(self, plan: Plan) -> None:
        steps = 0

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            nonlocal steps
            steps += 1
            if plan.fault == "leave" and steps > plan.turns % 3:
                raise GoneError
            if message["type"] == "http.response.start":
                plan.status = message["status"]

        call: Any = self.asgi(http_scope("/soak", plan=plan), receive, send)  # type: ignore[arg-type]
        if plan.fault == "close" and plan.protocol == "asgi-direct":
            # What a loop that is torn down does to a coroutine.
            with contextlib.suppress(StopIteration):
                call.send(None)
            call.close()
            return
        # A task that is cancelled abandons its thread, and Python's sqlite3 may crash where another
        # thread closes the connection under it. A cancelled scope of anyio waits for the thread.
        cancel_scope = anyio.CancelScope()
        task = asyncio.ensure_future(within(cancel_scope, call))
        if plan.fault in ("cancel", "close"):
            for _ in range(plan.turns):
                await asyncio.sleep(0)
            if plan.turns % 3 == 0:
                await asyncio.sleep(plan.turns / 10_000)
            if plan.protocol == "asgi-thread":
                cancel_scope.cancel()
            else:
                task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    def serve_wsgi(self, plan: Plan) -> None:
        def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
            plan.status = int(status[:3])
            return lambda _: None

        body: Any = self.wsgi(make_environ("/soak", plan=plan), start_response)  # type: ignore[arg-type]
        left = plan.turns % 3 if plan.fault in ("leave", "close", "cancel") else sys.maxsize
        try:
            for number, _ in enumerate(body):
                if number >= left:
                    break
        finally:
            if plan.fault != "leave" and hasattr(body, "close"):
                body.close()

    # -- the account ---------------------------------------------------------------------------

    def count(self, least: int, most: int) -> None:
        with self._lock:
            self.least += least
            self.most += most

    def judge(self, plan: Plan, error: BaseException | None) -> None:
        """Compare what became of a request with what had to."""
        told = "raised " + type(error).__name__ if error else f"status {plan.status}"
        fits = {
            "raise": told == "raised FaultError",
            "orphan": plan.status == 500 or told == "raised IntegrityError",
            "leave": told in ("raised GoneError", "status 200"),
            "busy": told == "status 200",
        }.get(plan.fault, told == "status 200" or not plan.is_sound)
        if plan.fault in ("orphan", "busy") and plan.tries == 1 + RETRIES:
            # Others write as well: the last try may find its state of the file old, too.
            fits = fits or "database is locked" in str(error)
        if not fits:
            self.surprises[f"{plan.protocol} {plan.work} {plan.fault}: {told} {error}"] += 1
        for late in plan.late:
            try:
                late()
            except ScopeClosedError:
                continue
            self.surprises[f"{plan.protocol}: something outlived its request"] += 1
        sound = plan.is_sound or (plan.fault == "busy" and plan.status == 200)
        sure = plan.wrote if sound else 0
        never = plan.fault in ("raise", "orphan", "doom", "veto")
        with self._lock:
            self.least += sure
            self.most += 0 if never else plan.wrote
            self.refused += max(0, plan.tries - 1)
            self.drawn[plan.protocol] += 1
            self.drawn[plan.fault] += 1

    def at_rest(self) -> dict[str, int]:
        """Return what is open and out now."""
        return {
            "scopes": len(open_scopes()),
            "checked out": checked_out(self.engine) + checked_out(self.async_engine),
        }

    def counter(self) -> int:
        with self.engine.connect() as connection:
            return int(connection.execute(READ).scalar_one())


def draw(dice: random.Random) -> Plan:
    """Draw one request."""

    def one_of(weights: dict[str, int]) -> str:
        return dice.choices(list(weights), list(weights.values()))[0]

    plan = Plan(one_of(PROTOCOLS), one_of(WORK), one_of(FAULTS), dice.randrange(1, 30))
    if plan.protocol == "asgi-direct":
        # A sync session that holds SQLite's write lock over an await would stop the loop.
        if plan.work == "write":
            plan.work = "read"
        if plan.fault in ("busy", "orphan"):
            plan.fault = "well"
    if plan.protocol == "asgi-async" and plan.fault in ("cancel", "close") and plan.work == "write":
        # aiosqlite may keep the lock of a cancelled query until the next garbage collection.
        plan.work = "read"
    return plan


@dataclass(frozen=True)
class Reading:
    """What the process holds after a lap."""

    requests: int
    rss: int
    blocks: int
    threads: int
    scopes: int
    checked_out: int
    seconds: float


async def lap(soak: Soak, plans: list[Plan], pool: ThreadPoolExecutor) -> None:
    """Serve `plans`, several at a time."""
    of_asgi = iter([plan for plan in plans if plan.protocol != "wsgi"])
    of_wsgi = [plan for plan in plans if plan.protocol == "wsgi"]

    async def task() -> None:
        for plan in of_asgi:
            error: BaseException | None = None
            try:
                await soak.serve_asgi(plan)
            except Exception as caught:
                error = caught.with_traceback(None)
            soak.judge(plan, error)
            del error

    def thread(mine: list[Plan]) -> None:
        for plan in mine:
            error: BaseException | None = None
            try:
                soak.serve_wsgi(plan)
            except Exception as caught:
                error = caught.with_traceback(None)
            soak.judge(plan, error)
            del error

    loop = asyncio.get_running_loop()
    threads = [loop.run_in_executor(pool, thread, of_wsgi[n::THREADS]) for n in range(THREADS)]
    await asyncio.gather(*threads, *(task() for _ in range(TASKS)))


async def read(soak: Soak, requests: int, begun: float) -> Reading:
    """Wait until everything is at rest (10 seconds at most), and look."""
    limit = time.monotonic() + 10
    while True:
        gc.collect()
        rest = soak.at_rest()
        if not any(rest.values()) or time.monotonic() > limit:
            break
        await asyncio.sleep(0.05)
    return Reading(
        requests=requests,
        rss=rss(),
        blocks=sys.getallocatedblocks(),
        threads=threading.active_count(),
        scopes=rest["scopes"],
        checked_out=rest["checked out"],
        seconds=time.monotonic() - begun,
    )


def rss() -> int:
    """Return the bytes of memory that the process has now; 0 where nobody tells."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0


async def run(soak: Soak, requests: int, seed: int) -> list[Reading]:
    """Send `requests` in laps; what was found at the start and after each lap."""
    dice = random.Random(seed)
    begun = time.monotonic()
    readings = [await read(soak, 0, begun)]
    print(f"{'requests':>10} {'RSS MiB':>9} {'blocks':>9} {'threads':>8} {'scopes':>7} {'out':>5}")
    done = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for number in range(LAPS):
            last = requests * (number + 1) // LAPS
            while done < last:  # small pieces: the plans themselves take memory
                piece = min(1000, last - done)
                await lap(soak, [draw(dice) for _ in range(piece)], pool)
                done += piece
            readings.append(await read(soak, done, begun))
            show(readings[-1])
    await soak.async_engine.dispose()
    return readings


def show(reading: Reading) -> None:
    print(
        f"{reading.requests:>10} {reading.rss / 2**20:>9.1f} {reading.blocks:>9}"
        f" {reading.threads:>8} {reading.scopes:>7} {reading.checked_out:>5}"
        f"   {reading.seconds:.0f} s",
        flush=True,
    )


def verdict(soak: Soak, readings: list[Reading]) -> list[str]:
    """Return what is wrong, in words."""
    wrong = [f"{number} times: {what}" for what, number in soak.surprises.most_common(20)]
    wrong += [
        f"after {reading.requests} requests {reading.scopes} scopes were left and "
        f"{reading.checked_out} connections were out"
        for reading in readings
        if reading.scopes or reading.checked_out
    ]
    first, last = readings[1], readings[-1]
    if last.blocks - first.blocks > MORE_BLOCKS:
        wrong.append(f"{last.blocks - first.blocks} memory blocks more than after the first lap")
    if last.rss - first.rss > MORE_RSS:
        wrong.append(f"{(last.rss - first.rss) / 2**20:.1f} MiB more than after the first lap")
    found = soak.counter()
    if not soak.least <= found <= soak.most:
        wrong.append(f"the counter is {found}, not {soak.least} to {soak.most}")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    asked = parser.parse_args(arguments)
    if asked.requests < LAPS:
        parser.error(f"--requests: {LAPS} at least")
    print(f"{asked.requests} requests, --seed {asked.seed}", flush=True)
    faulthandler.enable()
    logging.getLogger("rope_middleware").setLevel(logging.CRITICAL + 1)  # it tells of each fault
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL + 1)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="rope_soak_") as folder:
        soak = Soak(Path(folder))
        try:
            readings = asyncio.run(run(soak, asked.requests, asked.seed))
            wrong = verdict(soak, readings)
            found = soak.counter()
        finally:
            soak.helpers.shutdown()
            soak.engine.dispose()
            soak.other.dispose()
    print(", ".join(f"{name} {number}" for name, number in soak.drawn.most_common()))
    print(f"tries refused by SQLite: {soak.refused}")
    print(f"counter: {found}, expected {soak.least} to {soak.most}")
    for line in wrong:
        print(f"WRONG: {line}")
    print("something stays behind" if wrong else "nothing stays behind")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
