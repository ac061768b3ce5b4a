"""From the current scope to its session: the ``registry`` of a jenny.

`ScopeRegistry` is SQLAlchemy's `ScopedRegistry` interface over the current scope. Outside of any
scope it hands over to another registry (`outside`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util import ScopedRegistry

from rope_middleware.errors import no_scope
from rope_middleware.scope.context import current
from rope_middleware.scope.opening import current_scope
from rope_middleware.scope.reading import reads_only
from rope_middleware.scope.scope import (
    Scope,
    forget,
    keep,
    making,
    require_open,
    session_of,
)
from rope_middleware.scope.settling import (
    GUARDED,
    TELLING,
    TIED,
    needs_for_commit,
    settling_of,
)
from rope_middleware.session.failures.listening import listen_for_errors
from rope_middleware.session.guard.by_error import note_error
from rope_middleware.session.guard.sessions import become
from rope_middleware.session.kinds import SYNC, SyncKind
from rope_middleware.session.listeners import listen_to
from rope_middleware.session.tie import TIE, Tie, check_own, keep_also, tie_of, tie_to

if TYPE_CHECKING:
    from rope_middleware.scope.kind import SessionKind

__all__ = [
    "ScopeRegistry",
    "StrictRegistry",
    "tying",
    "use_replicas",
]

_T = TypeVar("_T")

_MAKER: Any = sessionmaker
_CALL: object = _MAKER.__call__


class ScopeRegistry(ScopedRegistry[_T], Generic[_T]):
    """One session for each scope, made on first use.

    Args:
        createfunc: makes a session; any callable.
        outside: the registry that is used where no scope is open.
    """

    __slots__ = (
        *("_jenny", "_listening", "_own", "_reading", "_simple"),
        *("kind", "outside", "replicas"),
    )

    def __init__(
        self, createfunc: Callable[..., _T], outside: ScopedRegistry[_T], kind: SyncKind = SYNC
    ) -> None:
        super().__init__(createfunc, outside.scopefunc)
        self.outside: ScopedRegistry[_T] = outside
        self.kind: SyncKind = kind
        self._listening: type[Session] | None = None
        self._simple: Any = None  # the same, if a call of it makes one of it and nothing else
        self._reading: type[Session] | None = None  # as `_listening`, in read-only scopes
        # A sync jenny, and the method of its own that `createfunc` is until somebody replaces it.
        self._jenny: Any = getattr(createfunc, "__self__", None)
        self._own: object = None if self._jenny is None else createfunc
        self.replicas: Any = None
        """The `Replicas` that sessions of read-only scopes read from, or None."""
        listen_for_errors()

    # ScopedRegistry's interface

    def __call__(self) -> _T:
        scope = self.scope()
        session: Any = None if scope is None else session_of(scope, self)
        return self.first_use(scope) if session is None else session

    def has(self) -> bool:
        scope = self.scope()
        return self.outside.has() if scope is None else session_of(scope, self) is not None

    def set(self, obj: _T) -> None:
        scope = self.scope()
        if scope is None:
            self.outside.set(obj)
            return
        replaced = self._remove_from(scope)
        if replaced is not None and replaced is not obj:
            self._keep_also(replaced)
        self._tie(obj, scope)
        keep(scope, self, obj)

    def clear(self) -> None:
        scope = self.scope()
        if scope is None:
            self.outside.clear()
        else:
            session: Any = self._remove_from(scope)
            if session is not None and not self.kind.is_idle(session):
                self._keep_also(session)

    def remove(self) -> Any:
        """Close the current session, if there is one; the next use makes a new one.

        Of an async registry this returns an awaitable, or None where there is no session.
        """
        scope = self.scope()
        if scope is not None:
            session = self._remove_from(scope)
            return None if session is None else self.kind.close(session)
        if not self.outside.has():
            return None
        session = self.outside()
        self.outside.clear()
        return self.kind.close(session)

    # Where sessions come from

    def scope(self) -> Scope | None:
        """Return the current scope, which may have ended, or None outside of any."""
        return current.get(None)

    def first_use(self, scope: Scope | None) -> _T:
        """Make the session of `scope`, or leave it to `outside` where there is none."""
        if scope is None:
            return self.outside()
        options = scope._options
        if scope._state or scope._settling is not None or options.read_only or self.replicas:
            return self._first_otherwise(scope)
        if (
            self.createfunc is self._own
            and type(factory := self._jenny.session_factory) is _MAKER
            and _MAKER.__call__ is _CALL
            and (made_class := factory.class_) is self._simple
        ):
            # `createfunc` and the sessionmaker's own call: two calls of a request, 80 instructions.
            made: Any = made_class(**factory.kw)
            inner = made
        else:
            made = self.createfunc()
            inner = self.kind.inner(made) if self.kind.is_async else made
        # The second: it has begun something already, or it is the session of another scope.
        if type(inner) is not self._listening or TIE in (known := inner.__dict__):
            self._tie(made, scope)
            return keep(scope, self, made)  # type: ignore[no-any-return]  # cast() is a call
        # As `tie_to` and `keep`: their calls, and what most requests need not ask, are 70 of the
        # 7,500 instructions of a request with one SELECT.
        tie = known[TIE] = Tie()
        tie.scope = scope
        tie.kind = kind = self.kind
        tie.is_async = kind.is_async
        tie.is_removed = False
        tie.connections = ()
        tie.transaction = tie.flush = tie.line = tie.task = tie.written = None
        if options.commit_on_success:
            become(inner, GUARDED if scope._is_async else TELLING, scope, made)
        sessions: dict[Any, Any] = {self: made}
        with making:
            is_first = scope._sessions is None
            if is_first:
                scope._sessions = sessions
        if is_first and not scope._state:  # in this order: see `keep`
            return made  # type: ignore[no-any-return]
        return keep(scope, self, made)  # type: ignore[no-any-return]

    def _first_otherwise(self, scope: Scope) -> _T:
        """`first_use`, where the scope has ended, reads, has replicas, or is being committed."""
        require_open(scope)
        settling = settling_of(scope)
        if settling is not None and (session := settling.session_for(self)) is not None:
            return session  # type: ignore[no-any-return]
        made = self.createfunc()
        self._tie(made, scope)
        return keep(scope, self, made)

    def _tie(self, session: _T, scope: Scope) -> None:
        """Tie to `scope` what a factory has made, before another thread can see it."""
        inner = self.kind.inner(session)
        if inner is not None:
            if tie_of(inner) is not None:
                check_own(inner, scope)
            if reads := reads_only(scope):
                self._place(inner, scope)  # first: it may change the class
            made_class: type[Session] = type(inner)  # pyright: ignore[reportUnknownVariableType]
            known = self._reading if reads else self._listening
            if made_class is known or not listen_to(inner):
                pass
            elif reads:
                self._reading = made_class
            else:
                self._listening = made_class
                if type(made_class) is type and made_class.__new__ is object.__new__:
                    self._simple = made_class
            tie = tie_to(inner, scope, self.kind)
            needed = needs_for_commit(scope)
            if needed != TIED:
                become(inner, needed, scope, session)
            if self.replicas is not None:
                self.replicas.follow(tie, scope)

    def _place(self, session: Session, scope: Scope) -> None:
        """Let a new session of a read-only scope read: from its own engine, or from a replica."""
        # Imported where they are used for the first time: they take their time.
        if self.replicas is None:
            from rope_middleware.session.reading.sessions import make_reading

            make_reading(session)
        else:
            from rope_middleware.session.reading.failover import place

            place(session, scope, self, self.replicas)

    def _remove_from(self, scope: Scope) -> _T | None:
        """Take the session out of its scope; return it, or None."""
        session: Any = forget(scope, self)
        if session is not None:
            tie = _tie_of(self.kind, session)
            if tie is not None:
                tie.is_removed = True
                if self.kind.is_async:
                    note_error(self.kind.inner(session))
        return session  # type: ignore[no-any-return]

    def _keep_also(self, session: Any) -> None:
        tie = _tie_of(self.kind, session)
        if tie is not None:
            keep_also(tie, session)


def tying(kind: Callable[[], SyncKind], create: Callable[..., _T]) -> Callable[..., _T]:
    """Make `create` tie its sessions to no scope: they are known while they have something open.

    Args:
        kind: gives what they are, once one is made.
        create: makes the sessions of a user's own scopefunc.
    """

    def create_tied(**kw: Any) -> _T:
        session = create(**kw)
        inner: Session | None = kind().inner(session)
        if inner is not None:
            check_own(inner, None)
            if tie_of(inner) is None:
                listen_to(inner)
                tie_to(inner, None, kind())
        return session

    return create_tied


def _tie_of(kind: SessionKind, session: Any) -> Any:
    inner = kind.inner(session)
    return None if inner is None else tie_of(inner)


class StrictRegistry(ScopedRegistry[_T]):
    """The registry outside of scopes where nothing may happen there."""

    __slots__ = ()

    def __init__(self, createfunc: Callable[..., _T]) -> None:
        super().__init__(createfunc, current_scope)

    def __call__(self) -> _T:
        raise no_scope()

    def has(self) -> bool:
        return False

    def set(self, obj: _T) -> None:  # noqa: ARG002
        raise no_scope()

    def clear(self) -> None:
        pass


def use_replicas(registry: ScopeRegistry[Any], given: Any, expected: type, factory: object) -> None:
    """Let the sessions of read-only scopes read from replicas; see `reading.replicas`."""
    from rope_middleware.session.reading.failover import check_factory
    from rope_middleware.session.reading.replicas import replicas_of

    registry.replicas = replicas_of(given, expected)
    if registry.replicas is not None:
        check_factory(factory)
