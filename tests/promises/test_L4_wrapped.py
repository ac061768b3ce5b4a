"""L4: what people do wrong with a middleware, a jenny and a scope: each error has its cure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import flask
import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import SADeprecationWarning
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from starlette.applications import Starlette

from rope_middleware import (
    ASGIRopeMiddleware,
    AsyncSessionJenny,
    NoScopeError,
    RopeError,
    RopeMiddleware,
    Scope,
    SessionJenny,
    SessionRope,
    WSGIRopeMiddleware,
    current_scope,
    open_scope,
)
from rope_middleware.flask import flask_scoped_session
from tests.kit.leaks import checked_out
from tests.kit.models import Data
from tests.kit.sessions import Around, Jenny

ONE = text("SELECT 1")
Case = Callable[[], object]


@pytest.fixture
def async_engine() -> AsyncEngine:
    """One that never connects."""
    return create_async_engine("sqlite+aiosqlite://")


# -- the middleware --------------------------------------------------------------------------------


def added(middleware: Any, *args: Any) -> None:
    """Add it to an application, whose first request makes it."""
    app = Starlette()
    app.add_middleware(middleware, *args)
    TestClient(app).get("/")


def around_itself() -> None:
    app = flask.Flask("application")
    app.wsgi_app = RopeMiddleware(app)  # type: ignore[method-assign]
    app.test_client().get("/")


def on_flask() -> None:
    app = flask.Flask("application")
    app.wsgi_app = ASGIRopeMiddleware(app.wsgi_app)  # type: ignore[arg-type, assignment]


class Forgetful(RopeMiddleware):
    """Its `__init__` does not call ours."""

    def __init__(self, app: Any) -> None:
        self.mine = app


class Empty(ASGIRopeMiddleware):
    """Made without its arguments."""


JENNY: Any = SessionJenny(sessionmaker())
WRONG: dict[str, tuple[Case, str]] = {
    "with a jenny": (lambda: added(RopeMiddleware, JENNY), "needs no mention"),
    "a jenny itself": (
        lambda: added(JENNY),
        r"^SessionJenny\..*add_middleware\(RopeMiddleware\), which needs no jenny",
    ),
    "an async jenny itself": (
        lambda: added(AsyncSessionJenny(async_sessionmaker())),
        r"^AsyncSessionJenny\..*add_middleware\(RopeMiddleware\), which needs no jenny",
    ),
    "with an engine": (
        lambda: added(RopeMiddleware, create_engine("sqlite://")),
        "its engine need no mention",
    ),
    "an instance": (
        lambda: added(RopeMiddleware(Starlette())),
        r"add_middleware\(\) takes the class: add_middleware\(RopeMiddleware\)",
    ),
    "the class of WSGI in an ASGI app": (
        lambda: added(WSGIRopeMiddleware),
        r"called as one, with \(environ, start_response\).*add_middleware\(RopeMiddleware\)",
    ),
    "the class of ASGI in a WSGI app": (
        on_flask,
        r"called as one, with \(scope, receive, send\).*RopeMiddleware\(app\)",
    ),
    "a WSGI middleware on an ASGI server": (
        lambda: WSGIRopeMiddleware(flask.Flask("x"))({}),  # type: ignore[call-arg]
        "for WSGI servers",
    ),
    "around itself": (around_itself, r"for ever.*app\.wsgi_app = RopeMiddleware\(app\.wsgi_app\)"),
    "a subclass that forgets": (
        lambda: TestClient(Forgetful(Starlette())).get("/"),  # type: ignore[arg-type]
        r"Forgetful.*super\(\).__init__\(app",
    ),
    "a subclass that forgets, WSGI": (
        lambda: Forgetful(flask.Flask("x"))({}, print),  # type: ignore[operator]
        r"Forgetful.*super\(\).__init__\(app",
    ),
    "a subclass without arguments": (
        lambda: Empty(),  # type: ignore[call-arg]
        r"Empty needs the application.*Empty\(app\)",
    ),
    "a scoped_session of threads": (
        lambda: added(RopeMiddleware, [scoped_session(sessionmaker())]),
        "Make it with scopefunc=current_scope",
    ),
    "no close_timeout": (
        lambda: open_scope(close_timeout=None),  # type: ignore[arg-type]
        "number of seconds, not None.*give a large number",
    ),
    "among Django's middleware": (
        lambda: RopeMiddleware(lambda request: None),  # type: ignore[arg-type, call-overload]
        r"no middleware of Django's.*application = RopeMiddleware\(application\)",
    ),
    "a Flask session for FastAPI": (
        lambda: flask_scoped_session(sessionmaker(), FastAPI()),  # type: ignore[arg-type]
        r"init_app\(\) takes a Flask application.*RopeMiddleware\(app\)",
    ),
    "strict in words": (
        lambda: SessionJenny(sessionmaker(), strict="no"),  # type: ignore[arg-type]
        "strict is True or False, not 'no'",
    ),
    "a Scope by hand": (lambda: Scope(), r'"with open_scope\(\) as scope:"'),
    "a rope without a registry": (lambda: SessionRope(JENNY), r"SessionRope\(jenny\.registry\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_L4_misuse_is_an_error_with_its_cure(name: str) -> None:
    """What is wrong, why, and what to do."""
    misuse, words = WRONG[name]
    with pytest.raises(TypeError, match=words):
        misuse()


USES: dict[str, Callable[[Any], object]] = {
    "route": lambda app: app.route("/"),
    "get": lambda app: app.get("/"),
    "include_router": lambda app: app.include_router(None),
    "config": lambda app: app.config.update(DEBUG=True),
    "run": lambda app: app.run(),
    "set": lambda app: setattr(app, "secret_key", "x"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("make", [flask.Flask, FastAPI])
def test_L4_an_app_that_is_used_after_it_was_wrapped(make: Any, use: str) -> None:
    """`app = RopeMiddleware(Flask(...))`, and then `@app.route`: the names are the app's."""
    app = RopeMiddleware(make(import_name="x") if make is flask.Flask else make())
    with pytest.raises(AttributeError, match=r"belongs to the application.*app\.wsgi_app = Rope"):
        USES[use](app)
    assert not hasattr(app, "route")
    with pytest.raises(AttributeError, match=r"'\w+' object has no attribute 'other'$"):
        _ = app.other  # type: ignore[attr-defined]


