"""The way from the current scope to a session, and from a session back to its scope.

`ScopeRegistry` is the ``registry`` of a `SessionJenny`: SQLAlchemy's `ScopedRegistry` interface
over the current scope. It is also the scope's `Keeper`: it knows how its sessions are committed
and closed. Outside any scope it hands over to another registry (`outside`).

Each session carries a `Tie` as an attribute (its ``info`` stays the application's): which scope
it belongs to and which connections it has had. Listeners on the session's class read it; on the
class, because listening on each session would cost a quarter of a small request.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any, Generic, TypeVar, cast
from weakref import WeakSet

from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IllegalStateChangeError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import ScopedRegistry

from rope_middleware.errors import CrossLoopError, RopeError
from rope_middleware.finish import running_loop
from rope_middleware.scope import (
    CLOSE_TIMEOUT,
    AsyncScope,
    Keeper,
    Scope,
    current,
    current_scope,
    is_async_callable,
    logger,
    no_scope,
)

__all__ = [
    "ScopeRegistry",
    "StrictRegistry",
    "check_loop",
    "check_session",
    "close",
    "drop",
    "has_nothing_open",
    "invalidate",
    "keepers_of",
    "leave_to_parent",
    "listen",
    "tie",
]

_T = TypeVar("_T")

_TIE = "_rope_middleware_tie"
_TRANSACTION_TELLS = hasattr(SessionTransaction, "connections")  # SQLAlchemy 2.1.7
_SESSION_CLOSE = Session.close

# Not event.contains(): it knows a class by its id, and the ids of dead classes come again. A
# sessionmaker makes a class each time.
_listening_to: WeakSet[type[Session]] = WeakSet()


class Tie:
    """What a session must know of where it comes from; an attribute of the session."""

    __slots__ = ("connections", "flush", "is_loose", "registry", "scope", "transaction")

    scope: Scope | None
    registry: ScopeRegistry[Any] | None
    is_loose: bool  # removed from its scope
    # Session.close() forgets its connections before it fails to close them, so they have to be
    # known beforehand. From SQLAlchemy 2.1.7 on the transaction tells them.
    transaction: Any  # SessionTransaction | None; that of 2.0 is annotated without `connections`
    connections: Collection[Connection]
    flush: tuple[SessionTransaction, int] | None  # the last one, and the thread it ran in

    def known_connections(self) -> Collection[Connection]:
        """Return the connections that the session has used since it was last seen idle."""
        if self.transaction is None:
            return self.connections
        return (*self.connections, *self.transaction.connections)


def tie(
    session: Session, scope: Scope | None = None, registry: ScopeRegistry[Any] | None = None
) -> Tie:
    """Tie `session` to its scope, or to none: then only its connections count.

    The session's class must be listened to: see `listen`.
    """
    link = session.__dict__[_TIE] = Tie()
    link.scope = scope
    link.registry = registry
    link.is_loose = False
    # A factory may have begun one.
    link.transaction = session.get_transaction() if _TRANSACTION_TELLS else None
    link.connections = ()
    link.flush = None
    return link


def listen(session_class: type[Session]) -> None:
    """Have the sessions of `session_class` heed their ties. Done once for each class."""
    if session_class not in _listening_to:
        _listening_to.add(session_class)
        event.listen(session_class, "after_transaction_create", _on_begin)
        event.listen(session_class, "after_commit", _on_commit)
        if not _TRANSACTION_TELLS:
            event.listen(session_class, "after_begin", _on_connection)


def _on_begin(session: Session, transaction: SessionTransaction) -> None:
    """Refuse to begin in a scope that has ended: nothing is checked out yet."""
    link: Tie | None = session.__dict__.get(_TIE)
    if link is None:
        scope = current.get(None)
        if scope is None or not any(_is_of(keeper, session) for keeper in scope._registries):
            return  # of the same class, and none of ours
        link = tie(session, scope)
    scope = link.scope
    if scope is not None and scope._state:
        if transaction.parent is None:
            # SQLAlchemy has assigned the transaction already; it must go, for the next use
            # to come by here again.
            session.reset()
        scope._raise_closed()
    if _TRANSACTION_TELLS and link.transaction is None:
        link.transaction = transaction
    elif transaction.parent is None:
        link.connections = [c for c in link.known_connections() if not c.closed]
        link.transaction = transaction if _TRANSACTION_TELLS else None
    elif not transaction.nested:
        # The transaction within a transaction that SQLAlchemy opens for each flush.
        link.flush = transaction, threading.get_ident()
    if scope is not None and link.registry is not None:
        if link.is_loose:
            link.registry._take_back(link, session)
        if link.registry.is_async:
            try:
                check_loop(cast("AsyncScope", scope))
            except CrossLoopError:
                if transaction.parent is None:
                    session.reset()
                raise


def _is_of(keeper: Keeper, session: Session) -> bool:
    return isinstance(keeper, RemovalKeeper) and keeper.find() is session


def _on_connection(
    session: Session, transaction: SessionTransaction, connection: Connection
) -> None:
    """Remember a connection that the session has begun to use."""
    # Without a tie it may be a session of a plain scoped_session: see `RemovalKeeper`.
    link: Tie = session.__dict__.get(_TIE) or tie(session)
    known = [c for c in link.connections if c is not connection and not c.closed]
    link.connections = [*known, connection]
    _refuse_late(session, transaction, connection)


def _refuse_late(session: Session, _: SessionTransaction, connection: Connection) -> None:
    """Give back the connection that a call waited for while its scope ended."""
    link: Tie = session.__dict__[_TIE]
    if link.scope is not None and link.scope._state:
        # Session.close() cannot be called in here (https://docs.sqlalchemy.org/en/20/errors.html#error-isce).
        if not _is_borrowed(session, connection):
            connection.close()
        link.scope._raise_closed()


def _on_commit(session: Session) -> None:
    """Tell the scope that something is committed: from here on nothing may be tried again."""
    link: Tie | None = session.__dict__.get(_TIE)
    if link is not None and link.scope is not None and not session.in_nested_transaction():
        link.scope._committed = link.scope._committed or bool(link.known_connections())


def check_loop(scope: AsyncScope) -> None:
    """Check that the running event loop is that of `scope`.

    Raises:
        CrossLoopError: it is another one.
    """
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
    link: Tie | None = session.__dict__.get(_TIE)
    if link is None:
        return []
    return [
        connection
        for connection in link.known_connections()
        if not connection.closed and not _is_borrowed(session, connection)
    ]


def invalidate(session: Session) -> None:
    """Invalidate the connections that the session still has out; never raises."""
    for connection in _connections_out(session):
        for step in (connection.invalidate, connection.close):
            try:
                step()
            except Exception:
                logger.exception("a connection could not be invalidated")


# What was open where this process was forked. It is kept for ever: to close it would be a word to
# the database over the parent's socket, and so may be to collect it.
_of_the_parent: list[Any] = []


def leave_to_parent(session: Session) -> None:
    """Take from the pool, in a forked process, the connections that `session` has out.

    See https://docs.sqlalchemy.org/en/20/core/pooling.html#pooling-multiprocessing
    """
    _of_the_parent.append(session)
    for connection in _connections_out(session):
        with suppress(Exception):  # one that is invalidated already
            connection.detach()  # says nothing to the database, as close() and invalidate() do


def has_nothing_open(session: Session) -> bool:
    """Tell whether ending `session` needs no I/O."""
    return session.get_transaction() is None and not _connections_out(session)


def close(session: Session) -> None:
    """Close `session`; what could not be given back to the pool is invalidated.

    Raises:
        BaseException: what ``session.close()`` raised.
    """
    link: Tie | None = session.__dict__.get(_TIE)
    is_open = session.get_transaction() is not None
    if link is not None and link.flush is not None:
        _wait_for_flush(link)
    try:
        _reset(session)
    except BaseException as error:
        if isinstance(error, IllegalStateChangeError) and link is not None:
            _close_later(session, link)
        invalidate(session)
        with suppress(Exception):
            session.reset()  # what is left of its transaction must not be used any more
        raise
    if link is not None:
        if link.connections or not is_open:
            # An earlier close(), by the application, may have failed and forgotten them.
            invalidate(session)
        link.transaction = None  # it refers to the session: a cycle for the garbage collector


def drop(session: Session) -> None:
    """`close` for a session that has nothing open: none of its connections can be out."""
    _reset(session)
    _forget(session)


def _reset(session: Session) -> None:
    if type(session).close is not _SESSION_CLOSE or "close" in session.__dict__:
        session.close()  # somebody has overridden it
        if session.get_transaction() is not None:
            session.reset()  # somebody's does something else
    else:
        # close() without "permanently closed" (Session.close_resets_only=False), after which
        # SQLAlchemy's own error would come before ours.
        session.reset()


def _wait_for_flush(link: Tie) -> None:
    """Let a flush end that another thread is in the middle of.

    Its next statement would land on a connection that is back in the pool already, and be
    committed by whoever has it then.
    """
    flush, link.flush = link.flush, None
    if flush is None or flush[1] == threading.get_ident() or running_loop() is not None:
        return  # nobody can be waited for here
    deadline = time.monotonic() + CLOSE_TIMEOUT
    while flush[0].is_active and time.monotonic() < deadline:
        time.sleep(0.001)


def _close_later(session: Session, link: Tie) -> None:
    """Close a session that a call of another thread is using: its connection must not stay out.

    A call that waits for its connection gives it back when it comes. One that has it (a commit,
    say) is let end first.
    """
    if _TRANSACTION_TELLS:
        event.listen(session, "after_begin", _refuse_late)
    deadline = time.monotonic() + CLOSE_TIMEOUT
    while True:
        with suppress(IllegalStateChangeError):
            session.reset()
            return
        if (
            all(connection.closed for connection in link.known_connections())
            or running_loop() is not None
            or time.monotonic() > deadline
        ):
            return
        time.sleep(0.001)


def check_session(session: object, expected: type, factory: object, example: str) -> None:
    """Check what a session factory gave.

    Raises:
        RopeError: it is something else than an `expected`.
    """
    if not isinstance(session, expected):
        what = "None" if session is None else f"an instance of {type(session).__qualname__}"
        raise RopeError(
            f"The session factory {factory!r} returned {what}; it must return a new sqlalchemy "
            f"{expected.__name__}, as {example} does."
        )


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
        self.outside: ScopedRegistry[_T] = outside
        self._listening: type[Session] | None = None

    # ScopedRegistry's interface

    def __call__(self) -> _T:
        scope = self.scope()
        session: Any = None if scope is None else scope._session_of(self)
        return self.first_use(scope) if session is None else session

    def has(self) -> bool:
        scope = self.scope()
        return self.outside.has() if scope is None else scope._session_of(self) is not None

    def set(self, obj: _T) -> None:
        scope = self.scope()
        if scope is None:
            self.outside.set(obj)
            return
        replaced = self._let_go(scope)
        if replaced is not None and replaced is not obj:
            self._keep_beside(scope, replaced)
        self._adopt(scope, obj)

    def clear(self) -> None:
        scope = self.scope()
        if scope is None:
            self.outside.clear()
        else:
            session = self._let_go(scope)
            if session is not None and not self.is_idle(session):
                self._keep_beside(scope, session)

    def remove(self) -> Any:
        """Close the current session, if there is one; the next use makes a new one.

        Of an async registry this returns an awaitable, or None where there is no session.
        """
        scope = self.scope()
        if scope is not None:
            session = self._let_go(scope)
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

    def first_use(self, scope: Scope | None) -> _T:
        """Make the session of `scope`, or leave it to `outside` where there is none."""
        if scope is None:
            return self.outside()
        if scope._state:
            scope._raise_closed()
        return self._adopt(scope, self.createfunc())

    def _adopt(self, scope: Scope, session: _T) -> _T:
        proper = self._proper(session)
        if type(proper) is not self._listening:
            listen(type(proper))
            self._listening = type(proper)
        tie(proper, scope, self)  # before another thread can see it
        kept: Any = None
        try:
            kept = scope._keep(self, session)
        finally:
            if kept is not session:  # another thread was first, or the scope has ended
                self.abandon(session)
                self.drop(session)
        return kept  # type: ignore[no-any-return]  # cast() is a call for every request

    def _let_go(self, scope: Scope) -> _T | None:
        """Take the session out of its scope; return it, or None."""
        session = cast("_T | None", scope._drop(self))
        if session is not None:
            self._proper(session).__dict__[_TIE].is_loose = True
        return session

    def _take_back(self, link: Tie, session: Session) -> None:
        """Have the scope end a session that was removed from it and is used on."""
        kept = self._facade(session)
        if link.scope is not None and kept is not None:
            self._keep_beside(link.scope, kept)

    def _keep_beside(self, scope: Scope, session: Any) -> None:
        """Have the scope end a session that is not its current one."""
        self._proper(session).__dict__[_TIE].is_loose = False
        scope._keep(copy.copy(self), session)  # a copy is another key for the same keeper

    def _proper(self, session: Any) -> Session:
        """Return the Session proper of what `createfunc` made."""
        return session  # type: ignore[no-any-return]

    def _facade(self, session: Session) -> Any:
        """Return what `createfunc` made, of a Session proper; None if it is gone."""
        return session

    # The scope's keeper

    def is_idle(self, session: Any, /) -> bool:
        return has_nothing_open(session)

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
        drop(session)

    def abandon(self, session: Any, /) -> None:
        invalidate(session)

    def leave_to_parent(self, session: Any, /) -> None:
        leave_to_parent(self._proper(session))


class StrictRegistry(ScopedRegistry[_T]):
    """The registry outside of scopes where nothing may happen there."""

    __slots__ = ("cure",)

    def __init__(self, createfunc: Callable[..., _T], cure: str = "") -> None:
        super().__init__(createfunc, current_scope)
        self.cure: str = cure

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
        # As async_scoped_session's is.
        self.is_async: bool = is_async_callable(scoped.remove)
        # None where it only has a remove(): then that is all there is to call.
        registry: Any = getattr(scoped, "registry", None)
        self.registry: ScopedRegistry[Any] | None = registry
        factory: Any = getattr(scoped, "session_factory", None)
        session_class: type = getattr(factory, "class_", Session)
        # An async_sessionmaker's class is no Session; its sessions' inner one is.
        listen(session_class if issubclass(session_class, Session) else Session)

    def find(self) -> Any:
        """Return the Session proper, or None."""
        if self.registry is None or not self.registry.has():
            return None
        session = self.registry()
        return getattr(session, "sync_session", session)

    def is_idle(self, _: Any, /) -> bool:
        if self.registry is None:
            return False
        try:
            session = self.find()
        except Exception:  # its scopefunc's: close() is going to say so
            return False
        if session is None:
            return True
        # The end of an async_scoped_session has to be awaited, whatever it has open.
        return not self.is_async and has_nothing_open(session)

    def is_twophase(self, _: Any, /) -> bool:
        return bool(getattr(self.find(), "twophase", False))

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
        return self._aclose() if self.is_async else self._close()

    def _close(self) -> None:
        session = self.find()
        self.scoped.remove()
        _forget(session)

    async def _aclose(self) -> None:
        session = self.find()
        await self.scoped.remove()
        _forget(session)

    def drop(self, _: Any, /) -> None:
        if not self.is_async:
            self._close()

    def abandon(self, _: Any, /) -> None:
        session = self.find()
        if session is not None and self.registry is not None:
            self.registry.clear()
            invalidate(session)

    def leave_to_parent(self, _: Any, /) -> None:
        try:
            session = self.find()
        except Exception:  # its scopefunc's
            session = None
        if session is not None:
            leave_to_parent(session)


def _forget(session: Session | None) -> None:
    """Drop what a closed session's tie refers to: a cycle for the garbage collector."""
    link: Tie | None = None if session is None else session.__dict__.get(_TIE)
    if link is not None:
        link.transaction = link.flush = None


async def _nothing() -> None:
    pass


def keepers_of(registries: Iterable[Any]) -> tuple[Keeper, ...]:
    """Return what has a scope remove the session of each of `registries`.

    Raises:
        TypeError: one of them is no scoped_session, or it is one and not a list of them.
    """
    if hasattr(registries, "remove") and hasattr(registries, "registry"):
        raise TypeError(f"registries= takes a list of scoped_session objects: [{registries!r}].")
    # A jenny's session is the scope's anyway.
    return tuple(
        RemovalKeeper(scoped)
        for scoped in registries
        if not isinstance(getattr(scoped, "registry", None), ScopeRegistry)
    )
