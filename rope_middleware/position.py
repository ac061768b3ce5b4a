"""How far a client has written: what its requests bring and their responses tell (R3). No I/O.

A position is one of PostgreSQL's log, of one database system on one timeline. A value may hold one
for each system that the application writes to. It is no secret and not trusted: a forged one can
only send its sender's reads to the primary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

__all__ = [
    "NAME",
    "UNKNOWN",
    "Carried",
    "Position",
    "following",
    "highest",
    "is_told",
    "parse",
    "value_of",
]

NAME = "Rope-Position"
"""The response header, the request header and the cookie."""

# A position is needed for as long as a replica may be behind. One that is further behind than
# this is left to whoever watches the replicas.
_SECONDS = 60

# More systems than anybody writes to, and shorter than any server's limit for a header.
_MAX_SYSTEMS = 8
_MAX_LENGTH = 400

_ONE = r"([0-9a-f]{1,16})-([0-9a-f]{1,8})-([0-9a-f]{1,16})"


class Position(NamedTuple):
    """A place in the log. A later timeline is higher."""

    timeline: int
    lsn: int


UNKNOWN = {0: Position(0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)}
"""Something was written, and nobody could say how far: only the primary is sure to have it."""


def parse(value: str) -> dict[int, Position]:
    """Return the position for each system that `value` holds; nothing of what is not in form."""
    positions: dict[int, Position] = {}
    for text in value[:_MAX_LENGTH].strip().split(".")[:_MAX_SYSTEMS]:
        found = re.fullmatch(_ONE, text, re.ASCII)
        if found is not None:
            system, timeline, lsn = (int(number, 16) for number in found.groups())
            positions = highest(positions, {system: Position(timeline, lsn)})
    return positions


def value_of(positions: dict[int, Position]) -> str:
    """Return the text that `parse` understands."""
    # Where there are too many, the lowest systems would be lost; the unknown one is kept.
    kept = sorted(positions.items())[:_MAX_SYSTEMS]
    return ".".join(f"{system:x}-{at.timeline:x}-{at.lsn:x}" for system, at in kept)


def highest(*several: dict[int, Position]) -> dict[int, Position]:
    """Return the highest position for each system."""
    merged: dict[int, Position] = {}
    for positions in several:
        for system, position in positions.items():
            merged[system] = max(position, merged.get(system, position))
    return merged


class Carried:
    """What one request brings of positions, and what its response has to tell.

    Args:
        headers: returns the request's values of one header, asked for by its name in lower case.
    """

    __slots__ = ("_brought", "_headers", "told")

    def __init__(self, headers: Callable[[str], Iterable[str]]) -> None:
        self._headers = headers
        self._brought: dict[int, Position] | None = None
        self.told: dict[int, Position] = {}
        """What this request has written. Replaced where it has written more."""

    @property
    def brought(self) -> dict[int, Position]:
        """The highest positions that the request brings."""
        if self._brought is None:
            values = [*self._headers(NAME.lower())]
            for header in self._headers("cookie"):
                for cookie in header.split(";"):
                    name, _, value = cookie.strip().partition("=")
                    if name == NAME:
                        values.append(value.strip('"'))
            self._brought = highest(*map(parse, values))
        return self._brought

    @property
    def wanted(self) -> dict[int, Position]:
        """What a replica must have replayed for this request to read from it."""
        return highest(self.brought, self.told) if self.told else self.brought

    def tell(self, positions: dict[int, Position]) -> None:
        """Note what was written."""
        self.told = highest(self.told, positions)

    def response_headers(self) -> list[tuple[str, str]]:
        """Return headers for the response: never a lower position than the request brought."""
        if not self.told:
            return []
        value = value_of(self.wanted)
        cookie = f"{NAME}={value}; Max-Age={_SECONDS}; Path=/; HttpOnly; SameSite=Lax"
        return [(NAME, value), ("Set-Cookie", cookie)]


def is_told(name: str, value: str) -> bool:
    """Tell whether a response's header is one of `Carried.response_headers`."""
    name = name.lower()
    return name == NAME.lower() or (name == "set-cookie" and value.startswith(f"{NAME}="))


class Following:
    """Whether anybody in this process reads from replicas: else no request is looked at."""

    is_on: bool = False


following: Following = Following()
