"""The engines and real connections of sandboxes.

A session in a sandbox uses a `SandboxEngine`: the application's engine with its dialect, events
and options, and a pool that hands out virtual connections.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.pool import NullPool, Pool

from rope_middleware.session.connections import check_begun
from rope_middleware.testing.errors import closed
from rope_middleware.testing.shared import SharedConnection
from rope_middleware.testing.stock import Stock, stock_of
from rope_middleware.testing.virtual import virtual_class
from rope_middleware.testing.watch import forget, others, watch

__all__ = ["Opened", "SandboxEngine"]


class SandboxEngine(OptionEngine):
    """An engine whose connections are virtual.

    Args:
        engine: the application's.
        pool: makes the virtual connections.
    """

    # The application's engines share their pool with those that are made from them; not this one.
    pool: Any = None

    def __init__(self, engine: Engine, pool: Pool) -> None:
        super().__init__(engine, {})
        self.__dict__["pool"] = pool
        event.listen(self, "handle_error", _hand_notes_on)


def _hand_notes_on(context: ExceptionContext) -> None:
    """Let SQLAlchemy's error say what the driver's says of the sandbox."""
    told = context.sqlalchemy_exception
    if told is not None:
        for note in getattr(context.original_exception, "__notes__", ()):
            if note not in getattr(told, "__notes__", ()):
                told.add_note(note)


def _hand_on(listeners: Any, *args: Any) -> None:
    for listener in listeners:
        if listener is not check_begun:  # a sandbox's transaction is open until its end
            listener(*args)


class Opened:
    """A real connection in the hands of one sandbox.

    Args:
        engine: the application's, at the root of those that share its pool.
        name: the sandbox's.
        wait: seconds that a session waits for another one's turn.
    """

    def __init__(self, engine: Engine, name: str, wait: float) -> None:
        self.stock: Stock = stock_of(engine)
        self.name = name
        self.shared: SharedConnection | None = None
        self._wait = wait
        self._lane = self.stock.lane()
        self._is_busy = False
        self._is_ended = False
        self._virtual = virtual_class(engine.dialect.name)
        self._heard: set[str] = set()
        self.pool: NullPool = NullPool(self.connect, dialect=engine.dialect)

    def engine(self, engine: Engine) -> SandboxEngine:
        """Return an engine that stands for `engine`, which has the pool of this one's."""
        for name in ("checkout", "checkin", "reset"):
            listeners = getattr(engine.pool.dispatch, name)
            if listeners and name not in self._heard:
                # Those of "connect" hear of the real connection.
                self._heard.add(name)
                event.listen(self.pool, name, partial(_hand_on, listeners))
        return SandboxEngine(engine, self.pool)

    def connect(self, *_: Any) -> Any:
        """Return a virtual connection; the first one opens the real one."""
        if self.shared is None:
            self._lane.call(self._open)
        assert self.shared is not None  # noqa: S101 - for the type checkers: _open has raised else
        return self._virtual(self.shared)

    def close(self) -> str:
        """Roll everything back and hand the real connection back; say why it could not be."""
        if self.shared is None and not self._is_busy:
            self._is_ended = True
            if not self._is_busy:  # still: nobody has begun to open it in this instant
                return ""
        return self._lane.block(self._close)

    def _take(self) -> bool:
        taken, self._is_busy = self._is_busy, True
        return not taken

    def _open(self) -> None:
        self._lane.wait(self._take, None)
        try:
            if self._is_ended:
                raise closed(self.name)
            if self.shared is None:
                database = self.stock.take(self)
                self.shared = SharedConnection(self.name, database, self._lane, self._wait)
                self.shared.others = partial(others, self.shared)
                watch(self.shared, self.stock.ask)
        finally:
            self._is_busy = False
            self._lane.wake()

    def _close(self) -> str:
        self._is_ended = True
        self._lane.wait(self._take, None)  # an opening under way comes to its end first
        self._is_busy = False
        self._lane.wake()
        shared = self.shared
        if shared is None:
            return ""
        is_sound = False
        try:
            shared.close()
            is_sound = True
        except shared.database.dialect.loaded_dbapi.Error:
            pass  # the connection is lost, and the server has rolled everything back
        finally:
            forget(shared)
            self.stock.put(self, shared.database, is_sound)
        return shared.gone
