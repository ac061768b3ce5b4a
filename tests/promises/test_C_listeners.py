"""C, S: listeners of the application's own, registered before ours and after ours.

They raise, they write, they are slow: the promises hold all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from rope_middleware import ScopeClosedError, current_scope, open_scope
from tests.kit.models import Row
from tests.kit.said import Said
from tests.kit.stores import Lock
from tests.kit.web import Answer, Exchange, Web

Listen = Callable[[str, Callable[..., object]], None]


class ListenerError(Exception):
    """The application's own."""


def fail(*told: Any) -> None:
    raise ListenerError


@pytest.fixture(params=["before ours", "after ours"])
def listen(request: pytest.FixtureRequest, web: Web) -> Listen:
    """Register a listener on the application's session class, before its first use or after it."""

    def register(what: str, function: Callable[..., object]) -> None:
        if request.param == "after ours":

            async def first_use(exchange: Exchange) -> None:
                await web.store.read()
                await exchange.answer(200)

            assert web.ask(first_use).status == 200
        event.listen(web.store.session_class, what, function)

    return register


def write_and_answer(web: Web, **options: Any) -> tuple[Answer, list[int]]:
    """Ask for row 1, in a second try for row 2; the answer, and how often the handler ran."""
    runs: list[int] = []

    async def handler(exchange: Exchange) -> None:
        runs.append(len(runs))
        await web.store.add(len(runs))
        await exchange.answer(200)

    return web.ask(handler, **{"commit_on_success": True} | options), runs


# -- they raise --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["before_flush", "after_flush", "before_commit"])
def test_C3_a_listener_that_raises_before_the_commit_is_one_error_response(
    web: Web, listen: Listen, what: str
) -> None:
    """No row, and no success."""

    listen(what, fail)
    answer, _ = write_and_answer(web)
    assert answer.seen == 500
    assert answer.whole
    assert web.store.rows() == []


def test_C3_a_listener_that_raises_after_the_commit_leaves_one_row(
    web: Web, listen: Listen
) -> None:
    """It cannot be taken back; the client gets one complete response, whichever."""

    listen("after_commit", fail)
    answer, runs = write_and_answer(web, retries=2)
    assert answer.whole
    assert runs == [0]
    assert web.store.rows() == [1]


def test_C6_what_a_session_committed_is_not_written_again(
    web: Web, listen: Listen, tmp_path: Path
) -> None:
    """Also where a listener fails after the commit, of a database that says "try again"."""
    other = web.other_store(tmp_path / "second.db")
    lock = Lock(other.path)

    def audit(session: Any) -> None:
        with other.engine.begin() as connection:
            connection.execute(Row.__table__.insert())

    listen("after_commit", audit)
    try:
        answer, runs = write_and_answer(web, retries=2)
    finally:
        lock.close()
        web.loop.run(other.dispose())
    assert answer.whole
    assert (runs, web.store.rows()) == ([0], [1])
    assert answer.error is None or isinstance(answer.error, OperationalError)


@pytest.mark.parametrize("what", ["after_begin", "after_transaction_create"])
def test_S3_a_listener_that_raises_when_a_transaction_begins_leaves_nothing_out(
    web: Web, listen: Listen, what: str
) -> None:
    """The request fails by it, and the next one has its connection."""

    listen(what, fail)
    answer, _ = write_and_answer(web)
    assert answer.seen == 500
    event.remove(web.store.session_class, what, fail)
    answer, _ = write_and_answer(web)
    assert answer.status == 200
    assert web.store.rows() == [1]


@pytest.mark.told
def test_S3_a_listener_that_raises_while_the_scope_ends_leaves_nothing_out(
    web: Web, listen: Listen
) -> None:
    """The answer has gone out; the connection comes back."""
    what = "after_transaction_end"
    raised: list[int] = []

    def fail(*told: Any) -> None:
        raised.append(1)
        raise ListenerError

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        await exchange.answer(200)
        event.listen(web.store.session_class, what, fail)

    listen("after_begin", lambda *told: None)
    try:
        assert web.ask(handler).status == 200
    finally:
        if event.contains(web.store.session_class, what, fail):
            event.remove(web.store.session_class, what, fail)
    assert raised
    assert web.store.held() == 0
    assert web.store.rows() == []


# -- they write --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["before_flush", "before_commit"])
def test_C2_what_a_listener_writes_is_committed_with_the_rest(
    web: Web, listen: Listen, what: str
) -> None:
    """The client that sees the success sees both rows."""
    seen: list[list[int]] = []

    def write(session: Any, *told: Any) -> None:
        if not session.info.setdefault("audited", 0):
            session.info["audited"] = 1
            session.add(Row(n=2))

    listen(what, write)
    answer, _ = write_and_answer(web, at_start=lambda status: seen.append(web.store.rows()))
    assert answer.status == 200
    assert seen == [[1, 2]]


