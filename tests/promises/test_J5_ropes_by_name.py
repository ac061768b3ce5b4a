"""J5: names of ropes, ropes by hand, and ropes beside scopes."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading
import weakref
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util import ScopedRegistry, ThreadLocalRegistry

from rope_middleware import ScopeClosedError, SessionJenny, SessionRope, open_scope
from tests.kit.engines import MakeEngine
from tests.kit.leaks import checked_out
from tests.kit.models import Data
from tests.kit.ropes import Seen, is_over, ropes_in, variables
from tests.kit.sessions import Jenny, run_threads, use
from tests.kit.waiting import eventually


@pytest.fixture
def jenny(engine: Engine) -> Jenny:
    """A jenny whose sessions are `Seen`."""
    return SessionJenny(sessionmaker(engine, class_=Seen))


def test_J5_the_rope_is_a_local_variable_of_its_name(jenny: Jenny, traced: Any) -> None:
    """`create_rope_name()` is the variable's name, and the key in `_ropes`."""

    def view() -> None:
        rope = jenny.rope
        name = jenny.create_rope_name()
        assert isinstance(name, str)
        assert variables()[name] is rope
        assert locals()[name] is rope
        assert dict(jenny._ropes) == {name: rope}

    with traced():
        view()
        view()
    assert isinstance(jenny._ropes, weakref.WeakValueDictionary)
    assert not jenny._ropes


def test_J5_names_differ_by_jenny_thread_and_task(jenny: Jenny, engine: Engine) -> None:
    """Each jenny, thread and task has a name of its own, and it stays."""
    names = [jenny.create_rope_name(), SessionJenny(sessionmaker(engine)).create_rope_name()]
    barrier = threading.Barrier(2, timeout=30)

    def work() -> None:
        barrier.wait()
        names.append(jenny.create_rope_name())
        barrier.wait()

    async def task() -> None:
        names.append(jenny.create_rope_name())
        await asyncio.sleep(0)
        assert jenny.create_rope_name() == names[-1] or len(names) == 6

    async def main() -> None:
        await asyncio.gather(task(), task())

    run_threads([work, work])
    asyncio.run(main())
    assert len(set(names)) == 6
    assert jenny.create_rope_name() == names[0]


def test_J5_the_callback_names_the_rope(jenny: Jenny, engine: Engine, traced: Any) -> None:
    """What `_rope_name_callback` returns is the name, of the variable and in `_ropes`."""
    assert jenny._rope_name_callback is None
    jenny._rope_name_callback = lambda: "my_rope"
    assert jenny._rope_name_callback() == "my_rope"
    assert jenny.create_rope_name() == "my_rope"

    def view() -> Session:
        session = use(jenny.session)
        assert variables()["my_rope"] is jenny.rope
        assert dict(jenny._ropes) == {"my_rope": jenny.rope}
        assert jenny.session is session
        assert not is_over(session)
        return session

    with traced():
        assert is_over(view())
        space = {"jenny": jenny, "use": use}
        exec("session = use(jenny.session)", space)
        session: Any = space["session"]
        assert isinstance(space["my_rope"], SessionRope)
        del space["my_rope"]
        assert is_over(session)
    assert checked_out(engine) == 0


def test_J5_the_callback_is_asked_each_time(jenny: Jenny) -> None:
    """Another name is another rope and another session, in the same function."""
    names = ["a", "b"]
    jenny._rope_name_callback = lambda: names[0]

    def view() -> list[Session]:
        first = use(jenny.session)
        names.reverse()
        second = use(jenny.session)
        assert second is not first
        names.reverse()
        assert jenny.session is first
        assert sorted(jenny._ropes) == ["a", "b"]
        assert sorted(ropes_in(variables())) == ["a", "b"]
        return [first, second]

    assert all(is_over(session) for session in view())


def test_J5_the_rope_never_touches_a_variable_of_the_function(jenny: Jenny, traced: Any) -> None:
    """A rope that is called like one of the function's variables is held beside it."""
    jenny._rope_name_callback = lambda: "session"

    def view() -> Session:
        session: Any = 42
        assert jenny.registry.has() is False
        first = use(jenny.session)
        assert session == 42
        session = jenny.session
        assert session is first
        assert not is_over(session)
        assert jenny.session is session
        del session
        assert not is_over(first)
        return first

    def view_with_cell() -> Session:
        session = use(jenny.session)

        def inner() -> Session:
            assert jenny.session is session
            return session

        assert inner() is jenny.session
        assert not is_over(session)
        return session

    with traced():
        assert is_over(view())
        assert is_over(view_with_cell())


