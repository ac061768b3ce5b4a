"""What a scope asks of the sessions that it keeps, and how it does: for type checkers alone."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeAlias

from rope_middleware.running.places import Places

__all__ = ["Hands", "PlainKind", "SessionCall", "SessionKey", "SessionKind", "Work"]


class SessionKind(Protocol):
    """How sessions of one kind are committed and ended.

    Of an async kind `flush`, `prepare`, `commit`, `rollback` and `close` return awaitables.
    """

    is_async: bool

    def inner(self, session: Any, /) -> Any:
        """Return the inner session of what a factory made, or None."""
        ...

    def handed_out(self, session: Any, /) -> Any:
        """Return what a factory made, given its inner session; None if it is gone."""
        ...

    def is_idle(self, session: Any, /) -> bool:
        """Tell whether `session` has nothing open, so that ending it needs no I/O."""
        ...

    def has_begun(self, session: Any, /) -> bool:
        """Tell whether `session` has something to commit. One that is not idle may have nothing."""
        ...

    def holds_connection(self, session: Any, /) -> bool:
        """Tell whether `session` has a connection out of its pool."""
        ...

    def has_changes(self, session: Any, /) -> bool:
        """Tell whether a commit of `session` flushes first."""
        ...

    def end_at_once(self, session: Any, /) -> bool:
        """End `session` on the event loop, where that needs no I/O; tell whether it has ended."""
        ...

    def end_idle(self, session: Any, scope: Any, /) -> bool:
        """End `session` and the use of its `scope`, where it `is_idle`; tell whether it was so."""
        ...

    def has_open_result(self, session: Any, /) -> bool:
        """Tell whether a result of `session` is still being read."""
        ...

    def is_busy(self, session: Any, /) -> bool:
        """Tell whether somebody is in the middle of a statement, or of a flush."""
        ...

    def is_of_body(self, session: Any, /) -> bool:
        """Tell whether `session` is in a `begin()` block that a response's body has begun."""
        ...

    def guard(self, session: Any, scope: Any, /) -> None:
        """Let calls on `session` and a commit of `scope` wait for each other."""
        ...

    def is_twophase(self, session: Any, /) -> bool:
        """Tell whether `session` commits in two phases."""
        ...

    def is_opaque(self, session: Any, /) -> bool:
        """Tell whether nothing can be known of what it has open: it is no Session."""
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

    def places_alone(self, session: Any, /) -> Places | None:
        """Tell what `commit_alone` may wait for, in a thread; None where that is not simple."""
        ...

    def commit_alone(self, session: Any, /) -> bool:
        """Commit here, where that is simple; tell whether nothing more is to be done.

        Of an async kind `in_greenlet`.
        """
        ...

    def rollback(self, session: Any, /) -> Any:
        """Roll back and give back the connection."""
        ...

    def close(self, session: Any, /) -> Any:
        """Close the session; whatever happens, give back or invalidate its connections."""
        ...

    def close_here(self, session: Any, /) -> None:
        """`close`, of an async kind `in_greenlet`."""
        ...

    def in_greenlet(self, func: Callable[..., object], /, *args: object) -> Any:
        """Call `func` where its sync code can wait: what is to be awaited; None of a sync kind."""
        ...

    def wait_here(self, work: Coroutine[Any, Any, Any], /) -> Any:
        """Wait for `work`, `in_greenlet`."""
        ...

    def discard(self, session: Any, /) -> None:
        """End an idle session, without I/O."""
        ...

    def end(self, session: Any, /) -> None:
        """End a session in this thread; of an async one, what ends without I/O."""
        ...

    def invalidate(self, session: Any, /) -> None:
        """Throw the session's connections away at once, without waiting for the database."""
        ...

    def detach(self, session: Any, /) -> None:
        """Leave to the parent process, in a forked one, what the session has open."""
        ...

    def explain(self, error: BaseException, /) -> None:
        """Add notes to an error that has left a scope with sessions of this kind."""
        ...

    def tells_why(self, session: Any, error: BaseException, name: str, /) -> bool:
        """Tell in the log why the end of scope `name` cannot close `session`, where it is known."""
        ...

    def owns(self, session: Any, scope: Any, /) -> bool:
        """Tell whether `session` is that of `scope`, open or ended; plain ones only."""
        ...


class SessionKey(Protocol):
    """Under what a scope keeps a session: a registry."""

    @property
    def kind(self) -> SessionKind:
        """How the session is committed and ended."""
        ...


class PlainKind(SessionKind, SessionKey, Protocol):
    """A plain scoped_session: it keeps its session itself, so it is key and kind at once."""

    @property
    def besides(self) -> SessionKind:
        """How a session ends that it has removed, and that is used on."""
        ...


Work: TypeAlias = list[tuple[SessionKey, Any]]
SessionCall: TypeAlias = Callable[[Any], Any]


class Hands(Protocol):
    """How what blocks or awaits is carried out: see `hands`."""

    def takes(self, work: Work) -> Work:
        """Return the sessions that can be committed so."""
        ...

    async def until(self, is_free: Callable[[], bool]) -> None:
        """Wait, not for ever, until a statement of somebody else's is over."""

    async def use(self, kind: SessionKind, call: SessionCall, session: Any, work: Work) -> None:
        """Flush or commit: functions of the application may run, and the pool be waited for.

        Args:
            kind: of the session.
            call: what is called with it.
            session: one of those that are committed.
            work: all of them.
        """

    async def release(self, kind: SessionKind, call: SessionCall, session: Any) -> None:
        """Roll back or close: gives a connection back."""

    async def run(self, fn: Callable[[], Any], limited: bool = False) -> None:
        """Call a function of the application's, sync or async; a limited one may not take long."""
