"""Sessions that know of their end, and a look at the variables of a frame."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy.orm import Session

from rope_middleware import SessionRope


class Seen(Session):
    """Knows how often it was closed, and on which thread."""

    closed_in: list[int]

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.closed_in = []

    def close(self) -> None:
        self.closed_in.append(threading.get_ident())
        self.info.get("on_close", int)()
        super().close()


def is_over(session: Session) -> bool:
    """Tell whether the rope has closed the session."""
    assert isinstance(session, Seen)
    return bool(session.closed_in)


def variables() -> dict[str, Any]:
    """Return the caller's local variables, without keeping its frame in one of them."""
    found = sys._getframe(1).f_locals.items()
    return {name: value for name, value in found if not name.startswith("@py_")}


def ropes_in(namespace: Any) -> list[str]:
    """Return the names under which ropes lie in a namespace."""
    return [name for name, value in namespace.items() if isinstance(value, SessionRope)]


@contextmanager
def tracing() -> Iterator[None]:
    """Trace every line as a debugger does, and look at the local variables."""

    def trace(frame: types.FrameType, what: str, argument: object) -> Any:
        assert frame.f_locals is not None
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
