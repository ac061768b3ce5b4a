"""How sessions commit and end: the kind of SQLAlchemy's Session, and of what is none.

The kind of AsyncSession lies in `async_kind`, because SQLAlchemy's asyncio half needs greenlet.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from sqlalchemy.exc import PendingRollbackError

from rope_middleware.running.places import Places
from rope_middleware.scope.ending import explainers
from rope_middleware.session import closing, committing, idle
from rope_middleware.session.connections import leave_block
from rope_middleware.session.guard.busy import is_busy
from rope_middleware.session.guard.sessions import guard
from rope_middleware.session.holding.begun import is_of_body
from rope_middleware.session.tie import is_session
from rope_middleware.session.unsaved import has_pending

__all__ = ["FOREIGN", "SYNC", "ForeignKind", "SyncKind"]


class SyncKind:
    """Sessions that are SQLAlchemy's `Session`."""

    is_async = False

    def inner(self, session: Any, /) -> Any:
        """Return the Session of what a factory made; None where it is no session at all."""
        return session

    def handed_out(self, session: Any, /) -> Any:
        """Return what a factory made, given its Session; None if it is gone."""
        return session

    def is_idle(self, session: Any, /) -> bool:
        return idle.has_nothing_open(session)

    def end_at_once(self, session: Any, /) -> bool:
        return idle.end_at_once(session)

    def end_idle(self, session: Any, scope: Any, /) -> bool:
        return idle.end_idle(session, scope)

    def places_alone(self, session: Any, /) -> Places | None:
        return committing.places_alone(session)

    def commit_alone(self, session: Any, /) -> bool:
        return committing.commit_alone(session)

    def end(self, session: Any, /) -> None:
        closing.close(session)

    def has_begun(self, session: Any, /) -> bool:
        inner = self.inner(session)
        return inner is None or closing.has_begun(inner)

    def holds_connection(self, session: Any, /) -> bool:
        inner = self.inner(session)
        return inner is not None and closing.holds_connection(inner)

    def has_changes(self, session: Any, /) -> bool:
        inner = self.inner(session)
        return inner is None or has_pending(inner)

    def has_open_result(self, session: Any, /) -> bool:
        inner = self.inner(session)
        return inner is not None and closing.has_open_result(inner)

    def is_busy(self, session: Any, /) -> bool:
        inner = self.inner(session)
        return inner is not None and is_busy(inner)

    def is_of_body(self, session: Any, /) -> bool:
        inner = self.inner(session)
        return inner is not None and is_of_body(inner)

    def guard(self, session: Any, scope: Any, /) -> None:
        inner = self.inner(session)
        if inner is not None:
            guard(inner, scope)

    def is_twophase(self, session: Any, /) -> bool:
        return bool(session.twophase)

    def is_opaque(self, _: Any, /) -> bool:
        return False

    def flush(self, session: Any, /) -> Any:
        return committing.flush(session)

    def prepare(self, session: Any, /) -> Any:
        return session.prepare()

    def commit(self, session: Any, /) -> Any:
        return committing.commit(session)

    def rollback(self, session: Any, /) -> Any:
        leave_block(self.inner(session))
        return session.rollback()

    def close(self, session: Any, /) -> Any:
        return closing.close(session)

    def close_here(self, session: Any, /) -> None:
        closing.close(session)

    def in_greenlet(self, _: Callable[..., object], /, *__: object) -> Any:
        return None

    def wait_here(self, _: Coroutine[Any, Any, Any], /) -> Any:
        return None

    def discard(self, session: Any, /) -> None:
        closing.discard(session)

    def invalidate(self, session: Any, /) -> None:
        closing.invalidate(session)

    def detach(self, session: Any, /) -> None:
        closing.detach(session)

    def explain(self, error: BaseException, /) -> None:
        if sys.is_finalizing() or not isinstance(error, PendingRollbackError):
            return
        from rope_middleware.session.failures.sharing import note_rollback

        note_rollback(error)

    def tells_why(self, _: Any, __: BaseException, ___: str, /) -> bool:
        return False

    def owns(self, _: Any, __: Any, /) -> bool:
        return False


class ForeignKind(SyncKind):
    """What a factory may return besides: a mock, a wrapper, anything that has a `close()` (J1).

    It is kept and closed; committed and rolled back where it has methods of that name.
    """

    def inner(self, session: Any, /) -> Any:
        return session if is_session(session) else None

    def is_idle(self, session: Any, /) -> bool:
        return is_session(session) and super().is_idle(session)

    def end_at_once(self, session: Any, /) -> bool:
        return is_session(session) and super().end_at_once(session)

    def end_idle(self, session: Any, scope: Any, /) -> bool:
        return is_session(session) and super().end_idle(session, scope)

    def is_twophase(self, session: Any, /) -> bool:
        return is_session(session) and super().is_twophase(session)

    def is_opaque(self, session: Any, /) -> bool:
        return self.inner(session) is None

    def flush(self, session: Any, /) -> Any:
        return super().flush(session) if is_session(session) else _call(session, "flush")

    def commit(self, session: Any, /) -> Any:
        if is_session(session):
            return super().commit(session)
        return _call(session, "commit")

    def places_alone(self, session: Any, /) -> Places | None:
        return super().places_alone(session) if is_session(session) else None

    def commit_alone(self, session: Any, /) -> bool:
        return is_session(session) and super().commit_alone(session)

    def rollback(self, session: Any, /) -> Any:
        if is_session(session):
            return super().rollback(session)
        return _call(session, "rollback")

    def close(self, session: Any, /) -> Any:
        return super().close(session) if is_session(session) else session.close()

    def end(self, session: Any, /) -> None:
        self.close(session)

    def invalidate(self, session: Any, /) -> None:
        if is_session(session):
            super().invalidate(session)

    def detach(self, session: Any, /) -> None:
        if is_session(session):
            super().detach(session)


def _call(session: Any, method: str) -> Any:
    found = getattr(session, method, None)
    return found() if callable(found) and not inspect.iscoroutinefunction(found) else None


def _note_reason(error: BaseException) -> None:
    # What looks at an error is imported when there is one: it takes its time.
    if sys.is_finalizing():
        return
    from rope_middleware.session.failures.sharing import note_reason

    note_reason(error)


explainers.append(_note_reason)


class _ByRequest(SyncKind):
    """The functions themselves, where each request comes by: a method would be one more call."""

    is_idle = staticmethod(idle.has_nothing_open)  # pyright: ignore[reportAssignmentType]
    end_at_once = staticmethod(idle.end_at_once)  # pyright: ignore[reportAssignmentType]
    end_idle = staticmethod(idle.end_idle)  # pyright: ignore[reportAssignmentType]
    places_alone = staticmethod(committing.places_alone)  # pyright: ignore[reportAssignmentType]
    commit_alone = staticmethod(committing.commit_alone)  # pyright: ignore[reportAssignmentType]
    end = staticmethod(closing.close)  # pyright: ignore[reportAssignmentType]


SYNC: SyncKind = _ByRequest()
FOREIGN = ForeignKind()
