"""The async twin of `SessionJenny`.

Apart from it because SQLAlchemy's asyncio half needs greenlet, which a sync application does not
install.
"""

from __future__ import annotations

from asyncio import get_running_loop
from collections.abc import Callable, Iterable
from inspect import Signature
from operator import methodcaller
from threading import get_ident
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from rope_middleware.elsewhere import NO_MIDDLEWARE, name_elsewhere
from rope_middleware.errors import no_engine, sync_scope
from rope_middleware.jenny import get_or_make
from rope_middleware.running.deadlines import within
from rope_middleware.running.finish import finish
from rope_middleware.scope.context import current
from rope_middleware.scope.loop import check_loop
from rope_middleware.scope.opening import current_scope
from rope_middleware.scope.options import DEFAULT
from rope_middleware.scope.outcome import timeout_of
from rope_middleware.scope.scope import AsyncScope, is_over
from rope_middleware.session.async_kind import ASYNC, FOREIGN_ASYNC  # first: it names the cure
from rope_middleware.session.factories import check_arguments, check_session, class_of_made
from rope_middleware.session.failures.sharing import noting
from rope_middleware.session.listeners import listen
from rope_middleware.session.registry import ScopeRegistry, StrictRegistry, tying, use_replicas
from rope_middleware.session.release import has_connection, inner_session, release
from rope_middleware.signature import explained