def test_L4_a_subclass_has_what_names_it_likes() -> None:
    """The names of applications are free for it, in the class and in its instances."""

    class Mine(RopeMiddleware):
        def __init__(self, app: Any, *, state: int, **options: Any) -> None:
            super().__init__(app, **options)  # type: ignore[call-arg, misc, unused-ignore]
            self.state = state

        def run(self) -> int:
            return self.state + 1

    mine: Any = Mine(Starlette(), state=3, commit_on_success=True)
    assert isinstance(mine, ASGIRopeMiddleware)
    assert (mine.state, mine.run()) == (3, 4)
    assert TestClient(mine).get("/").status_code == 404


# -- session factories -----------------------------------------------------------------------------


def test_L4_a_sync_jenny_of_an_async_engine(async_engine: AsyncEngine, around: Around) -> None:
    """At once, where the sessionmaker tells; else at the first use, each time."""
    made: Any = async_engine
    with pytest.raises(RopeError, match=r"AsyncSessionJenny\(async_sessionmaker\(engine\)\)"):
        SessionJenny(sessionmaker(made))
    maker = sessionmaker()
    jenny = SessionJenny(maker)
    maker.configure(bind=made)
    with around():
        for _ in range(2):
            with pytest.raises(RopeError, match="cannot use the async engine"):
                jenny.execute(ONE)


def test_L4_the_jenny_of_the_other_kind(async_engine: AsyncEngine, engine: Engine) -> None:
    """The text names the right one."""
    for maker in async_sessionmaker(async_engine), sessionmaker(async_engine, class_=AsyncSession):  # type: ignore[call-overload]
        with pytest.raises(TypeError, match=r"which makes AsyncSessions.*Use AsyncSessionJenny"):
            SessionJenny(maker)
        AsyncSessionJenny(maker)
    wrong: Any = sessionmaker(engine)
    with pytest.raises(TypeError, match=r"which makes plain Sessions.*SessionJenny for plain"):
        AsyncSessionJenny(wrong)

    async def main() -> None:
        jenny = AsyncSessionJenny(lambda: wrong())
        async with open_scope():
            with pytest.raises(RopeError, match="must return a new sqlalchemy AsyncSession"):
                _ = jenny.session

    asyncio.run(main())


def test_L4_the_bare_class_of_sessions(engine: Engine, around: Around) -> None:
    """`SessionJenny(Session)` has no engine; with one it is as good as any factory."""
    jenny = SessionJenny(Session)
    with around():
        for _ in range(2):
            with pytest.raises(RopeError, match=r"no engine.*SessionJenny\(sessionmaker\(engine"):
                jenny.execute(ONE)
        assert jenny(bind=engine).scalar(ONE) == 1
        jenny.remove()
    assert checked_out(engine) == 0

    async def main() -> None:
        async with open_scope():
            with pytest.raises(RopeError, match=r"AsyncSessionJenny\(async_sessionmaker\(engine"):
                await AsyncSessionJenny(AsyncSession).execute(ONE)

    asyncio.run(main())


