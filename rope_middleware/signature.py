"""How classes are called: what `inspect.signature` tells, and the errors of wrong arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from inspect import Parameter, Signature, getattr_static, signature
from types import FunctionType, MethodType
from typing import Any, TypeVar, cast

__all__ = ["SignatureOf", "explained", "may_take", "near", "parameters_of"]

_F = TypeVar("_F", bound=Callable[..., None])


def near(name: str, known: Iterable[str]) -> str:
    """Return a question for who has misspelt a name, or an empty string."""
    import difflib  # only for those

    # "scope_func" and "readOnly" are nearer to what is meant than they look.
    plain = {one.replace("_", ""): one for one in known}
    meant = name.replace("_", "").lower()
    found = [one for one in plain if one.startswith(meant)]  # "commit"
    found = found or difflib.get_close_matches(meant, plain, 1)
    return f" Did you mean {' or '.join(plain[one] for one in found)}?" if found else ""


def explained(example: str) -> Callable[[_F], _F]:
    """Let an `__init__` that is called with wrong arguments say how it is called.

    Args:
        example: a call as most write it.
    """

    def decorate(init: _F) -> _F:
        @wraps(init)
        def checked(self: object, *arguments: Any, **named: Any) -> None:
            try:
                init(self, *arguments, **named)
            except TypeError as error:
                if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
                    raise  # by its body: the arguments were those that it takes
                raise _wrong(type(self), init, str(error), example, named) from None

        return cast("_F", checked)

    return decorate


def _wrong(made: type, init: Any, text: str, example: str, named: Iterable[str]) -> TypeError:
    """Make the error for arguments that `init` does not take; Python tells in `text` which."""
    who = init.__qualname__.partition(".")[0]
    owner = next(one for one in made.__mro__ if one.__name__ == who)
    takes = Signature(parameters_of(owner))
    unknown = next((name for name in named if name not in takes.parameters), None)
    hint = "" if unknown is None else near(unknown, takes.parameters)
    told = text.replace(f"{init.__qualname__}() ", "").replace("missing", "is missing")
    told = told.partition(". Did you mean")[0]  # asked by Python 3.13 and later, too
    if "positional arguments but" in told:  # Python counts the object itself, too
        told = "got too many arguments, or one by its position that needs its name"
    return TypeError(f"{who} {told}.{hint} It takes {takes}, as in: {example}")


def parameters_of(made: type) -> list[Parameter]:
    """Return the parameters by which a class is called, without their types."""
    parameters = signature(made).parameters.values()
    return [one.replace(annotation=Parameter.empty) for one in parameters]


def may_take(function: object, count: int) -> bool:
    """Tell whether `function` may be called with `count` arguments by position.

    False is certain. What is written in C, a class, a proxy, and what brings a signature of its
    own may take anything.
    """
    if hasattr(function, "__signature__"):
        return True
    kind: object = type(function)
    if kind not in (FunctionType, MethodType, partial):
        call: Any = getattr_static(type(function), "__call__", None)
        if isinstance(function, type) or type(call) is not FunctionType:
            return True
        function = MethodType(call, function)
    plain = function
    while (kind := type(plain)) is not FunctionType:
        if kind is not partial and kind is not MethodType:
            return True
        inner: object = getattr(plain, "func" if kind is partial else "__func__")
        plain = inner
    if hasattr(plain, "__signature__"):
        return True
    try:
        # A decorator's own, whatever it has decorated.
        takes = signature(cast("Callable[..., Any]", function), follow_wrapped=False)
    except Exception:  # Python 3.14 looks up the annotations, and finds not all
        return True
    try:
        takes.bind(*range(count))
    except TypeError:
        return False
    return True


class SignatureOf:
    """Stands as ``__signature__`` in a class whose ``__new__`` chooses another one.

    Its objects have their own, by which servers tell an ASGI application. So has a subclass of the
    user's with an ``__init__`` of its own.

    Args:
        parameters: makes the parameters, for who asks.
    """

    def __init__(self, parameters: Callable[[], Iterable[Parameter]]) -> None:
        self._parameters = parameters

    def __get__(self, instance: object, owner: Any) -> Signature:
        """Return the signature of a class of ours.

        Raises:
            AttributeError: Python finds it out as usual.
        """
        if instance is None and owner.__init__.__module__.startswith("rope_middleware."):
            return Signature(list(self._parameters()))
        raise AttributeError("__signature__")
