"""Which sandbox a session belongs to, and how it comes to work there.

A `Route` belongs to a jenny. The first `Sandbox` of that jenny sets it up, and it stays: what
outlives a sandbox has to be told so, and must not reach the real database.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, ref

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import _sessions  # all that live, as close_all_sessions() needs them
from sqlalchemy.util import ScopedRegistry

from rope_middleware.errors import RopeError
from rope_middleware.rope.registry import RopeRegistry
from rope_middleware.scope.context import current
from rope_middleware.scope.scope import Scope, session_of
from rope_middleware.session.reading.sessions import Reading, reading_bind
from rope_middleware.session.registry import ScopeRegistry, StrictRegistry
from rope_middleware.session.tie import is_session, tie_of
from rope_middleware.testing.errors import closed

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["IsSandbox", "Route", "block", "named", "route_of"]


class IsSandbox(Protocol):
    """What is asked of a sandbox here."""

    name: str
    jennies: tuple[Any, ...]

    @property
    def is_open(self) -> bool:
        """Whether it has been entered and not left."""
        ...

    def engine_for(self, engine: Engine) -> Engine:
        """Return the engine that its sessions use in the place of `engine`."""
        ...

    def scope_here(self) -> Scope:
        """Return the scope of the test's own, for this thread."""
        ...


named: ContextVar[IsSandbox | None] = ContextVar("rope_middleware.testing.named", default=None)
"""The sandbox that the request being served names."""

block: ContextVar[IsSandbox | None] = ContextVar("rope_middleware.testing.block", default=None)
"""The sandbox in whose block the code runs."""

_routes: WeakKeyDictionary[Any, Route] = WeakKeyDictionary()
_setting_up = threading.Lock()


def route_of(jenny: Any) -> Route:
    """Return the route of a jenny; set it up if this is its first sandbox."""
    with _setting_up:
        route = _routes.get(jenny)
        if route is None:
            route = _routes[jenny] = Route(jenny.registry)
            for session in list(_sessions.values()):
                if route.owns(session):
                    _Way(session, route)
        return route


class Route:
    """Which sandbox the sessions of one jenny work in.

    Args:
        registry: the jenny's.
    """

    def __init__(self, registry: ScopeRegistry[Any]) -> None:
        self.open: list[IsSandbox] = []
        self._registry = registry
        # Where a scope belongs is found out once: its end must not find another sandbox.
        self._of_scope: WeakKeyDictionary[Scope, IsSandbox] = WeakKeyDictionary()
        self._create: Callable[..., Any] = registry.createfunc
        registry.createfunc = registry.outside.createfunc = self._made
        outside = registry.outside
        if isinstance(outside, StrictRegistry):
            registry.outside = _InBlock(self, registry, outside)

    def owns(self, session: Session) -> bool:
        """Tell whether `session`, made before there was a route, is the jenny's."""
        tie = tie_of(session)
        if tie is None:
            return False
        if tie.scope is not None:
            return session_of(tie.scope, self._registry) is self._registry.kind.handed_out(session)
        outside = self._registry.outside
        return isinstance(outside, RopeRegistry) and outside.holds(session)

    def claim(self, scope: Scope, sandbox: IsSandbox) -> None:
        """Say that `scope` belongs to `sandbox`."""
        self._of_scope[scope] = sandbox

    def find(self, scope: Scope | None = None) -> IsSandbox | None:
        """Return the sandbox for what runs here, in `scope`; None for the real database.

        Raises:
            RopeError: several are open, and nothing says which one is meant.
            ScopeClosedError: it has ended.
        """
        found = None if scope is None else self._of_scope.get(scope)
        for sandbox in (named.get(), block.get()):
            if found is None and sandbox is not None and self in map(route_of, sandbox.jennies):
                found = sandbox
        if found is None and self.open:
            found = self._only()
        if found is None:
            return None
        if not found.is_open:
            raise closed(found.name)
        if scope is not None:
            self._of_scope[scope] = found
        return found

    def _only(self) -> IsSandbox:
        if len(self.open) > 1:
            names = ", ".join(repr(sandbox.name) for sandbox in self.open)
            raise RopeError(
                f"Several sandboxes are open ({names}), and nothing says which one this code "
                "belongs to. Let the request name it by the header or cookie Rope-Sandbox "
                "(headers=sandbox.headers or cookies=sandbox.cookies, and SandboxMiddleware "
                "around the app), or run the code in the sandbox's block."
            )
        return self.open[0]

    def _made(self, **kw: Any) -> Any:
        made = self._create(**kw)
        session = self._registry.kind.inner(made)
        if is_session(session):
            _Way(session, self)
        return made


