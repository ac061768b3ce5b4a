"""What ``wsgi.file_wrapper`` makes (PEP 3333, "Optional Platform-Specific File Handling")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed.wsgi import WSGIEnvironment

__all__ = ["CLASS_OR_NONE", "is_file", "note_files"]


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
