"""Names that people look for in the wrong object: an error that says where they are.

A `__getattr__` could say so of every name, and would cost each use of such an object: CPython no
longer remembers where its attributes are. (180 ns of the 800 that a middleware takes of a request,
and 40 of the 85 of ``jenny.session``.) So the names that are looked for stand in the class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from rope_middleware.errors import no_such_name

__all__ = ["NO_MIDDLEWARE", "Elsewhere", "name_elsewhere", "stand_in"]

NO_MIDDLEWARE = (
    ".__call__ [it takes arguments for the session factory, by keyword; around an application goes "
    "add_middleware(RopeMiddleware), which needs no jenny]"
)
"""Ends the name of a jenny's `__call__`: Python's own error has it where that is given an app."""

_Error = Callable[[Any, str], AttributeError]


class Elsewhere:
    """Stands in a class for a name that its instances do not have; a subclass may have it.

    Args:
        name: of the attribute.
        error: makes the error, of the instance (or its class) and the name.
    """

    def __init__(self, name: str, error: _Error) -> None:
        self._name = name
        self._error = error

    def __get__(self, instance: Any, owner: type) -> Any:
        """Return what a subclass of the user's has set; else there is none.

        Raises:
            AttributeError: it is elsewhere.
        """
        found = cast("dict[str, Any]", {} if instance is None else vars(instance))
        if self._name in found:
            return found[self._name]
        raise self._error(owner if instance is None else instance, self._name)

    def __set__(self, instance: Any, value: object) -> None:
        """Set it for a subclass of the user's.

        Raises:
            AttributeError: it is elsewhere, and would not hear of it.
        """
        owner: type[Any] = instance.__class__
        if owner.__module__.startswith("rope_middleware."):
            raise self._error(instance, self._name)
        vars(instance)[self._name] = value


def stand_in(owner: type, names: Iterable[str], error: _Error) -> None:
    """Let `owner` say of each of `names` where it is, unless it has the name itself.

    Type checkers are not told: they find none of them.
    """
    for name in names:
        if not hasattr(owner, name):
            setattr(owner, name, Elsewhere(name, error))


def name_elsewhere(jenny: type, made: type | None) -> None:
    """Let a class of jennies say of the names of its sessions where they are.

    Args:
        jenny: sync or async.
        made: the class of the sessions; None where no session has been made yet.
    """
    names = ["exec"] if made is None else dir(made)  # SQLModel's is what people look for
    names += ["class_", "kw"]  # of a sessionmaker: libraries look for these
    stand_in(jenny, (name for name in names if not name.startswith("_")), no_such_name)
