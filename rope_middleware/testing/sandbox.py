"""`Sandbox`: the block in which nothing lasts."""

from __future__ import annotations

import os
import secrets
import threading
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

from sqlalchemy.engine import Engine

from rope_middleware.errors import RopeError
from rope_middleware.running.finish import finish
from rope_middleware.running.threads import in_thread
from rope_middleware.scope.context import current, restore
from rope_middleware.scope.scope import Scope
from rope_middleware.session.registry import ScopeRegistry
from rope_middleware.signature import explained
from rope_middleware.testing.connections import Opened, SandboxEngine
from rope_middleware.testing.errors import closed
from rope_middleware.testing.routes import IsSandbox, block, route_of
from rope_middleware.testing.scopes import OwnScope, OwnScopes
from rope_middleware.testing.stock import root_of

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["NAME", "Sandbox", "by_token", "check_jennies"]

NAME = "Rope-Sandbox"
"""The header and the cookie by which a request names its sandbox."""


_open: WeakSet[Sandbox] = WeakSet()


def by_token(token: str) -> Sandbox | None:
    """Return the open sandbox of this process that has this token.

    Each token is compared, in a time that does not tell how much of it was right.
    """
    told = token.encode("utf-8", "surrogateescape")
    found = None
    for sandbox in list(_open):
        if secrets.compare_digest(sandbox.token.encode(), told):
            found = sandbox
    return found


class Sandbox:
    """A block whose jennies work in one transaction, which is rolled back at its end.

    Whatever the jennies do meanwhile happens in it: requests by a client in this process, threads,
    tasks, and the block itself. A commit releases a savepoint, a rollback goes back to it. The
    block is a scope of its own, for sessions of both kinds::

        with Sandbox(jenny) as sandbox:
            jenny.session.add(Book(title="Emma"))
            jenny.session.commit()
            assert client.get("/books", headers=sandbox.headers).json() == ["Emma"]

    Args:
        jennies: each a `SessionJenny` or an `AsyncSessionJenny`.
        name: what error texts call it; the running test by default.
        wait: seconds that a session waits for another one of this sandbox that has written and
            has not ended its transaction.

    Raises:
        TypeError: no jenny, or something else is given; another argument is of a wrong type.
        ValueError: `wait` is negative.
        RuntimeError: it is entered a second time.
        RopeError: at the end, where something was committed behind the sandbox's back.
    """

    @explained("with Sandbox(jenny): ...")
    def __init__(self, *jennies: Any, name: str | None = None, wait: float = 5.0) -> None:
        _check(jennies, name, wait)
        self.name: str = name or _running_test()
        """What error texts call it."""
        self.token: str = secrets.token_urlsafe(32)
        """By what a request names it; random."""
        self.jennies: tuple[Any, ...] = tuple(dict.fromkeys(jennies))
        self._wait = wait
        self._entering = threading.Lock()
        self._making = threading.Lock()
        self._is_open = False
        self._opened: dict[Engine, Opened] = {}
        self._engines: dict[Engine, SandboxEngine] = {}
        self._scopes = OwnScopes(self.name, self._claim)
        self._own: OwnScope | None = None
        self._former: Scope | None = None
        self._token: Token[IsSandbox | None] | None = None

    def __repr__(self) -> str:
        return f"<Sandbox {self.name!r} {'open' if self._is_open else 'closed'}>"

    @property
    def headers(self) -> dict[str, str]:
        """The header by which a request names this sandbox."""
        return {NAME: self.token}

    @property
    def cookies(self) -> dict[str, str]:
        """The cookie by which a request names this sandbox."""
        return {NAME: self.token}

    @property
    def is_open(self) -> bool:
        """Whether it has been entered and not left."""
        return self._is_open

    # What sessions ask

    def engine_for(self, engine: Engine) -> Engine:
        """Return the engine that sessions use in the place of `engine`.

        Raises:
            ScopeClosedError: the sandbox has ended.
        """
        if isinstance(engine, SandboxEngine):
            return engine
        with self._making:
            if not self._is_open:
                raise closed(self.name)
            made = self._engines.get(engine)
            if made is None:
                root = root_of(engine)
                opened = self._opened.get(root)
                if opened is None:
                    opened = self._opened[root] = Opened(root, self.name, self._wait)
                made = self._engines[engine] = opened.engine(engine)
            return made

    def scope_here(self) -> Scope:
        """Return the scope of the test's own, for this thread."""
        with self._making:
            if not self._is_open:
                raise closed(self.name)
            return self._scopes.here()

    def _claim(self, scope: Scope) -> None:
        for jenny in self.jennies:
            route_of(jenny).claim(scope, self)

    # Its life

    def open(self) -> None:
        """Let the jennies work in it, wherever nothing says otherwise."""
        if not self._entering.acquire(blocking=False):
            raise RuntimeError(
                f"The sandbox {self.name!r} has been entered already; a Sandbox is for one block. "
                "Make another one."
            )
        self._is_open = True
        _open.add(self)
        for jenny in self.jennies:
            route_of(jenny).open.append(self)

    def close(self) -> RopeError | None:
        """Roll everything back; return the error where something was committed meanwhile."""
        found = self._roll_back()
        self._scopes.end()
        return found

    async def _aclose(self) -> RopeError | None:
        found = await in_thread(lambda _: self._roll_back(), None)
        await self._scopes.aend()
        return found

    def _roll_back(self) -> RopeError | None:
        """Roll everything back. The sessions have nothing to say to the database any more."""
        with self._making:
            if not self._is_open:
                return None
            self._is_open = False
        _open.discard(self)
        for jenny in self.jennies:
            route_of(jenny).open.remove(self)
        false = ""
        for opened in self._opened.values():
            false = opened.close() or false
        return RopeError(false) if false else None

    def _enter(self, *, is_async: bool) -> None:
        self.open()
        self._token = block.set(self)
        self._former = current.get(None)
        self._own = self._scopes.here(is_async=is_async)
        current.set(self._own)

    def _leave(self) -> None:
        if self._own is not None:
            restore(self._own, self._former)
        _reset(block, self._token)

    def __enter__(self) -> Self:
        self._enter(is_async=False)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            found = self.close()
        finally:
            self._leave()
        _tell(found, error)

    async def __aenter__(self) -> Self:
        self._enter(is_async=True)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            found = await finish(self._aclose())
        finally:
            self._leave()
        _tell(found, error)


