"""J5: where ropes work, each also under tracing, and whose they are."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import functools
import gc
import importlib.util
import sys
import threading
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session, sessionmaker

from rope_middleware import SessionJenny
from tests.kit.leaks import checked_out
from tests.kit.models import Data
from tests.kit.ropes import Seen, is_over, ropes_in
from tests.kit.sessions import Jenny, run_threads, use


@pytest.fixture
def jenny(engine: Engine) -> Jenny:
    """A jenny whose sessions are `Seen`."""
    return SessionJenny(sessionmaker(engine, class_=Seen))


def test_J5_a_function_has_one_session_that_goes_with_it(
    jenny: Jenny, engine: Engine, traced: Any
) -> None:
    """A function's uses give one session, which is closed when the function returns."""

    def view() -> Session:
        session = use(jenny.session)
        for _ in range(3):
            assert jenny.session is session
            assert jenny() is session
            assert jenny.rope.session is session
        assert checked_out(engine) == 1
        assert not is_over(session)
        return session

    with traced():
        first, second = view(), view()
    assert first is not second
    assert is_over(first)
    assert is_over(second)
    assert checked_out(engine) == 0


def logged(method: Any) -> Any:
    """Decorate a method."""

    @functools.wraps(method)
    def call(*args: Any) -> Any:
        return method(*args)

    return call


class Database(SessionJenny[Any]):
    """An application's own jenny, with a shorthand in each form that a class may have."""

    def method(self) -> Session:
        return self.session

    @property
    def attribute(self) -> Session:
        return self.method()

    @functools.cached_property
    def kept(self) -> Session:
        return self.session

    @logged
    def decorated(self) -> Session:
        return self.session

    def nested(self) -> Session:
        return (lambda: self.session)()


def test_J5_the_methods_of_a_subclass_are_the_jennys(engine: Engine, traced: Any) -> None:
    """The rope hangs on the function that calls them, and does not go with their own frames."""
    database = Database(sessionmaker(engine, class_=Seen))

    def view() -> None:
        session = use(database.method())
        assert database.session is session
        assert database.attribute is database.kept is database.decorated() is session
        assert database.nested() is session
        assert checked_out(engine) == 1
        del database.kept

    with traced():
        view()
    assert checked_out(engine) == 0


def test_J5_a_function_that_raises_ends_its_session(
    jenny: Jenny, engine: Engine, traced: Any
) -> None:
    """An exception that is handled and forgotten takes the rope with it."""

    def view() -> None:
        use(jenny.session)
        raise ValueError

    def caller() -> None:
        try:
            view()
        except ValueError:
            assert checked_out(engine) == 1
        assert checked_out(engine) == 0

    with traced():
        caller()


def test_J5_a_method_is_a_function(jenny: Jenny, traced: Any) -> None:
    """Methods, class methods, static methods, properties and lambdas hold ropes."""

    class Service:
        def method(self) -> Session:
            assert jenny.session is jenny.session
            return use(jenny.session)

        @classmethod
        def class_method(cls) -> Session:
            return use(jenny.session)

        @staticmethod
        def static_method() -> Session:
            return use(jenny.session)

        @property
        def attribute(self) -> Session:
            return use(jenny.session)

    with traced():
        service = Service()
        sessions = [
            service.method(),
            service.class_method(),
            service.static_method(),
            service.attribute,
            (lambda: use(jenny.session))(),
            functools.partial(use)(jenny.session),
        ]
        assert all(is_over(session) for session in sessions[:-1])
    assert len(set(sessions)) == len(sessions)


@pytest.mark.parametrize("name", ["add", "session", "execute", "rope", "remove", "query"])
def test_J5_a_function_that_is_called_like_the_facade_is_no_facade(
    jenny: Jenny, engine: Engine, name: str
) -> None:
    """The facade is told by its code, not by the names of functions."""
    space: dict[str, Any] = {"jenny": jenny, "use": use, "__name__": "application"}
    exec(f"def {name}(): return use(jenny.session)", space)
    session = space[name]()
    assert is_over(session)
    assert checked_out(engine) == 0


