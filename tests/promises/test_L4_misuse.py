"""J1, L4: what factories return, what is imported, and names that a client chooses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker

from rope_middleware import (
    AsyncSessionJenny,
    RopeError,
    RopeMiddleware,
    SessionJenny,
    SessionRope,
    current_scope,
    open_scope,
)
from rope_middleware.flask import flask_scoped_session
from rope_middleware.testing import Sandbox, SandboxMiddleware
from tests.kit.asgi import answer, ask, http_scope, into_nothing
from tests.kit.leaks import checked_out
from tests.kit.programs import run_python
from tests.kit.wsgi import make_environ

ONE = text("SELECT 1")


def names(mock: Any) -> list[str]:
    return [call[0] for call in mock.mock_calls]


@pytest.mark.parametrize("spec", [None, Session])
def test_J1_a_mock_is_committed_once_and_closed(spec: Any) -> None:
    """By `open_scope` and by a response; nobody can ask what it has open."""
    made: Any = Mock(spec=spec)
    jenny = SessionJenny(lambda: made)
    with open_scope(commit_on_success=True):
        jenny.add(1)
    assert names(made).count("commit") == 1
    assert names(made)[-1] == "close"

    made.reset_mock()
    jenny.add(2)  # by rope
    jenny.remove()
    assert names(made) == ["add", "close"]

    made.reset_mock()
    with pytest.raises(ValueError), open_scope(commit_on_success=True):
        jenny.add(3)
        raise ValueError
    assert "commit" not in names(made)
    assert names(made)[-1] == "close"


@pytest.mark.parametrize("spec", [None, AsyncSession])
def test_J1_an_async_mock_is_committed_once_and_closed(spec: Any) -> None:
    """The twin."""
    made: Any = AsyncMock(spec=spec)
    jenny: Any = AsyncSessionJenny(lambda: made)

    async def main() -> None:
        async with open_scope(commit_on_success=True):
            await jenny.execute("x")

    asyncio.run(main())
    assert names(made).count("commit") == 1
    assert names(made)[-1] == "close"


def test_J1_a_mock_in_a_request_that_commits() -> None:
    """Its commit comes before the response starts, and the response starts."""
    made: Any = Mock()
    jenny = SessionJenny(lambda: made)

    async def view(scope: Any, receive: Any, send: Any) -> None:
        jenny.add(1)
        await answer(send)

    statuses: list[int] = []
    asyncio.run(ask(RopeMiddleware(view, commit_on_success=True), statuses))
    assert statuses == [200]
    assert "commit" in names(made)
    assert names(made)[-1] == "close"


def test_L4_a_factory_that_returns_one_session_to_two_scopes_is_refused(engine: Engine) -> None:
    """They would commit and close for one another; one after the other they may."""
    with Session(engine) as one:
        jenny = SessionJenny(lambda: one)
        for _ in range(2):
            with open_scope("outer"):
                jenny.execute(ONE)
                with open_scope("inner"), pytest.raises(RopeError, match=r"'outer'.*still open"):
                    jenny.execute(ONE)
                assert one.in_transaction()
        assert checked_out(engine) == 0


@pytest.mark.parametrize("given", [None, 7])
def test_L4_registries_is_a_list(given: Any) -> None:
    """The error says so."""

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    with pytest.raises(TypeError, match="registries= takes a list of scoped_session objects, not"):
        RopeMiddleware(app, registries=given)


def wsgi_app(environ: Any, start_response: Any) -> Any: ...


FACTORY = sessionmaker(create_engine("sqlite://"))
JENNY = SessionJenny(FACTORY)
WRONG: list[tuple[Callable[[], object], str, str]] = [
    (lambda: open_scope(commit_on_sucess=True), "open_scope", "commit_on_success"),
    (lambda: open_scope(commit=True), "open_scope", "commit_on_success"),
    (lambda: open_scope("import", readOnly=True), "open_scope", "read_only"),
    (lambda: SessionJenny(FACTORY, scope_func=int), "SessionJenny", "scopefunc"),
    (lambda: SessionJenny(FACTORY, replica=[]), "SessionJenny", "replicas"),
    (lambda: SessionJenny(FACTORY, int, True), "SessionJenny", ""),
    (lambda: SessionJenny(), "SessionJenny", ""),
    (lambda: SessionRope(), "SessionRope", ""),
    (lambda: AsyncSessionJenny(FACTORY, stict=True), "AsyncSessionJenny", "strict"),
    (lambda: AsyncSessionJenny(), "AsyncSessionJenny", ""),
    (lambda: flask_scoped_session(FACTORY, ap=None), "flask_scoped_session", "app"),
    (lambda: Sandbox(JENNY, nmae="x"), "Sandbox", "name"),
    (lambda: SandboxMiddleware(wsgi_app, JENNY, pth="/x"), "SandboxMiddleware", "path"),
    (lambda: RopeMiddleware(wsgi_app, retires=3), "WSGIRopeMiddleware", "retries"),
    (
        lambda: RopeMiddleware(wsgi_app, commit=True),
        "WSGIRopeMiddleware",
        "commit_on_success or commit_veto",
    ),
    (lambda: RopeMiddleware(wsgi_app, (), True), "RopeMiddleware", ""),
]  # type: ignore[call-arg, call-overload, misc]


@pytest.mark.parametrize(("call", "who", "meant"), WRONG)
def test_L4_wrong_arguments_are_told_with_what_is_meant(
    call: Callable[[], object], who: str, meant: str
) -> None:
    """Which one, what it is called, and how a call looks like; not Python's `__init__() got`."""
    with pytest.raises(TypeError) as raised:
        call()
    told = str(raised.value)
    assert told.startswith(f"{who} ") and "__init__" not in told
    if meant:
        assert "got an unexpected keyword argument" in told and f"Did you mean {meant}?" in told
        assert told.count("Did you mean") == 1  # Python 3.13 and later ask, too
    else:
        assert "It takes (" in told and f"{who}(" in told.rpartition("as in: ")[2]
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_L4_an_error_within_a_jenny_stays_as_it_is() -> None:
    """A TypeError of a subclass, or of what an argument does, is not taken for wrong arguments."""

    class Own(SessionJenny[Session]):
        def __init__(self, url: str) -> None:
            super().__init__(sessionmaker(create_engine(url)))

    with pytest.raises(TypeError, match=r"Own\.__init__\(\) missing 1 required"):
        Own()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^strict is True or False, not 1\.$"):
        SessionJenny(FACTORY, strict=1)  # type: ignore[arg-type]


