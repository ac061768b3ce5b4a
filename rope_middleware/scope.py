"""The scope: what lives exactly as long as one request, and ends exactly once.

A `Scope` is the key under which everything of a request is found, and the place where its
sessions are kept. It knows no SQLAlchemy: a session is kept by a `Keeper` (a registry), which
the scope asks to commit and to close it.

What has to happen when a scope commits or ends is written down once, as a generator of steps
that does no I/O of its own. Two drivers carry the steps out: `drive` calls them, `adrive`
awaits them and sends what blocks to a thread.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Generator
from contextlib import suppress
from contextvars import ContextVar, Token
from functools import partial, wraps
from types import TracebackType
from typing import Any, NoReturn, ParamSpec, Protocol, TypeVar, cast

from rope_middleware.errors import NoScopeError, RopeError, ScopeClosedError
from rope_middleware.finish import (
    finish,
    finish_in_thread,
    in_anyio_thread,
    in_thread,
    is_async_running,
    within,
)

__all__ = [
    "CLOSED",
    "CLOSE_TIMEOUT",
    "ENDED",
    "OPEN",
    "SCOPE_KEY",
    "AsyncScope",
    "Keeper",
    "Scope",
    "class_of",
    "current",
    "current_scope",
    "is_async_callable",
    "log_retry",
    "logger",
    "no_scope",
    "note_shared_session",
    "open_scope",
    "unbind",
]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_ScopeT = TypeVar("_ScopeT", bound="Scope")

SCOPE_KEY = "rope_middleware.scope"
"""Where the ASGI scope and the WSGI environ carry the open Scope."""

CLOSE_TIMEOUT = 10.0
"""Seconds that an async session may take to give back its connection."""

logger: logging.Logger = logging.getLogger("rope_middleware")

current: ContextVar[Scope | None] = ContextVar("rope_middleware.scope")
"""The scope that is open here. The only global state of the package."""


class Keeper(Protocol):
    """What a scope has to know of the registry that keeps a session in it.

    Of an async keeper `flush`, `prepare`, `commit`, `rollback` and `close` return awaitables.
    """

    is_async: bool

    def is_idle(self, session: Any, /) -> bool:
        """Tell whether `session` has nothing open, so that ending it needs no I/O."""
        ...

    def is_twophase(self, session: Any, /) -> bool:
        """Tell whether `session` commits in two phases."""
        ...

    def flush(self, session: Any, /) -> Any:
        """Write what is pending."""
        ...

    def prepare(self, session: Any, /) -> Any:
        """First phase of a two-phase commit."""
        ...

    def commit(self, session: Any, /) -> Any:
        """Commit."""
        ...

    def rollback(self, session: Any, /) -> Any:
        """Roll back and give back the connection."""
        ...

    def close(self, session: Any, /) -> Any:
        """Close the session; whatever happens, give back or invalidate its connections."""
        ...

    def drop(self, session: Any, /) -> None:
        """Close an idle session, without I/O."""
        ...

    def abandon(self, session: Any, /) -> None:
        """Invalidate the session's connections at once, without waiting for the database."""
        ...

    def leave_to_parent(self, session: Any, /) -> None:
        """Forget, in a forked process, what the session has open, without a word to anybody."""
        ...


OPEN, ENDED, CLOSED = range(3)

# Held for the instant in which a scope gets its dictionary; J6 has two threads race for it.
_first_use = threading.Lock()

# (function, argument, kind). See `drive` and `adrive`.
_Step = tuple[Callable[[Any], Any], Any, int]
_Steps = Generator[_Step, Any, _T]
# What a step does: blocks, awaits, awaits for a limited time, blocks and may call functions of the
# application's (its listeners hear of flushes and commits).
_BLOCKS, _AWAITS, _RELEASES, _CALLS = range(4)


