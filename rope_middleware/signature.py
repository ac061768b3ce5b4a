"""What `inspect.signature` and `help()` tell of a class whose `__new__` chooses another one."""

from __future__ import annotations

from dataclasses import fields
from inspect import Parameter, Signature
from typing import Any

__all__ = ["SignatureOf", "parameters_of"]


def parameters_of(options: type) -> list[Parameter]:
    """Return the fields of a dataclass as parameters by keyword."""
    return [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default)
        for field in fields(options)
    ]


class SignatureOf:
    """Stands in such a class as its ``__signature__``.

    Its objects have their own, by which servers tell an ASGI application. So has a subclass of the
    user's with an ``__init__`` of its own.
    """

    def __init__(self, *parameters: Parameter) -> None:
        self._signature = Signature(parameters)

    def __get__(self, instance: object, owner: Any) -> Signature:
        """Return the signature of a class of ours.

        Raises:
            AttributeError: Python finds it out as usual.
        """
        if instance is None and owner.__init__.__module__.startswith("rope_middleware."):
            return self._signature
        raise AttributeError("__signature__")
