"""A body whose first chunk starts the response: a gate decides before that one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rope_middleware.scope.context import current, unbind
from rope_middleware.wsgi.begun import to_the_end
from rope_middleware.wsgi.body import Body, made

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rope_middleware.scope.scope import Scope
    from rope_middleware.wsgi.commit import Gate

__all__ = ["hand_on_late"]


def hand_on_late(body: Iterable[bytes], scope: Scope, owns: bool, gate: Gate) -> Iterable[bytes]:
    """Return what the server gets for a body whose first chunk starts the response, by `gate`."""
    late = made(_LateBody, body, scope, owns=owns)
    late.gate = gate
    return late


class _LateBody(Body):
    """A `Body` whose response starts with its first chunk."""

    __slots__ = ("gate",)

    gate: Gate | None  # None when the response has started

    def __iter__(self) -> Iterator[bytes]:
        for chunk in super().__iter__():
            if self.gate is not None and (instead := self._settle(self.gate)) is not None:
                yield from to_the_end(instead)
                return
            yield chunk
        if self.gate is not None:  # a body without any chunk
            yield from to_the_end(self._settle(self.gate) or ())

    def _settle(self, gate: Gate) -> Iterable[bytes] | None:
        """Let the response start, or return what the server gets in its place."""
        scope = self._scope
        if scope is None:  # closed
            return None
        token = current.set(scope)
        try:
            return gate.announce_or_replace()
        finally:
            unbind(token)
            self._commits = gate.commits
            if not gate.is_waiting:
                self.gate = None