from sqlalchemy.ext.asyncio import (  # isort: skip
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session
from sqlalchemy.util import ScopedRegistry

__all__ = ["AsyncSessionJenny"]

_T = TypeVar("_T")
_AS = TypeVar("_AS", bound=AsyncSession)

_ASYNC_EXAMPLE = "async_sessionmaker(engine)"

_MAKER: Any = async_sessionmaker
_CALL: object = _MAKER.__call__

_OWN = "_rope_middleware_inner_class"
"""In the ``__dict__`` of a class of inner sessions: that which is ours, and derived from it."""


def _own_class(factory: Any, kw: dict[str, Any]) -> type[Session] | None:
    """Return an inner class of ours for an async_sessionmaker's sessions; None for all others.

    By itself it is `Session`, the base of everybody's sessions: listening to that would cost all
    of them. And ours tells of two tasks that share it, also where nobody else does.
    """
    if not isinstance(factory, async_sessionmaker):
        return None
    given: Any = factory  # pyright: ignore[reportUnknownVariableType]
    async_class = given.class_
    if async_class.__init__ is not AsyncSession.__init__:
        return None  # it may take other arguments
    base: object = (
        kw.get("sync_session_class")
        or given.kw.get("sync_session_class")
        or async_class.sync_session_class
    )
    if not isinstance(base, type) or not issubclass(base, Session):
        return None  # SQLAlchemy takes any callable that returns a Session
    own: type[Session] | None = base.__dict__.get(_OWN)
    if own is None:  # of two threads that come here each may have one
        own = type(base.__name__, (base,), {"__module__": base.__module__, **noting(base)})
        listen(own)
        setattr(base, _OWN, own)
    return own


class AsyncScopeRegistry(ScopeRegistry[_T]):
    """The twin of `ScopeRegistry` for AsyncSession."""

    __slots__ = ()

    def __init__(self, createfunc: Callable[..., _T], outside: ScopedRegistry[_T]) -> None:
        super().__init__(createfunc, outside, ASYNC)

    def __call__(self) -> _T:
        scope = current.get(None)
        if isinstance(scope, AsyncScope):
            # As `check_loop`, which would be one more call for every use.
            try:
                here = get_running_loop()
            except RuntimeError:
                here = None
            if here is not scope._loop:
                if scope._loop is None and scope._thread == get_ident():
                    scope._loop = here
                else:
                    check_loop(scope)
            sessions = scope._sessions
            session: Any = None if sessions is None else sessions.get(self)
            if session is not None:
                return session  # type: ignore[no-any-return]  # cast() is a call for every request
        elif scope is not None and not is_over(scope):
            raise sync_scope(scope.name)
        return self.first_use(scope)


class AsyncSessionJenny(async_scoped_session[_AS], Generic[_AS]):
    """The AsyncSession of the request being served: the twin of `SessionJenny`.

    There is no rope, because nothing can await the end of a session when a function returns.
    Outside of scopes, `scopefunc` says whose session it is; without one, `NoScopeError` is raised.

    Args:
        session_factory: an `async_sessionmaker`, or any callable that returns a new
            `AsyncSession`, or something else that has a ``close()``.
        scopefunc: called outside of scopes; its hashable result is the key of the session.
            Call ``await jenny.remove()`` yourself there.
        strict: raise `NoScopeError` outside of scopes, even if there is a `scopefunc`.
        replicas: one `AsyncEngine` for each server that replicates the factory's. Sessions of
            read-only scopes read from one of them.

    Raises:
        TypeError: `session_factory` or `scopefunc` is not callable, or `replicas` holds something
            else than engines.
        RopeError: there are replicas, and ``binds=`` or a get_bind() of the factory's chooses, too.

    See SQLAlchemy's documentation: `Using asyncio scoped session
    <https://docs.sqlalchemy.org/en/20/orm/extensions/asyncio.html#using-asyncio-scoped-session>`_.
    """

    registry: AsyncScopeRegistry[_AS]

    @explained("jenny = AsyncSessionJenny(async_sessionmaker(engine))")
    def __init__(
        self,
        session_factory: Callable[..., _AS],
        scopefunc: Callable[[], Any] | None = None,
        *,
        strict: bool = False,
        replicas: Iterable[AsyncEngine] = (),
    ) -> None:
        check_arguments(session_factory, scopefunc, strict, _ASYNC_EXAMPLE, is_async=True)
        self._session_class = class_of_made(session_factory)
        name_elsewhere(AsyncSessionJenny, self._session_class)
        super().__init__(cast("Any", session_factory), scopefunc or current_scope)

        def create(**kw: Any) -> _AS:
            # Looked up on each use: the factory may be replaced later.
            factory: Any = self.session_factory
            if type(factory) is _MAKER and _MAKER.__call__ is _CALL and not kw:
                # What it does when it is called, and `_own_class`: two calls less in each request.
                made_of: Any = factory.class_
                options: dict[str, Any] = factory.kw
                base = options.get("sync_session_class") or made_of.sync_session_class
                known = base.__dict__.get(_OWN) if isinstance(base, type) else None
                if (
                    known is not None
                    and made_of.__init__ is AsyncSession.__init__
                    and self._session_class is not None
                ):
                    return made_of(**{**options, "sync_session_class": known})  # type: ignore[no-any-return]
            own = _own_class(factory, kw)
            if own is not None:
                kw["sync_session_class"] = own
            session: _AS = factory(**kw)
            if own is not None and self._session_class is not None:
                return session  # nothing but an AsyncSession comes of such a factory
            made: object = session  # a factory of the user's may return anything
            if not issubclass(type(made), AsyncSession):
                check_session(made, AsyncSession, factory, _ASYNC_EXAMPLE)
                self.registry.kind = FOREIGN_ASYNC
            elif factory is AsyncSession and session.sync_session.bind is None:
                raise no_engine(f"AsyncSessionJenny({_ASYNC_EXAMPLE})")
            elif self._session_class is None:
                self._session_class = type(session)
                name_elsewhere(AsyncSessionJenny, self._session_class)
            return session

        outside: ScopedRegistry[_AS]
        if scopefunc is None or strict:
            outside = StrictRegistry(create)
        else:
            outside = ScopedRegistry(tying(lambda: self.registry.kind, create), scopefunc)
        self.registry = AsyncScopeRegistry(  # pyright: ignore[reportIncompatibleVariableOverride]
            create, outside
        )
        self.__signature__: Signature = Signature()  # for Depends(jenny): see SessionJenny
        if replicas != ():
            use_replicas(self.registry, replicas, AsyncEngine, session_factory)

    @property
    def session(self) -> _AS:
        """The current session; made on first use.

        Raises:
            NoScopeError: no scope is open, and there is no scopefunc.
            ScopeClosedError: this code has outlived its scope.
            CrossLoopError: the scope belongs to another event loop.
            RopeError: the scope is a sync one, or the session factory returned something
                that is no AsyncSession.
        """
        return self.registry()

    if not TYPE_CHECKING:
        # The same, without a call of a function of Python's for every use.
        session = property(methodcaller("registry"), doc=session.__doc__)

    def __call__(self, **kw: Any) -> _AS:
        """Return the current session; make it with `kw` for the session factory if there is none.

        Raises:
            sqlalchemy.exc.InvalidRequestError: `kw` is given and there is a session already.
        """
        return get_or_make(self, super().__call__, kw)  # type: ignore[no-any-return]

    async def remove(self) -> None:
        """Close the current session; the next use makes a new one.

        Finishes even where the caller is cancelled meanwhile.

        Raises:
            TimeoutError: the database has given no answer within the scope's `close_timeout`; the
                connection is invalidated.
        """
        scope = self.registry.scope()
        closing = self.registry.remove()
        if closing is not None:
            limit = DEFAULT.close_timeout if scope is None else timeout_of(scope)
            await finish(within(limit, closing), grace=limit)

    async def release(self) -> None:
        """Give the session's connection back to its pool, now: see `SessionJenny.release`.

        Finishes even where the caller is cancelled meanwhile.

        Raises:
            RopeError: something that is not committed would be lost; or a savepoint, a
                ``begin()`` block or a result is open.
            CrossLoopError: the scope belongs to another event loop.
        """
        if not self.registry.has():
            return
        made = self.registry()
        session = inner_session(self.registry)
        if has_connection(session):
            await finish(made.run_sync(release), grace=DEFAULT.close_timeout)
        else:
            release(session)


vars(AsyncSessionJenny)["__call__"].__qualname__ = "AsyncSessionJenny" + NO_MIDDLEWARE
