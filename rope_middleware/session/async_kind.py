"""How AsyncSessions commit and end: the twin of `kinds`.

Apart from it because SQLAlchemy's asyncio half needs greenlet, which a sync application does not
install.
"""

from __future__ import annotations

import inspect
from collections.abc import Coroutine
from operator import attrgetter
from typing import Any, TypeGuard

try:
    from sqlalchemy.ext.asyncio import AsyncSession, async_session
except ImportError as _error:
    raise ImportError(
        "AsyncSessionJenny needs SQLAlchemy's asyncio extension: "
        "pip install 'rope-middleware[asyncio]'"
    ) from _error

from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, greenlet_spawn

from rope_middleware.running.places import Places
from rope_middleware.session import closing, committing, idle
from rope_middleware.session.failures.sharing import tell_cut_off
from rope_middleware.session.guard.by_error import NOTES_ERRORS
from rope_middleware.session.guard.sessions import plain_class, reset
from rope_middleware.session.kinds import SyncKind

__all__ = ["ASYNC", "FOREIGN_ASYNC", "AsyncKind", "ForeignAsyncKind"]

_CLOSE, _COMMIT, _FLUSH = AsyncSession.close, AsyncSession.commit, AsyncSession.flush


class AsyncKind(SyncKind):
    """Sessions that are SQLAlchemy's `AsyncSession`."""

    is_async = True

    inner: Any = attrgetter("sync_session")  # a method would be one more call

    def handed_out(self, session: Any, /) -> Any:
        # The application may have kept the inner session alone. What a scope keeps can be awaited.
        return async_session(session) or AsyncSession(sync_session_class=_made_of(session))

    def is_idle(self, session: Any, /) -> bool:
        own = getattr(session.close, "__func__", None)  # mostly: see `plain_class`, 2 calls less
        is_plain = own is _CLOSE or (own is NOTES_ERRORS and session.__class__.close is _CLOSE)
        if not is_plain and plain_class(session, _CLOSE) is None:
            return False
        return idle.has_nothing_open(session.sync_session)

    def end_at_once(self, session: Any, /) -> bool:
        is_plain = getattr(session.close, "__func__", None) is _CLOSE  # mostly, and a call less
        if not is_plain and plain_class(session, _CLOSE) is None:
            return False
        inner = session.sync_session  # from here on as `idle.end_at_once`, a call less
        if not inner.in_transaction() and idle.end_idle(inner):
            return True
        return hasattr(inner, "_rope_middleware_ends_at_once") and idle.end_at_once(inner)

    def end_idle(self, session: Any, scope: Any, /) -> bool:
        own = getattr(session.close, "__func__", None)  # as `is_idle`
        is_plain = own is _CLOSE or (own is NOTES_ERRORS and session.__class__.close is _CLOSE)
        if not is_plain and plain_class(session, _CLOSE) is None:
            return False
        return idle.end_idle(session.sync_session, scope)

    def is_twophase(self, session: Any, /) -> bool:
        return bool(session.sync_session.twophase)

    async def prepare(self, session: Any, /) -> None:
        await session.run_sync(Session.prepare)

    async def commit(self, session: Any, /) -> None:
        await committing.acommit(session)

    async def flush(self, session: Any, /) -> None:
        await session.run_sync(committing.flush)

    def places_alone(self, session: Any, /) -> Places | None:
        return committing.places_alone(session.sync_session, is_async=True)

    def commit_alone(self, session: Any, /) -> bool:
        return (
            getattr(session.commit, "__func__", None) is _COMMIT
            and getattr(session.flush, "__func__", None) is _FLUSH
            and committing.commit_alone_in_greenlet(session)
        )  # else the application's own are to be called

    def close(self, session: Any, /) -> Coroutine[Any, Any, None]:
        return greenlet_spawn(self.close_here, session)

    def close_here(self, session: Any, /) -> None:
        is_plain = getattr(session.close, "__func__", None) is _CLOSE
        if is_plain or plain_class(session, _CLOSE) is not None:
            closing.close(session.sync_session)
        else:
            await_only(_close_by_its_own(session))

    in_greenlet: Any = staticmethod(greenlet_spawn)  # a method would be one more call

    def wait_here(self, work: Coroutine[Any, Any, Any], /) -> Any:
        return await_only(work)

    def discard(self, session: Any, /) -> None:
        closing.discard(session.sync_session)

    def end(self, session: Any, /) -> None:
        # Of an idle one: it has no close() of its own, for which `discard` asks once more.
        inner: Session = session.sync_session
        reset(inner)
        closing.forget(inner)

    def invalidate(self, session: Any, /) -> None:
        closing.invalidate(session.sync_session)

    def detach(self, session: Any, /) -> None:
        closing.detach(session.sync_session)

    def tells_why(self, session: Any, error: BaseException, name: str, /) -> bool:
        inner = self.inner(session)
        return inner is not None and tell_cut_off(inner, error, name)


def _made_of(session: Session) -> Any:
    """Return what stands for the class of an AsyncSession's inner session: it makes `session`."""

    def make(**_: object) -> Session:
        return session

    return make


def _is_session(thing: object) -> TypeGuard[AsyncSession]:
    return issubclass(type(thing), AsyncSession)  # see `tie.is_session`


class ForeignAsyncKind(AsyncKind):
    """What a factory may return besides: anything that has a `close()`. See `ForeignKind`."""

    def inner(self, session: Any, /) -> Any:
        return session.sync_session if _is_session(session) else None

    def is_opaque(self, session: Any, /) -> bool:
        return self.inner(session) is None

    def is_idle(self, session: Any, /) -> bool:
        return _is_session(session) and super().is_idle(session)

    def end_at_once(self, session: Any, /) -> bool:
        return _is_session(session) and super().end_at_once(session)

    def end_idle(self, session: Any, scope: Any, /) -> bool:
        return _is_session(session) and super().end_idle(session, scope)

    def is_twophase(self, session: Any, /) -> bool:
        return _is_session(session) and super().is_twophase(session)

    async def flush(self, session: Any, /) -> None:
        if _is_session(session):
            await super().flush(session)
        else:
            await _call(session, "flush")

    async def commit(self, session: Any, /) -> None:
        if _is_session(session):
            await super().commit(session)
        else:
            await _call(session, "commit")

    def places_alone(self, session: Any, /) -> Places | None:
        return super().places_alone(session) if _is_session(session) else None

    def commit_alone(self, session: Any, /) -> bool:
        return _is_session(session) and super().commit_alone(session)

    async def rollback(self, session: Any, /) -> None:
        await _call(session, "rollback")

    def close_here(self, session: Any, /) -> None:
        if _is_session(session):
            super().close_here(session)
        else:
            await_only(_call(session, "close"))

    def invalidate(self, session: Any, /) -> None:
        if _is_session(session):
            super().invalidate(session)

    def detach(self, session: Any, /) -> None:
        if _is_session(session):
            super().detach(session)


async def _close_by_its_own(session: Any) -> None:
    try:
        await session.close()
    finally:
        closing.invalidate(session.sync_session)


async def _call(session: Any, method: str) -> None:
    found = getattr(session, method, None)
    result = found() if callable(found) else None
    if inspect.isawaitable(result):
        await result


ASYNC = AsyncKind()
FOREIGN_ASYNC = ForeignAsyncKind()
