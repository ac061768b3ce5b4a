"""The async twin of `registry.ScopeRegistry` and `jenny.SessionJenny`.

Apart from them because SQLAlchemy's asyncio extension needs greenlet, which a sync application
does not install.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

try:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_session
except ImportError as _error:
    raise ImportError(
        "AsyncSessionJenny needs SQLAlchemy's asyncio extension: "
        "pip install 'rope-middleware[asyncio]'"
    ) from _error

from sqlalchemy.orm import Session
from sqlalchemy.util import ScopedRegistry

from rope_middleware.errors import RopeError
from rope_middleware.finish import finish
from rope_middleware.jenny import check_callables
from rope_middleware.registry import (
    ScopeRegistry,
    StrictRegistry,
    check_loop,
    check_session,
    close,
    drop,
    has_nothing_open,
    invalidate,
)
from rope_middleware.scope import CLOSE_TIMEOUT, AsyncScope, Scope, current, current_scope

__all__ = ["AsyncSessionJenny"]

_T = TypeVar("_T")
_AS = TypeVar("_AS", bound=AsyncSession)

_ASYNC_SESSION_CLOSE = AsyncSession.close

_ASYNC_EXAMPLE = "async_sessionmaker(engine)"
_NO_ASYNC_ROPE = (
    " Nothing can await the end of an AsyncSession that hangs on a frame, so there is no rope "
    "for it."
)


class AsyncScopeRegistry(ScopeRegistry[_T]):
    """The twin of `ScopeRegistry` for AsyncSession."""

    __slots__ = ()

    is_async = True

    def __call__(self) -> _T:
        scope: Any = current.get(None)
        session: Any = None if scope is None else scope._session_of(self)
        if session is None:
            return self.first_use(scope)
        check_loop(scope)  # pyright: ignore[reportArgumentType]  # sessions are in no other
        return session  # type: ignore[no-any-return]  # cast() is a call for every request

    def first_use(self, scope: Scope | None) -> _T:
        if isinstance(scope, AsyncScope):
            check_loop(scope)
        elif scope is not None and not scope._state:
            raise RopeError(
                f"The scope {scope.name!r} is a sync one (WSGI, or a plain "
                '"with open_scope():"), where nothing can await the end of an AsyncSession. '
                'Use "async with open_scope():", or a SessionJenny here.'
            )
        return super().first_use(scope)

    def _proper(self, session: Any) -> Session:
        return session.sync_session  # type: ignore[no-any-return]

    def _facade(self, session: Session) -> Any:
        return async_session(session)

    def is_idle(self, session: Any, /) -> bool:
        return has_nothing_open(session.sync_session) and not _overrides_close(session)

    def is_twophase(self, session: Any, /) -> bool:
        return bool(session.sync_session.twophase)

    async def prepare(self, session: Any, /) -> None:
        await session.run_sync(Session.prepare)

    async def close(self, session: Any, /) -> None:
        try:
            if _overrides_close(session):
                await session.close()
            else:
                await session.run_sync(close)
        finally:
            invalidate(session.sync_session)

    def drop(self, session: Any, /) -> None:
        drop(session.sync_session)

    def abandon(self, session: Any, /) -> None:
        invalidate(session.sync_session)


def _overrides_close(session: AsyncSession) -> bool:
    """Tell whether somebody has put another close() in the place of SQLAlchemy's."""
    return type(session).close is not _ASYNC_SESSION_CLOSE or "close" in session.__dict__


class AsyncSessionJenny(async_scoped_session[_AS], Generic[_AS]):
    """The AsyncSession of the request being served: the twin of `SessionJenny`.

    There is no rope: nothing can await the end of a session when a frame goes. Outside of
    scopes, `scopefunc` tells whose session it is, or `NoScopeError` is raised.

    Args:
        session_factory: an `async_sessionmaker`, or any callable that returns a new
            `AsyncSession`.
        scopefunc: called outside of scopes; its hashable result is the key of the session.
            Call ``await jenny.remove()`` yourself there.
        strict: raise `NoScopeError` outside of scopes, whatever the scopefunc.

    Raises:
        TypeError: `session_factory` or `scopefunc` is not callable.

    See the SQLAlchemy chapter "Using asyncio scoped session".
    """

    registry: AsyncScopeRegistry[_AS]

    def __init__(
        self,
        session_factory: Callable[..., _AS],
        scopefunc: Callable[[], Any] | None = None,
        *,
        strict: bool = False,
    ) -> None:
        check_callables(session_factory, scopefunc, _ASYNC_EXAMPLE)
        super().__init__(cast("Any", session_factory), scopefunc or current_scope)

        def create(**kw: Any) -> _AS:
            # Looked up on each use: the factory may be replaced later.
            session = self.session_factory(**kw)
            made: object = session  # a factory of the user's may return anything
            if not isinstance(made, AsyncSession):
                check_session(made, AsyncSession, self.session_factory, _ASYNC_EXAMPLE)
            return session

        self._create = create
        outside: ScopedRegistry[_AS]
        if scopefunc is None or strict:
            outside = StrictRegistry(create, _NO_ASYNC_ROPE)
        else:
            outside = ScopedRegistry(create, scopefunc)
        self.registry = AsyncScopeRegistry(  # pyright: ignore[reportIncompatibleVariableOverride]
            create, outside
        )

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

    def __call__(self, **kw: Any) -> _AS:
        """Return the current session; make it with `kw` for the session factory if there is none.

        Raises:
            sqlalchemy.exc.InvalidRequestError: `kw` is given and there is a session already.
        """
        if not kw:
            return self.session
        if self.registry.has():
            return super().__call__(**kw)  # SQLAlchemy's error
        session = self._create(**kw)
        self.registry.set(session)
        return session

    async def remove(self) -> None:
        """Close the current session; the next use makes a new one.

        Finishes even where the caller is cancelled meanwhile.
        """
        closing = self.registry.remove()
        if closing is not None:
            await finish(closing, grace=CLOSE_TIMEOUT)
