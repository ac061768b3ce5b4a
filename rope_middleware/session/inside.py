"""Is another thread inside of a call on a session? Its frames tell."""

from __future__ import annotations

import sys
import threading
from types import CodeType, FrameType

from sqlalchemy.orm import Session
from sqlalchemy.orm import session as _session_module

__all__ = ["is_in_call"]

_SESSION_FILE = str(_session_module.__file__)

# Before Python 3.13 what is read is a copy that stays in the frame, and keeps what it refers to.
_COPIES = sys.version_info < (3, 13)


def is_in_call(session: Session, waits: CodeType | None = None) -> bool:
    """Tell whether another thread is inside of a call on the session.

    What it would do next, it would do on the connection that is back in its pool by then.

    Args:
        session: the session.
        waits: the code of a function in which a thread waits, and touches nothing.
    """
    here = threading.get_ident()
    for ident, found in list(sys._current_frames().items()):  # noqa: SLF001 - documented
        frame: FrameType | None = found
        while ident != here and frame is not None and frame.f_code is not waits:
            if frame.f_code.co_filename == _SESSION_FILE and _is_call_on(frame, session):
                return True
            frame = frame.f_back
    return False


def _is_call_on(frame: FrameType, session: Session) -> bool:
    variables = frame.f_locals
    found = variables.get("self")
    if _COPIES:
        variables.clear()
    return found is session or getattr(found, "session", None) is session
