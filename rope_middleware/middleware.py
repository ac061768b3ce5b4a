"""What both middlewares have in common, and the choice between them.

`RopeMiddleware(app)` is an instance of the subclass for the app's protocol, as
``pathlib.Path()`` is a PosixPath. The subclasses announce themselves by their class keyword
``protocol``, so nothing here knows them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from importlib import import_module
from inspect import Parameter
from typing import TYPE_CHECKING, Any, ClassVar, overload

from rope_middleware.apps import NAMES, belongs_to_app, check_app, is_around_itself, protocol_of
from rope_middleware.elsewhere import stand_in
from rope_middleware.scope.context import logger
from rope_middleware.scope.options import DEFAULT, Options, methods_of, options_of
from rope_middleware.scope.response import options_now, take_in
from rope_middleware.scope.scope import Scope
from rope_middleware.session.failures.listening import listen_for_retries
from rope_middleware.signature import SignatureOf, explained, parameters_of

if TYPE_CHECKING:
    from typing import TypedDict, Unpack
    from wsgiref.types import WSGIApplication

    # For type checkers alone: at run time neither is known here.
    from rope_middleware.asgi import ASGIRopeMiddleware
    from rope_middleware.protocols import ASGIApp, CommitError, Veto
    from rope_middleware.running.line import Line
    from rope_middleware.scope.kind import PlainKind
    from rope_middleware.wsgi import WSGIRopeMiddleware

    class GivenOptions(TypedDict, total=False):
        """What a `RopeMiddleware` takes by keyword: see `Options`."""

        commit_on_success: bool
        commit_veto: Veto | None
        on_commit_error: CommitError | None
        retries: int
        max_active: int | None
        read_only: Collection[str]
        close_timeout: float


__all__ = ["RopeMiddleware"]


class RopeMiddleware:
    """Opens a scope for each request and ends it, whatever happens.

    Given an ASGI application this is an `ASGIRopeMiddleware`, given a WSGI application a
    `WSGIRopeMiddleware`.

    Args:
        app: the application. Its signature tells whether it is ASGI or WSGI.
        registries: `scoped_session` and `async_scoped_session` objects made with
            ``scopefunc=current_scope``. They are removed at the end of each request. A
            `SessionJenny` need not be named.
        commit_on_success: commit before a response with a status under 400 starts, else roll
            back. Later work (a stream, a background task) is committed when the scope ends.
        commit_veto: with commit_on_success, called with the status and the headers (a list of
            pairs of str). If it returns something true, the scope rolls back. It must not block.
        on_commit_error: called with the error of a failed commit, after the last try. It returns
            the application that answers (every Starlette or Werkzeug response is one), or None
            for the default. An error that it raises comes out of the middleware. It must not
            block.
        retries: how often a request is run again if the database refused its transaction
            (serialization failure, deadlock, SQLite busy), or if a connection was lost or could
            not be made before anything was committed. If the answer to a commit was lost,
            PostgreSQL is asked what became of it. The body of the request is kept for another
            try, up to 1 MiB; a request with a longer one is run once.
        max_active: how many requests may be served at a time. The others wait in line, first come,
            first served. A request counts until it holds no connection any more: until its end,
            or until its response starts if it holds none then. A good number is the size of the
            pool (pool_size + max_overflow, 15 by default). None, the default, means no limit.
            WebSockets are not counted.
        read_only: methods, as ``("GET", "HEAD")``. Sessions of such requests read without a
            transaction, and refuse to write. If a jenny has `replicas`, they read from one.
        close_timeout: seconds for each of these: the database's answer to the COMMIT of an async
            session, the end of an async session, an async `on_close` function; 10 by default.
            After that the connection is invalidated, and a COMMIT without an answer is in doubt.

    Raises:
        TypeError: `app` is no application, or could be ASGI as well as WSGI, or an option has a
            wrong type.
        ValueError: `retries` is negative, `max_active` is less than 1, or `close_timeout` is not
            more than 0.

    The ASGI scope and the WSGI environ carry the open `Scope` under ``"rope_middleware.scope"``.
    Two middlewares around the same request share one scope, and their options add up: `registries`
    and `read_only` of both, a commit or a veto that either asks for. `retries`, `max_active` and
    `close_timeout` are those of the outer one.
    """

    _protocols: ClassVar[dict[str, type[RopeMiddleware]]] = {}
    _protocol: ClassVar[str]
    __signature__: ClassVar[SignatureOf] = SignatureOf(
        lambda: [
            Parameter("app", Parameter.POSITIONAL_OR_KEYWORD),
            Parameter("registries", Parameter.POSITIONAL_OR_KEYWORD, default=()),
            *parameters_of(Options),
        ]
    )

    # Of a subclass whose __init__ has not called ours; `_check_set_up` says so.
    _has_more = True
    _is_set_up = False

    def __init_subclass__(cls, protocol: str = "", **more: Any) -> None:
        super().__init_subclass__(**more)
        if protocol:
            cls._protocols[protocol] = cls
            cls._protocol = protocol

    @overload
    def __new__(
        cls, app: ASGIApp, registries: Iterable[Any] = (), **options: Unpack[GivenOptions]
    ) -> ASGIRopeMiddleware: ...
    @overload
    def __new__(
        cls, app: WSGIApplication, registries: Iterable[Any] = (), **options: Unpack[GivenOptions]
    ) -> WSGIRopeMiddleware: ...
    def __new__(cls, app: Any = None, *_: Any, **__: Any) -> Any:
        """Choose the class by the protocol of `app`."""
        if not any(issubclass(cls, chosen) for chosen in cls._protocols.values()):
            cls = _choose(cls, _class_of(protocol_of(app)))
        return object.__new__(cls)

    if not TYPE_CHECKING:
        # Hidden from type checkers, which take the type from `__new__`: with an `__init__` in
        # sight mypy ignores `__new__`, and pyright checks both.
        @explained("app = RopeMiddleware(app, commit_on_success=True)")
        def __init__(self, app=None, registries=(), **options):
            self._set_up(app, registries, options)

    def _set_up(self, app: Any, registries: Iterable[Any], options: dict[str, Any]) -> None:
        who = type(self).__name__
        check_app(who, app, self._protocol)
        self.app = app
        if "read_only" in options:
            options["read_only"] = methods_of(options["read_only"])
        self._options = options_of(who, options)
        # What few middlewares need is imported by those: it takes its time.
        self._registries: tuple[PlainKind, ...] = ()
        if registries != ():
            from rope_middleware.session.plain import kinds_of

            self._registries = kinds_of(registries)
        self._line: Line | None = None
        if self._options.max_active is not None:
            from rope_middleware.running.line import Line

            self._line = Line(self._options.max_active)
        # Requests of apps without any of these take the short way.
        self._has_more = bool(self._options.retries or self._registries or self._line)
        self._reads = bool(self._options.read_only)
        self._has_told = False
        self._is_set_up = True
        if self._options.retries:
            listen_for_retries()

    def _check_set_up(self) -> None:
        """Check that there is something to serve.

        Raises:
            TypeError: a subclass has an `__init__` that does not call ours.
        """
        if not self._is_set_up:
            name = type(self).__name__
            raise TypeError(
                f"{name}.__init__() has not set up the middleware: there is no application. Call "
                "super().__init__(app, **options) in it."
            )

    def _check_order(self) -> None:
        """Check that the application does not call the middleware that calls it.

        Raises:
            TypeError: it does, and a request would go round for ever.
        """
        if is_around_itself(self, self.app):
            raise TypeError(
                f"{self.app!r} calls this {type(self).__name__}, which calls it, and so on for "
                "ever. Wrap what the attribute was: app.wsgi_app = RopeMiddleware(app.wsgi_app)."
            )

    def _take_in(self, outer: Scope) -> bool:
        """Add our options to the scope of another middleware around this one (S6).

        Returns:
            Whether we have to watch the response for it.
        """
        if not self._has_told:
            self._has_told = True
            self._tell_dropped(outer)
        return take_in(outer, self._options, self._registries)

    def _tell_dropped(self, outer: Scope) -> None:
        dropped = [
            name
            for name in ("retries", "max_active", "close_timeout")
            if getattr(self._options, name)
            not in (getattr(DEFAULT, name), getattr(options_now(outer), name))
        ]
        if dropped:
            logger.warning(
                "%s of a middleware inside of another one (seen at %r) are dropped: the outermost "
                "one's count. Give them there.",
                " and ".join(f"{name}={getattr(self._options, name)!r}" for name in dropped),
                outer.name,
            )


stand_in(RopeMiddleware, NAMES, belongs_to_app)


def _class_of(protocol: str) -> type[RopeMiddleware]:
    """Return the class of a protocol; its module announces itself when it is imported."""
    if protocol not in RopeMiddleware._protocols:
        import_module(f"rope_middleware.{protocol}")
    return RopeMiddleware._protocols[protocol]


_chosen: dict[tuple[type, type], type] = {}


def _choose(cls: type, protocol: type) -> Any:
    """Return the class of the protocol, of which a user's own subclass has one more."""
    if cls is RopeMiddleware:
        return protocol
    if (cls, protocol) not in _chosen:
        _chosen[cls, protocol] = type(cls.__name__, (cls, protocol), {"__module__": cls.__module__})
    return _chosen[cls, protocol]
