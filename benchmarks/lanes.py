"""What is timed: a *builder* makes the named *lanes* of one process.

A lane is a function of a number of requests that serves so many and returns the seconds it took
(or, for memory, what it counted). Builders are named as ``module:function``, so that another
process can find them.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.database import Database
from benchmarks.measure import Times, orders

ROOT = Path(__file__).parents[1]

Lane = Callable[[int], float | Awaitable[float]]
Lanes = dict[str, Lane]


@dataclass(frozen=True)
class Side:
    """A process, before it is started: what it builds, and with which copy of the package."""

    builder: str
    options: dict[str, Any] = field(default_factory=dict)
    event_loop: bool = False
    """Whether it runs in an event loop. Sync code does not: some ask for the current task."""
    ours: bool = False
    tree: str = ""
    """A folder with another rope_middleware in it."""
    suffix: str = ""
    """Of the names of its lanes."""


class Process:
    """A running side: a process of its own, so that it has no listeners but its own."""

    def __init__(self, side: Side, where: Database | None) -> None:
        path = [side.tree] if side.tree else []
        self._side = side
        self._process = subprocess.Popen(
            # -P: or else the current folder would win over the other tree
            [sys.executable, "-P", "-m", "benchmarks.lanes"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)])},
        )  # fmt: skip
        self._ask({"side": asdict(side), "where": where and asdict(where)})

    def names(self) -> list[str]:
        """Wait until it is built, and return the names of its lanes."""
        return [name + self._side.suffix for name in self._hear()]

    def time(self, name: str, requests: int) -> float:
        """Serve one batch by this lane."""
        self._ask([name.removesuffix(self._side.suffix), requests])
        return float(self._hear())

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _ask(self, what: Any) -> None:
        assert self._process.stdin
        try:
            print(json.dumps(what), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise RuntimeError(f"{self._side} has died") from None

    def _hear(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._side} has died")
        answer = json.loads(line)
        if isinstance(answer, dict):
            raise RuntimeError(answer["error"])
        return answer


@dataclass(frozen=True)
class Effort:
    """How long a race is run."""

    rounds: int
    seconds: float
    """Of a batch. Short, so that somebody else's work disturbs some rounds, and not each."""


def race(
    sides: Sequence[Side],
    where: Database | None,
    effort: Effort,
    absent: dict[str, str] | None = None,
) -> Times:
    """Run these sides once; return the seconds of a request, for each round, by lane.

    Args:
        sides: the processes; all are started before the first round.
        where: the database.
        effort: how long it takes.
        absent: if given, takes the error of a side that could not be built, by its repr.
    """
    running = [(side, Process(side, where)) for side in sides]
    try:
        lanes: dict[str, Process] = {}
        for side, process in running:
            try:
                lanes |= dict.fromkeys(process.names(), process)
            except RuntimeError as error:
                if absent is None:
                    raise
                absent[repr(side)] = str(error)
        requests = {name: _calibrated(name, lanes[name], effort) for name in lanes}
        times: Times = {name: [] for name in lanes}
        for order in orders(list(lanes), effort.rounds):
            for name in order:
                times[name].append(lanes[name].time(name, requests[name]) / requests[name])
        return times
    finally:
        for _, process in running:
            process.stop()


def _calibrated(name: str, process: Process, effort: Effort) -> int:
    once = max(process.time(name, 20) / 20, 1e-7)
    return max(10, min(5_000, int(effort.seconds / once)))


def counts(side: Side, where: Database | None, requests: int) -> Times:
    """Run a side whose lanes return what they have counted, not seconds."""
    process = Process(side, where)
    try:
        return {name: [process.time(name, requests)] for name in process.names()}
    finally:
        process.stop()


# -- the other process -------------------------------------------------------------------------


async def _serve(told: dict[str, Any], answer: Callable[[Any], None]) -> None:
    """Build the lanes, then serve one batch for each line of the standard input."""
    side = Side(**told["side"])
    where = Database(**told["where"]) if told["where"] else None
    async with AsyncExitStack() as stack:
        module, _, name = side.builder.partition(":")
        made = getattr(importlib.import_module(module), name)(where, stack, **side.options)
        lanes: Lanes = await made if inspect.isawaitable(made) else made
        _look_at_tree(side)
        for lane in lanes.values():
            await _result(lane(3))
        gc.collect()
        gc.freeze()  # of what has been there before, nothing has to be looked at again
        answer(list(lanes))
        for line in sys.stdin:
            name, requests = json.loads(line)
            gc.collect()
            gc.disable()
            await _result(lanes[name](2))  # the other processes have had the processor
            value = await _result(lanes[name](requests))
            gc.enable()
            answer(value)


async def _result(value: float | Awaitable[float]) -> float:
    return await value if inspect.isawaitable(value) else value


def _look_at_tree(side: Side) -> None:
    package = sys.modules.get("rope_middleware")
    wanted = Path(side.tree or ROOT) / "rope_middleware"
    if package is not None and wanted.resolve() != Path(package.__path__[0]).resolve():
        raise RuntimeError(f"{package.__path__[0]} is measured, not {wanted}")


def _without_loop(coroutine: Any) -> None:
    """Run a coroutine that never waits for anything, outside of any event loop."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise RuntimeError("a sync side waited for something")


def main() -> None:
    """Serve as the other process."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(value: Any) -> None:
        print(json.dumps(value), file=out, flush=True)

    told = json.loads(sys.stdin.readline())
    run: Any = asyncio.run if told["side"]["event_loop"] else _without_loop
    try:
        run(_serve(told, answer))
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def timed(work: Callable[[], object], clock: Callable[[], float] = perf_counter) -> Lane:
    """Return the lane that calls `work` once for each request."""

    def lane(requests: int) -> float:
        started = clock()
        for _ in repeat(None, requests):
            work()
        return clock() - started

    return lane


if __name__ == "__main__":
    main()
