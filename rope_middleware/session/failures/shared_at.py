"""At which lines two tasks use one AsyncSession (Y3): looked up when an error tells of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import FrameType, TracebackType

from sqlalchemy.orm import Session, SessionTransaction

from rope_middleware.session.code.lines import (
    Line,
    frames_of_task,
    is_sqlalchemys,
    line_of,
    variables_of,
)
from rope_middleware.session.tie import is_session

__all__ = ["line_of_other", "session_in"]


def session_in(error: BaseException) -> tuple[Session | None, Line | None]:
    """Return the session that `error` was raised in, and the line that called it."""
    frames = list(_frames(error.__traceback__))[::-1]
    session = next((found for frame in frames if (found := _session_of(frame))), None)
    return session, line_of(frames)


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _session_of(frame: FrameType) -> Session | None:
    """Return the session whose method `frame` runs, a frame of SQLAlchemy's; else None."""
    if not is_sqlalchemys(frame):
        return None
    found = variables_of(frame).get("self")
    if isinstance(found, SessionTransaction):
        return found.session
    found = getattr(found, "sync_session", found)
    return found if is_session(found) else None


def line_of_other(session: Session) -> Line | None:
    """Return where another task is in the middle of a call on `session`, or None."""
    try:
        current = asyncio.current_task()
        tasks = asyncio.all_tasks()
    except RuntimeError:
        return None
    for task in tasks:
        if task is not current:
            frames = frames_of_task(task)
            if any(_session_of(frame) is session for frame in frames):
                return line_of(frames)
    return None