def test_L4_a_factory_that_is_a_dependency(engine: Engine, around: Around) -> None:
    """A `get_db` with `yield`, or an async function: what they return has a `close()`, too."""

    def get_db() -> Any:
        yield Session(engine)

    async def get_async_db() -> Session:
        return Session(engine)

    for factory in get_db, get_async_db:
        jenny = SessionJenny(factory)
        with around(), pytest.raises(RopeError, match=r"get_.*db.*must return a new sqlalchemy"):
            _ = jenny.session


@pytest.mark.parametrize("way", ["with arguments", "set"])
def test_L4_a_session_of_another_scope_is_refused(jenny: Jenny, engine: Engine, way: str) -> None:
    """`jenny(**kw)` of a factory that returns one session, and `registry.set()` of somebody's."""
    with Session(engine) as one:
        sharing = SessionJenny(lambda **kw: one)
        with open_scope("outer"):
            assert sharing.session is one
            with open_scope("inner"), pytest.raises(RopeError, match=r"'outer'.*still open"):
                if way == "set":
                    jenny.registry.set(one)
                else:
                    sharing(autoflush=False)
            assert sharing.scalar(ONE) == 1
            sharing.registry.set(one)  # it is its own
        with open_scope("later"):
            assert sharing(autoflush=False) is one
    assert checked_out(engine) == 0


def test_J1_an_asyncio_session_warns_as_it_does_in_a_scoped_session(
    engine: Engine, around: Around
) -> None:
    """SQLAlchemy's own warning, where a Session class says so of itself."""

    class Asyncio(Session):
        _is_asyncio = True

    def twice(jenny: Any) -> list[Session]:
        with pytest.warns(SADeprecationWarning, match="Please use `async_scoped_session` instead"):
            first: Session = jenny()
        with pytest.warns(SADeprecationWarning):
            return [first, jenny()]

    for made in (scoped_session, SessionJenny):
        jenny: Any = made(sessionmaker(engine, class_=Asyncio))
        with around():
            first, second = twice(jenny)
            assert first is second
            jenny.remove()


# -- open_scope ------------------------------------------------------------------------------------


def test_L4_open_scope_decorates_functions(jenny: Jenny) -> None:
    """Static and class methods, too; nothing else, and nothing that is awaited later."""

    class Jobs:
        @open_scope()
        @staticmethod
        async def static() -> str:
            return current_scope().name

        @open_scope()
        @classmethod
        def of_class(cls) -> str:
            return f"{cls.__name__}: {current_scope().name}"

    assert asyncio.run(Jobs.static()).endswith("Jobs.static")
    assert Jobs.of_class().startswith("Jobs: ")

    async def job() -> None: ...

    with pytest.raises(RopeError, match="Decorate the async function itself"):
        open_scope()(lambda: job())()
    for wrong, words in (Jobs, "Decorate the methods"), (5, "decorates a function, not 5"):
        with pytest.raises(TypeError, match=words):
            open_scope()(wrong)  # type: ignore[arg-type]


# -- outside of scopes -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_L4_a_startup_hook_is_told_to_open_a_scope(engine: Engine, is_async: bool) -> None:
    """The middleware stands there already: it is no request."""
    jenny: Any = SessionJenny(sessionmaker(engine), strict=True)
    if is_async:
        jenny = AsyncSessionJenny(async_sessionmaker())

    @asynccontextmanager
    async def lifespan(app: object) -> Any:
        with pytest.raises(NoScopeError, match=r"startup \(lifespan\)"):
            _ = jenny.session
        async with open_scope():
            assert jenny.session
        yield

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(RopeMiddleware)
    with TestClient(app):
        pass


# -- Depends(jenny) --------------------------------------------------------------------------------


def test_L4_depends_in_all_its_spellings(jenny: Jenny, engine: Engine) -> None:
    """By a dependency of a dependency, too, and beside parameters of the request."""
    app = FastAPI()
    app.add_middleware(RopeMiddleware)

    def count(session: Session = Depends(jenny)) -> int:
        return session.get_one(Data, 1).count

    @app.get("/{number}")
    async def view(
        number: int, q: int = 1, session: Session = Depends(jenny), found: int = Depends(count)
    ) -> str:
        assert session is jenny.session
        return f"{number} {found} {q}"

    answer = TestClient(app).get("/7?q=2")
    assert (answer.status_code, answer.json()) == (200, "7 0 2")
    parameters = app.openapi()["paths"]["/{number}"]["get"]["parameters"]
    assert [one["name"] for one in parameters] == ["number", "q"]
    assert checked_out(engine) == 0