@pytest.mark.parametrize("value", [None, "name", 3])
def test_J5_the_callback_must_be_callable(jenny: Jenny, value: Any) -> None:
    """Setting anything else is a TypeError that says what is asked for."""
    with pytest.raises(TypeError, match="_rope_name_callback must be a callable"):
        jenny._rope_name_callback = value
    assert jenny._rope_name_callback is None


@pytest.mark.parametrize("value", [None, b"name", 3])
def test_J5_the_callback_must_return_a_str(jenny: Jenny, value: Any) -> None:
    """A name that is no str is a TypeError, and no rope is made."""
    jenny._rope_name_callback = lambda: value
    with pytest.raises(TypeError, match="must return a str"):
        jenny.create_rope_name()
    with pytest.raises(TypeError, match="must return a str"):
        _ = jenny.session
    assert not jenny._ropes


def test_J5_threads_with_ropes_of_one_name_do_not_meet(jenny: Jenny) -> None:
    """A name is looked up within its own thread, and removed there only."""
    jenny._rope_name_callback = lambda: "my_rope"

    def other() -> None:
        assert jenny.registry.has() is False
        jenny.remove("my_rope")
        theirs = use(jenny.session)
        assert theirs is not session
        jenny.remove()
        assert is_over(theirs)

    session = use(jenny.session)
    run_threads([other])
    assert not is_over(session)
    assert jenny.session is session


def test_J5_set_rope_ties_in_the_frame_it_is_given(jenny: Jenny, traced: Any) -> None:
    """With a frame, the session lives as long as that one."""

    def helper() -> Session:
        jenny.set_rope(sys._getframe(1))
        return use(jenny.session)

    def view() -> Session:
        session = helper()
        assert not is_over(session)
        assert jenny.session is session
        assert ropes_in(variables()) == [jenny.create_rope_name()]
        return session

    with traced():
        assert is_over(view())


def test_J5_set_rope_of_what_is_no_frame_is_an_error_in_words(jenny: Jenny) -> None:
    """It says what a frame is."""
    with pytest.raises(TypeError, match=r"sys\._getframe.*not 'frame'"):
        jenny.set_rope("frame")  # type: ignore[arg-type]


def test_J5_set_rope_in_a_nested_call_leaves_the_outer_session_alone(
    jenny: Jenny, traced: Any
) -> None:
    """The inner function has a session of its own; the outer one's is current again after it."""

    def inner() -> Session:
        jenny.set_rope()
        return use(jenny.session)

    def outer() -> Session:
        session = use(jenny.session)
        theirs = inner()
        assert theirs is not session
        assert is_over(theirs)
        assert not is_over(session)
        assert jenny.session is session
        assert dict(jenny._ropes) == {jenny.create_rope_name(): jenny.rope}
        return session

    with traced():
        assert is_over(outer())


def test_J5_set_rope_again_ends_the_one_before(jenny: Jenny) -> None:
    """A new rope under the same name in the same frame takes the old one's place."""
    first = use(jenny.session)
    jenny.set_rope()
    assert is_over(first)
    assert jenny.session is not first


def test_J5_remove_closes_the_session_and_forgets_the_rope(jenny: Jenny, engine: Engine) -> None:
    """The next use makes another session, which has a rope of its own."""

    def view() -> Session:
        first = use(jenny.session)
        jenny.remove()
        assert is_over(first)
        assert checked_out(engine) == 0
        assert not jenny._ropes
        second = use(jenny.session)
        assert second is not first
        return second

    assert is_over(view())


def test_J5_remove_of_what_is_not_there_is_silent(jenny: Jenny) -> None:
    """As `scoped_session.remove()` is: no warning, no error, twice."""
    jenny.remove()
    jenny.remove()
    jenny.remove("no such rope")
    jenny.remove(rope_name="no such rope")
    assert not jenny._ropes


def test_J5_remove_takes_the_name_of_a_rope(jenny: Jenny) -> None:
    """Only the session of the rope of that name is closed."""
    name = "a"
    jenny._rope_name_callback = lambda: name
    first = use(jenny.session)
    name = "b"
    second = use(jenny.session)
    jenny.remove("a")
    assert is_over(first)
    assert not is_over(second)
    assert list(jenny._ropes) == ["b"]
    assert jenny.session is second


