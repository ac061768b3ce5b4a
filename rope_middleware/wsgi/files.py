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

__all__ = ["CLASS_OR_NONE", "STREAMS", "is_file", "is_odd", "is_streamed", "note_files"]

# Classes of bodies that are streams, each with the ``wsgi.file_wrapper`` that did not make them.
# To ask all questions again for each response costs 1 us. Only classes that live as long as their
# module: one that a request has made would keep what that request had.
STREAMS: dict[type, object] = {}


def is_odd(body: object) -> bool:
    """Tell whether the server has to see the body as it is, to complain about it."""
    return isinstance(body, (str, bytes)) or not hasattr(body, "__iter__")


def is_streamed(body: object, environ: WSGIEnvironment) -> bool:
    """Tell whether code of the application runs while the server reads the body."""
    kind = type(body)
    wrapper = environ.get("wsgi.file_wrapper")
    if kind in STREAMS and STREAMS[kind] is wrapper:
        return True
    if hasattr(kind, "__len__") or is_odd(body) or is_file(body, environ):
        return False
    if _stays(kind) and hasattr(kind, "__iter__") and type(wrapper) in CLASS_OR_NONE:
        STREAMS[kind] = wrapper
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


CLASS_OR_NONE = frozenset({type, type(None)})


class _FileWrapper:
    """Knows what a ``wsgi.file_wrapper`` made that is a function, as uWSGI's is."""

    def __init__(self, wrapper: Callable[..., Any]) -> None:
        self._wrapper = wrapper
        self.made: list[object] = []

    def __call__(self, *args: Any) -> Any:
        made = self._wrapper(*args)
        self.made.append(made)
        return made


def note_files(environ: WSGIEnvironment) -> None:
    """Take note of what a ``wsgi.file_wrapper`` makes that is no class."""
    wrapper = environ["wsgi.file_wrapper"]
    if not isinstance(wrapper, (type, _FileWrapper)):
        environ["wsgi.file_wrapper"] = _FileWrapper(wrapper)