def test_J5_nested_calls_use_the_outer_session(jenny: Jenny, traced: Any) -> None:
    """Where the caller has a session, what it calls has the same, and it outlives the call."""

    def inner(depth: int) -> Session:
        if depth:
            return inner(depth - 1)
        return jenny.session

    def outer() -> Session:
        session = use(jenny.session)
        assert inner(0) is session
        assert inner(5) is session
        assert not is_over(session)
        return session

    with traced():
        assert is_over(outer())


def test_J5_without_an_outer_session_each_inner_call_has_its_own(
    jenny: Jenny, engine: Engine, traced: Any
) -> None:
    """A session that was made in a nested call ends with that call."""

    def inner() -> Session:
        return use(jenny.session)

    def outer() -> None:
        first, second = inner(), inner()
        assert first is not second
        assert is_over(first)
        assert is_over(second)
        assert checked_out(engine) == 0
        assert jenny.session not in (first, second)

    with traced():
        outer()


def test_J5_a_generator_keeps_its_session_until_it_ends(
    jenny: Jenny, engine: Engine, traced: Any
) -> None:
    """A generator has the session between its values; it goes at the end, at close() or by del."""
    seen: list[Session] = []

    def rows() -> Iterator[int]:
        session = use(jenny.session)
        seen.append(session)
        for number in range(3):
            yield number
            assert jenny.session is session
            assert not is_over(session)

    with traced():
        assert list(rows()) == [0, 1, 2]
        assert is_over(seen.pop())

        generator = rows()
        next(generator)
        assert checked_out(engine) == 1
        generator.close()
        del generator
        assert is_over(seen.pop())

        generator = rows()
        next(generator)
        del generator
        assert is_over(seen.pop())

        for _ in (use(jenny.session) for _ in range(2)):
            assert checked_out(engine) == 1
        del _
    assert checked_out(engine) == 0


@pytest.mark.xfail(
    sys.version_info >= (3, 13),
    reason="Python 3.13: close() clears the variables of a generator but not what PEP 667 keeps "
    "beside them; that goes with the generator itself",
    strict=sys.version_info < (3, 14),
)
def test_J5_closing_a_generator_ends_its_session_at_once(jenny: Jenny) -> None:
    """After close() the session is over, although the generator object is still there."""

    def rows() -> Iterator[Session]:
        yield use(jenny.session)

    generator = rows()
    session = next(generator)
    generator.close()
    over_at_once = is_over(session)
    del generator
    assert over_at_once


def test_J5_a_generator_that_ends_closes_nothing_that_its_caller_uses(
    jenny: Jenny, engine: Engine, traced: Any
) -> None:
    """Whoever used a session holds it: the end of the generator that made it is not its end."""

    def rows() -> Iterator[Session]:
        yield jenny.session

    def caller() -> Session:
        generator = rows()
        theirs = next(generator)
        mine = use(jenny.session)
        assert mine is theirs
        generator.close()
        del generator
        assert not is_over(mine)
        assert jenny.session is mine
        assert checked_out(engine) == 1
        return mine

    with traced():
        assert is_over(caller())


def test_J5_a_suspended_generator_keeps_the_session_of_its_caller(jenny: Jenny) -> None:
    """A generator that outlives its caller goes on with the session that it began with."""

    def rows() -> Iterator[Session]:
        while True:
            yield jenny.session

    def caller() -> tuple[Iterator[Session], Session]:
        session = use(jenny.session)
        generator = rows()
        assert next(generator) is session
        return generator, session

    generator, session = caller()
    assert not is_over(session)
    assert next(generator) is session
    del generator
    assert is_over(session)


