"""Opening a scope by hand, and asking for the one that is open."""

from __future__ import annotations

import inspect
import sys
import threading
from asyncio import CancelledError
from collections.abc import Awaitable, Callable
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast
from weakref import ref

from rope_middleware.errors import RopeError, no_scope
from rope_middleware.running.finish import is_async_running
from rope_middleware.scope.context import (
    check_is_no_job,
    check_stays,
    class_of,
    current,
    is_async_callable,
    removing,
    restore,
    unbind,
)
from rope_middleware.scope.ending import end, end_closing, explain
from rope_middleware.scope.options import EVERY, options_of
from rope_middleware.scope.scope import AsyncScope, Scope, SyncScope
from rope_middleware.signature import explained

__all__ = ["current_scope", "open_scope"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_ScopeT = TypeVar("_ScopeT", bound=Scope)


def current_scope() -> Scope:
    """Return the open scope. Usable as ``scoped_session(..., scopefunc=current_scope)``.

    Returns:
        The scope of the request being served, or of the innermost ``with open_scope():``.

    Raises:
        NoScopeError: no scope is open here.
        ScopeClosedError: the scope in which this code was started has ended.
    """
    scope = current.get(None)
    if scope is None:
        raise no_scope()
    if scope._state and removing.get() is not scope:
        scope._raise_closed()
    return scope


class open_scope:  # noqa: N801 - used like a function
    """Open a scope by hand: ``with``, ``async with``, or as a decorator.

    If another scope is open, the new one is an inner scope with sessions of its own. The outer one
    is untouched, and current again afterwards. One object can be entered once at a time. As a
    decorator it opens a new scope for each call. Who calls ``__enter__()`` by hand has to keep the
    object: if it is collected, its scope ends::

        with open_scope("import"):
            jenny.session.add(row)
            jenny.session.commit()


        @open_scope(commit_on_success=True)
        async def job(): ...

    Args:
        name: what error texts and log lines call the scope; by default the name of the decorated
            function.
        commit_on_success: commit when the block ends without an error. ``sys.exit(0)`` is no error.
        read_only: sessions of the scope read without a transaction, and refuse to write.
        close_timeout: seconds for each of these: the database's answer to the COMMIT of an async
            session, the end of an async session, an async `on_close` function; 10 by default.
            After that the connection is invalidated, and a COMMIT without an answer is in doubt.

    Returns:
        A context manager; ``with`` and ``async with`` give the `Scope`.

    Raises:
        TypeError: an argument has a wrong type, or the decorated function is a generator, whose
            body runs after the call, or what the decorator of a queue has made.
        ValueError: `close_timeout` is not more than 0.
        RuntimeError: it is entered a second time before it is left.
        RopeError: a framework runs the code in a worker thread, in a copy of the context, as
            FastAPI does with dependencies that are plain generators: nobody would find the scope.
    """

    _entered: tuple[Scope, Scope | None] | None = None

    @explained('with open_scope("import", commit_on_success=True): ...')
    def __init__(
        self,
        name: str | None = None,
        *,
        commit_on_success: bool = False,
        read_only: bool = False,
        close_timeout: float = 10.0,
    ) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(
                f"open_scope() takes a name, not {name!r}. As a decorator it needs its "
                "brackets: @open_scope()."
            )
        self._name = name
        if not isinstance(read_only, bool):
            raise TypeError(
                f"read_only is True or False, not {read_only!r}. (That of a middleware is a "
                'collection of methods, as ("GET", "HEAD").)'
            )
        self._options = options_of(
            "open_scope()",
            {
                "commit_on_success": commit_on_success,
                "read_only": EVERY if read_only else (),
                "close_timeout": close_timeout,
            },
        )
        self._entering = threading.Lock()

    def _enter(self, scope: _ScopeT) -> _ScopeT:
        if not self._entering.acquire(blocking=False):
            raise RuntimeError(
                "This open_scope() is entered already, and one object can be entered only once at "
                'a time. Make a new one where you enter it: "with open_scope():".'
            )
        outer = current.get(None)
        if outer is None or outer._state:
            scope._open(self._name or "open_scope()", self._options)
        else:
            # Plain scoped_sessions find their session by the current scope: it has its own here.
            scope._open(
                self._name or "open_scope()",
                self._options,
                tuple(kind for kind in outer._registries if scope._is_async or not kind.is_async),
            )
            scope._outer = ref(outer)
            if outer._info is not None:
                scope._info = outer._info.copy()
        self._entered = scope, outer
        current.set(scope)
        return scope

    def _leave(self, error: BaseException | None) -> tuple[Scope, bool, str]:
        assert self._entered is not None  # noqa: S101 - `_enter` has set it
        scope, _ = self._entered
        if error is not None:
            explain(scope, error)
        # A program that ends by sys.exit(0) has succeeded (click, argparse, Django's commands).
        is_success = error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
        commits = self._options.commit_on_success and is_success and not scope._doomed
        return scope, commits, "doomed" if error is None else class_of(error)

    def _restore(self) -> None:
        """Make the former scope current again."""
        assert self._entered is not None  # noqa: S101
        restore(*self._entered)
        self._entered = None
        self._entering.release()

    def __enter__(self) -> Scope:
        if sys._getframe(1).f_code.co_flags & inspect.CO_GENERATOR:
            check_stays(sys._getframe(1))
        return self._enter(SyncScope())

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._entered is None:
            return  # the garbage collector has finalised it before the generator that is closed
        scope, commits, why = self._leave(error)
        try:
            end(scope, commits, why)
        finally:
            self._restore()

    def __del__(self) -> None:
        # What a signal's handler raises (a time limit of a job) may come as `__enter__` ends, or as
        # `__exit__` begins: then nobody leaves the block any more. Async code hears of it at await.
        if self._entered is None or self._entered[0]._is_async or sys.is_finalizing():
            return
        scope, _ = self._entered
        token = current.set(scope)
        try:
            if not scope.closed:
                end(scope, why="it was cut off")
        finally:
            unbind(token)
            self._restore()

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
        scope, commits, why = self._leave(error)
        try:
            if isinstance(error, GeneratorExit) and not _may_await(traceback):
                end_closing(scope)
            else:
                await _aend(scope, commits, why)
        except CancelledError:
            if error is None:
                raise  # else: the block's own error goes on
        finally:
            self._restore()

    def _again(self, fn: Callable[..., Any]) -> open_scope:
        again = open_scope(self._name or getattr(fn, "__qualname__", None))
        again._options = self._options
        return again

    def __call__(self, fn: Callable[_P, _T]) -> Callable[_P, _T]:
        """Decorate `fn`, sync or async: each call of it has a scope of its own."""
        if isinstance(fn, staticmethod | classmethod):  # they stand below us
            below: Any = cast("Any", fn)
            return cast("Callable[_P, _T]", below.__class__(self(below.__func__)))
        if not callable(fn):
            raise TypeError(
                f"@open_scope() decorates a function, not {fn!r}. Around a block of code it is "
                '"with open_scope():".'
            )
        if isinstance(fn, type):
            raise TypeError(
                f"@open_scope() cannot decorate the class {fn!r}: its methods run after the call "
                "has returned. Decorate the methods."
            )
        if (is_async := inspect.isasyncgenfunction(fn)) or inspect.isgeneratorfunction(fn):
            raise TypeError(
                f"@open_scope() cannot decorate the generator {fn!r}: its body runs after the "
                f'call has returned. Use "{"async " * is_async}with open_scope():" inside of it.'
            )
        check_is_no_job(fn)
        if is_async_callable(fn):

            @wraps(fn)
            async def in_async_scope(*args: _P.args, **kwargs: _P.kwargs) -> Any:
                async with self._again(fn):
                    return await cast("Awaitable[Any]", fn(*args, **kwargs))

            return cast("Callable[_P, _T]", in_async_scope)

        @wraps(fn)
        def in_scope(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            with self._again(fn):
                result = fn(*args, **kwargs)
                if inspect.isawaitable(result):
                    raise _returned_awaitable(fn, result)
                return result

        return in_scope


async def _first_aend(scope: Scope, commits: bool, why: str) -> None:
    """Import what ends async scopes: many programs have none."""
    global _aend
    from rope_middleware.scope.async_ending import aend

    _aend = aend
    await aend(scope, commits, why)


_aend: Callable[[Scope, bool, str], Awaitable[None]] = _first_aend


def _returned_awaitable(fn: object, result: object) -> RopeError:
    if inspect.iscoroutine(result):
        result.close()
    return RopeError(
        f"@open_scope() took {fn!r} for a plain function, and it returned an awaitable: that would "
        "be awaited after the scope has ended. Decorate the async function itself, below the "
        'other decorators, or use "async with open_scope():" inside of it.'
    )


def _may_await(traceback: TracebackType | None) -> bool:
    """Tell whether code that GeneratorExit goes through can still await.

    An async generator can (its aclose() is awaited), a coroutine that is closed cannot.
    """
    return (
        traceback is not None
        and bool(traceback.tb_frame.f_code.co_flags & inspect.CO_ASYNC_GENERATOR)
        and is_async_running()
    )
