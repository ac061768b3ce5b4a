"""`registries=`: plain (async_)scoped_sessions, whose sessions a scope removes.

Such a scoped_session keeps its session itself and finds it by its own scopefunc (`current_scope`).
So a `PlainSessions` is the key and the kind at once, and every method ignores the session that it
is given.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.exc import IllegalStateChangeError
from sqlalchemy.orm import Session
from sqlalchemy.util import ScopedRegistry

from rope_middleware.scope.context import is_async_callable
from rope_middleware.scope.opening import current_scope
from rope_middleware.scope.scope import is_over
from rope_middleware.session import closing, committing, idle
from rope_middleware.session.connections import leave_block
from rope_middleware.session.failures.listening import listen_for_errors
from rope_middleware.session.failures.sharing import tell_cut_off
from rope_middleware.session.guard.sessions import guard
from rope_middleware.session.kinds import SYNC, SyncKind
from rope_middleware.session.listeners import listen
from rope_middleware.session.registry import ScopeRegistry
from rope_middleware.session.tie import is_session, tie_of, tie_to
from rope_middleware.session.unsaved import has_pending

if TYPE_CHECKING:
    from rope_middleware.scope.kind import PlainKind, SessionKind

__all__ = ["PlainSessions", "kinds_of"]


class PlainSessions(SyncKind):
    """The sessions of a plain `scoped_session`, one for each scope."""

    def __init__(self, scoped: Any) -> None:
        registry = getattr(scoped, "registry", None)
        if not callable(getattr(scoped, "remove", None)) or not isinstance(
            registry, ScopedRegistry
        ):
            raise TypeError(
                f"registries= takes scoped_session objects, not {scoped!r}. Make each with "
                "scopefunc=current_scope and give them in a list."
            )
        if getattr(cast("Any", registry), "scopefunc", None) is not current_scope:
            raise TypeError(
                f"registries= was given {scoped!r}, whose sessions do not belong to a scope: no "
                "end of a request would find them. Make it with scopefunc=current_scope (from "
                "rope_middleware)."
            )
        self.scoped = scoped
        # As async_scoped_session's is.
        self.is_async: bool = is_async_callable(scoped.remove)
        self.registry: ScopedRegistry[Any] = registry
        factory: Any = getattr(scoped, "session_factory", None)
        session_class: Any = getattr(factory, "class_", Session)
        listen_for_errors()
        # An async_sessionmaker's class is no Session; its sessions' inner one is.
        listen(session_class if issubclass(session_class, Session) else Session)

    @property
    def kind(self) -> SessionKind:
        return self

    @property
    def besides(self) -> SessionKind:
        if not self.is_async:
            return SYNC
        from rope_middleware.session.async_kind import ASYNC

        return ASYNC

    def inner(self, _: Any = None, /) -> Any:
        return _sync_of(self.registry()) if self.registry.has() else None

    def owns(self, session: Any, scope: Any, /) -> bool:
        found = self.registry.registry.get(scope)
        if found is None or _sync_of(found) is not session:
            return False
        if is_over(scope):  # it was made while the scope ended, and nobody removes it any more
            self.registry.registry.pop(scope, None)
        return True

    def is_idle(self, _: Any, /) -> bool:
        session = self.inner()
        if session is None:
            return True
        # The end of an async_scoped_session has to be awaited, whatever it has open.
        return not self.is_async and idle.has_nothing_open(session)

    def has_begun(self, _: Any, /) -> bool:
        session = self.inner()
        return session is not None and closing.has_begun(session)

    def has_changes(self, _: Any, /) -> bool:
        session = self.inner()
        return session is not None and has_pending(session)

    def end_at_once(self, _: Any, /) -> bool:
        return False

    def guard(self, _: Any, scope: Any, /) -> None:
        session = self.inner()
        if is_session(session):
            guard(session, scope)

    def is_twophase(self, _: Any, /) -> bool:
        return bool(getattr(self.inner(), "twophase", False))

    def flush(self, _: Any, /) -> Any:
        if self.is_async:
            return self.registry().run_sync(committing.flush)
        return committing.flush(self.registry())

    def prepare(self, _: Any, /) -> Any:
        if self.is_async:
            return self.registry().run_sync(Session.prepare)
        return self.registry().prepare()

    def commit(self, _: Any, /) -> Any:
        commit: Any = committing.acommit if self.is_async else committing.commit
        return commit(self.registry())

    def places_alone(self, _: Any, /) -> None:
        return None

    def commit_alone(self, _: Any, /) -> bool:
        return False

    def rollback(self, _: Any, /) -> Any:
        leave_block(self.inner())
        return self.registry().rollback()

    def close(self, _: Any, /) -> Any:
        return self._aclose() if self.is_async else self._close()

    def _close(self) -> None:
        session = self._tied()
        if session is None:
            self.scoped.remove()
        else:
            closing.close(session, self.scoped.remove)
            if self.registry.has() and is_over(current_scope()):
                self.registry.clear()  # it waits for a connection, and is closed when that comes

    async def _aclose(self) -> None:
        session = self._tied()
        made = None if session is None else self.registry()
        try:
            await self.scoped.remove()
        except IllegalStateChangeError:
            if made is not None:
                await made.run_sync(closing.close_later)
            raise
        if session is not None:
            closing.forget(session)

    def _tied(self) -> Session | None:
        """Return the session, tied to its scope: one that has not begun yet must not do so now."""
        session = self.inner()
        if not is_session(session):
            return None
        if tie_of(session) is None:
            tie_to(session, current_scope())
        return session

    def discard(self, _: Any, /) -> None:
        if not self.is_async:
            self._close()

    def end(self, session: Any, /) -> None:
        self.discard(session)

    def invalidate(self, _: Any, /) -> None:
        session = self.inner()
        if session is not None:
            if is_over(current_scope()):  # else its end removes it: it may get a connection yet
                self.registry.clear()
            closing.invalidate(session)

    def detach(self, _: Any, /) -> None:
        session = self.inner()
        if session is not None:
            closing.detach(session)

    def tells_why(self, _: Any, error: BaseException, name: str, /) -> bool:
        session = self.inner()
        return self.is_async and session is not None and tell_cut_off(session, error, name)

    def explain(self, _: BaseException, /) -> None:
        """Nothing: what is told of sessions that a jenny has made does not fit here."""


def _sync_of(session: Any) -> Any:
    """Return the Session within an AsyncSession; any other as it is."""
    return getattr(session, "sync_session", session)


def kinds_of(registries: Iterable[Any]) -> tuple[PlainKind, ...]:
    """Return how a scope removes the session of each of `registries`.

    Raises:
        TypeError: one of them is no scoped_session, or it is one and not a list of them.
    """
    if isinstance(getattr(registries, "registry", None), ScopeRegistry):
        raise TypeError(
            f"registries= was given {registries!r}: a jenny needs no mention, its sessions belong "
            "to the scope anyway. Leave it out: add_middleware(RopeMiddleware), or "
            "RopeMiddleware(app)."
        )
    if hasattr(registries, "remove") and hasattr(registries, "registry"):
        raise TypeError(f"registries= takes a list of scoped_session objects: [{registries!r}].")
    if not isinstance(cast("object", registries), Iterable):
        raise TypeError(
            f"registries= takes a list of scoped_session objects, not {registries!r}. (A jenny "
            "and its engine need no mention.)"
        )
    # A jenny's session is the scope's anyway.
    return tuple(
        PlainSessions(scoped)
        for scoped in registries
        if not isinstance(getattr(scoped, "registry", None), ScopeRegistry)
    )