def test_J5_a_coroutine_keeps_its_session_until_it_ends(
    jenny: Jenny, engine: Engine, traced: Any
) -> None:
    """A coroutine has one session over its awaits, shared with what it awaits."""

    async def inner() -> Session:
        await asyncio.sleep(0)
        return jenny.session

    async def outer() -> Session:
        session = use(jenny.session)
        assert await inner() is session
        assert [s async for s in stream()] == [session] * 2
        assert jenny.session is session
        assert not is_over(session)
        return session

    async def stream() -> AsyncIterator[Session]:
        for _ in range(2):
            yield jenny.session
            await asyncio.sleep(0)

    async def main() -> None:
        first, second = await outer(), await outer()
        assert first is not second
        assert is_over(first)
        assert is_over(second)
        assert checked_out(engine) == 0

    with traced():
        asyncio.run(main())


def test_J5_an_async_generator_keeps_its_session_until_it_ends(
    jenny: Jenny, engine: Engine, traced: Any
) -> None:
    """An async generator has the session between its values, until it is closed."""
    seen: list[Session] = []

    async def rows() -> AsyncIterator[int]:
        seen.append(use(jenny.session))
        yield 1
        assert jenny.session is seen[0]
        yield 2

    async def main() -> None:
        generator = rows()
        assert await anext(generator) == 1
        assert checked_out(engine) == 1
        await generator.aclose()  # type: ignore[attr-defined]
        del generator
        assert is_over(seen[0])

    with traced():
        asyncio.run(main())


def test_J5_a_comprehension_uses_the_session_of_its_function(jenny: Jenny, traced: Any) -> None:
    """List, set and dict comprehensions are part of the function on every Python."""

    def view() -> Session:
        sessions = [use(jenny.session) for _ in range(2)]
        sessions += {jenny.session for _ in range(2)}
        sessions += {number: jenny.session for number in range(2)}.values()  # noqa: C420
        sessions += [s for _ in range(2) for s in [jenny.session for _ in range(2)]]
        assert set(sessions) == {jenny.session}
        assert not is_over(jenny.session)
        return sessions[0]

    with traced():
        assert is_over(view())


def test_J5_an_async_comprehension_uses_the_session_of_its_coroutine(jenny: Jenny) -> None:
    """A comprehension that awaits is part of the coroutine, too."""

    async def numbers() -> AsyncIterator[int]:
        for number in range(2):
            yield number

    async def view() -> Session:
        sessions = [use(jenny.session) async for _ in numbers()]
        assert set(sessions) == {jenny.session}
        assert not is_over(sessions[0])
        return sessions[0]

    assert is_over(asyncio.run(view()))


def test_J5_a_class_body_uses_the_session_of_the_code_around_it(jenny: Jenny, traced: Any) -> None:
    """The class does not keep the rope, which would never go, nor does an Enum count it."""

    def view() -> tuple[list[type], Session]:
        class Plain:
            session = use(jenny.session)
            again = jenny.session
            sessions = tuple(jenny.session for _ in range(2))

        class Numbers(enum.Enum):
            ONE = jenny.session.scalar(select(Data.count))
            TWO = 2

        @dataclasses.dataclass
        class Record:
            session: Any = jenny.session

        assert {Plain.session, Plain.again, Record().session} == {jenny.session}
        assert [member.name for member in Numbers] == ["ONE", "TWO"]
        assert not is_over(Plain.session)
        return [Plain, Numbers, Record], Plain.session

    with traced():
        classes, session = view()
        assert is_over(session)
    assert [ropes_in(vars(cls)) for cls in classes] == [[], [], []]


