"""The facade: one object for the whole application, whose session is the request's.

`SessionJenny` is a `scoped_session`: it keeps SQLAlchemy's methods and gives them another
registry. Its async twin stands in `async_jenny`, because it cannot be imported without greenlet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import Signature
from types import FrameType
from typing import Any, Generic, TypeVar, cast
from weakref import WeakValueDictionary

from sqlalchemy import Engine
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.util import ScopedRegistry

from rope_middleware.elsewhere import NO_MIDDLEWARE, name_elsewhere
from rope_middleware.errors import no_engine
from rope_middleware.rope.frames import code_of
from rope_middleware.rope.registry import RopeRegistry, owner_name
from rope_middleware.rope.rope import ScopeRope, SessionRope
from rope_middleware.scope.context import current
from rope_middleware.session.factories import (
    check_arguments,
    check_session,
    class_of_made,
    listen_to_factory,
)
from rope_middleware.session.kinds import FOREIGN
from rope_middleware.session.registry import ScopeRegistry, StrictRegistry, tying, use_replicas
from rope_middleware.signature import explained

__all__ = ["SessionJenny", "get_or_make"]

_S = TypeVar("_S", bound=Session)

_EXAMPLE = "sessionmaker(engine)"
_current = current.get


class SessionJenny(scoped_session[_S], Generic[_S]):
    """The session of the request being served, from anywhere in the application.

    It hands out the session that is yours here, as the spinning jenny handed out threads.
    Every method and attribute of SQLAlchemy's `scoped_session` works and goes to the current
    scope's session. Outside of any scope, `scopefunc` says whose session it is, as in SQLAlchemy.
    Without a `scopefunc` a rope holds the session: a local variable of the calling function, as in
    SQLAlchemy-Rope.

    Args:
        session_factory: a `sessionmaker`, or any callable that returns a new `Session`, or
            something else that has a ``close()``: a mock, a wrapper.
        scopefunc: called outside of scopes; its hashable result is the key of the session.
        strict: raise `NoScopeError` outside of scopes, even if there is a `scopefunc`.
        replicas: one `Engine` for each server that replicates the factory's. Sessions of read-only
            scopes read from one of them.

    Raises:
        TypeError: `session_factory` or `scopefunc` is not callable, or `replicas` holds something
            that is no engine.
        RopeError: the factory's engine is an AsyncEngine; or the factory has ``binds=`` or a
            get_bind() of its own, which cannot be used together with `replicas`.

    See SQLAlchemy's documentation: `Contextual/Thread-local Sessions
    <https://docs.sqlalchemy.org/en/20/orm/contextual.html>`_.
    """

    registry: ScopeRegistry[_S]

    @explained("jenny = SessionJenny(sessionmaker(engine))")
    def __init__(
        self,
        session_factory: Callable[..., _S],
        scopefunc: Callable[[], Any] | None = None,
        *,
        strict: bool = False,
        replicas: Iterable[Engine] = (),
    ) -> None:
        check_arguments(session_factory, scopefunc, strict, _EXAMPLE, is_async=False)
        listen_to_factory(session_factory)  # now: later its sessions may be in use
        self._session_class = class_of_made(session_factory)
        self._checked_class: type[Any] | None = None  # of sessions: nothing is to be asked of it
        name_elsewhere(SessionJenny, self._session_class)
        # Any callable is as good as the sessionmaker that SQLAlchemy's annotation asks for.
        super().__init__(cast("Any", session_factory), scopefunc)
        self._ropes: WeakValueDictionary[str, SessionRope[_S]] = WeakValueDictionary()
        self._callback: Callable[[], str] | None = None

        create = self._make_session
        outside: ScopedRegistry[_S]
        if strict:
            outside = StrictRegistry(create)
        elif scopefunc is not None:
            outside = ScopedRegistry(tying(lambda: self.registry.kind, create), scopefunc)
        else:
            inside = code_of(type(self), SessionJenny)
            outside = RopeRegistry(create, self.create_rope_name, self._ropes, inside)
        self.registry = ScopeRegistry(  # pyright: ignore[reportIncompatibleVariableOverride]
            create, outside
        )
        if replicas != ():
            use_replicas(self.registry, replicas, Engine, session_factory)
        self._unbound_rope = ScopeRope(self.registry)
        # For Depends(jenny): it takes nothing from the request. (Of the instance: the class is
        # called with other arguments.)
        self.__signature__: Signature = Signature()

    def _make_session(self, **kw: Any) -> _S:
        # Looked up on each use: the factory may be replaced later. (A plain sessionmaker is not
        # called here, once its class is known: `ScopeRegistry.first_use` calls that class itself.)
        factory: Any = self.session_factory
        session: _S = factory(**kw)
        if type(session) is not self._checked_class:
            self._check(session, factory)
        return session

    def _check(self, session: _S, factory: Any) -> None:
        """Check what a factory of the user's has made: it may return anything."""
        made: object = session
        if not issubclass(type(made), Session):  # a mock may say that it is
            check_session(made, Session, factory, _EXAMPLE)
            self.registry.kind = FOREIGN
        elif factory is Session:
            if session.bind is None:
                raise no_engine(f"SessionJenny({_EXAMPLE})")
        else:
            self._checked_class = type(session)
            if self._session_class is None:
                self._session_class = type(session)
                name_elsewhere(SessionJenny, self._session_class)

    @property
    def session(self) -> _S:
        """The current session; made on first use.

        Raises:
            NoScopeError: no scope is open, and the jenny is strict.
            ScopeClosedError: this code has outlived its scope.
            RopeError: the session factory returned something that cannot be a session.
        """
        scope = _current(None)
        if scope is not None and scope._sessions is not None:
            try:
                return scope._sessions[self.registry]  # type: ignore[no-any-return]
            except KeyError:
                pass
        return self.registry.first_use(scope)

    def __call__(self, **kw: Any) -> _S:
        """Return the current session. If there is none, make it: `kw` goes to the session factory.

        Raises:
            sqlalchemy.exc.InvalidRequestError: `kw` is given and there is a session already.
        """
        session: _S = get_or_make(self, super().__call__, kw)
        if getattr(session, "_is_asyncio", False) is True:
            return super().__call__()  # SQLAlchemy warns of it
        return session

    def remove(self, rope_name: str | None = None) -> None:
        """Close the current session; the next use makes a new one.

        Args:
            rope_name: outside of scopes, the name of the rope whose session is meant; by
                default the one that `create_rope_name` returns. If there is no such rope, nothing
                happens.
        """
        outside = self.registry.outside
        if self.registry.scope() is None and isinstance(outside, RopeRegistry):
            outside.remove(rope_name)
        else:
            self.registry.remove()

    def release(self) -> None:
        """Give the session's connection back to its pool, now: before a wait.

        The session stays, and so does everything that it has loaded: nothing is expired, and
        nothing is committed. Its next use begins a new transaction. The old transaction's locks
        are gone then, and so are its settings (``SET LOCAL``). If there is nothing to give back,
        nothing happens::

            user = jenny.session.get_one(User, 1)
            jenny.release()
            answer = model.ask(user.question)  # takes half a minute

        PostgreSQL is asked whether a statement given as text, or a function, has written anything.
        Other databases cannot be asked: there, the writes of such statements are rolled back.

        Raises:
            RopeError: something would be lost, because it is not committed; or a savepoint, a
                ``begin()`` block or a result is open.
        """
        if self.registry.has():
            from rope_middleware.session.release import inner_session, release

            release(inner_session(self.registry))

    # SQLAlchemy-Rope's interface

    @property
    def rope(self) -> SessionRope[_S]:
        """The rope that holds the current session; set in the calling frame if there is none.

        Inside a scope it belongs to the scope, and with a `scopefunc` to what that returns. Then
        nothing is set in any frame.

        Raises:
            NoScopeError: no scope is open, and the jenny is strict.
        """
        outside = self._outside()
        return self._unbound_rope if outside is None else outside.rope()

    def set_rope(self, frame: FrameType | None = None) -> None:
        """Set a new rope as a local variable named `create_rope_name`.

        Does nothing if no rope is needed: inside a scope, or with a `scopefunc`.

        Args:
            frame: the frame to set it in; by default that of the code that uses the jenny.

        Raises:
            NoScopeError: no scope is open, and the jenny is strict.
            TypeError: `frame` is no frame.
        """
        if not isinstance(frame, FrameType | None):
            raise TypeError(
                "set_rope() takes a frame, as sys._getframe() returns one, or nothing for the "
                f"calling one; not {frame!r}."
            )
        outside = self._outside()
        if outside is not None:
            outside.set_in(frame)

    def create_rope_name(self) -> str:
        """Return the name of the rope of this thread or asyncio task.

        If a `_rope_name_callback` is set, it is what that returns.

        Raises:
            TypeError: the callback returned something that is no str.
        """
        if self._callback is None:
            return f"session{id(self)}:{owner_name()}"
        name = self._callback()
        if not isinstance(name, str):
            raise TypeError(
                f"_rope_name_callback must return a str, the rope's name; it returned {name!r}."
            )
        return name

    @property
    def _rope_name_callback(self) -> Callable[[], str] | None:
        """A callable without arguments that returns the name for a rope; None if none is set.

        Raises:
            TypeError: it is set to something that is not callable.
        """
        return self._callback

    @_rope_name_callback.setter
    def _rope_name_callback(self, callback: Callable[[], str]) -> None:
        if not callable(callback):
            raise TypeError(
                "_rope_name_callback must be a callable without arguments that returns a str, "
                f"the rope's name; {callback!r} is not callable."
            )
        self._callback = callback

    def _outside(self) -> RopeRegistry[_S] | None:
        """Return where ropes are found and set; None where there are none."""
        if self.registry.scope() is not None:
            return None
        outside = self.registry.outside
        if isinstance(outside, StrictRegistry):
            outside()  # raises
        return outside if isinstance(outside, RopeRegistry) else None


vars(SessionJenny)["__call__"].__qualname__ = "SessionJenny" + NO_MIDDLEWARE


def get_or_make(jenny: Any, refuse: Callable[..., Any], kw: dict[str, Any]) -> Any:
    """Return the current session of `jenny`, sync or async; make it with `kw` if there is none.

    Where there is one and `kw` is given, `refuse` raises SQLAlchemy's own error.
    """
    if not kw:
        return jenny.session
    if jenny.registry.has():
        return refuse(**kw)
    session = jenny.registry.createfunc(**kw)
    jenny.registry.set(session)
    return session
