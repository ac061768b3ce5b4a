"""Where requests name, open and end sandboxes: what `SandboxMiddleware` answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from rope_middleware.scope.context import logger
from rope_middleware.testing.lanes import loop
from rope_middleware.testing.sandbox import NAME, Sandbox, by_token, check_jennies

__all__ = ["Desk", "Reply", "Visit"]


class Reply(NamedTuple):
    """An answer that does not come from the application."""

    status: HTTPStatus
    content: dict[str, Any] | None = None
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def body(self) -> bytes:
        """The content as JSON."""
        return b"" if self.content is None else json.dumps(self.content).encode()

    def all_headers(self) -> list[tuple[str, str]]:
        """Return every header of the answer."""
        told = [] if self.content is None else [("Content-Type", "application/json")]
        if self.status is not HTTPStatus.NO_CONTENT:
            told.append(("Content-Length", str(len(self.body))))
        return [*told, *self.headers]


class Visit(NamedTuple):
    """What a request says of sandboxes."""

    method: str
    path: str
    query: str
    header: str | None
    cookie: str | None

    @property
    def token(self) -> str | None:
        """By what it names its sandbox; the header wins."""
        return self.header if self.header is not None else _token_in(self.cookie)


def _token_in(cookie: str | None) -> str | None:
    for pair in (cookie or "").split(";"):
        name, found, value = pair.strip().partition("=")
        if found and name == NAME:
            return value.strip('"')
    return None


_GONE = Reply(
    HTTPStatus.GONE,
    {
        "detail": f"The sandbox that this request names by {NAME} is not open in this process: it "
        "has ended, or it was opened in another one."
    },
)


class Desk:
    """Knows the sandboxes that were opened by requests, and ends those that idle.

    Args:
        jennies: those of the sandboxes that it opens; none: it opens none.
        path: where they are opened and ended.
        idle: seconds without a request after which one of them ends by itself.
    """

    def __init__(self, jennies: tuple[Any, ...], path: object, idle: object) -> None:
        if not isinstance(path, str):
            raise TypeError(f"path is a str like '/rope-sandbox', not {path!r}.")
        if not path.startswith("/"):
            raise ValueError(f"path begins with a slash: {path!r}.")
        if isinstance(idle, bool) or not isinstance(idle, (int, float)):
            raise TypeError(f"idle is a number of seconds, not {idle!r}.")
        if not idle > 0:
            raise ValueError(f"idle must be more than 0 seconds, not {idle!r}.")
        check_jennies(jennies, "SandboxMiddleware(app, ...)")
        self._jennies = jennies
        self._path = path
        self._idle = float(idle)
        self._stays: dict[Sandbox, _Stay] = {}

    def is_asked(self, visit: Visit) -> bool:
        """Tell whether the request is for the desk itself."""
        return bool(self._jennies) and visit.path == self._path

    def find(self, visit: Visit) -> Sandbox | Reply | None:
        """Return the sandbox that a request names, the refusal, or None where it names none."""
        if visit.token is None:
            return None
        return by_token(visit.token) or _GONE

    def answer(self, visit: Visit) -> Reply:
        """Open or end a sandbox. Ending one blocks."""
        if visit.method == "POST":
            return self._open(visit)
        if visit.method != "DELETE":
            return Reply(HTTPStatus.METHOD_NOT_ALLOWED, {}, (("Allow", "POST, DELETE"),))
        found = self.find(visit)
        if not isinstance(found, Sandbox):
            return _GONE
        self._stays.pop(found, None)
        false = found.close()
        if false is not None:
            return Reply(HTTPStatus.CONFLICT, {"detail": str(false)})
        return Reply(HTTPStatus.NO_CONTENT)

    def come_in(self, sandbox: Sandbox) -> Callable[[], None]:
        """Note that a request works in `sandbox`; return what notes that it has left."""
        stay = self._stays.get(sandbox)
        if stay is None:
            return _nothing
        stay.come()
        return stay.leave

    def _open(self, visit: Visit) -> Reply:
        names = parse_qs(visit.query).get("name")
        sandbox = Sandbox(*self._jennies, name=names[0] if names else None)
        sandbox.open()
        self._stays[sandbox] = stay = _Stay(self._idle, lambda: self._end_idle(sandbox))
        stay.wait()
        return Reply(
            HTTPStatus.CREATED,
            {
                "name": sandbox.name,
                "token": sandbox.token,
                "headers": sandbox.headers,
                "cookies": sandbox.cookies,
            },
            (("Set-Cookie", f"{NAME}={sandbox.token}; Path=/; HttpOnly; SameSite=Lax"),),
        )

    def _end_idle(self, sandbox: Sandbox) -> None:
        if self._stays.pop(sandbox, None) is None:
            return  # a DELETE has ended it
        logger.info("the sandbox %r ends: %g s without a request", sandbox.name, self._idle)
        false = sandbox.close()
        if false is not None:
            logger.error("%s", false)


def _nothing() -> None:
    pass


class _Stay:
    """How long ago the last request of a sandbox was.

    Args:
        idle: seconds.
        end: called, in a thread, after so many without a request.
    """

    def __init__(self, idle: float, end: Callable[[], None]) -> None:
        self._idle = idle
        self._end = end
        self._inside = 0
        self._left_at = time.monotonic()

    def come(self) -> None:
        """A request begins."""
        self._inside += 1

    def leave(self) -> None:
        """A request has ended."""
        self._inside -= 1
        self._left_at = time.monotonic()

    def wait(self) -> None:
        """Look again when the time may be over."""
        left = self._left_at + self._idle - time.monotonic()
        timers = loop()
        timers.call_soon_threadsafe(timers.call_later, max(left, 0.01), self._look)

    def _look(self) -> None:
        if self._inside or time.monotonic() - self._left_at < self._idle:
            if self._inside:
                self._left_at = time.monotonic()
            self.wait()
        else:
            loop().run_in_executor(None, self._end)
