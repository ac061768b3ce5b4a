"""What both middlewares have in common, and the choice between them.

`RopeMiddleware(app)` is an instance of the subclass for the app's protocol, as
``pathlib.Path()`` is a PosixPath. The subclasses announce themselves by their class keyword
``protocol``, so nothing here knows them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, overload

from rope_middleware.refusal import listen_for_refusals
from rope_middleware.registry import keepers_of
from rope_middleware.scope import CLOSE_TIMEOUT, Scope, is_async_callable

if TYPE_CHECKING:
    from typing import TypedDict, Unpack
    from wsgiref.types import WSGIApplication

    from rope_middleware.asgi import ASGIApp, ASGIRopeMiddleware
    from rope_middleware.wsgi import WSGIRopeMiddleware

__all__ = ["REPLAY_LIMIT", "SERVER_ERROR", "RopeMiddleware", "Veto"]

Veto: TypeAlias = Callable[[int, list[tuple[str, str]]], object]

if TYPE_CHECKING:

    class Options(TypedDict, total=False):
        """What a `RopeMiddleware` takes by keyword."""

        commit_on_success: bool
        commit_veto: Veto | None
        retries: int
        close_timeout: float


REPLAY_LIMIT = 1024 * 1024
"""Bytes of a request's body that are kept for another try."""

SERVER_ERROR = b"Internal Server Error"
"""The body of the plain 500 that stands in for a success whose commit failed."""


class RopeMiddleware:
    """Opens a scope for each request and ends it, whatever happens.

    Given an ASGI application this is an `ASGIRopeMiddleware`, given a WSGI application a
    `WSGIRopeMiddleware`.

    Args:
        app: the application; its protocol is told by its signature.
        registries: `scoped_session` and `async_scoped_session` objects made with
            ``scopefunc=current_scope``, to be removed at the end of each request. A
            `SessionJenny` needs no mention.
        commit_on_success: commit before a response with a status under 400 starts, else roll
            back. What is done after that is committed when the scope ends.
        commit_veto: with commit_on_success, called with the status and the headers (a list of
            pairs of str); where it returns something true, the scope rolls back. It must not
            block.
        retries: how often a request is run again when the database refused its transaction as
            one to try again (serialization failure, deadlock, SQLite busy). The request's body
            is kept for that, up to 1 MiB; a longer one is served once.
        close_timeout: seconds that each async session may take to give its connection back, 10
            by default; past it the connection is invalidated.

    Raises:
        TypeError: `app` is no application, or cannot be told apart, or an option is of a
            wrong type.
        ValueError: `retries` is negative, `close_timeout` is not more than 0, or `commit_veto` is
            given without commit_on_success.

    The open `Scope` stands in the ASGI scope or the WSGI environ under
    ``"rope_middleware.scope"``. Two of these around the same request share one scope, and the
    outer one's options rule.
    """

    _protocols: ClassVar[dict[str, type[RopeMiddleware]]] = {}

    def __init_subclass__(cls, protocol: str = "") -> None:
        super().__init_subclass__()
        if protocol:
            cls._protocols[protocol] = cls

    @overload
    def __new__(
        cls, app: ASGIApp, registries: Iterable[Any] = (), **options: Unpack[Options]
    ) -> ASGIRopeMiddleware: ...
    @overload
    def __new__(
        cls, app: WSGIApplication, registries: Iterable[Any] = (), **options: Unpack[Options]
    ) -> WSGIRopeMiddleware: ...
    def __new__(cls, app: Any = None, *_: Any, **__: Any) -> Any:
        """Choose the class by the protocol of `app`."""
        if cls is RopeMiddleware:
            cls = cls._protocols[_protocol_of(app)]
        return object.__new__(cls)

    if not TYPE_CHECKING:
        # For type checkers `__new__` alone tells the class: beside an `__init__`, mypy would not
        # look at it, and pyright would ask for both.
        def __init__(
            self,
            app,
            registries=(),
            *,
            commit_on_success=False,
            commit_veto=None,
            retries=0,
            close_timeout=CLOSE_TIMEOUT,
        ):
            self._set_up(app, registries, commit_on_success, commit_veto, retries, close_timeout)

    def _set_up(
        self,
        app: Any,
        registries: Iterable[Any],
        commit_on_success: bool,
        commit_veto: Veto | None,
        retries: int,
        close_timeout: float,
    ) -> None:
        if not callable(app):
            raise TypeError(_NO_APP.format(type(self).__name__, app))
        _check_options(commit_on_success, commit_veto, retries, close_timeout)
        self.app = app
        self._registries = keepers_of(registries)
        self._commit = commit_on_success
        self._veto = commit_veto
        self._retries = retries
        self._close_timeout = close_timeout
        # Requests of apps without any of these take the short way.
        self._has_options = bool(
            retries or self._registries or commit_veto or close_timeout != CLOSE_TIMEOUT
        )
        if retries:
            listen_for_refusals()

    def _configure(self, scope: Scope) -> None:
        """Hand the options on to a request's scope."""
        scope._registries = self._registries
        scope._close_timeout = self._close_timeout

    def _why_not(
        self, scope: Scope, status: int, headers: Callable[[], list[tuple[str, str]]]
    ) -> str:
        """Tell why a response that is about to start must not commit; "" where it may."""
        if status >= 400:
            return f"status {status}"
        if scope._doomed:
            return "doomed"
        if self._veto is not None and self._veto(status, headers()):
            return "vetoed"
        return ""