class Scope:
    """The life of one request, or of one ``with open_scope():`` block.

    Made by the middlewares and by `open_scope`, never by hand. Two scopes are equal only if
    they are the same object, so a Scope is a safe dictionary key.
    """

    # Every request pays for its Scope. There is no __init__, which would double the price: the
    # short ways of the middlewares set the slots, all others call `_open`. What most requests
    # never change has its value on the class, and goes into __dict__ when it is changed.
    __slots__ = ("__dict__", "__weakref__", "_commits", "_name", "_sessions", "_state")

    _commits: bool
    _name: Any
    _sessions: dict[Keeper, Any] | None  # None: there is nothing to end, not even a callback
    _state: int  # OPEN, ENDED (nothing can be kept any more), CLOSED (everything given back)

    _is_async = False
    _close_timeout = CLOSE_TIMEOUT
    _registries: tuple[Keeper, ...] = ()
    _on_commit: list[Callable[[], Any]] | None = None
    _on_close: list[Callable[[], Any]] | None = None
    _info: dict[Any, Any] | None = None
    _outer: Scope | None = None  # what `open_scope` found open
    _is_parents = False  # this process was forked while it was open
    _left: tuple[Scope | None] | None = None  # what was current before, once left: see `_restore`
    _doomed = False
    _committed = False  # a session has committed something: see C6
    _refused: BaseException | None = None  # the database asked to try again: see C6

    def _open(self, name: Any, commits: bool = False) -> None:
        self._name = name
        self._sessions = None
        self._state = OPEN
        self._commits = commits

    def __repr__(self) -> str:
        return f"<Scope {self.name!r} {('open', 'ending', 'closed')[self._state]}>"

    @property
    def name(self) -> str:
        """What the scope is for, ``GET /path`` (no query string) or the name it was given."""
        return cast("str", self._name)

    @property
    def closed(self) -> bool:
        """True once the scope has ended and everything of it is given back."""
        return self._state == CLOSED

    @property
    def info(self) -> dict[Any, Any]:
        """A dictionary for the application's own use; empty at the start."""
        if self._info is None:
            self._info = {}
        return self._info

    def doom(self) -> None:
        """Have the scope roll back, whatever the response will be.

        It concerns what `commit_on_success` would commit, from now on; what is committed stays.
        """
        self._doomed = True

    def on_commit(self, fn: Callable[[], object]) -> None:
        """Call `fn` once after the scope's commit and before the response starts.

        Registered after the response started, it runs after the final commit. It never runs
        after a rollback; its own error is logged and changes nothing. Functions run in order
        of registration, sync ones in a thread where the scope is async.

        Args:
            fn: called without arguments; an async function only in an async scope.

        Raises:
            RopeError: the scope does not commit, or `fn` is async and the scope is not.
            ScopeClosedError: the scope has ended.
        """
        if not self._commits:
            raise RopeError(
                f"on_commit() has nothing to wait for: the scope {self.name!r} does not commit. "
                "Give commit_on_success=True to the middleware or to open_scope(), or call the "
                "function yourself after your commit."
            )
        self._check_callback(fn, "on_commit")
        self._begin_use()
        if self._on_commit is None:
            self._on_commit = []
        self._on_commit.append(fn)

    def on_close(self, fn: Callable[[], object]) -> None:
        """Call `fn` once when the scope has ended and its sessions are closed, newest first.

        Its own error is logged, and the others still run.

        Args:
            fn: called without arguments; an async function only in an async scope.

        Raises:
            RopeError: `fn` is async and the scope is not.
            ScopeClosedError: the scope has ended.
        """
        self._check_callback(fn, "on_close")
        self._begin_use()
        if self._on_close is None:
            self._on_close = []
        self._on_close.append(fn)
        if self._state:  # it has ended in this instant, and may have passed over `fn`
            self._raise_closed()

    def _check_callback(self, fn: Callable[[], object], method: str) -> None:
        if self._state:
            self._raise_closed()
        if not callable(fn):
            raise TypeError(f"{method}() takes a callable without arguments, not {fn!r}.")
        if not self._is_async and is_async_callable(fn):
            raise RopeError(
                f"{method}() was given the async function {fn!r}, and the scope {self.name!r} "
                "is a sync one (WSGI, or a plain 'with open_scope():'), where nothing can await "
                "it. Give a plain function."
            )

    def _raise_closed(self) -> NoReturn:
        if self._is_parents:
            raise ScopeClosedError(
                f"The scope {self.name!r} belongs to the process that this one was forked from, "
                'and so do its sessions and their connections. Use "with open_scope():" around '
                "work of this process's own."
            )
        raise ScopeClosedError(
            f"The scope {self.name!r} has ended, and its sessions are closed. This code has "
            'outlived it (a thread, a task or a timed-out handler?). Use "with open_scope():" '
            "around work of its own."
        )

    def _begin_use(self) -> dict[Keeper, Any]:
        """Make sure that the end does not pass this scope over; return its sessions."""
        if self._sessions is None:
            with _first_use:
                if self._sessions is None:
                    self._sessions = {}
        return self._sessions

    # -- what registries call ------------------------------------------------------------

    def _keep(self, keeper: Keeper, session: Any) -> Any:
        """Keep `session` for `keeper`, unless another thread was first; return the one kept."""
        sessions = self._sessions
        kept = (self._begin_use() if sessions is None else sessions).setdefault(keeper, session)
        # Read after the write: the end sets `_state` first and looks at `_sessions` then, so
        # that one of the two sees the other.
        if self._state:
            self._drop(keeper)
            self._raise_closed()
        return kept

    def _drop(self, keeper: Keeper) -> Any:
        """Forget the session of `keeper`; return it, or None."""
        return None if self._sessions is None else self._sessions.pop(keeper, None)

    def _session_of(self, keeper: Keeper) -> Any:
        """Return the session of `keeper`, or None."""
        return None if self._sessions is None else self._sessions.get(keeper)

    # -- the steps -----------------------------------------------------------------------

    def _open_sessions(self) -> list[tuple[Keeper, Any]]:
        """Return what has something open, in the order in which it was made."""
        held = [*(self._sessions or {}).items(), *_without(self._registries)]
        return [(keeper, session) for keeper, session in held if not keeper.is_idle(session)]

    def _commit_steps(self) -> _Steps[None]:
        """Commit every session, then run what waits for the commit.

        Raises:
            BaseException: what the first failing step raised; everything is rolled back then.
        """
        work = self._open_sessions()
        kind = _kinds
        try:
            if len(work) > 1:
                # What the database refuses at a flush must not find half of them committed.
                for keeper, session in work:
                    yield keeper.flush, session, kind[keeper.is_async]
            for keeper, session in work:
                if keeper.is_twophase(session):
                    yield keeper.prepare, session, kind[keeper.is_async]
            for keeper, session in work:
                yield keeper.commit, session, kind[keeper.is_async]
        except BaseException as error:
            logger.error("commit of %r failed: %s", self.name, class_of(error))
            yield from self._rollback_steps("its commit failed")
            raise
        while self._on_commit:
            fn = self._on_commit.pop(0)
            try:
                yield from _call_steps(fn)
            except (Exception, asyncio.CancelledError):
                logger.exception("on_commit function %r of %r failed", fn, self.name)

    def _rollback_steps(self, why: str) -> _Steps[None]:
        """Roll every session back, log it, and forget what waits for a commit."""
        self._on_commit = None
        work = self._open_sessions()
        if work:
            logger.info("rolled back %r: %s", self.name, why)
        for keeper, session in work:
            try:
                yield keeper.rollback, session, _releases[keeper.is_async]
            except Exception as error:
                logger.error("rollback of %r failed: %s", self.name, class_of(error))
                keeper.abandon(session)

    def _end_steps(self, commit: bool, why: str = "") -> _Steps[None]:
        """End the scope: commit or not, close every session, run what waits for the end.

        Raises:
            BaseException: what the commit raised, or what is no `Exception`
                (KeyboardInterrupt, SystemExit) and came while closing; at the end, when
                everything is given back.
        """
        raised: BaseException | None = None
        if commit:
            try:
                yield from self._commit_steps()
            except BaseException as error:
                raised = error
        elif self._commits and (work := self._open_sessions()):
            logger.info("rolled back %r: %s", self.name, why)
            del work
        # While the scope is open: their scopefunc has to find it.
        for registry in self._registries:
            raised = (yield from self._close_steps(registry, None)) or raised
        self._state = ENDED
        for keeper, session in list((self._sessions or {}).items()):
            raised = (yield from self._close_steps(keeper, session)) or raised
        self._sessions = None
        for fn in reversed(self._on_close or ()):
            try:
                yield from _call_steps(fn)
            except (Exception, asyncio.CancelledError):
                logger.exception("on_close function %r of %r failed", fn, self.name)
            except BaseException as error:
                raised = error
        self._on_close = self._on_commit = None
        self._state = CLOSED
        if raised is not None:
            raise raised

    def _close_steps(self, keeper: Keeper, session: Any) -> _Steps[BaseException | None]:
        """Close one session; return what must be raised once all are closed."""
        try:
            if keeper.is_idle(session):
                keeper.drop(session)
            else:
                yield keeper.close, session, _releases[keeper.is_async]
        except BaseException as error:
            return self._close_failed(keeper, session, error)
        return None

    def _close_failed(
        self, keeper: Keeper, session: Any, error: BaseException
    ) -> BaseException | None:
        """Log `error` and invalidate what the session holds; return what is to be raised."""
        logger.error(
            "closing a session of %r failed, its connection is invalidated: %s",
            self.name,
            class_of(error),
            exc_info=error,
        )
        try:
            keeper.abandon(session)
        except Exception:
            logger.exception("a connection of %r could not be invalidated", self.name)
        return None if isinstance(error, (Exception, asyncio.CancelledError)) else error

    def _leave_to_parent(self) -> None:
        """End the scope in a forked process. Its sessions and callbacks are the parent's."""
        for keeper, session in [*(self._sessions or {}).items(), *_without(self._registries)]:
            keeper.leave_to_parent(session)
        self._sessions = self._on_close = self._on_commit = None
        self._registries = ()
        self._commits = False
        self._is_parents = True
        self._state = CLOSED

    # -- what the boundaries call ----------------------------------------------------------

    def _end_unused(self) -> bool:
        """End a scope that has nothing to end; tell whether it was one."""
        if self._sessions is not None or self._registries:
            return False
        self._state = ENDED
        if self._sessions is not None:  # made by a thread in this instant
            return False  # type: ignore[unreachable]
        self._state = CLOSED
        return True

    def _end(self, commit: bool = False, why: str = "") -> None:
        """End a sync scope. See `_end_steps`."""
        if self._end_unused():
            return
        if self._commits or self._registries or self._on_close:
            drive(self._end_steps(commit, why))
        else:
            self._end_plainly("close")

    def _end_plainly(self, how: str) -> None:
        """What most requests need of `_end_steps`, without the price of its generators.

        Args:
            how: "close", or "drop" where every session is idle.
        """
        raised: BaseException | None = None
        self._state = ENDED
        for keeper, session in list((self._sessions or {}).items()):
            try:
                getattr(keeper, how)(session)
            except BaseException as error:
                raised = self._close_failed(keeper, session, error) or raised
        self._sessions = None
        self._state = CLOSED
        if raised is not None:
            raise raised