def test_J5_a_module_keeps_its_session_as_long_as_itself(
    jenny: Jenny, tmp_path: Path, traced: Any
) -> None:
    """At the top of a module the rope is a global variable of it."""
    path = tmp_path / "application.py"
    # No comprehension: Python 3.12 warns of its variable when a module is traced.
    path.write_text("session = jenny.session\nagain = [jenny.session, jenny.query().session]\n")
    spec = importlib.util.spec_from_file_location("application", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.jenny = jenny  # type: ignore[attr-defined]
    with traced():
        spec.loader.exec_module(module)
        session = use(module.session)
        assert module.again == [session] * 2
        assert jenny.session is session
    assert ropes_in(vars(module)) == [jenny.create_rope_name()]
    assert not is_over(session)


def test_J5_a_module_that_goes_takes_its_session_with_it(jenny: Jenny, engine: Engine) -> None:
    """When nothing refers to the module any more its rope goes."""
    module = types.ModuleType("application")
    vars(module)["jenny"] = jenny
    exec("session = jenny.session\nagain = [jenny.session for _ in range(2)]", vars(module))
    session = use(module.session)
    assert module.again == [session] * 2
    assert not is_over(session)
    del module
    gc.collect()
    assert is_over(session)
    assert checked_out(engine) == 0


class Mapping:
    """As little as exec() asks for."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        return self.data[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.data[name] = value


def test_J5_exec_keeps_the_session_in_its_namespace(jenny: Jenny, traced: Any) -> None:
    """Code in exec() and eval() has its local variables, and its rope, in the given namespace."""

    def run(*namespaces: Any) -> None:
        exec("session = use(jenny.session)\nassert jenny.session is session", *namespaces)

    with traced():
        space: dict[str, Any] = {"jenny": jenny, "use": use}
        run(space)
        assert ropes_in(space) == [jenny.create_rope_name()]
        session = space["session"]
        assert eval("jenny.session", space) is session
        assert not is_over(session)
        space.clear()
        assert is_over(session)

        names: dict[str, Any] = {}
        space = {"jenny": jenny, "use": use}
        run(space, names)
        assert ropes_in(space) == []
        assert ropes_in(names) == [jenny.create_rope_name()]
        session = names["session"]
        del names
        assert is_over(session)

        custom = Mapping()
        run(space, custom)
        assert ropes_in(custom.data) == [jenny.create_rope_name()]


def test_J5_exec_in_a_function_leaves_nothing_behind(
    jenny: Jenny, engine: Engine, traced: Any
) -> None:
    """Code in exec() with the function's own variables has a session at most as long as it."""

    def view() -> Session:
        seen: list[Session] = []
        exec("seen.append(use(jenny.session))", globals() | {"jenny": jenny}, locals())
        return seen[0]

    with traced():
        assert is_over(view())
    assert checked_out(engine) == 0


def test_J5_each_thread_has_its_own(jenny: Jenny, engine: Engine) -> None:
    """Threads at the same time have a session each, which ends with the thread's function."""
    barrier = threading.Barrier(4, timeout=30)
    sessions: list[Session] = []

    def work() -> None:
        session = use(jenny.session)
        sessions.append(session)
        barrier.wait()
        assert checked_out(engine) == 4
        assert jenny.session is session
        assert not any(is_over(session) for session in sessions)
        barrier.wait()

    run_threads([work] * 4)
    assert len(set(sessions)) == 4
    assert all(is_over(session) for session in sessions)
    assert checked_out(engine) == 0
    assert not jenny._ropes


def test_J5_threads_one_after_the_other_share_nothing(jenny: Jenny) -> None:
    """A thread whose ident is that of an earlier one has a session of its own.

    The earlier one's frame is still there: a traceback keeps it.
    """
    kept: list[BaseException] = []
    sessions: list[Session] = []
    idents: list[int] = []

    def fail() -> None:
        try:
            work()
        except ValueError as error:
            kept.append(error)

    def work() -> None:
        idents.append(threading.get_ident())
        sessions.append(jenny.session)
        raise ValueError

    for _ in range(20):
        run_threads([fail])
    assert len(set(idents)) < 20, "no ident came again"
    assert len(set(sessions)) == 20
    kept.clear()
    assert all(is_over(session) for session in sessions)
