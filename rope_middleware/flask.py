"""Drop-in for Flask-SQLAlchemy-Session: the session of the application context.

``from flask_sqlalchemy_session import ...`` becomes ``from rope_middleware.flask import ...``.
The session is kept in a `Scope` like any other; only that this scope lies in Flask's ``g``,
which lives and ends with the application context.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

try:
    from flask import current_app, g, has_app_context
    from werkzeug.local import LocalProxy
except ImportError as _error:
    raise ImportError(
        "rope_middleware.flask needs Flask: pip install 'rope-middleware[flask]'"
    ) from _error

from sqlalchemy.orm import Session

from rope_middleware.jenny import SessionJenny
from rope_middleware.rope.rope import ScopeRope
from rope_middleware.scope.ending import end
from rope_middleware.scope.options import DEFAULT
from rope_middleware.scope.response import open_as
from rope_middleware.scope.scope import Scope, is_over
from rope_middleware.session.registry import ScopeRegistry

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask import Flask

__all__ = ["current_session", "flask_scoped_session"]

_S = TypeVar("_S", bound=Session)
_T = TypeVar("_T", bound=Any)

_CONTEXT = "_rope_middleware_context"


class _Context:
    """Lies in ``g``: the scope of an application context, and its end if all else fails.

    Flask calls no teardown function after one that raises, and one that comes after ours may
    use a session again. What is left then ends with the context itself.
    """

    def __init__(self, name: str) -> None:
        self.scope = Scope()
        open_as(self.scope, name, DEFAULT)

    def __del__(self) -> None:
        if not is_over(self.scope):
            end(self.scope)


class _AppContextRegistry(ScopeRegistry[_T]):
    """Finds the session in the scope of the current application context."""

    __slots__ = ()

    def scope(self) -> Scope | None:
        if not has_app_context():
            return super().scope()
        context: _Context | None = g.get(_CONTEXT)
        if context is not None:
            return context.scope
        made = _Context(f"application context of {_app().name}")
        # Two threads may share a context: only one of them sets it.
        return cast("_Context", g.setdefault(_CONTEXT, made)).scope


class flask_scoped_session(SessionJenny[_S]):  # noqa: N801 - the name that is documented
    """A `SessionJenny` whose session belongs to Flask's application context.

    Requests, CLI commands, ``with app.app_context():`` and test contexts have a session each;
    it is closed when the context is torn down. Outside of a context it is a `SessionJenny`
    like any other. Several of them work in one app; `current_session` is the session of the
    one that was initialised last.

    Args:
        session_factory: a `sessionmaker`, or any callable that returns a new `Session`.
        app: the Flask application; or call `init_app` later.

    Raises:
        TypeError: `session_factory` is not callable.
    """

    registry: ScopeRegistry[_S]

    def __init__(self, session_factory: Callable[..., _S], app: Flask | None = None) -> None:
        super().__init__(session_factory)
        self.registry = _AppContextRegistry(self.registry.createfunc, self.registry.outside)
        self._unbound_rope = ScopeRope(self.registry)
        if app is not None:
            self.init_app(app)

    @property
    def session(self) -> _S:
        """The session of the application context; made on first use."""
        return self.registry()

    def init_app(self, app: Flask) -> None:
        """Set this up for `app`: as ``app.scoped_session``, removed at each teardown.

        Args:
            app: the Flask application.
        """
        # Where Flask-SQLAlchemy-Session documents it; Flask itself has no such attribute.
        cast("Any", app).scoped_session = self
        if _teardown not in app.teardown_appcontext_funcs:
            app.teardown_appcontext(_teardown)


def _teardown(_: BaseException | None) -> None:
    context: _Context | None = g.pop(_CONTEXT, None)
    if context is not None:
        end(context.scope)


def _app() -> Flask:
    return cast("Any", current_app)._get_current_object()  # type: ignore[no-any-return]


def _current_session() -> Any:
    if not has_app_context():
        raise RuntimeError(
            "Cannot access current_session when outside of an application context. Use "
            '"with app.app_context():".'
        )
    app = _app()
    if not hasattr(app, "scoped_session"):
        raise AttributeError(
            f"{app} has no 'scoped_session' attribute. You need to initialize it with a "
            "flask_scoped_session."
        )
    return cast("Any", app).scoped_session


current_session: flask_scoped_session[Session] = cast("Any", LocalProxy(_current_session))
"""The session of the current application context.

Raises:
    RuntimeError: there is no application context.
    AttributeError: the app has no `flask_scoped_session`.
"""
