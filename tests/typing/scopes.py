"""Scopes by hand: blocks, decorators, and what a Scope offers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Hashable
from typing import Any, assert_type

from rope_middleware import (
    CrossLoopError,
    NoScopeError,
    RopeError,
    Scope,
    ScopeClosedError,
    current_scope,
    open_scope,
)


def plain() -> None:
    pass


async def asynchronous() -> None:
    pass


def block() -> str:
    with open_scope() as scope:
        assert_type(scope, Scope)
    with open_scope("a name", commit_on_success=True, read_only=True, close_timeout=1.5) as scope:
        # A scope passes every error on, so what follows is not optional.
        return scope.name


async def async_block() -> str:
    async with open_scope() as scope:
        assert_type(scope, Scope)
    async with open_scope(
        "a name", commit_on_success=True, read_only=True, close_timeout=1.5
    ) as scope:
        return scope.name


def scope() -> None:
    scope = current_scope()
    assert_type(scope, Scope)
    assert_type(scope.name, str)
    assert_type(scope.closed, bool)
    assert_type(scope.info, dict[Any, Any])
    scope.info["user"] = 1
    scope.doom()
    scope.on_commit(plain)
    scope.on_commit(asynchronous)
    scope.on_commit(lambda: 1)
    scope.on_close(plain)
    scope.on_close(asynchronous)
    scopefunc: Callable[[], Hashable] = current_scope
    assert_type(scopefunc() == scope, bool)


@open_scope()
def job(number: int, *, name: str = "") -> list[str]:
    return [name] * number


@open_scope("import", commit_on_success=True)
async def async_job(number: int, *, name: str = "") -> list[str]:
    return [name] * number


async def decorated() -> None:
    assert_type(job(1, name="a"), list[str])
    assert_type(await async_job(1, name="a"), list[str])
    coroutine: Coroutine[Any, Any, list[str]] = async_job(1)
    await coroutine


class Worker:
    @open_scope()
    def work(self, number: int) -> int:
        return number

    @open_scope()
    async def work_async(self, number: int) -> int:
        return number


async def methods(worker: Worker) -> None:
    assert_type(worker.work(1), int)
    assert_type(await worker.work_async(1), int)


def errors() -> None:
    try:
        current_scope()
    except NoScopeError as error:
        lookup_error: LookupError = error
        rope_error: RopeError = error
        raise rope_error from lookup_error
    except (ScopeClosedError, CrossLoopError) as error:
        base: RopeError = error
        raise base from None
