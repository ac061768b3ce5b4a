"""What is timed: a *builder* makes the named *lanes* of one process.

A lane is a coroutine function of a number of requests that serves so many and returns the seconds
it took (or, for memory, what it counted). `race` asks; `_answer`, in the other process, answers.
"""

import asyncio
import gc
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import process_time
from typing import Any, NamedTuple

from benchmarks.database import Database
from benchmarks.measure import Times, one_cpu

Lanes = dict[str, Callable[[int], Awaitable[float]]]
CPU = " (CPU)"  # ends the name of a lane where the CPU seconds of its process stand


@dataclass(frozen=True)
class Side:
    """A process, before it is started, and what it builds."""

    builder: Callable[..., Any]
    options: dict[str, Any]
    event_loop: bool = False  # sync code runs in none: some ask for the current task


class Effort(NamedTuple):
    """How long a race is run."""

    rounds: int
    seconds: float  # of a batch; short, so that others disturb some rounds, and not each a little
    requests: int = 0  # of a batch, if its seconds do not matter


class Process:
    """A running side: a process of its own, so that it has no listeners but its own."""

    def __init__(self, side: Side, where: Database | None) -> None:
        self._side = side
        spawn = get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_answer, args=(side, where, theirs))
        self._process.start()
        theirs.close()

    def hear(self) -> Any:
        """Wait for what it says next: first the names of its lanes, once it is built."""
        heard = self._pipe.recv()
        if isinstance(heard, Exception):
            raise RuntimeError(f"{heard!r} ({self._side.options})")
        return heard

    def time(self, name: str, requests: int) -> tuple[float, float]:
        """Serve one batch by this lane; return what it returns, and the CPU seconds it took."""
        self._pipe.send((name, requests))
        wall, cpu = self.hear()
        return wall, cpu

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(30)


def race(sides: Sequence[Side], where: Database | None, effort: Effort) -> Times:
    """Run these sides once; return the seconds of a request, for each round, by lane."""
    shuffle = random.Random(42)
    with ExitStack() as stack:
        lanes = _started(sides, where, stack)
        requests = {
            name: effort.requests or _calibrated(name, lanes[name], effort) for name in lanes
        }
        times: Times = {name + kind: [] for name in lanes for kind in ("", CPU)}
        for _ in range(effort.rounds):
            for name in shuffle.sample(list(lanes), len(lanes)):
                wall, cpu = lanes[name].time(name, requests[name])
                times[name].append(wall / requests[name])
                times[name + CPU].append(cpu / requests[name])
        return times


def _started(sides: Sequence[Side], where: Database | None, stack: ExitStack) -> dict[str, Process]:
    """Start all, then wait for each: they get ready at the same time."""
    running = [Process(side, where) for side in sides]
    for process in running:
        stack.callback(process.stop)
    return {name: process for process in running for name in process.hear()}


def _calibrated(name: str, process: Process, effort: Effort) -> int:
    once = max(process.time(name, 20)[0] / 20, 1e-7)
    return max(10, min(5_000, int(effort.seconds / once)))


async def build(side: Side, where: Database | None, stack: AsyncExitStack) -> Lanes:
    """Make the lanes of a side, and serve some requests by each."""
    lanes: Lanes = await side.builder(where, stack, **side.options)
    for lane in lanes.values():
        await lane(3)
    return lanes


def run(side: Side, main: Any) -> None:
    """Run a coroutine in an event loop; outside of any where the side is sync."""
    if side.event_loop:
        asyncio.run(main)
    else:
        with suppress(StopIteration):
            main.send(None)


async def _serve(side: Side, where: Database | None, pipe: Connection) -> None:
    """Build the lanes, then serve one batch for each that is asked for."""
    async with AsyncExitStack() as stack:
        lanes = await build(side, where, stack)
        gc.collect()
        gc.freeze()  # of what has been there before, nothing has to be looked at again
        pipe.send(list(lanes))
        with suppress(EOFError):
            while True:
                name, requests = pipe.recv()
                gc.collect()
                gc.disable()  # one lane's garbage is not collected in another one's time
                await lanes[name](2)  # the other processes have had the processor
                started = process_time()
                value = await lanes[name](requests)
                seconds = process_time() - started
                gc.enable()
                pipe.send((value, seconds))


def _answer(side: Side, where: Database | None, pipe: Connection) -> None:
    """Serve as the other process."""
    try:
        with one_cpu(-1):
            run(side, _serve(side, where, pipe))
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
