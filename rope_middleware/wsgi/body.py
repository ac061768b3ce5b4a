"""What the server gets for a body: something whose `close()` ends the scope, once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rope_middleware.scope.context import current, logger
from rope_middleware.scope.ending import end, end_failed, explain
from rope_middleware.scope.response import gate_of, is_doomed
from rope_middleware.scope.scope import CLOSED, ENDED, Scope
from rope_middleware.scope.short import end_shortly, end_untouched
from rope_middleware.wsgi.files import is_file, is_odd, is_streamed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from _typeshed.wsgi import WSGIEnvironment

__all__ = [
    "SHORT",
    "Body",
    "ListBody",
    "hand_on",
    "made",
]

_Made = TypeVar("_Made", bound="_Ending")

# Bound once: this is the way of every request.
_set_current = current.set
_reset_current = current.reset
_get_current = current.get


def hand_on(
    body: Iterable[bytes],
    environ: WSGIEnvironment,
    scope: Scope,
    commits: bool = False,
    owns: bool = True,
) -> Iterable[bytes]:
    """Return what the server gets for `body`: something whose close() ends the scope.

    Args:
        body: the application's.
        environ: the request's.
        scope: the request's.
        commits: the response is a success: what is done after its start is committed, too.
        owns: False where another middleware ends the scope.
    """
    kind = type(body)
    if kind is list or kind is tuple:
        return made(ListBody, body, scope, commits) if owns else body
    if is_streamed(body, environ):
        return made(Body, body, scope, commits, owns)
    if is_file(body, environ):
        return _end_with_file(body, scope, commits) if owns else body
    if is_odd(body):
        if owns:
            end(scope, *_verdict(scope, commits, is_read=True))
        return body
    return made(_SizedBody, body, scope, commits, owns)


def made(
    kind: type[_Made], body: Any, scope: Scope, commits: bool = False, owns: bool = True
) -> _Made:
    """Return a body of ours. An `__init__` would cost three times as much.

    Args:
        kind: the class of it.
        body: the application's.
        scope: the request's.
        commits: the response is a success.
        owns: False where another middleware ends the scope.
    """
    ending = kind()
    ending._body = body
    ending._scope = scope
    ending._owns = owns
    ending._commits = commits
    ending._read = False
    return ending


def _verdict(scope: Scope, commits: bool, is_read: bool) -> tuple[bool, str]:
    """Tell whether the end of the response commits, and if not, why."""
    gate = gate_of(scope)
    if not (commits if gate is None else gate.commits):
        return False, "the response was no success"
    if is_doomed(scope):
        return False, "doomed"
    return is_read, "the body was not read to its end and closed"


class _Ending:
    """Closes the application's body, then ends the scope. Once."""

    __slots__ = ("__weakref__", "_body", "_commits", "_owns", "_read", "_scope")

    _body: Any
    _scope: Scope | None  # None once it has ended
    _owns: bool
    _commits: bool
    _read: bool  # to its end

    def close(self) -> None:
        """Close the application's body, then end the scope. Called again it does nothing."""
        scope = self._scope
        if scope is None:
            return
        self._scope = None
        token = _set_current(scope)
        try:
            # PEP 3333: close() of the iterable, not of its iterator.
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
            if self._owns and not (end_untouched(scope) or end_shortly(scope)):
                end(scope, *_verdict(scope, self._commits, self._read))
        except BaseException as error:
            if self._owns:
                end_failed(scope, error)
            raise
        finally:
            try:  # `unbind`, without the price of a call (0.04 us)
                _reset_current(token)
            except ValueError:
                pass

    def __del__(self) -> None:
        # A server that drops the body without closing it: nothing is committed.
        if self._scope is not None:
            self._read = False
            try:
                _Ending.close(self)
            except Exception:
                logger.exception("close() of a response that was never closed failed")


