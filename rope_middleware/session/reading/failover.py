"""A read-only session on replicas: it reads from one, and goes elsewhere where that is lost.

The statement that found a replica lost goes to another engine: it reads, so it may be run again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from rope_middleware.errors import RopeError
from rope_middleware.scope.reading import carried_of, choice_of
from rope_middleware.scope.scope import Scope
from rope_middleware.session.reading.replicas import Choice, Replicas
from rope_middleware.session.reading.sessions import Reading, make_reading

if TYPE_CHECKING:
    from rope_middleware.scope.kind import SessionKey

__all__ = ["check_factory", "place"]

_CHOICE = "_rope_middleware_choice"
_HAS_LOST = "_rope_middleware_has_lost"


def place(session: Session, scope: Scope, key: SessionKey, replicas: Replicas) -> None:
    """Let a new session of a read-only scope read from a replica.

    Args:
        session: a new one of `scope`.
        scope: the current one.
        key: the registry that the session belongs to.
        replicas: of its jenny.

    Raises:
        RopeError: the session itself chooses among engines.
    """
    _check_binds(type(session), _has_binds(session))
    make_reading(session, _ReadingReplica)
    choice = choice_of(scope, key, lambda: Choice(replicas, carried_of(scope)))
    session.__dict__[_CHOICE] = choice


def check_factory(factory: Any) -> None:
    """Check what is known of a jenny's factory before it makes a session.

    Raises:
        RopeError: its sessions choose among engines themselves.
    """
    known: dict[str, Any] = getattr(factory, "kw", {})
    session_class: Any = known.get("sync_session_class") or getattr(factory, "class_", Session)
    if isinstance(session_class, type) and issubclass(session_class, Session):
        _check_binds(session_class, bool(known.get("binds")))


def _check_binds(session_class: type[Session], has_binds: bool) -> None:
    if has_binds or session_class.get_bind is not Session.get_bind:
        raise RopeError(
            f"The {session_class.__name__} chooses its engine itself, by binds= or get_bind(), and "
            "the jenny has replicas= to choose from: two choices for one session. Give the jenny "
            "a factory with bind= alone, or no replicas, and choose among them in get_bind()."
        )


def _has_binds(session: Session) -> bool:
    """Tell whether `session` has engines for single classes or tables."""
    # Until 2.1 is the oldest SQLAlchemy: there it is public.
    private: Any = session.__dict__.get("_Session__binds")
    return bool(session.binds if private is None else private)


class _ReadingReplica(Reading):
    """A reading session that goes to another engine where one is lost."""

    def get_bind(self, *args: Any, **kw: Any) -> Engine | Connection:
        if kw.get("bind") is None and not isinstance(self.bind, Connection):
            choice: Choice = self.__dict__[_CHOICE]
            engine = choice.engine()
            if engine is not None:
                return engine
        return super().get_bind(*args, **kw)

    def execute(self, *args: Any, **kw: Any) -> Any:
        return self._read(super().execute, args, kw)

    def scalars(self, *args: Any, **kw: Any) -> Any:
        return self._read(super().scalars, args, kw)

    def scalar(self, *args: Any, **kw: Any) -> Any:
        return self._read(super().scalar, args, kw)

    def connection(self, *args: Any, **kw: Any) -> Connection:
        connection: Connection = self._read(super().connection, args, kw)
        return connection

    def commit(self) -> None:
        """Commit nothing. A connection that was lost has nothing to commit, and cannot."""
        if not self.__dict__.pop(_HAS_LOST, False):
            super().commit()
            return
        self.flush()
        if self.expire_on_commit:
            self.rollback()  # which expires what is loaded, as a commit does
            return
        kept = list(self)
        self.expunge_all()
        self.rollback()
        self.add_all(kept)

    def _read(self, call: Callable[..., Any], args: tuple[Any, ...], kw: dict[str, Any]) -> Any:
        choice: Choice = self.__dict__[_CHOICE]
        while True:
            try:
                result = call(*args, **kw)
            except (DBAPIError, OSError) as error:
                if "bind" in (kw.get("bind_arguments") or ()):
                    raise
                if not choice.again(choice.replica, error):
                    raise
                self.__dict__[_HAS_LOST] = True
            else:
                if choice.replica is not None:
                    choice.replica.answered()
                return result
