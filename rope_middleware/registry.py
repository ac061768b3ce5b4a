"""The way from the current scope to a session, and from a session back to its scope.

`ScopeRegistry` is the ``registry`` of a `SessionJenny`: SQLAlchemy's `ScopedRegistry` interface
over the current scope. It is also the scope's `Keeper`: it knows how its sessions are committed
and closed. Outside any scope it hands over to another registry (`outside`).

Each session carries a `Tie` in its ``info``: which scope it belongs to and which connections it
has had. Three listeners on the session's class read it; one for each class, because listening on
each session would cost a quarter of a small request.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, cast

from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_session
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import ScopedRegistry

from rope_middleware.errors import CrossLoopError, RopeError
from rope_middleware.finish import running_loop
from rope_middleware.scope import (
    AsyncScope,
    Keeper,
    Scope,
    current,
    current_scope,
    is_async_callable,
    no_scope,
)

__all__ = [
    "AsyncScopeRegistry",
    "ScopeRegistry",
    "StrictRegistry",
    "close",
    "keepers_of",
    "make_session",
    "tie",
]

_T = TypeVar("_T")

_TIE = "rope_middleware.tie"
_CLOSE_METHODS: tuple[object, object] = (Session.close, AsyncSession.close)


class Tie:
    """What a session must know of where it comes from; kept in ``session.info``."""

    __slots__ = ("connections", "registry", "scope")

    def __init__(self, scope: Scope | None, registry: ScopeRegistry[Any] | None) -> None:
        self.scope = scope
        self.registry = registry
        # Session.close() forgets its connections before it fails to close them, so they have
        # to be known beforehand.
        self.connections: list[Connection] = []


def tie(session: Session, scope: Scope | None, registry: ScopeRegistry[Any] | None = None) -> None:
    """Tie `session` to `scope`, or to none (a rope's session: only its connections count)."""
    session.info[_TIE] = Tie(scope, registry)


def listen(session_class: type[Session]) -> None:
    """Have the sessions of `session_class` heed their ties. Done once for each class."""
    if not event.contains(session_class, "after_transaction_create", _on_begin):
        event.listen(session_class, "after_transaction_create", _on_begin)
        event.listen(session_class, "after_begin", _on_connection)
        event.listen(session_class, "after_commit", _on_commit)


def _on_begin(session: Session, transaction: SessionTransaction) -> None:
    """Refuse to begin in a scope that has ended: nothing is checked out yet."""
    link: Tie | None = session.info.get(_TIE)
    if link is None or (scope := link.scope) is None:
        return
    if scope._state:
        if transaction.parent is None:
            # SQLAlchemy has assigned the transaction already; it must go, for the next use
            # to come by here again.
            session.reset()
        scope._raise_closed()
    registry = link.registry
    if registry is not None and transaction.parent is None:
        registry._on_begin(scope, session)


def _on_connection(session: Session, _: SessionTransaction, connection: Connection) -> None:
    """Remember a connection that the session has begun to use."""
    link: Tie | None = session.info.get(_TIE)
    if link is None:
        # A session of a plain scoped_session, see `keepers_of`.
        link = session.info[_TIE] = Tie(None, None)
    connections = link.connections
    if connections:
        connections[:] = [known for known in connections if not known.closed]
    connections.append(connection)
    if link.scope is not None and link.scope._state:
        # The scope ended while this call waited for its connection. Session.close() cannot
        # be called in here (https://docs.sqlalchemy.org/en/20/errors.html#error-isce).
        if not _is_borrowed(session, connection):
            connection.close()
        link.scope._raise_closed()


def _on_commit(session: Session) -> None:
    """Tell the scope that something is committed: from here on nothing may be tried again."""
    link: Tie | None = session.info.get(_TIE)
    if link is not None and link.scope is not None and not session.in_nested_transaction():
        link.scope._committed = link.scope._committed or bool(link.connections)


def _check_loop(scope: AsyncScope) -> None:
    loop = running_loop()
    if loop is None or loop is scope._loop:
        return
    if scope._loop is None and scope._thread == threading.get_ident():
        scope._loop = loop
        return
    raise CrossLoopError(
        f"The scope {scope.name!r} belongs to another event loop than the one that runs here, "
        'and so do the connections of its AsyncSession. Use "async with open_scope():" in this '
        "loop (with an engine made for it), or come back to the scope's loop with "
        "asyncio.run_coroutine_threadsafe()."
    )


def _is_borrowed(session: Session, connection: Connection) -> bool:
    """Tell whether the application gave the session this connection: then it is not ours."""
    return connection is session.bind or any(
        connection is bind for bind in getattr(session, "binds", {}).values()
    )


def _connections_out(session: Session) -> list[Connection]:
    """Return the session's own connections that have not gone back to their pool."""
    link: Tie | None = session.info.get(_TIE)
    if link is None:
        return []
    return [
        connection
        for connection in link.connections
        if not connection.closed and not _is_borrowed(session, connection)
    ]


def _invalidate(session: Session) -> None:
    """Invalidate the connections that the session still has out; never raises."""
    for connection in _connections_out(session):
        try:
            connection.invalidate()
        finally:
            connection.close()


def _has_nothing_open(session: Session) -> bool:
    return session.get_transaction() is None and not _connections_out(session)


def _has_own_close(session: Session | AsyncSession) -> bool:
    """Tell whether a close() that somebody has overridden has to be called."""
    return type(session).close not in _CLOSE_METHODS or "close" in vars(session)


def close(session: Session) -> None:
    """Close `session`; what could not be given back to the pool is invalidated.

    Raises:
        BaseException: what ``session.close()`` raised.
    """
    try:
        if _has_own_close(session):
            session.close()
        else:
            # close() without "permanently closed" (Session.close_resets_only=False), after
            # which SQLAlchemy's own error would come before ours.
            session.reset()
    finally:
        # Also after a close() that succeeded: an earlier one, by the application, may have
        # failed and forgotten its connection.
        _invalidate(session)


def make_session(factory: Callable[..., _T], expected: type[_T], cure: str, **kw: Any) -> _T:
    """Call the session factory and check what it gives.

    Raises:
        RopeError: it gave something else than an `expected`.
    """
    session = factory(**kw)
    if not isinstance(session, expected):
        what = "None" if session is None else f"an instance of {type(session).__qualname__}"
        raise RopeError(
            f"The session factory {factory!r} returned {what}; it must return a new "
            f"sqlalchemy {expected.__name__}, as {cure} does."
        )
    return session


class ScopeRegistry(ScopedRegistry[_T], Generic[_T]):
    """One session for each scope, made on first use; also the scope's keeper of it.

    Args:
        createfunc: makes a session; any callable.
        outside: the registry that is used where no scope is open.
    """

    __slots__ = ("_listening", "outside")

    is_async = False

    def __init__(self, createfunc: Callable[..., _T], outside: ScopedRegistry[_T]) -> None:
        super().__init__(createfunc, outside.scopefunc)
        self.outside = outside
        self._listening: type[Session] | None = None

    # ScopedRegistry's interface

    def __call__(self) -> _T:
        try:
            return cast("dict[Any, _T]", current.get()._sessions)[self]
        except (LookupError, TypeError):
            return self._first_use()

    def has(self) -> bool:
        scope = self.scope()
        return self.outside.has() if scope is None else scope._session_of(self) is not None

    def set(self, obj: _T) -> None:
        scope = self.scope()
        if scope is None:
            self.outside.set(obj)
            return
        replaced = scope._drop(self)
        if replaced is not None:
            self._keep_beside(scope, replaced)
        self._adopt(scope, obj)

    def clear(self) -> None:
        scope = self.scope()
        if scope is None:
            self.outside.clear()
        else:
            scope._drop(self)

    def remove(self) -> Any:
        """Close the current session, if there is one; the next use makes a new one.

        Of an async registry this returns an awaitable, or None where there is no session.
        """
        scope = self.scope()
        if scope is not None:
            session = scope._drop(self)
            return None if session is None else self.close(session)
        if not self.outside.has():
            return None
        session = self.outside()
        self.outside.clear()
        return self.close(session)

    # Where sessions come from

    def scope(self) -> Scope | None:
        """Return the current scope, which may have ended, or None outside of any."""
        return current.get(None)

    def _first_use(self) -> _T:
        scope = self.scope()
        if scope is None:
            return self.outside()
        if scope._state:
            scope._raise_closed()
        session = scope._session_of(self)
        if session is not None:
            return cast("_T", session)
        return self._adopt(scope, self.createfunc())

    def _adopt(self, scope: Scope, session: _T) -> _T:
        self._tie(scope, self._sync(session))  # before another thread can see it
        kept = scope._keep(self, session)
        if kept is not session:
            self.drop(session)
        return cast("_T", kept)

    def _tie(self, scope: Scope, session: Session) -> None:
        if type(session) is not self._listening:
            listen(type(session))
            self._listening = type(session)
        tie(session, scope, self)

    def _sync(self, session: Any) -> Session:
        """Return the Session proper."""
        return cast("Session", session)

    def _on_begin(self, scope: Scope, session: Session) -> None:
        """Take back a session that was removed from its scope and is used on."""
        if scope._session_of(self) is not session:
            self._keep_beside(scope, session)

    def _keep_beside(self, scope: Scope, session: Any) -> None:
        """Have `scope` end a session that is not, or no more, its current one."""
        if not any(kept is session for kept in list((scope._sessions or {}).values())):
            # A copy is another key for the same keeper.
            scope._keep(copy.copy(self), session)

    # The scope's keeper

    def is_idle(self, session: Any, /) -> bool:
        return _has_nothing_open(session)

    def is_twophase(self, session: Any, /) -> bool:
        return bool(session.twophase)

    def flush(self, session: Any, /) -> Any:
        return session.flush()

    def prepare(self, session: Any, /) -> Any:
        return session.prepare()

    def commit(self, session: Any, /) -> Any:
        return session.commit()

    def rollback(self, session: Any, /) -> Any:
        return session.rollback()

    def close(self, session: Any, /) -> Any:
        return close(session)

    def drop(self, session: Any, /) -> None:
        close(session)

    def abandon(self, session: Any, /) -> None:
        _invalidate(session)


class AsyncScopeRegistry(ScopeRegistry[_T]):
    """The twin of `ScopeRegistry` for AsyncSession."""

    __slots__ = ()

    is_async = True

    def __call__(self) -> _T:
        try:
            scope = current.get()
            session = cast("dict[Any, _T]", scope._sessions)[self]
        except (LookupError, TypeError):
            return self._first_use()
        _check_loop(cast("AsyncScope", scope))
        return session

    def _first_use(self) -> _T:
        scope = self.scope()
        if isinstance(scope, AsyncScope):
            _check_loop(scope)
        elif scope is not None and not scope._state:
            raise RopeError(
                f"The scope {scope.name!r} is a sync one (WSGI, or a plain "
                '"with open_scope():"), where nothing can await the end of an AsyncSession. '
                'Use "async with open_scope():", or a SessionJenny here.'
            )
        return super()._first_use()

    def _sync(self, session: Any) -> Session:
        return cast("AsyncSession", session).sync_session

    def _on_begin(self, scope: Scope, session: Session) -> None:
        _check_loop(cast("AsyncScope", scope))
        current_session = scope._session_of(self)
        if current_session is None or current_session.sync_session is not session:
            removed = async_session(session)
            if removed is not None:
                self._keep_beside(scope, removed)

    def is_idle(self, session: Any, /) -> bool:
        return _has_nothing_open(session.sync_session) and not _has_own_close(session)

    def is_twophase(self, session: Any, /) -> bool:
        return bool(session.sync_session.twophase)

    async def prepare(self, session: Any, /) -> None:
        await session.run_sync(Session.prepare)

    async def close(self, session: Any, /) -> None:
        try:
            if _has_own_close(session):
                await session.close()
            else:
                await session.run_sync(close)
        finally:
            _invalidate(session.sync_session)

    def drop(self, session: Any, /) -> None:
        close(session.sync_session)

    def abandon(self, session: Any, /) -> None:
        _invalidate(session.sync_session)


class StrictRegistry(ScopedRegistry[_T]):
    """The registry outside of scopes where nothing may happen there."""

    __slots__ = ("cure",)

    def __init__(self, createfunc: Callable[..., _T], cure: str = "") -> None:
        super().__init__(createfunc, current_scope)
        self.cure = cure

    def __call__(self) -> _T:
        raise no_scope(self.cure)

    def has(self) -> bool:
        return False

    def set(self, obj: _T) -> None:  # noqa: ARG002
        raise no_scope(self.cure)

    def clear(self) -> None:
        pass


class RemovalKeeper(Keeper):
    """Keeps nothing itself: has a scope end the session of a plain `scoped_session`.

    The scoped_session finds its session by its own scopefunc (`current_scope`), so every
    method here ignores the session it is given.
    """

    def __init__(self, scoped: Any) -> None:
        if not callable(getattr(scoped, "remove", None)):
            raise TypeError(
                f"registries= takes scoped_session objects, not {scoped!r}. Make each with "
                "scopefunc=current_scope and give them in a list."
            )
        self.scoped = scoped
        self.is_async = isinstance(scoped, async_scoped_session) or is_async_callable(scoped.remove)
        # None where it only has a remove(): then that is all there is to call.
        registry: Any = getattr(cast("Any", scoped), "registry", None)
        self.registry: ScopedRegistry[Any] | None = registry
        factory: Any = getattr(cast("Any", scoped), "session_factory", None)
        session_class: type = getattr(factory, "class_", Session)
        # An async_sessionmaker's class is no Session; its sessions' inner one is.
        listen(session_class if issubclass(session_class, Session) else Session)

    def _sync_session(self) -> Any:
        """Return the Session proper, or None."""
        if self.registry is None or not self.registry.has():
            return None
        session = self.registry()
        return getattr(session, "sync_session", session)

    def is_idle(self, _: Any, /) -> bool:
        if self.registry is None:
            return False
        session = self._sync_session()
        if session is None:
            return True
        # The end of an async_scoped_session has to be awaited, whatever it has open.
        return not self.is_async and _has_nothing_open(session)

    def is_twophase(self, _: Any, /) -> bool:
        return bool(getattr(self._sync_session(), "twophase", False))

    def flush(self, _: Any, /) -> Any:
        return self._call("flush")

    def prepare(self, _: Any, /) -> Any:
        if self.is_async:
            return self.scoped.registry().run_sync(Session.prepare)
        return self._call("prepare")

    def commit(self, _: Any, /) -> Any:
        return self._call("commit")

    def rollback(self, _: Any, /) -> Any:
        return self._call("rollback")

    def _call(self, method: str) -> Any:
        if self.registry is not None:
            return getattr(self.registry(), method)()
        return _nothing() if self.is_async else None

    def close(self, _: Any, /) -> Any:
        return self.scoped.remove()

    def drop(self, _: Any, /) -> None:
        if not self.is_async:
            self.scoped.remove()

    def abandon(self, _: Any, /) -> None:
        session = self._sync_session()
        if session is not None and self.registry is not None:
            self.registry.clear()
            _invalidate(session)


async def _nothing() -> None:
    pass


def keepers_of(registries: Iterable[Any]) -> tuple[Keeper, ...]:
    """Return what has a scope remove the session of each of `registries`.

    Raises:
        TypeError: one of them is no scoped_session, or it is one and not a list of them.
    """
    if hasattr(registries, "remove") and hasattr(registries, "registry"):
        raise TypeError(f"registries= takes a list of scoped_session objects: [{registries!r}].")
    return tuple(RemovalKeeper(scoped) for scoped in registries)