def _after_fork() -> None:
    """Have a forked process leave to its parent what is open where it was forked.

    What other threads and tasks have open is not reached any more: they are not there.
    """
    scope = current.get(None)
    while scope is not None:
        if not scope._state:
            scope._leave_to_parent()
        scope = scope._outer


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class AsyncScope(Scope):
    """A scope that is opened and ended in async code. Its opener sets `_thread`, too."""

    # Which event loop the scope belongs to is found out when an AsyncSession is first used: the
    # thread is cheaper to ask for, and runs one loop at a time.
    __slots__ = ("_thread",)

    _thread: int

    _is_async = True
    _loop: object = None

    async def _aend(self, commit: bool = False, why: str = "") -> None:
        """End the scope; finishes under cancellation. See `_end_steps`."""
        if self._end_unused():
            return
        if self._commits or self._registries or self._on_close:
            await self._afinish(self._end_steps(commit, why))
            return
        self._state = ENDED  # before the look: from here on nothing can begin
        if not self._open_sessions():
            self._end_plainly("drop")
        elif any(keeper.is_async for keeper in list(self._sessions or ())):
            await finish(self._aend_plainly(), self._close_timeout)
        else:
            try:
                await finish_in_thread(self._end_plainly, "close", self._close_timeout)
            except asyncio.CancelledError as error:
                self._give_up(error)
                raise
            except Exception as error:  # no thread could be started
                self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        """End the scope without the thread that should have done it, if it has not."""
        if self._state == CLOSED:
            return
        self._state = ENDED
        for keeper, session in list((self._sessions or {}).items()):
            self._close_failed(keeper, session, error)
        self._sessions = None
        self._state = CLOSED

    async def _aend_plainly(self) -> None:
        """`_end_plainly`, for sessions of both kinds."""
        raised: BaseException | None = None
        self._state = ENDED
        for keeper, session in list((self._sessions or {}).items()):
            try:
                if keeper.is_idle(session):
                    keeper.drop(session)
                elif keeper.is_async:
                    await within(self._close_timeout, keeper.close(session))
                else:
                    await in_thread(keeper.close, session)
            except BaseException as error:
                raised = self._close_failed(keeper, session, error) or raised
        self._sessions = None
        self._state = CLOSED
        if raised is not None:
            raise raised

    async def _afinish(self, steps: _Steps[None]) -> None:
        """Carry `steps` out to their end, in a task of its own only if one has to wait."""
        try:
            step = next(steps)
        except StopIteration:
            return
        await finish(adrive(steps, step, self._close_timeout), grace=self._close_timeout)

    def _abandon(self) -> None:
        """End an async scope whose coroutine is being closed: nothing can be awaited there."""
        token = current.set(self)  # it may be closed in any context
        try:
            self._abandon_async()
            self._end()
        finally:
            unbind(token)

    def _abandon_async(self) -> None:
        for keeper, session in [*(self._sessions or {}).items(), *_without(self._registries)]:
            if not keeper.is_async:
                continue
            if keeper.is_idle(session):
                keeper.drop(session)
            else:
                logger.error(
                    "the coroutine that served %r was closed before its end; the connection "
                    "of its session is invalidated",
                    self.name,
                )
                keeper.abandon(session)
            self._drop(keeper)
        self._registries = tuple(r for r in self._registries if not r.is_async)
        self._on_close = [fn for fn in self._on_close or () if not is_async_callable(fn)]


