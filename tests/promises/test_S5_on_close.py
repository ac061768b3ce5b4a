"""S5: `on_close` and `info`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, text

from rope_middleware import RopeError, Scope, ScopeClosedError, current_scope, open_scope
from tests.kit.asgi import serve
from tests.kit.leaks import checked_out
from tests.kit.sessions import Jenny, errors_in, in_thread, touch, use
from tests.kit.stores import Store
from tests.kit.waiting import cancel_again_and_again, poll
from tests.kit.ways import Way, by_with, by_wsgi_request
from tests.kit.web import Exchange, Web
from tests.kit.wsgi import HEADERS, Wrap, make_environ, scope_of

pytestmark = pytest.mark.anyio


def test_S5_info_is_empty_at_the_start_and_the_users_own(way: Way) -> None:
    """A dict that is the scope's, also afterwards."""

    def body() -> Scope:
        scope = current_scope()
        assert scope.info == {}
        scope.info["key"] = 1
        assert in_thread(current_scope).info == {"key": 1}
        return scope

    scope = way(body)
    assert scope.info == {"key": 1}
    with open_scope() as other:
        assert other.info == {}


def test_S5_on_close_runs_once_newest_first_when_the_sessions_are_closed(
    jenny: Jenny, engine: Engine, way: Way
) -> None:
    """When the functions run nothing of the scope is open any more."""
    calls: list[Any] = []

    def body() -> Scope:
        scope = current_scope()
        session = use(jenny.session)

        def closed() -> None:
            calls.append((checked_out(engine), session.in_transaction()))

        scope.on_close(partial(calls.append, "first"))
        scope.on_close(closed)
        scope.on_close(lambda: calls.append("last"))
        scope.on_close(partial(calls.append, "twice"))
        scope.on_close(partial(calls.append, "twice"))
        assert calls == []
        return scope

    assert way(body).closed
    assert calls == ["twice", "twice", "last", (0, False), "first"]


def test_S5_on_close_runs_in_a_scope_that_touched_no_database(way: Way) -> None:
    """A scope without any session has an end, too."""
    calls: list[str] = []
    way(lambda: current_scope().on_close(lambda: calls.append("closed")))
    assert calls == ["closed"]


def test_S5_on_close_runs_after_an_error(jenny: Jenny, way: Way) -> None:
    """Also after a failed block, and before its error comes out."""
    calls: list[str] = []

    def body() -> None:
        current_scope().on_close(lambda: calls.append("closed"))
        raise ValueError

    with pytest.raises(ValueError):
        way(body)
    assert calls == ["closed"]


