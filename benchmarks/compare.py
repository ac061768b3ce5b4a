"""The rounds: every contestant of a setting side by side, on every path of its site."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from time import perf_counter, thread_time
from typing import Any

from sqlalchemy import func, select

from benchmarks.contestants import PATHS, SETTINGS, Absent, Contestant, Site, describe
from benchmarks.database import Database, Note
from benchmarks.drivers import (
    asgi_answer,
    asgi_batch,
    asgi_scope,
    wsgi_answer,
    wsgi_batch,
    wsgi_environ,
)
from benchmarks.measure import Spread, interleave_async, per_request, ratio, version_of

BATCH_SECONDS = 0.004
"""Of the contestant by hand. Short, so that most rounds are not disturbed by others."""


@dataclass(frozen=True)
class Row:
    """One contestant on one path of one setting; or why there is no figure."""

    database: str
    setting: str
    title: str
    path: str
    microseconds: Spread | None = None
    ratio: Spread | None = None
    """To the contestant by hand, in the same round."""
    requests: int = 0
    """Per batch."""
    rounds: int = 0
    versions: str = ""
    ours: bool = False
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it as what JSON knows."""
        return vars(self) | {
            "microseconds": self.microseconds and self.microseconds.as_json(),
            "ratio": self.ratio and self.ratio.as_json(),
        }


def compare(contestants: list[Contestant | Absent], where: Database, rounds: int) -> Iterator[Row]:
    """Yield what every contestant takes, and what failed."""
    for absent in contestants:
        if isinstance(absent, Absent):
            yield Row(where.name, "", absent.title, "", error=absent.error)
    present = [one for one in contestants if isinstance(one, Contestant)]
    for setting in SETTINGS:
        group = [one for one in present if one.setting == setting]
        if not any(one.by_hand for one in group):
            continue
        if group[0].is_wsgi:
            # Sync code runs where no event loop does: some contestants ask for the task.
            yield from _without_loop(_rows(group, where, rounds))
        else:
            yield from asyncio.run(_rows(group, where, rounds))


def _without_loop(rows: Any) -> list[Row]:
    """Run a coroutine that never waits for anything, outside of any event loop."""
    try:
        rows.send(None)
    except StopIteration as stop:
        made: list[Row] = stop.value
        return made
    raise RuntimeError("a sync contestant waited for something")


async def _rows(group: list[Contestant], where: Database, rounds: int) -> list[Row]:
    rows = []
    async with AsyncExitStack() as stack:
        running: dict[str, tuple[Contestant, Site]] = {}
        for one in group:
            try:
                made = one.build(where, stack)
                site = await made if inspect.isawaitable(made) else made
                await _try_out(one, site, where)
            except Exception as error:
                failed = describe(error)
                rows += [
                    Row(where.name, one.setting, one.title, path, versions=_versions(one),
                        ours=one.ours, error=failed)
                    for path in PATHS
                ]  # fmt: skip
            else:
                running[one.title] = one, site
        for path in PATHS:
            rows += await _race(running, path, where, rounds)
    return rows


def _versions(one: Contestant) -> str:
    return ", ".join(f"{name} {version_of(name)}" for name in one.packages if version_of(name))


async def _try_out(one: Contestant, site: Site, where: Database) -> None:
    """See that the site does what it should, before anything is measured.

    Raises:
        RuntimeError: it does not.
    """
    before = _notes(where)
    for path in PATHS:
        if one.is_wsgi:
            status, body = wsgi_answer(site.app, wsgi_environ(f"/{path}"))
        else:
            status, body = await asgi_answer(site.app, asgi_scope(f"/{path}", site.state))
        if (status, body) != (200, path.encode()):
            raise RuntimeError(f"/{path} was answered with {status} {body[:80]!r}")
    added = _notes(where) - before
    if added != 1:
        raise RuntimeError(f"/insert has written {added} rows")


def _notes(where: Database) -> int:
    engine = where.engine()
    try:
        with engine.connect() as connection:
            return connection.execute(select(func.count()).select_from(Note)).scalar_one()
    finally:
        engine.dispose()


async def _race(
    running: dict[str, tuple[Contestant, Site]], path: str, where: Database, rounds: int
) -> list[Row]:
    # SQLite under WSGI works in this thread and waits for nothing, see `benchmarks.check`.
    clock = thread_time if where.name == "SQLite" else perf_counter

    async def batch(title: str, requests: int) -> float:
        one, site = running[title]
        if one.is_wsgi:
            return wsgi_batch(site.app, wsgi_environ(f"/{path}"), requests, clock)
        return await asgi_batch(site.app, asgi_scope(f"/{path}", site.state), requests)

    base = next(title for title, (one, _) in running.items() if one.by_hand)
    await batch(base, 20)
    started = perf_counter()
    await batch(base, 20)
    once = (perf_counter() - started) / 20
    requests = max(5, min(4_000, int(BATCH_SECONDS / once)))

    times = await interleave_async(
        {title: (lambda title=title: batch(title, requests)) for title in running}, rounds
    )
    return [
        Row(
            where.name,
            one.setting,
            title,
            path,
            per_request(times[title], requests),
            ratio(times, title, base),
            requests,
            rounds,
            _versions(one),
            one.ours,
        )
        for title, (one, _) in running.items()
    ]
