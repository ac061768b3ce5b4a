"""The scopes of a test's own: that of its block, and one for each thread that knows of none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from rope_middleware.running.finish import running_loop
from rope_middleware.running.threads import in_thread
from rope_middleware.scope.async_ending import aend
from rope_middleware.scope.ending import end
from rope_middleware.scope.options import DEFAULT
from rope_middleware.scope.response import open_as
from rope_middleware.scope.scope import AsyncScope
from rope_middleware.testing.lanes import loop

__all__ = ["OwnScope", "OwnScopes"]


class OwnScope(AsyncScope):
    """A scope for sessions of both kinds, in any loop."""

    @property
    def _loop(self) -> object:  # type: ignore[override]
        # The connections of a sandbox do not live on the loop that runs here.
        return running_loop()

    @property
    def _thread(self) -> int:
        # That of no loop: a test may use a sync session where its loop runs.
        return 0

    @_thread.setter
    def _thread(self, _: int) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        pass

    def open(self, name: str, *, is_async: bool) -> None:
        """Begin. In a sync block it takes no async callbacks: nothing would await them."""
        open_as(self, name, DEFAULT)
        self._is_async = is_async

    def end(self) -> None:
        """End it, when the sandbox has rolled everything back."""
        self.doom()  # it is meant that nothing is kept
        if any(key.kind.is_async for key in list(self._sessions or ())):
            asyncio.run_coroutine_threadsafe(aend(self), loop()).result()
        else:
            end(self)

    async def aend(self) -> None:
        """End it in the loop that runs here."""
        self.doom()
        await aend(self)


class OwnScopes:
    """The scopes of one test.

    Args:
        name: the sandbox's.
        claim: told of each new scope.
    """

    def __init__(self, name: str, claim: Callable[[OwnScope], None]) -> None:
        self._name = name
        self._claim = claim
        self._scopes: dict[int, OwnScope] = {}

    def here(self, *, is_async: bool = False) -> OwnScope:
        """Return the scope of this thread."""
        thread = threading.get_ident()
        scope = self._scopes.get(thread)
        if scope is None:
            scope = self._scopes[thread] = OwnScope()
            scope.open(self._name, is_async=is_async)
            self._claim(scope)
        return scope

    def end(self) -> None:
        """End all of them."""
        while self._scopes:
            self._scopes.popitem()[1].end()

    async def aend(self) -> None:
        """End all of them: that of this thread in its loop, whose callbacks it has."""
        own = self._scopes.pop(threading.get_ident(), None)
        try:
            if own is not None:
                await own.aend()
        finally:
            await in_thread(lambda _: self.end(), None)