def test_J5_the_rope_removes_as_the_jenny_does(jenny: Jenny) -> None:
    """`jenny.rope.remove()` closes the session; the rope makes another on its next use."""
    rope = jenny.rope
    first = use(rope.session)
    rope.remove()
    rope.remove()
    assert is_over(first)
    second = use(jenny.session)
    assert second is not first
    assert rope.session is second


def test_J5_registry_set_and_clear(jenny: Jenny, engine: Engine) -> None:
    """SQLAlchemy's registry interface: set() gives the rope a session, clear() lets it be."""

    def view() -> Session:
        mine = Seen(engine)
        jenny.registry.set(mine)
        assert jenny.session is mine
        jenny.registry.clear()
        assert jenny.registry.has() is False
        assert not is_over(mine)
        jenny.registry.set(use(mine))
        return mine

    assert is_over(view())


@pytest.mark.parametrize("kind", ["thread-local", "scopefunc"])
def test_J5_a_rope_by_hand_of_a_plain_registry(engine: Engine, kind: str) -> None:
    """It closes the registry's session when it goes, and the registry makes a new one then."""
    factory = sessionmaker(engine, class_=Seen)
    registry: ScopedRegistry[Session] = (
        ThreadLocalRegistry(factory)
        if kind == "thread-local"
        else ScopedRegistry(factory, lambda: "key")
    )

    def view() -> Session:
        rope = SessionRope(registry)
        assert registry.has() is False
        session = use(rope.session)
        assert rope.session is session
        assert registry() is session
        return session

    first, second = view(), view()
    assert first is not second
    assert is_over(first)
    assert is_over(second)
    assert registry.has() is False
    assert checked_out(engine) == 0


def test_J5_a_rope_by_hand_removes_the_session_of_its_registry(engine: Engine) -> None:
    """`remove()` does as `scoped_session.remove()`, also where the rope has made none itself."""
    plain = scoped_session(sessionmaker(engine, class_=Seen))
    rope = SessionRope(plain.registry)
    rope.remove()
    session = use(plain())
    rope.remove()
    assert is_over(session)
    assert plain.registry.has() is False
    again = use(rope.session)
    rope.remove()
    rope.remove()
    assert is_over(again)
    assert plain() is not again
    plain.remove()


def test_J5_a_rope_by_hand_that_another_thread_collects(engine: Engine) -> None:
    """It closes its own session and leaves the other thread's in the registry."""
    plain = scoped_session(sessionmaker(engine, class_=Seen))
    ropes = [SessionRope(plain.registry)]
    session = use(ropes[0].session)

    def collect() -> None:
        mine = use(plain())
        ropes.clear()
        assert is_over(session)
        assert not is_over(mine)
        assert plain() is mine
        plain.remove()

    run_threads([collect])
    plain.remove()


def test_J5_a_rope_by_hand_of_a_jenny_takes_the_place_of_the_frame(
    jenny: Jenny, engine: Engine
) -> None:
    """Its session is the one that `jenny.session` gives, and lives as long as the rope."""

    def begin() -> SessionRope[Session]:
        rope = SessionRope(jenny.registry)
        use(rope.session)
        assert jenny.session is rope.session
        return rope

    rope = begin()
    session = rope.session
    assert not is_over(session)
    assert jenny._ropes
    del rope
    assert is_over(session)
    assert checked_out(engine) == 0
    assert not jenny._ropes


def test_J5_a_rope_by_hand_of_a_jenny_is_renewed_after_remove(jenny: Jenny) -> None:
    """Whoever removes it, the rope and the jenny agree on the next session."""
    rope = SessionRope(jenny.registry)
    rope.remove()
    first = use(rope.session)
    jenny.remove()
    second = use(rope.session)
    assert is_over(first)
    assert second is jenny.session
    rope.remove()
    assert is_over(second)
    assert rope.session is jenny.session


def test_J5_a_rope_by_hand_inside_a_scope_leaves_the_scopes_session_alone(jenny: Jenny) -> None:
    """The session is the scope's, so only `remove()` and the scope's end close it."""

    def view() -> Session:
        return use(SessionRope(jenny.registry).session)

    rope = SessionRope(jenny.registry)
    outer = use(rope.session)
    with open_scope():
        session = view()
        assert session is jenny.session
        assert rope.session is session
        assert not is_over(session)
        rope.remove()
        assert is_over(session)
        assert not is_over(outer)
        last = use(rope.session)
    assert is_over(last)