def _without(registries: tuple[Keeper, ...]) -> list[tuple[Keeper, Any]]:
    """Pair keepers that find their session themselves with none."""
    return [(registry, None) for registry in registries]


_kinds = {False: _CALLS, True: _AWAITS}
_releases = {False: _BLOCKS, True: _RELEASES}


def _call_steps(fn: Callable[[], Any]) -> _Steps[None]:
    """Call the user's `fn`, sync or async."""
    if is_async_callable(fn):
        yield (lambda _: fn()), None, _AWAITS
        return
    result = yield (lambda _: fn()), None, _CALLS
    if inspect.isawaitable(result):  # a lambda around an async function
        yield (lambda _: result), None, _AWAITS


def drive(steps: _Steps[_T]) -> _T:
    """Carry `steps` out in this thread and return their result."""
    try:
        func, argument, kind = next(steps)
        while True:
            try:
                if kind in (_AWAITS, _RELEASES):
                    raise RopeError("An async function cannot be awaited in a sync scope.")
                result = func(argument)
            except BaseException as error:
                func, argument, kind = steps.throw(error)
            else:
                func, argument, kind = steps.send(result)
    except StopIteration as stop:
        return cast("_T", stop.value)


async def adrive(steps: _Steps[_T], step: _Step, close_timeout: float) -> _T:
    """Carry `steps` out without blocking the event loop and return their result.

    Args:
        steps: a started generator.
        step: its first step.
        close_timeout: seconds for each step that gives a connection back.
    """
    func, argument, kind = step
    try:
        while True:
            try:
                if kind == _BLOCKS:
                    result = await in_thread(func, argument)
                elif kind == _CALLS:
                    result = await in_anyio_thread(func, argument)
                elif kind == _RELEASES:
                    result = await within(close_timeout, func(argument))
                else:
                    result = await func(argument)
            except BaseException as error:
                func, argument, kind = steps.throw(error)
            else:
                func, argument, kind = steps.send(result)
    except StopIteration as stop:
        return cast("_T", stop.value)


