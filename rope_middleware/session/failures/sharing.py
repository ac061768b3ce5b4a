"""Errors of a session that say what is wrong, and not why: the notes that do.

Two tasks have shared it (Y3), an attribute was read that was not loaded, or an error handler has
used a session whose flush had failed. Most notes are added where the error leaves a scope. That of
a shared session is added where it is raised: GraphQL and Socket.IO answer such an error themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, cast

from sqlalchemy.exc import IllegalStateChangeError, PendingRollbackError
from sqlalchemy.orm import Session

from rope_middleware.scope.context import MAX_CAUSES
from rope_middleware.session.code.lines import Line, application_line, text_of
from rope_middleware.session.code.telling import tell_once
from rope_middleware.session.tie import PlainTie, tie_of

__all__ = ["note_reason", "note_rollback", "noting", "tell_cut_off"]

_SHARED_SESSION = (
    "Two tasks have probably used one AsyncSession at the same time, which SQLAlchemy does not "
    "allow. Give each concurrent task sessions of its own: 'async with open_scope():' around "
    "its work, or @open_scope() on its function (rope_middleware)."
)

_SHARED_BY_THREADS = (
    "Two threads have probably used one Session at the same time, which SQLAlchemy does not allow. "
    "Give each thread sessions of its own: 'with open_scope():' around its work, or @open_scope() "
    "on its function (rope_middleware)."
)

_ROLL_BACK = (
    "A flush of this session has failed before, and the application went on (an error handler?). "
    "Roll back first: jenny.rollback(), which an AsyncSession awaits. What was loaded is read anew "
    "then (rope_middleware)."
)

_LOST = (
    "The connection of this session was lost before, or a statement was cut off (by a time-out, a "
    "cancellation), and the application went on. What was written before is lost (where a commit "
    "was cut off, it may stand). If that was nothing, roll back where the error or the "
    "cancellation is swallowed: jenny.rollback(), which an AsyncSession awaits (rope_middleware)."
)


def note_rollback(error: BaseException) -> None:
    """Tell what to call where a session is used on after a failed flush, or a lost connection."""
    if isinstance(error, PendingRollbackError):
        note = _LOST if error.code == "8s2b" else _ROLL_BACK  # of a connection; 7s2a: of a flush
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


def note_reason(error: BaseException) -> None:
    """Add to `error` a note that says why, where it tells of what is misunderstood often."""
    with suppress(Exception):  # an error that has no text, or takes no note
        _add_note(error)


def _add_note(error: BaseException) -> None:
    pending: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while pending and len(seen) < MAX_CAUSES:
        inner = pending.pop()
        if inner is None or any(inner is one for one in seen):
            continue
        note = _note_for(inner, seen[::-1])
        seen.append(inner)
        for told in (inner, error) if note else ():
            if note not in getattr(told, "__notes__", ()):
                told.add_note(note)
        pending += (inner.__cause__, inner.__context__)
        if isinstance(inner, BaseExceptionGroup):
            pending += cast("BaseExceptionGroup[BaseException]", inner).exceptions


# What looks at an error is imported when there is one: it takes its time.


def _note_for(error: BaseException, around: list[BaseException]) -> str:
    from rope_middleware.session.failures.loading import note_of_load
    from rope_middleware.session.failures.shared_at import session_in

    if _tells_of_sharing(error):
        notes: list[str] = getattr(error, "__notes__", [])
        known = next((note for note in notes if note.startswith(_SHARED)), None)
        return known or _shared(*session_in(error))
    return note_of_load(error, around)


_SHARED = (_SHARED_SESSION, _SHARED_BY_THREADS)


def _shared(session: Session | None, here: Line | None) -> str:
    """Say who shares a session, and at which lines they are; tell it once in the log."""
    text = _SHARED_BY_THREADS if session is not None and _is_sync(session) else _SHARED_SESSION
    if here is None:
        return text
    from rope_middleware.session.failures.shared_at import line_of_other

    other = None if session is None else line_of_other(session)
    where = f" This one is at {text_of(here)}"
    where += "." if other is None else f", the other at {text_of(other)}."
    tell_once("shared", here, "%s%s", text, where)
    if session is not None:
        session.__dict__[_TOLD] = True
    return text + where


def _is_sync(session: Session) -> bool:
    tie = tie_of(session)
    if tie is None:
        return False
    kind = tie.owner if isinstance(tie, PlainTie) else tie.kind
    return kind is not None and not kind.is_async


_TOLD = "_rope_middleware_shared"  # in a session: it has been told that two tasks share it


def _note_shared(session: Session, error: BaseException) -> None:
    """Add to an error of `session` the note that two tasks share it, where it tells of that."""
    if not getattr(error, "__notes__", None) and (
        _tells_of_sharing(error) or (_has_text(error, _AMBIGUOUS) and _is_with_other(session))
    ):
        error.add_note(_shared(session, application_line(2)))


def _is_with_other(session: Session) -> bool:
    from rope_middleware.session.failures.shared_at import line_of_other

    return line_of_other(session) is not None


_CALLS = (
    *("commit", "connection", "execute", "flush", "get", "get_one", "merge", "refresh"),
    *("rollback", "scalar", "scalars"),
)


def noting(base: type[Session]) -> dict[str, Any]:
    """Return methods for a subclass of `base`: as they were, but their errors get the note."""
    return {name: _noting(base, name) for name in _CALLS if hasattr(base, name)}


def _noting(base: type[Session], name: str) -> Callable[..., Any]:
    @wraps(getattr(base, name))
    def call(self: Session, *args: Any, **kw: Any) -> Any:
        try:
            # Looked up on each call: somebody may replace it, for the time of a test, say.
            return getattr(base, name)(self, *args, **kw)
        except Exception as error:
            _note_shared(self, error)
            raise

    return call


def tell_cut_off(session: Session, error: BaseException, name: str) -> bool:
    """Say in which line another task still uses a session that the end of its scope cannot close.

    Args:
        session: whose connection is invalidated for it.
        error: what its close() has raised.
        name: of the scope.

    Returns:
        Whether it has been said, here or where the two tasks met.
    """
    if not isinstance(error, IllegalStateChangeError):
        return False
    if session.__dict__.pop(_TOLD, False):
        return True
    from rope_middleware.session.failures.shared_at import line_of_other

    line = line_of_other(session)
    if line is None:
        return False
    tell_once(
        "cut off",
        line,
        "%r has ended while another task was in the middle of a call on its AsyncSession, at %s: "
        "that call is cut off. Await the task before the end, or give its work a scope of its own, "
        "'async with open_scope():'.",
        name,
        text_of(line),
    )
    return True


# The drivers' own errors of this kind: asyncpg's InterfaceError, psycopg's OperationalError.
_TEXTS = ("another operation is in progress", "another command is already in")


# SQLAlchemy's own without a code. A listener that calls what it may not meets them as well, so they
# tell of sharing only while another task is in the middle of a call.
_AMBIGUOUS = ("Session is already flushing", "This session is in 'prepared' state")


def _tells_of_sharing(error: BaseException) -> bool:
    # SQLAlchemy gives its own errors of this kind the code "isce".
    # https://docs.sqlalchemy.org/en/20/errors.html#error-isce
    if getattr(error, "code", None) == "isce":
        return True
    return _has_text(error, _TEXTS)


def _has_text(error: BaseException, texts: tuple[str, ...]) -> bool:
    # Only what is short: the text of an error with many bound values takes its time.
    told = error.args[0] if error.args else None
    return isinstance(told, str) and any(text in told for text in texts)