class _Way:
    """Says which engine a session uses, in the place of the session's class.

    On the session itself: the class may be the application's, with a get_bind() of its own. It
    asks anew for each transaction.
    """

    def __init__(self, session: Session, route: Route) -> None:
        self._route = route
        self._session = ref(session)
        self._transaction: Any = None
        self._sandbox: IsSandbox | None = None
        session.__dict__.update(get_bind=self._get_bind, connection=self._connection)

    def _lookup(self) -> tuple[Session, type[Session]]:
        session = self._session()
        assert session is not None  # noqa: S101 - its own method runs
        transaction = session.get_transaction()
        if not self._is_known(transaction):
            tie = tie_of(session)
            self._sandbox = self._route.find(None if tie is None else tie.scope)
        self._transaction = transaction
        return session, type(session)

    def _is_known(self, transaction: SessionTransaction | None) -> bool:
        """Tell whether the sandbox was found for this transaction; not to be found another one."""
        if transaction is None:
            return False
        if self._transaction is None:  # SQLAlchemy asks for the engine first, and begins then
            return self._sandbox is not None and self._sandbox.is_open
        return transaction is self._transaction

    def _get_bind(self, *args: Any, **kw: Any) -> Engine | Connection:
        session, its_class = self._lookup()
        if self._sandbox is None or not issubclass(its_class, Reading):
            return self._engine(its_class.get_bind(session, *args, **kw))
        # It would read from a replica, which knows nothing of the sandbox.
        # The first that is neither a reading one, nor a guard that is put in front of one.
        bases: tuple[Any, ...] = its_class.__mro__
        plain = next(
            one for one in bases if issubclass(one, Session) and not issubclass(one, Reading)
        )
        bind = plain.get_bind(session, *args, **kw)
        return self._engine(reading_bind(bind, kw.get("clause")))

    def _connection(
        self, bind_arguments: dict[str, Any] | None = None, execution_options: Any = None
    ) -> Connection:
        session, its_class = self._lookup()
        bind = (bind_arguments or {}).get("bind")
        if bind is not None:
            bind_arguments = {"bind": self._engine(bind)}
        return its_class.connection(session, bind_arguments, execution_options)

    def _engine(self, bind: Engine | Connection) -> Engine | Connection:
        if self._sandbox is None:
            return bind
        if isinstance(bind, Connection):
            raise RopeError(
                f"In the sandbox {self._sandbox.name!r} a session is bound to a Connection that "
                "the application has made itself, and nobody would roll that back. Bind the "
                "session factory to the engine: the sandbox takes care of the connection."
            )
        return self._sandbox.engine_for(bind)


class _InBlock(StrictRegistry[Any]):
    """Outside of scopes, where nothing may happen: in a sandbox there is the test's own scope.

    Args:
        route: the jenny's.
        registry: the jenny's.
        instead: what it had there.
    """

    def __init__(
        self, route: Route, registry: ScopeRegistry[Any], instead: StrictRegistry[Any]
    ) -> None:
        super().__init__(instead.createfunc)
        self._instead = instead
        self._route = route
        self._of_jenny = registry

    def __call__(self) -> Any:
        return self._in_scope(lambda registry: registry())

    def has(self) -> bool:
        return bool(self._in_scope(lambda registry: registry.has()))

    def set(self, obj: Any) -> None:
        self._in_scope(lambda registry: registry.set(obj))

    def clear(self) -> None:
        self._in_scope(lambda registry: registry.clear())

    def _in_scope(self, act: Callable[[ScopedRegistry[Any]], Any]) -> Any:
        sandbox = self._route.find()
        if sandbox is None:
            return act(self._instead)
        token = current.set(sandbox.scope_here())
        try:
            return act(self._of_jenny)
        finally:
            current.reset(token)