def test_J5_a_rope_that_was_never_initialised_is_collected_in_silence() -> None:
    """A subclass whose `__init__` fails leaves nothing that `__del__` would stumble over."""
    rope = SessionRope.__new__(SessionRope)
    del rope
    with pytest.raises(TypeError):
        SessionRope()  # type: ignore[call-arg]


def test_J5_inside_a_scope_nothing_is_set_in_any_frame(jenny: Jenny) -> None:
    """`jenny.rope` is the scope's; `set_rope()` and `session` leave the caller's frame alone."""

    def view() -> Session:
        before = variables()
        jenny.set_rope()
        jenny.set_rope(sys._getframe(1))
        rope = jenny.rope
        assert isinstance(rope, SessionRope)
        assert rope.session is jenny.session
        assert jenny() is jenny.session
        assert jenny.query(Data).all()
        assert set(variables()) <= {*before, "before", "rope"}
        assert not jenny._ropes
        return jenny.session

    with open_scope():
        session = use(view())
        assert not is_over(session)
        assert jenny.rope.session is session
        jenny.rope.remove()
        assert is_over(session)
        assert jenny.session is not session
    assert jenny._ropes == {}
    assert ropes_in(variables()) == []


def test_J5_a_scope_hides_the_rope_and_gives_it_back(jenny: Jenny) -> None:
    """A session that hangs by a rope is not the scope's, and current again after it."""
    session = use(jenny.session)
    with open_scope():
        assert jenny.session is not session
        jenny.remove(jenny.create_rope_name())
    assert not is_over(session)
    assert jenny.session is session


def test_J5_ropes_after_the_end_of_a_scope(jenny: Jenny) -> None:
    """Code that outlived its scope gets the scope's error, and no rope."""

    def late() -> None:
        with pytest.raises(ScopeClosedError):
            _ = jenny.session
        with pytest.raises(ScopeClosedError):
            _ = jenny.rope.session
        assert not jenny._ropes

    with open_scope():
        context = contextvars.copy_context()
    run_threads([lambda: context.run(late)])


def test_J5_several_jennies_hang_side_by_side(make_engine: MakeEngine) -> None:
    """Two jennies in one function have a rope each."""
    engines = [make_engine(), make_engine()]
    first, second = (SessionJenny(sessionmaker(engine, class_=Seen)) for engine in engines)

    def view() -> list[Session]:
        sessions: list[Session] = [use(first.session), use(second.session)]
        assert len(ropes_in(variables())) == 2
        first.remove()
        assert is_over(sessions[0])
        assert not is_over(sessions[1])
        return sessions

    assert all(is_over(session) for session in view())


def test_J5_a_jenny_that_goes_leaves_nothing(engine: Engine) -> None:
    """The sessions of a jenny that nobody refers to any more are closed with their frames."""

    def view() -> tuple[Session, weakref.ref[Any]]:
        jenny = SessionJenny(sessionmaker(engine, class_=Seen))
        return use(jenny.session), weakref.ref(jenny)

    session, jenny = view()
    gc.collect()
    assert is_over(session)
    assert jenny() is None


def test_J5_nothing_piles_up(jenny: Jenny) -> None:
    """Threads, tasks and names that are gone leave no trace in the jenny."""
    names = iter(range(10**6))
    other = SessionJenny(jenny.session_factory)
    other._rope_name_callback = lambda: f"rope {next(names)}"

    def view() -> None:
        _ = jenny.session
        _ = other.session

    async def main() -> None:
        view()

    for _ in range(20):
        run_threads([view])
        asyncio.run(main())
    gc.collect()
    for each in (jenny, other):
        outside: Any = each.registry.outside
        assert not each._ropes
        assert len(outside._ropes) <= 1
        assert not any(outside._ropes.values())


def test_J5_waiting_for_another_thread_is_not_needed(jenny: Jenny, engine: Engine) -> None:
    """A thousand functions in eight threads leave every connection in the pool."""

    def work() -> None:
        for _ in range(25):
            inner()

    def inner() -> None:
        use(jenny.session)

    run_threads([work] * 8)
    eventually(lambda: checked_out(engine) == 0, "all connections back")