def log_retry(scope: Scope, number: int, of: int) -> None:
    """Log that a request is run again because the database refused its transaction."""
    logger.warning("retry %d of %d of %r: %s", number, of, scope.name, class_of(scope._refused))


def class_of(error: BaseException | None) -> str:
    """Name the class of `error`, and of the driver's error inside of it.

    Not its text: that may hold bound values, which are no matter for a log.
    """
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    try:
        inner = getattr(error, "orig", None)
    except Exception:  # a property of the driver's, or of the user's
        inner = None
    if inner is None or inner is error:
        return name
    return f"{name} ({type(inner).__module__}.{type(inner).__qualname__})"


def is_async_callable(fn: object) -> bool:
    """Tell whether calling `fn` gives a coroutine: async functions, methods, partials, objects."""
    while isinstance(fn, partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(
        getattr(fn, "__call__", None)  # noqa: B004 - not a test for callable()
    )


def current_scope() -> Scope:
    """Return the open scope. Usable as ``scoped_session(..., scopefunc=current_scope)``.

    Returns:
        The scope of the request being served, or of the innermost ``with open_scope():``.

    Raises:
        NoScopeError: no scope is open here.
        ScopeClosedError: this code has outlived the scope that it was started in.
    """
    scope = current.get(None)
    if scope is None:
        raise no_scope()
    if scope._state:
        scope._raise_closed()
    return scope


def no_scope(more: str = "") -> NoScopeError:
    """Make the error for code that needs a scope where none is open.

    Args:
        more: a sentence for the end of its text.
    """
    return NoScopeError(
        'No request scope is open. Wrap the app in RopeMiddleware, or use "with open_scope():" '
        f'("async with" for an AsyncSession) in scripts, threads and background jobs.{more}'
    )


def unbind(token: Token[Scope | None]) -> None:
    """Give the ContextVar `current` the value it had before."""
    try:
        current.reset(token)
    except ValueError:
        # Left in another context than it was entered in (a coroutine closed by the garbage
        # collector, a generator dependency run in two threads): here nothing was set.
        pass


def _restore(scope: Scope, token: Token[Scope | None]) -> None:
    """Give the ContextVar its former value, also where scopes are not left in order.

    Generators that open a scope each may be closed in any order. One that is left while another
    is current only notes what was before it, and whoever comes back to it goes on to that.
    """
    if current.get(None) is not scope:
        former = token.old_value
        scope._left = (None if former is Token.MISSING else former,)
        return
    unbind(token)
    while (now := current.get(None)) is not None and now._left is not None:
        current.set(now._left[0])


_SHARED_SESSION = (
    "Two tasks have probably used one AsyncSession at the same time, which SQLAlchemy does not "
    "allow. Give each concurrent task sessions of its own: 'async with open_scope():' around "
    "its work, or @open_scope() on its function (rope_middleware)."
)


def note_shared_session(error: BaseException) -> None:
    """Add to `error`, where it tells of a session shared by tasks, a note that says so (Y3)."""
    with suppress(Exception):  # an error that has no text, or takes no note
        _note_shared_session(error)


def _note_shared_session(error: BaseException) -> None:
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        inner = pending.pop()
        if inner is None or id(inner) in seen:
            continue
        seen.add(id(inner))
        if _tells_of_sharing(inner):
            for told in (inner, error):
                if _SHARED_SESSION not in getattr(told, "__notes__", ()):
                    told.add_note(_SHARED_SESSION)
        pending += (inner.__cause__, inner.__context__)
        if isinstance(inner, BaseExceptionGroup):
            pending += cast("BaseExceptionGroup[BaseException]", inner).exceptions


def _tells_of_sharing(error: BaseException) -> bool:
    # SQLAlchemy gives its own errors of this kind the code "isce"; the others are the drivers'.
    # https://docs.sqlalchemy.org/en/20/errors.html#error-isce
    if getattr(error, "code", None) == "isce":
        return True
    text = str(error)  # asyncpg's, psycopg's
    return "another operation is in progress" in text or "another command is already in" in text


def _may_await(traceback: TracebackType | None) -> bool:
    """Tell whether code that GeneratorExit goes through can still await.

    An async generator can (its aclose() is awaited), a coroutine that is closed cannot.
    """
    return (
        traceback is not None
        and bool(traceback.tb_frame.f_code.co_flags & inspect.CO_ASYNC_GENERATOR)
        and is_async_running()
    )


class open_scope:  # noqa: N801 - used like a function
    """Open a scope by hand: ``with``, ``async with``, or as a decorator.

    The scope is an inner one where another is open already, with sessions of its own; the
    outer one is untouched and current again afterwards. As a decorator it opens a new scope
    for each call::

        with open_scope("import"):
            jenny.session.add(row)
            jenny.session.commit()


        @open_scope(commit_on_success=True)
        async def job(): ...

    Args:
        name: what error texts and log lines call the scope; the function's name where it is
            used as a decorator.
        commit_on_success: commit when the block ends without an error.
        close_timeout: seconds that each async session may take to give its connection back, 10
            by default; past it the connection is invalidated.

    Returns:
        A context manager; ``with`` and ``async with`` give the `Scope`.

    Raises:
        TypeError: `name` is no str, or it decorates a generator function, whose body runs after
            the call.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        commit_on_success: bool = False,
        close_timeout: float = CLOSE_TIMEOUT,
    ) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(
                f"open_scope() takes a name, not {name!r}. As a decorator it needs its "
                "brackets: @open_scope()."
            )
        self._name = name
        self._commit = commit_on_success
        self._close_timeout = close_timeout
        self._entered: list[tuple[Scope, Token[Scope | None]]] = []

    def _enter(self, scope: _ScopeT) -> _ScopeT:
        scope._open(self._name or "open_scope()", self._commit)
        scope._close_timeout = self._close_timeout
        outer = current.get(None)
        if outer is not None:
            scope._outer = outer
            if outer._registries:
                # Their sessions are found by the current scope: this one has its own.
                scope._registries = tuple(
                    registry
                    for registry in outer._registries
                    if scope._is_async or not registry.is_async
                )
        self._entered.append((scope, current.set(scope)))
        return scope

    def _leave(self, error: BaseException | None) -> tuple[Scope, Token[Scope | None], bool, str]:
        # Threads and tasks may share one object, and need not leave in the order they came.
        here = current.get(None)
        entered = reversed(self._entered.copy())
        entry = next((one for one in entered if one[0] is here), self._entered[-1])
        self._entered.remove(entry)
        scope, token = entry
        if error is not None:
            note_shared_session(error)
        commit = self._commit and error is None and not scope._doomed
        why = "doomed" if error is None else class_of(error)
        return scope, token, commit, why

    def __enter__(self) -> Scope:
        return self._enter(Scope())

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        scope, token, commit, why = self._leave(error)
        try:
            scope._end(commit, why)
        finally:
            _restore(scope, token)

    async def __aenter__(self) -> Scope:
        scope = self._enter(AsyncScope())
        scope._thread = threading.get_ident()
        return scope

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        left, token, commit, why = self._leave(error)
        scope = cast("AsyncScope", left)
        try:
            if isinstance(error, GeneratorExit) and not _may_await(traceback):
                scope._abandon()
            else:
                await scope._aend(commit, why)
        finally:
            _restore(scope, token)

    def _again(self, fn: Callable[..., Any]) -> open_scope:
        return open_scope(
            self._name or getattr(fn, "__qualname__", None),
            commit_on_success=self._commit,
            close_timeout=self._close_timeout,
        )

    def __call__(self, fn: Callable[_P, _T]) -> Callable[_P, _T]:
        """Decorate `fn`, sync or async: each call of it has a scope of its own."""
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise TypeError(
                f"@open_scope() cannot decorate the generator {fn!r}: its body runs after the "
                'call has returned. Use "with open_scope():" inside of it.'
            )
        if is_async_callable(fn):

            @wraps(fn)
            async def in_async_scope(*args: _P.args, **kwargs: _P.kwargs) -> Any:
                async with self._again(fn):
                    return await cast("Awaitable[Any]", fn(*args, **kwargs))

            return cast("Callable[_P, _T]", in_async_scope)

        @wraps(fn)
        def in_scope(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            with self._again(fn):
                return fn(*args, **kwargs)

        return in_scope
