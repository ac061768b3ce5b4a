"""What ends a `begin()` block, or a savepoint, waits for commits as the methods of its session do.

By no method of the session: by those of its transaction. See `sessions`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import ReferenceType, ref

from sqlalchemy.orm import Session, SessionTransaction

from rope_middleware.scope.settling import Calls
from rope_middleware.session.guard.sessions import CALLS, calling

__all__ = ["guard_transaction"]

_ENDS = ("commit", "rollback", "close")


class _Ends:
    """Stands in front of what ends a transaction, and does not keep it alive."""

    __slots__ = ("_calls", "_of")

    def __init__(self, of: ReferenceType[SessionTransaction], calls: Calls) -> None:
        self._of = of
        self._calls = calls

    def call(self, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        of = self._of()
        assert of is not None  # noqa: S101 - who calls its method has it
        with calling(self._calls) as has_waited:
            if has_waited and _is_over(of):
                return None
            return getattr(type(of), name)(of, *args, **named)


def _end(name: str) -> Callable[..., Any]:
    def end(ends: _Ends, /, *args: Any, **named: Any) -> Any:
        return ends.call(name, args, named)

    return end


_GUARDED_ENDS = {name: _end(name) for name in _ENDS}


def guard_transaction(session: Session, transaction: SessionTransaction) -> None:
    """Let the end of `transaction`, where its session is guarded, and commits wait, too."""
    calls: Calls | None = session.__dict__.get(CALLS)
    if calls is not None:
        ends = _Ends(ref(transaction), calls)
        bound = {name: MethodType(func, ends) for name, func in _GUARDED_ENDS.items()}
        transaction.__dict__.update(bound)


def _is_over(transaction: SessionTransaction) -> bool:
    """Tell whether a transaction has been ended, by the commit that was waited for."""
    session = transaction.session
    one = session.get_nested_transaction()
    while one is not None and one is not transaction:
        one = one.parent
    return one is None and session.get_transaction() is not transaction