class ListBody(_Ending):
    """A body that is there already: no code of the application runs between its chunks."""

    __slots__ = ()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def __len__(self) -> int:
        # Servers make a Content-Length of the one chunk of a body of length 1.
        return len(self._body)

    def close(self) -> None:
        """End the scope. Called again it does nothing."""
        # As `_Ending.close`, without what a list has not. To call that took 0.16 us more.
        scope = self._scope
        if scope is None:
            return
        self._scope = None
        if scope._sessions is None:  # `end_untouched`, without the price of a call (0.04 us)
            scope._state = ENDED
            if scope._sessions is None:
                scope._state = CLOSED
                return
        token = _set_current(scope)
        try:
            if not end_shortly(scope):
                end(scope, *_verdict(scope, self._commits, is_read=True))
        except BaseException as error:
            end_failed(scope, error)
            raise
        finally:
            try:  # `unbind`, without the price of a call (0.04 us)
                _reset_current(token)
            except ValueError:
                pass


class Body(_Ending):
    """A body whose chunks are made as they are asked for, each with the scope current."""

    __slots__ = ()

    def __iter__(self) -> Iterator[bytes]:
        scope = self._scope
        if scope is None:  # closed
            yield from self._body
            return
        token: Any = _set_current(scope)  # None while the server has its turn
        try:
            # A for loop: `next` would cost a call for each chunk, and StopIteration 0.3 us.
            for chunk in self._body:
                inner = _get_current(None)
                # None before the call: if a signal's handler raises in it, nothing is reset twice.
                used, token = token, None
                try:  # `unbind`, without the price of a call (0.04 us)
                    _reset_current(used)
                except ValueError:
                    pass
                yield chunk
                # An open_scope() around several chunks is current for each of them.
                if inner is not scope and (inner is None or inner._state):
                    inner = scope
                token = _set_current(inner)
            self._read = True
        except BaseException as error:
            if token is not None:  # the application's error: not one of the server's
                explain(scope, error)
            raise
        finally:
            if token is not None:
                try:
                    _reset_current(token)
                except ValueError:
                    pass


class _ClosableBody(Body):
    """A `Body` of a class that has a close(), in a scope that ends with it."""

    __slots__ = ()

    def close(self) -> None:
        """Close the application's body, then end the scope. Called again it does nothing."""
        # As `_Ending.close`, without what is known here. To call that took 0.1 us more.
        scope = self._scope
        if scope is None:
            return
        self._scope = None
        token = _set_current(scope)
        try:
            try:
                close = self._body.close
            except AttributeError:  # a slot of its class that is empty, or of a proxy
                close = None
            if close is not None:
                close()
            if scope._sessions is None:  # `end_untouched`, without the price of a call
                scope._state = ENDED
                if scope._sessions is None:
                    scope._state = CLOSED
                    return
            if not end_shortly(scope):
                end(scope, *_verdict(scope, self._commits, self._read))
        except BaseException as error:
            end_failed(scope, error)
            raise
        finally:
            try:  # `unbind`, without the price of a call (0.04 us)
                _reset_current(token)
            except ValueError:
                pass


SHORT: tuple[type[Body | ListBody], ...] = (ListBody, Body, _ClosableBody)
"""What the server gets for a body of a known class in a scope that ends with it: see `KINDS`."""


class _SizedBody(Body):
    """A `Body` that knows its length."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._body)


class _File(_Ending):
    """Ends the scope by the `close()` of the server's own file wrapper.

    Once closed it does not refer to the wrapper, which refers to it: that would be a cycle.
    """

    __slots__ = ()

    def close(self) -> None:
        """Close the file, then end the scope: the server has read it by itself."""
        self._read = True
        try:
            super().close()
        finally:
            self._body = None  # a method of the wrapper's, where its class has close()


def _end_with_file(body: Any, scope: Scope, commits: bool) -> Iterable[bytes]:
    """Replace the close() of the server's own file wrapper; return the wrapper."""
    close = getattr(body, "close", None)
    ending = made(_File, SimpleNamespace(close=close), scope, commits)
    try:
        body.close = ending.close
    except (AttributeError, TypeError):
        ending._body = None  # the server will close it
        ending.close()
    return cast("Iterable[bytes]", body)
