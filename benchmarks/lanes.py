"""What is timed: a *builder* makes the named *lanes* of one process.

A lane is a coroutine function of a number of requests that serves so many and returns the seconds
it took (or, for memory, what it counted). Builders are named as ``module:function``, so that
another process finds them. `race` asks; ``python -m benchmarks.lanes`` answers.
"""

import asyncio
import gc
import importlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

from benchmarks.database import Database
from benchmarks.measure import Times

ROOT = Path(__file__).parents[1]

Lanes = dict[str, Callable[[int], Awaitable[float]]]
CPU = " (CPU)"  # ends the name of a lane where the CPU seconds of its process stand


@dataclass(frozen=True)
class Side:
    """A process, before it is started: what it builds, and with which copy of the package."""

    builder: str
    options: dict[str, Any]
    event_loop: bool = False  # sync code runs in none: some ask for the current task
    ours: bool = False
    tree: str = ""  # a folder with another rope_middleware in it
    suffix: str = ""  # of the names of its lanes


class Effort(NamedTuple):
    """How long a race is run."""

    rounds: int
    seconds: float  # of a batch; short, so that others disturb some rounds, and not each a little
    requests: int = 0  # of a batch, if its seconds do not matter


class Process:
    """A running side: a process of its own, so that it has no listeners but its own."""

    def __init__(self, side: Side, where: Database | None) -> None:
        self._side = side
        path = os.pathsep.join(filter(None, (side.tree, str(ROOT))))
        self._process = subprocess.Popen(
            # -P: or else the current folder would win over the other tree
            [sys.executable, "-P", "-m", "benchmarks.lanes"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        self._ask({"side": asdict(side), "where": where and asdict(where)})

    def names(self) -> list[str]:
        """Wait until it is built, and return the names of its lanes."""
        return [name + self._side.suffix for name in self._hear()]

    def time(self, name: str, requests: int) -> tuple[float, float]:
        """Serve one batch by this lane; return what it returns, and the CPU seconds it took."""
        self._ask([name.removesuffix(self._side.suffix), requests])
        wall, cpu = self._hear()
        return wall, cpu

    def stop(self) -> None:
        self._process.communicate(timeout=30)

    def _ask(self, what: Any) -> None:
        assert self._process.stdin
        print(json.dumps(what), file=self._process.stdin, flush=True)

    def _hear(self) -> Any:
        assert self._process.stdout
        heard = json.loads(self._process.stdout.readline() or '{"error": "it has died"}')
        if isinstance(heard, dict):
            raise RuntimeError(f"{heard['error']} ({self._side.options})")
        return heard


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
    return {name: process for process in running for name in process.names()}


def _calibrated(name: str, process: Process, effort: Effort) -> int:
    once = max(process.time(name, 20)[0] / 20, 1e-7)
    return max(10, min(5_000, int(effort.seconds / once)))


async def build(side: Side, where: Database | None, stack: AsyncExitStack) -> Lanes:
    """Make the lanes of a side, and serve some requests by each."""
    module, _, name = side.builder.partition(":")
    builder = getattr(importlib.import_module(module), name)
    lanes: Lanes = await builder(where, stack, **side.options)
    _look_at_tree(Path(side.tree or ROOT) / "rope_middleware")
    for lane in lanes.values():
        await lane(3)
    return lanes


def _look_at_tree(wanted: Path) -> None:
    package = sys.modules.get("rope_middleware")
    if package is not None and not wanted.samefile(package.__path__[0]):
        raise RuntimeError(f"{package.__path__[0]} is measured, not {wanted}")


def run(side: Side, main: Any) -> None:
    """Run a coroutine in an event loop; outside of any where the side is sync."""
    if side.event_loop:
        asyncio.run(main)
    else:
        with suppress(StopIteration):
            main.send(None)


async def _serve(side: Side, where: Database | None, answer: Callable[[Any], None]) -> None:
    """Build the lanes, then serve one batch for each line of the standard input."""
    async with AsyncExitStack() as stack:
        lanes = await build(side, where, stack)
        gc.collect()
        gc.freeze()  # of what has been there before, nothing has to be looked at again
        answer(list(lanes))
        for line in sys.stdin:
            name, requests = json.loads(line)
            gc.collect()
            gc.disable()  # one lane's garbage is not collected in another one's time
            await lanes[name](2)  # the other processes have had the processor
            started = process_time()
            value = await lanes[name](requests)
            seconds = process_time() - started
            gc.enable()
            answer([value, seconds])


def main() -> None:
    """Serve as the other process."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(value: Any) -> None:
        print(json.dumps(value), file=out, flush=True)

    told = json.loads(sys.stdin.readline())
    side, where = Side(**told["side"]), told["where"] and Database(**told["where"])
    try:
        run(side, _serve(side, where, answer))
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


if __name__ == "__main__":
    main()
