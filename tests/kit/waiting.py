"""Waiting for something to come true, in code of both kinds; no test sleeps for luck."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio

PATIENCE = float(os.environ.get("ROPE_PATIENCE", "30"))
"""Seconds that anything may take on a busy machine before a test calls it broken."""


def eventually(
    condition: Callable[[], Any], what: str | Callable[[], str], seconds: float = PATIENCE
) -> None:
    """Poll until `condition()` is true; fail with `what` when it is not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            text = what() if callable(what) else what
            raise AssertionError(f"not within {seconds} s: {text}")
        time.sleep(0.01)


async def poll(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Do as `eventually`, while the event loop goes on."""
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.005)


async def never() -> Any:
    """Wait for what does not come."""
    await anyio.sleep(3600)


async def cancel_again_and_again(task: asyncio.Task[Any]) -> None:
    """Cancel `task` at every turn of the loop until it has ended."""
    async with asyncio.timeout(PATIENCE):
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
    assert task.cancelled()


def turns(most: int = 5_000) -> Iterator[int]:
    """After how many turns of the loop to cancel a task: every one at first, then every few.

    Most of them wait for the same thread. After `most` it is a task that does not end.
    """
    number = 0
    while number < most:
        yield number
        number += 1 + number // 40