_NO_APP = "{} takes an ASGI or WSGI application, not {!r}."


def _check_options(commit: object, veto: object, retries: object, close_timeout: object) -> None:
    if not isinstance(commit, bool):
        raise TypeError(f"commit_on_success is True or False, not {commit!r}.")
    if veto is not None:
        if not callable(veto) or is_async_callable(veto):
            raise TypeError(
                "commit_veto must be a plain function of (status, headers) that returns true "
                f"where the request must not be committed, not {veto!r}."
            )
        if not commit:
            raise ValueError("commit_veto has nothing to veto without commit_on_success=True.")
    if isinstance(retries, bool) or not isinstance(retries, int):
        raise TypeError(f"retries is a number of further tries, not {retries!r}.")
    if retries < 0:
        raise ValueError(f"retries cannot be negative: {retries!r}.")
    if isinstance(close_timeout, bool) or not isinstance(close_timeout, (int, float)):
        raise TypeError(f"close_timeout is a number of seconds, not {close_timeout!r}.")
    if not close_timeout > 0:
        raise ValueError(f"close_timeout must be more than 0 seconds, not {close_timeout!r}.")


def _protocol_of(app: Any) -> str:
    """Tell the protocol of `app` from how it can be called.

    ASGI applications are called with (scope, receive, send)
    (https://asgi.readthedocs.io/en/latest/specs/main.html#applications), WSGI applications
    with (environ, start_response) (PEP 3333).

    Raises:
        TypeError: it is no application, or cannot be told apart.
    """
    if app is None:
        raise TypeError(
            "RopeMiddleware needs the application it stands in front of: RopeMiddleware(app). "
            "With no app there is no telling the protocol; ASGIRopeMiddleware and "
            "WSGIRopeMiddleware are the two explicit classes."
        )
    if not callable(app):
        raise TypeError(
            _NO_APP.format("RopeMiddleware", app)
            + " (The explicit classes are ASGIRopeMiddleware and WSGIRopeMiddleware.)"
        )
    if not isinstance(app, type):
        if is_async_callable(app):
            if _takes(app, 3):
                return "asgi"
        else:
            two, three = _takes(app, 2), _takes(app, 3)
            if two and not _is_variadic(app):
                return "wsgi"  # also (environ, start_response, option=None)
            if three and not two:
                return "asgi"
    raise TypeError(
        f"RopeMiddleware cannot tell whether {app!r} is an ASGI or a WSGI application: "
        + ("it is a class" if isinstance(app, type) else "its parameters do not say so")
        + ". Say so yourself: ASGIRopeMiddleware(app), called with (scope, receive, send), or "
        "WSGIRopeMiddleware(app), called with (environ, start_response)."
    )


def _takes(app: Any, count: int) -> bool:
    """Tell whether `app` can be called with so many positional arguments."""
    try:
        inspect.signature(app).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


def _is_variadic(app: Any) -> bool:
    parameters = inspect.signature(app).parameters.values()
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
