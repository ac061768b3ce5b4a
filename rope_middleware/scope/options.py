"""What a middleware or an `open_scope` was asked for: one frozen object, checked once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, cast

from rope_middleware.scope.context import is_async_callable
from rope_middleware.signature import may_take, near

if TYPE_CHECKING:
    from rope_middleware.protocols import CommitError, Veto

__all__ = ["DEFAULT", "EVERY", "Options", "methods_of", "options_of"]

EVERY = ("every method",)
"""As `read_only`: of a scope that is read-only whatever it is for."""


class Options:
    """The options of a scope. Frozen.

    By hand, for Python compiles what a dataclass generates: 0.6 ms of the import.

    Args:
        commit_on_success: commit before a response with a status under 400 starts, else roll
            back; `open_scope` commits when its block ends without an error.
        commit_veto: called with the status and the headers (a list of pairs of str) of a response
            that would commit; where it returns something true, the scope rolls back.
        on_commit_error: called with the error of a commit that has failed for good; returns the
            application that answers, or None.
        retries: how often a request is run again when the database refused its transaction as
            one to try again, or a connection was lost.
        max_active: how many requests may be served at a time; the others wait in line.
        read_only: the methods whose requests read only (R1), or `EVERY`.
        close_timeout: seconds that the database may take to answer the COMMIT of an async
            session, each async session to give its connection back, and each async `on_close`
            function to end; past it the connection is invalidated.

    Raises:
        TypeError: an option is of a wrong type.
        ValueError: an option is of the right type and cannot be meant.
    """

    __slots__ = (
        "close_timeout",
        "commit_on_success",
        "commit_veto",
        "max_active",
        "on_commit_error",
        "read_only",
        "retries",
    )

    commit_on_success: bool
    commit_veto: Veto | None
    on_commit_error: CommitError | None
    retries: int
    max_active: int | None
    read_only: tuple[str, ...]
    close_timeout: float

    def __init__(
        self,
        *,
        commit_on_success: bool = False,
        commit_veto: Veto | None = None,
        on_commit_error: CommitError | None = None,
        retries: int = 0,
        max_active: int | None = None,
        read_only: tuple[str, ...] = (),
        close_timeout: float = 10.0,
    ) -> None:
        assign = object.__setattr__
        assign(self, "commit_on_success", commit_on_success)
        assign(self, "commit_veto", commit_veto)
        assign(self, "on_commit_error", on_commit_error)
        assign(self, "retries", retries)
        assign(self, "max_active", max_active)
        assign(self, "read_only", read_only)
        assign(self, "close_timeout", close_timeout)
        self._check()

    def __setattr__(self, name: str, value: object) -> NoReturn:
        """Refuse: a scope that is open has them.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(f"options are frozen: {name} cannot be set")

    def __reduce__(self) -> tuple[Callable[[], Options], tuple[()]]:
        """Let a middleware be copied and pickled; Python's own way would set attributes."""
        return partial(Options, **{name: getattr(self, name) for name in self.__slots__}), ()

    def _check(self) -> None:
        _check_flag("commit_on_success", self.commit_on_success)
        veto: object = self.commit_veto
        if veto is not None and (not callable(veto) or is_async_callable(veto)):
            raise TypeError(
                "commit_veto must be a plain function of (status, headers) that returns true "
                f"where the request must not be committed, not {veto!r}."
            )
        answering: object = self.on_commit_error
        if answering is not None and (not callable(answering) or is_async_callable(answering)):
            raise TypeError(
                "on_commit_error must be a plain function of the error that returns an application "
                f"(a response), or None, not {answering!r}."
            )
        _check_number("retries", "further tries", self.retries, 0)
        if self.max_active is not None:
            _check_number("max_active", "requests", self.max_active, 1)
        _check_seconds("close_timeout", self.close_timeout)

    def plus(self, inner: Options) -> Options:
        """Add the options of a middleware that stands inside of this one's (S6)."""
        return Options(
            commit_on_success=self.commit_on_success or inner.commit_on_success,
            commit_veto=_either(self.commit_veto, inner.commit_veto),
            on_commit_error=inner.on_commit_error or self.on_commit_error,
            retries=self.retries,
            max_active=self.max_active,
            close_timeout=self.close_timeout,
            read_only=tuple(dict.fromkeys((*self.read_only, *inner.read_only))),
        )


def options_of(who: str, given: dict[str, Any]) -> Options:
    """Make the options that a user gave by keyword.

    Raises:
        TypeError: there is no such option, or it is of a wrong type.
        ValueError: it is of the right type and cannot be meant.
    """
    known = Options.__slots__
    for name in given:
        if name not in known:
            raise TypeError(
                f"{who} got an unexpected keyword argument {name!r}.{near(name, known)} "
                f"Its options are {', '.join(known)}."
            )
    options = Options(**given)
    _check_call("commit_veto", options.commit_veto, "status", "headers")
    _check_call("on_commit_error", options.on_commit_error, "error")
    return options


def _check_call(name: str, function: object, *arguments: str) -> None:
    """Refuse a function that cannot be called as it will be."""
    if function is not None and not may_take(function, len(arguments)):
        raise TypeError(
            f"{name} is called with ({', '.join(arguments)}), and {function!r} does not take that."
        )


def methods_of(read_only: object) -> tuple[str, ...]:
    """Return the methods that a middleware was given as `read_only`.

    Raises:
        TypeError: it is no collection of methods.
    """
    if not isinstance(read_only, str | bytes) and isinstance(read_only, Iterable):
        names = tuple(cast("Iterable[object]", read_only))
        if all(isinstance(name, str) and _is_method(name) for name in names):
            return tuple(name.upper() for name in cast("tuple[str, ...]", names))
    raise TypeError(
        f'read_only is a collection of methods, as ("GET", "HEAD"), not {read_only!r}. Requests '
        "with one of these methods read only. (That of open_scope() is True or False.)"
    )


def _is_method(name: str) -> bool:
    return name.isascii() and name.replace("-", "a").isalpha()


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {value!r}.")


def _check_number(name: str, what: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a number of {what}, not {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, not {value!r}.")


def _check_seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name} is a number of seconds, not {value!r}."
            + (
                " An end that waits for ever keeps its connection for ever: leave it out for the "
                "default, or give a large number."
                if value is None
                else ""
            )
        )
    if not value > 0:
        raise ValueError(f"{name} must be more than 0 seconds, not {value!r}.")


def _either(outer: Veto | None, inner: Veto | None) -> Veto | None:
    """Return a veto that says no where one of the two does."""
    if outer is None or inner is None or outer is inner:
        return outer or inner
    return lambda status, headers: outer(status, headers) or inner(status, headers)


DEFAULT = Options()
