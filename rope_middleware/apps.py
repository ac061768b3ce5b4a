"""The application that a middleware wraps: its protocol, and what people take for one."""

from __future__ import annotations

import inspect
from typing import Any

from rope_middleware.scope.context import is_async_callable

__all__ = ["NAMES", "belongs_to_app", "check_app", "is_around_itself", "protocol_of"]

_NO_APP = "{} takes an ASGI or WSGI application, not {!r}."
_OF_FRAMEWORK = (
    " (It is no middleware of Django's MIDDLEWARE, and no tween of Pyramid's, which are called "
    "with a request: wrap the finished application, as in application = "
    "RopeMiddleware(application).)"
)
_PARAMETERS = {"asgi": "(scope, receive, send)", "wsgi": "(environ, start_response)"}


def protocol_of(app: Any) -> str:
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
        + f". Say so yourself: ASGIRopeMiddleware(app), called with {_PARAMETERS['asgi']}, or "
        f"WSGIRopeMiddleware(app), called with {_PARAMETERS['wsgi']}." + _OF_FRAMEWORK
    )


def check_app(who: str, app: Any, protocol: str) -> None:
    """Check that `app` can be called as its protocol says.

    Args:
        who: the class that was called.
        app: what it was given.
        protocol: "asgi" or "wsgi".

    Raises:
        TypeError: it cannot.
    """
    if app is None:
        raise TypeError(f"{who} needs the application it stands in front of: {who}(app).")
    if not callable(app):
        raise TypeError(_NO_APP.format(who, app))
    is_asgi = protocol == "asgi"
    if (is_asgi or not is_async_callable(app)) and _takes(app, 3 if is_asgi else 2, unknown=True):
        return
    raise TypeError(
        f"{who} takes {'an ASGI' if is_asgi else 'a WSGI'} application, and {app!r} cannot be "
        f"called as one, with {_PARAMETERS[protocol]}. RopeMiddleware tells the two protocols "
        "apart by itself: RopeMiddleware(app), or add_middleware(RopeMiddleware)." + _OF_FRAMEWORK
    )


def _takes(app: Any, count: int, unknown: bool = False) -> bool:
    """Tell whether `app` can be called with so many positional arguments.

    Args:
        app: what is asked.
        count: how many.
        unknown: the answer where it does not say what it takes.
    """
    try:
        signature = inspect.signature(app)
    except (TypeError, ValueError):
        return unknown
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _is_variadic(app: Any) -> bool:
    parameters = inspect.signature(app).parameters.values()
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)


def is_around_itself(middleware: object, app: object) -> bool:
    """Tell whether `app` calls `middleware`, which calls `app`, and so on for ever."""
    return any(getattr(app, name, None) is middleware for name in ("wsgi_app", "asgi_app"))


# What people call or set on ``app = RopeMiddleware(Flask(...))``, as if it were the application.
NAMES = (
    *("add_api_route", "add_event_handler", "add_exception_handler", "add_middleware"),
    *("add_route", "add_url_rule", "add_websocket_route", "after_request", "app_context"),
    *("before_request", "before_serving", "blueprint", "blueprints", "cli", "command"),
    *("config", "context_processor", "debug", "delete", "dependency_overrides"),
    *("errorhandler", "exception_handler", "exception_handlers", "extensions", "get", "head"),
    *("include_router", "jinja_env", "logger", "middleware", "mount", "on_event", "openapi"),
    *("options", "patch", "post", "put", "register_blueprint", "register_error_handler"),
    *("request_context", "route", "router", "routes", "run", "secret_key", "serve", "state"),
    *("teardown_appcontext", "teardown_request", "template_filter", "test_cli_runner"),
    *("test_client", "test_request_context", "testing", "url_for", "url_map"),
    *("url_path_for", "user_middleware", "view_functions", "websocket", "websocket_route"),
)


def belongs_to_app(middleware: object, name: str) -> AttributeError:
    """Make the error for a name of an application that is asked of the middleware around it."""
    owner: Any = middleware if isinstance(middleware, type) else type(middleware)
    return AttributeError(
        f"{owner.__name__!r} object has no attribute {name!r}: it belongs to the application, and "
        "this is the middleware around it. Set up the application before you wrap it, or keep its "
        "name: app.wsgi_app = RopeMiddleware(app.wsgi_app) (Flask), "
        "app.add_middleware(RopeMiddleware) (Starlette, FastAPI, Responder). The application "
        "itself is the middleware's .app."
    )