@pytest.mark.parametrize("how", ["request", "open_scope"])
def test_C2_what_a_listener_writes_by_another_jenny_is_committed_with_the_rest(
    web: Web, listen: Listen, how: str, tmp_path: Path
) -> None:
    """A session that first gets something to commit during the commit is committed with it."""
    other = web.other_store(tmp_path / "second.db")
    seen: list[list[int]] = []

    def audit(session: Any, context: Any) -> None:
        for row in session.new:
            other.jenny.session.add(Row(n=row.n + 10))

    listen("after_flush", audit)

    async def handler(exchange: Exchange) -> None:
        web.store.jenny.session.add(Row(n=1))
        await exchange.answer(200)

    async def script() -> None:
        async with open_scope(commit_on_success=True):
            web.store.jenny.session.add(Row(n=1))
        seen.append(other.rows())

    if how == "request":
        at_start: Any = lambda status: seen.append(other.rows())  # noqa: E731
        assert web.ask(handler, commit_on_success=True, at_start=at_start).status == 200
    else:
        web.loop.run(script())
    web.loop.run(other.dispose())
    assert web.store.rows() == [1]
    assert seen == [[11]]


@pytest.mark.told
@pytest.mark.parametrize("ever", [False, True], ids=["once", "at each commit"])
@pytest.mark.parametrize("how", ["request", "open_scope", "own"])
def test_C2_what_a_listener_adds_after_the_commit_is_committed_at_the_end_or_told(
    web: Web, listen: Listen, said: Said, how: str, ever: bool
) -> None:
    """One more commit takes it; a listener that adds for ever is told of what it loses (L1)."""

    def audit(session: Any) -> None:
        if ever or "audited" not in session.info:
            session.info["audited"] = n = session.info.get("audited", 1) + 1
            session.add(Row(n=n))

    listen("after_commit", audit)

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        if how == "own":
            await web.store.commit()
        await exchange.answer(200)

    async def script() -> None:
        async with open_scope("job", commit_on_success=True):
            await web.store.add(1)

    if how == "open_scope":
        web.loop.run(script())
    else:
        assert web.ask(handler, commit_on_success=how == "request").status == 200
    assert web.store.rows()[:2] == ([1] if how == "own" else [1, 2])
    assert len(said.warnings) == (1 if ever or how == "own" else 0)
    assert all("changes are lost" in one and "1 Row added" in one for one in said.warnings)


def test_C5_what_a_listener_of_the_commit_asks_for_is_called_before_the_start(
    web: Web, listen: Listen
) -> None:
    """It is the last moment to ask, and nothing else is left to be committed."""
    order: list[str] = []

    def ask(session: Any) -> None:
        current_scope().on_commit(lambda: order.append("called"))

    listen("after_commit", ask)
    answer, _ = write_and_answer(web, at_start=lambda status: order.append("start"))
    assert answer.status == 200
    assert order == ["called", "start"]
    assert web.store.rows() == [1]


# -- they are slow -----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["before_commit", "after_commit"])
def test_C2_a_slow_listener_holds_the_success_back(web: Web, listen: Listen, what: str) -> None:
    """The client sees nothing before the commit and its listeners are over."""
    order: list[str] = []

    def slow(session: Any) -> None:
        time.sleep(0.05)
        order.append("listener")

    listen(what, slow)
    answer, _ = write_and_answer(web, at_start=lambda status: order.append("start"))
    assert answer.status == 200
    assert order == ["listener", "start"]
    assert web.store.rows() == [1]


@pytest.mark.told
def test_S3_a_slow_listener_of_the_rollback_is_waited_for(web: Web) -> None:
    """When the request is over, so is its rollback."""
    order: list[str] = []

    def slow(connection: Any) -> None:
        time.sleep(0.05)
        order.append("rolled back")

    event.listen(web.store.engine, "rollback", slow)
    answer, _ = write_and_answer(web, commit_on_success=False)
    assert answer.status == 200
    assert order == ["rolled back"]
    assert web.store.held() == 0


# -- ours hears as before ----------------------------------------------------------------------


@pytest.mark.told
def test_S4_a_captured_session_raises_beside_listeners_of_the_application(
    web: Web, listen: Listen
) -> None:
    """Whoever listens first: no connection is checked out after the end."""
    heard: list[str] = []
    kept: list[Any] = []
    listen("after_transaction_create", lambda *told: heard.append("create"))
    listen("after_begin", lambda *told: heard.append("begin"))

    async def handler(exchange: Exchange) -> None:
        await web.store.add(1)
        kept.append(web.store.jenny.session)
        await exchange.answer(200)

    assert web.ask(handler).status == 200
    assert "begin" in heard

    async def too_late() -> None:
        for _ in range(2):
            with pytest.raises(ScopeClosedError):
                found = kept[0].execute(text("SELECT 1"))
                if web.store.is_async:
                    await found

    web.loop.run(too_late())
    assert web.store.held() == 0
