"""Drop-in for Flask-SQLAlchemy-Session: the session of the application context.

``from flask_sqlalchemy_session import ...`` becomes ``from rope_middleware.flask import ...``.
The session is kept in a `Scope` like any other; only that this scope lies in Flask's ``g``,
which lives and ends with the application context.

Flask's own context may stay behind: with `stream_with_context` a client hangs up, another thread
closes the body, and the context of that request stays current in the thread that began it. Later
requests of the thread find it, take it for theirs, and never tear it down
(https://github.com/pallets/flask/issues/6123). Such a request keeps its sessions itself.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakSet, ref

try:
    import flask
    from flask import current_app, g, has_app_context, has_request_context, request
    from werkzeug.local import LocalProxy
except ImportError as _error:
    raise ImportError(
        "rope_middleware.flask needs Flask: pip install 'rope-middleware[flask]'"
    ) from _error

from sqlalchemy.orm import Session

from rope_middleware.flask.popped import being_popped
from rope_middleware.jenny import SessionJenny
from rope_middleware.rope.rope import ScopeRope
from rope_middleware.running.forks import at_fork
from rope_middleware.scope.ending import detach, end, explain
from rope_middleware.scope.options import DEFAULT
from rope_middleware.scope.order import invalidate_failed
from rope_middleware.scope.response import open_as
from rope_middleware.scope.scope import Scope, SyncScope, is_over, session_of
from rope_middleware.session.registry import ScopeRegistry
from rope_middleware.session.tie import tie_of
from rope_middleware.session.unsaved import tell_lost
from rope_middleware.signature import explained

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask import Flask

__all__ = ["current_session", "flask_scoped_session"]

_S = TypeVar("_S", bound=Session)
_T = TypeVar("_T", bound=Any)

_app: Any = current_app  # a cast() would be a call each time
_g: Any = g
_request: Any = request

_REMOVE = vars(SessionJenny)["remove"]
_CONTEXT = "_rope_middleware_context"
_LAST = "_rope_middleware_last"  # in `g`: the last request that ended in this context
_OWNER = "_rope_middleware_owner"  # in `g` of a context that is torn down: whose it was
_EXTENSION = "rope_middleware"  # in `app.extensions`: the sessions that were initialised


class _Context:
    """Lies in ``g``: the scope of an application context, and its end if all else fails.

    Flask calls no teardown function after one that raises, and one that comes after ours may
    use a session again. What is left then ends with the context itself.
    """

    def __init__(self, name: str) -> None:
        self.scope = SyncScope()
        open_as(self.scope, name, DEFAULT)
        _open.add(self)

    def __del__(self) -> None:
        if not is_over(self.scope):
            end(self.scope)


# What a forked process leaves to its parent: these scopes are not in the ContextVar.
_open: WeakSet[_Context] = WeakSet()


def _after_fork() -> None:
    for context in list(_open):
        if not is_over(context.scope):
            detach(context.scope)


at_fork(after_in_child=_after_fork)


class _AppContextRegistry(ScopeRegistry[_T]):
    """Finds the session in the scope of the current application context."""

    __slots__ = ()

    def scope(self) -> Scope | None:
        if not has_app_context():
            return super().scope()
        home: Any = _home()
        context: _Context | None = home.get(_CONTEXT)
        if context is not None:
            return context.scope
        made = _Context(f"application context of {_app.name}")
        if type(cast("object", home)) is dict:  # the request's
            _end_before(home, made)
        # Two threads may share a context: only one of them sets it.
        return cast("_Context", home.setdefault(_CONTEXT, made)).scope


# What this thread has made last for a request that keeps its sessions itself, and for which.
_here = threading.local()


def _end_before(home: Any, made: _Context) -> None:
    """End what an earlier request of this thread keeps itself.

    Its streamed body was closed by another thread, where Flask calls no teardown function.
    """
    context, owner = [one() for one in getattr(_here, "last", ())] or (None, None)
    _here.last = ref(made), ref(_request._get_current_object())
    theirs = cast("dict[str, Any]", {} if owner is None else vars(owner))
    if context is not None and theirs is not home and theirs.get(_CONTEXT) is context:
        _end(theirs, None, None)


def _home() -> Any:
    """Return what keeps the `_Context`: ``g``, or the request if ``g`` is an earlier request's."""
    here = _g._get_current_object()  # each use of the proxy is five calls
    owner: ref[Any] | None = here.get(_OWNER)
    if owner is not None and has_request_context():
        current = _request._get_current_object()
        if owner() is not current:
            return cast("dict[str, Any]", vars(current))
    return here


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

    @explained("session = flask_scoped_session(sessionmaker(engine), app)")
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

        Raises:
            TypeError: `app` is something else.
        """
        if not isinstance(cast("object", app), flask.Flask):
            raise TypeError(
                f"init_app() takes a Flask application, not {app!r}: it is kept in Flask's "
                "application context. Elsewhere use SessionJenny and RopeMiddleware(app)."
            )
        # Where Flask-SQLAlchemy-Session documents it; Flask itself has no such attribute.
        cast("Any", app).scoped_session = self
        sessions: list[flask_scoped_session[Any]] = app.extensions.setdefault(_EXTENSION, [])
        if self not in sessions:
            sessions.append(self)
        if _teardown not in app.teardown_appcontext_funcs:
            app.teardown_appcontext(_teardown)
            app.teardown_request(_teardown_request)


def _teardown_request(error: BaseException | None) -> None:
    """End what a request keeps itself, and note whose context it ends in.

    Args:
        error: that nobody has handled.
    """
    popped = being_popped()
    here = has_request_context()
    mine = _request._get_current_object() if here else None
    ended = mine if popped is None else popped.request
    if ended is mine and ended is not None:
        home = _home()
        if home is vars(ended):
            _end(home, _app._get_current_object(), error)
        else:
            setattr(home, _LAST, ref(ended))
    elif ended is not None:
        _end(vars(ended), None, error)  # by another thread


def _teardown(error: BaseException | None) -> None:
    """End what lies in the ``g`` of the context that is popped.

    Not always the current one: another thread may finalise a streamed body, also one that is
    within a request of its own.

    Args:
        error: that nobody has handled.
    """
    popped = being_popped()
    home: Any = _g._get_current_object() if popped is None or has_app_context() else None
    if popped is None or popped.g is home:
        app: Flask | None = _app._get_current_object()
    else:
        home, app = popped.g, None
    owner = home.pop(_LAST, None)
    if owner is not None:
        setattr(home, _OWNER, owner)
    _end(home, app, error)


def _end(home: Any, app: Flask | None, error: BaseException | None) -> None:
    """End the scope that `home` keeps.

    Args:
        home: what keeps it.
        app: whose sessions are removed first, as documented. None: they would be the sessions of
            another context.
        error: that has left the context, or None.
    """
    kept: _Context | None = home.get(_CONTEXT)
    if error is not None and kept is not None:
        explain(kept.scope, error)
    try:
        for session in () if app is None else app.extensions[_EXTENSION]:
            _remove(session, home)
    finally:
        if (context := home.pop(_CONTEXT, None)) is not None:
            end(context.scope)


def _remove(session: flask_scoped_session[Any], home: Any) -> None:
    """Call the documented `remove`, which may be a subclass's."""
    context: _Context | None = home.get(_CONTEXT)
    made = None if context is None else session_of(context.scope, session.registry)
    if made is not None:
        _tell_lost(session.registry.kind.inner(made))
    elif getattr(session.remove, "__func__", None) is _REMOVE:
        return  # a scope would be made only to find that there is nothing to remove
    try:
        session.remove()
    except Exception as error:
        if context is None or made is None:
            raise
        invalidate_failed(context.scope, session.registry.kind, made, error)


def _tell_lost(session: Session | None) -> None:
    """Say what is lost: a `remove` does not, because one of the application's own is meant."""
    if session is not None and (tie := tie_of(session)) is not None:
        tell_lost(tie, session)


def _current_session() -> Any:
    if not has_app_context():
        raise RuntimeError(
            "Cannot access current_session when outside of an application context. Use "
            '"with app.app_context():".'
        )
    app = _app._get_current_object()
    if not hasattr(app, "scoped_session"):
        raise AttributeError(
            f"{app} has no 'scoped_session' attribute. You need to initialize it with a "
            "flask_scoped_session."
        )
    return app.scoped_session


current_session: flask_scoped_session[Session] = cast("Any", LocalProxy(_current_session))
"""The session of the current application context.

Raises:
    RuntimeError: there is no application context.
    AttributeError: the app has no `flask_scoped_session`.
"""
