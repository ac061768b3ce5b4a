"""The log position of a WSGI request: what its headers bring, what its response tells (R3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rope_middleware.position import Carried, is_told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

__all__ = ["Telling", "carried_by", "told_again"]


def carried_by(environ: WSGIEnvironment) -> Carried:
    """Return what a request carries; its headers are read where somebody asks for it."""

    def values(name: str) -> Iterable[str]:
        value = environ.get(f"HTTP_{name.upper().replace('-', '_')}")
        return [] if value is None else [str(value)]

    return Carried(values)


class Telling:
    """Stands between the gate and the server's `start_response`: adds the position's headers.

    Args:
        carried: the request's.
        start_response: the server's.
    """

    __slots__ = ("_carried", "_start_response")

    def __init__(self, carried: Carried, start_response: StartResponse) -> None:
        self._carried = carried
        self._start_response: Callable[..., Callable[[bytes], object]] = start_response

    def __call__(
        self, status: str, headers: list[tuple[str, str]], *exc_info: Any, **named: Any
    ) -> Callable[[bytes], object]:
        """Pass the call on."""
        told = self._carried.response_headers()
        return self._start_response(
            status, [*headers, *told] if told else headers, *exc_info, **named
        )


def told_again(call: Any, carried: Carried | None) -> Any:
    """Return a call that tells what was written after a `Telling` has seen it.

    Args:
        call: of start_response.
        carried: what the request carries; None where there is nothing to be told once more.
    """
    told = [] if carried is None else carried.response_headers()
    if not told:
        return call
    status, headers, *exc_info = call
    return status, [*(one for one in headers if not is_told(*one)), *told], *exc_info
