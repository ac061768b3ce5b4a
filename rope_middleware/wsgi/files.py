"""What kind of body is it: a stream, a file, something odd?

A file is what ``wsgi.file_wrapper`` made (PEP 3333, "Optional Platform-Specific File Handling").
"""

from __future__ import annotations

import sys
from types import GeneratorType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import WSGIEnvironment

__all__ = ["KINDS", "WITHOUT_FILES", "is_file", "is_odd", "is_streamed", "kinds_by"]

# What is a body of this class? All but a list are streams; CLOSABLE: its class has a close().
LIST, STREAM, CLOSABLE = range(3)

_LISTS: dict[type, int] = {list: LIST, tuple: LIST}

# By the server's ``wsgi.file_wrapper``, which did not make it. To ask all questions again for each
# response costs 1 us. Only classes that live as long as their module: one that a request has made
# would keep what that request had.
WITHOUT_FILES: dict[type, int] = _LISTS.copy()
KINDS: dict[object, dict[type, int]] = {None: WITHOUT_FILES}


def kinds_by(environ: WSGIEnvironment) -> dict[type, int]:
    """Return what the classes of bodies are that are known in this request.

    Files are not among them.
    """
    wrapper = environ.get("wsgi.file_wrapper")
    if wrapper is None or (isinstance(wrapper, type) and wrapper in KINDS):
        return KINDS[wrapper]
    _note_files(environ)
    if isinstance(wrapper, type) and _stays(wrapper):
        return KINDS.setdefault(wrapper, _LISTS.copy())
    return _LISTS


def is_odd(body: object) -> bool:
    """Tell whether the server has to see the body as it is, to complain about it."""
    return isinstance(body, (str, bytes)) or not hasattr(body, "__iter__")


def is_streamed(body: object, environ: WSGIEnvironment) -> bool:
    """Tell whether code of the application runs while the server reads the body."""
    kind = type(body)
    kinds = kinds_by(environ)
    if kind in kinds:
        return kinds[kind] != LIST
    has_len = hasattr(kind, "__len__")
    # Servers ask the body: a proxy of ddtrace's has the method in its class, and says no to it.
    if (has_len and hasattr(body, "__len__")) or is_odd(body) or is_file(body, environ):
        return False
    if kinds is not _LISTS and not has_len and _stays(kind) and hasattr(kind, "__iter__"):
        kinds[kind] = STREAM if getattr(kind, "close", None) is None else CLOSABLE
    return True


def _stays(kind: type) -> bool:
    """Tell whether a class is that of generators, or lies in its module."""
    module = sys.modules.get(kind.__module__)
    return kind is GeneratorType or (
        module is not None and module.__dict__.get(kind.__name__) is kind
    )


def is_file(body: object, environ: WSGIEnvironment) -> bool:
    """Tell whether ``wsgi.file_wrapper`` made the body: then servers want that very object."""
    wrapper = environ.get("wsgi.file_wrapper")
    if isinstance(wrapper, _FileWrapper):
        return any(body is made for made in wrapper.made)
    return isinstance(wrapper, type) and isinstance(body, wrapper)


class _FileWrapper:
    """Knows what a ``wsgi.file_wrapper`` made that is a function, as uWSGI's is."""

    def __init__(self, wrapper: Callable[..., Any]) -> None:
        self._wrapper = wrapper
        self.made: list[object] = []

    def __call__(self, *args: Any) -> Any:
        made = self._wrapper(*args)
        self.made.append(made)
        return made


def _note_files(environ: WSGIEnvironment) -> None:
    """Take note of what a ``wsgi.file_wrapper`` makes that is no class."""
    wrapper = environ["wsgi.file_wrapper"]
    if not isinstance(wrapper, (type, _FileWrapper)):
        environ["wsgi.file_wrapper"] = _FileWrapper(wrapper)