def _tell(found: RopeError | None, error: BaseException | None) -> None:
    if found is None:
        return
    if error is None:
        raise found
    if str(found) not in (str(error), *getattr(error, "__notes__", ())):
        error.add_note(str(found))


def _reset(variable: ContextVar[Any], token: Token[Any] | None) -> None:
    try:
        if token is not None:
            variable.reset(token)
    except ValueError:
        pass  # left in another context than it was entered in: there nothing was set


def check_jennies(jennies: tuple[Any, ...], taker: str) -> None:
    """Check that each of `jennies` is one.

    Raises:
        TypeError: one of them is something else.
    """
    for jenny in jennies:
        registry = getattr(jenny, "registry", None)
        if isinstance(jenny, type) or not isinstance(registry, ScopeRegistry):
            raise TypeError(
                f"{taker} takes each SessionJenny or AsyncSessionJenny as an argument of its own, "
                f"not {jenny!r}."
            )


def _check(jennies: tuple[Any, ...], name: object, wait: object) -> None:
    if not jennies:
        raise TypeError("Sandbox() takes the jennies whose work it rolls back: Sandbox(jenny).")
    check_jennies(jennies, "Sandbox()")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name is a str, not {name!r}.")
    if isinstance(wait, bool) or not isinstance(wait, (int, float)):
        raise TypeError(f"wait is a number of seconds, not {wait!r}.")
    if not wait >= 0:
        raise ValueError(f"wait cannot be negative: {wait!r}.")


def _running_test() -> str:
    # "tests/test_books.py::test_add (call)"
    return os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0] or "sandbox"
