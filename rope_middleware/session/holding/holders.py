"""`holders()`: who holds the connections now (H1)."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from rope_middleware.session.code.lines import text_of
from rope_middleware.session.code.where import now
from rope_middleware.session.connections import connections_out
from rope_middleware.session.holding.begun import open_ties
from rope_middleware.session.holding.door import is_waiting
from rope_middleware.session.holding.pools import engine_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rope_middleware.session.tie import Tie

__all__ = ["Holder", "Holders", "holder_of", "holders"]


@dataclass(frozen=True, eq=False)
class Holder:
    """An open transaction of a session that came from a jenny.

    Attributes:
        scope: the name of its scope, ``GET /path``, or "no scope".
        engine: the URL of its engine, without the password.
        seconds: how long it has been open.
        began: the application's line that began it, as ``file.py:12``.
        now: the line where its thread or task is, or was last.
        connection: "held", "none yet", or "waited for".
    """

    scope: str
    engine: str
    seconds: float
    began: str
    now: str
    connection: str

    @property
    def waiting(self) -> bool:
        """Whether it waits for a connection of the pool."""
        return self.connection == WAITED_FOR


HELD, NONE_YET, WAITED_FOR = "held", "none yet", "waited for"


class Holders(tuple[Holder, ...]):
    """The open transactions, the oldest first; `str()` makes a table of them."""

    __slots__ = ()

    def __str__(self) -> str:
        """Return a table with a row for each."""
        if not self:
            return "no transaction is open"
        rows = [("scope", "engine", "seconds", "began", "now", "connection")]
        rows += [
            (one.scope, one.engine, f"{one.seconds:.1f}", one.began, one.now, one.connection)
            for one in self
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def holders() -> Holders:
    """Return who holds a connection now: every open transaction of a session from a jenny.

    Requests, streams, WebSockets, background tasks, threads, scripts, ropes and other event loops:
    all of this process. Other worker processes have pools and lists of their own. What is returned
    holds texts and numbers only::

        print(holders())

    Returns:
        A tuple of holders, the oldest first; each has ``scope``, ``engine``, ``seconds``,
        ``began``, ``now`` and ``waiting``. Its ``str()`` is a table without any values.
    """
    return listed(open_ties())


def listed(ties: Iterable[Tie]) -> Holders:
    """Return the holders that belong to `ties`."""
    return Holders(one for tie in ties if (one := holder_of(tie)) is not None)


def holder_of(tie: Tie) -> Holder | None:
    """Return what can be said of the open transaction of `tie`; None if it has just ended."""
    line, transaction, scope = tie.line, tie.transaction, tie.scope
    if line is None or transaction is None:
        return None
    try:
        out = connections_out(tie)
    except RuntimeError:  # it is just getting one
        out = []
    engines = {engine_text(connection.engine) for connection in out}
    if not engines:
        engines = {engine_text(transaction.session.bind)}
    here = now(tie)
    return Holder(
        scope="no scope" if scope is None else scope.name,
        engine=", ".join(sorted(engines)),
        seconds=monotonic() - tie.since,
        began=text_of(line),
        now=text_of(here or line),
        connection=HELD if out else WAITED_FOR if is_waiting(tie) else NONE_YET,
    )