def test_S5_an_on_close_that_fails_is_logged_and_the_others_run(
    way: Way, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error goes nowhere else."""
    calls: list[str] = []

    def fail() -> None:
        raise ValueError("mine")

    def body() -> Scope:
        scope = current_scope()
        scope.on_close(lambda: calls.append("first"))
        scope.on_close(fail)
        scope.on_close(lambda: calls.append("last"))
        return scope

    scope = way(body, name="the job")
    assert scope.closed
    assert calls == ["last", "first"]
    assert len(errors_in(caplog)) == 1
    assert "fail" in errors_in(caplog)[0]
    assert "the job'" in errors_in(caplog)[0]


def test_S5_an_on_close_that_fails_never_replaces_the_error_of_the_application(way: Way) -> None:
    """What the block raised comes out."""

    def fail() -> None:
        raise RuntimeError("not mine")

    def body() -> None:
        current_scope().on_close(fail)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        way(body)


def test_S5_in_on_close_the_scope_is_over(jenny: Jenny, way: Way) -> None:
    """It is the current one still, so its session is refused; a new scope is the way."""
    outcomes: list[object] = []

    def after() -> None:
        with pytest.raises(ScopeClosedError):
            _ = jenny.session
        with open_scope() as inner:
            outcomes.append(use(jenny.session))
        outcomes.append(inner.closed)

    way(lambda: current_scope().on_close(after))
    assert len(outcomes) == 2
    assert outcomes[1] is True


@pytest.mark.parametrize("way", [by_with, by_wsgi_request])
def test_S5_async_functions_are_refused_in_a_sync_scope(way: Way) -> None:
    """Nothing could await them; the error says so at registration, as of `on_commit`."""

    async def fn() -> None:
        raise AssertionError("never called")

    class Callable_:  # noqa: N801
        async def __call__(self) -> None:
            raise AssertionError("never called")

    def body() -> None:
        scope = current_scope()
        for register in (scope.on_close, scope.on_commit):
            for bad in (fn, partial(fn), Callable_(), Callable_().__call__):
                with pytest.raises(RopeError, match="the job' is a sync one"):
                    register(bad)

    way(body, name="the job", commit_on_success=True)


def test_S5_async_functions_run_in_an_async_scope() -> None:
    """Sync and async ones in one order; a lambda around an async one is awaited."""
    calls: list[str] = []

    async def fn(name: str) -> None:
        await asyncio.sleep(0)
        calls.append(name)

    async def main() -> None:
        async with open_scope() as scope:
            scope.on_close(partial(fn, "first"))
            scope.on_close(lambda: calls.append("second"))
            scope.on_close(lambda: fn("third"))

    asyncio.run(main())
    assert calls == ["third", "second", "first"]


@pytest.mark.parametrize("bad", [None, 1, "name"])
def test_S5_what_is_not_callable_is_refused(bad: Any) -> None:
    """A TypeError at registration, not a log line at the end."""
    with open_scope(commit_on_success=True) as scope:
        with pytest.raises(TypeError, match="on_close"):
            scope.on_close(bad)
        with pytest.raises(TypeError, match="on_commit"):
            scope.on_commit(bad)


def test_S5_after_the_end_nothing_can_be_registered(way: Way) -> None:
    """It would never run, so it is refused."""
    scope = way(current_scope)
    with pytest.raises(ScopeClosedError):
        scope.on_close(print)


def test_S5_on_close_functions_of_a_scope_are_registered_from_threads(way: Way) -> None:
    """Each of many threads' functions runs, once."""
    calls: list[int] = []

    def body() -> None:
        scope = current_scope()
        with ThreadPoolExecutor(8) as pool:
            for number in range(200):
                pool.submit(scope.on_close, partial(calls.append, number))

    way(body)
    assert sorted(calls) == list(range(200))


async def test_S5_async_and_sync_functions_run_newest_first(store: Store) -> None:
    """When the sessions are closed and the scope has ended; an error does not stop the rest."""
    order: list[Any] = []

    async def handler() -> None:
        scope = current_scope()

        async def later() -> None:
            await asyncio.sleep(0)
            order.append(("async", store.held()))

        def broken() -> None:
            raise LookupError("broken")

        scope.on_close(later)
        scope.on_close(broken)
        scope.on_close(lambda: order.append(("sync", store.held())))
        await store.jenny.execute(text("SELECT 1"))

    await serve(handler)
    assert order == [("sync", 0), ("async", 0)]


async def test_S5_on_close_finishes_though_the_request_is_cancelled(store: Store) -> None:
    """The callbacks belong to the end, and the end is shielded."""
    order: list[str] = []

    async def later() -> None:
        await asyncio.sleep(0.05)
        order.append("finished")

    async def handler() -> None:
        current_scope().on_close(later)
        await store.hold()

    task = asyncio.create_task(serve(handler))
    await poll(lambda: store.holding == 1)
    await cancel_again_and_again(task)
    assert order == ["finished"]


def test_S5_on_close_runs_once_newest_first_after_the_sessions(
    wrap: Wrap, jenny: Jenny, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A failing one is logged, and the others still run."""
    ran: list[Any] = []

    def fail() -> None:
        ran.append("fail")
        raise ValueError("in on_close")

    def app(environ: Any, start_response: Any) -> Any:
        scope = scope_of(environ)
        scope.on_close(lambda: ran.append(("first", checked_out(engine))))
        scope.on_close(fail)
        touch(jenny)
        start_response("200 OK", HEADERS)
        return body(scope)

    def body(scope: Scope) -> Iterator[bytes]:
        yield b"x"
        scope.on_close(lambda: ran.append(("last", checked_out(engine))))

    with caplog.at_level(logging.ERROR, logger="rope_middleware"):
        result = wrap(app)(make_environ(), lambda *args: print)
        assert list(result) == [b"x"]
        assert ran == []
        result.close()
        result.close()
    assert ran == [("last", 0), "fail", ("first", 0)]
    assert any("in on_close" in (record.exc_text or "") for record in caplog.records)


@pytest.mark.told
@pytest.mark.parametrize("outcome", ["success", "client error", "raises"])
@pytest.mark.parametrize("commits", [False, True])
def test_S5_commit_on_close_runs_once_newest_first_when_the_sessions_are_closed(
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


@pytest.mark.told
@pytest.mark.parametrize("web", ["asgi-async", "asgi-sync"], indirect=True)
def test_S5_async_on_close_is_awaited_under_asgi(web: Web) -> None:
    """Whatever kind of session there was, and when it is closed."""
    order: list[Any] = []

    async def later() -> None:
        await asyncio.sleep(0)
        order.append(web.store.held())

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        current_scope().on_close(later)
        await exchange.answer(200)

    answer = web.ask(handler)
    assert (answer.status, answer.error) == (200, None)
    assert order == [0]