@pytest.mark.slow
def test_L4_a_star_import_without_greenlet() -> None:
    """A sync application does not install it."""
    program = (
        "import sys; sys.modules['greenlet'] = None\n"
        "from rope_middleware import *\n"
        "assert SessionJenny and 'AsyncSessionJenny' not in globals()\n"
        "import rope_middleware\n"
        "try: rope_middleware.AsyncSessionJenny\n"
        "except ImportError as error: assert 'rope-middleware[asyncio]' in str(error)\n"
    )
    run_python("-c", program)


def test_S_the_name_of_a_scope_is_one_line_of_text(engine: Engine) -> None:
    """A client chooses the path: what is no text is escaped, in ASGI and WSGI."""
    seen: list[str] = []
    path = "/a\nERROR b\x1b[2J\u2028é"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(current_scope().name)
        await answer(send)

    def wsgi_app(environ: Any, start_response: Any) -> list[bytes]:
        seen.append(current_scope().name)
        return []

    async def main() -> None:
        await RopeMiddleware(app)(http_scope(path), into_nothing, into_nothing)  # type: ignore[arg-type]

    asyncio.run(main())
    environ = make_environ(path.encode().decode("latin-1"))
    RopeMiddleware(wsgi_app)(environ, lambda *_: lambda _: None).close()  # type: ignore[attr-defined]
    assert seen == [r"GET /a\nERROR b\x1b[2J\u2028é"] * 2
