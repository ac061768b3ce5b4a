"""A second engine on the same pool that reads without a transaction and writes nothing.

It is made of what SQLAlchemy documents: an engine with execution options of its own shares the
pool and the listeners of the first one, and `Dialect` is where begin and execute can be overridden.
The dialect of the reading engine is a copy of the first one's; that one stays as it is.

Not ``isolation_level="AUTOCOMMIT"``: it is an event on the engine, and with one event every other
point of the engine looks for listeners, too. That was 10 % of a request with one SELECT.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, event
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.pool import (
    ConnectionPoolEntry,
    PoolProxiedConnection,
)

from rope_middleware.session.statements import READS, Effect, effect_of
from rope_middleware.session.switches import Switch, switch_of
from rope_middleware.session.written import watch_engine

__all__ = ["ask_outside_transaction", "connection_ends_at_once", "reading_engine"]

_READING = "_rope_middleware_reading"

# In a connection's `info`: how its autocommit was before, while it is lent to a reading engine.
_BEFORE = "rope_middleware.autocommit"
# In the same place, while a statement runs.
_IN_USE = "rope_middleware.in_use"

Refuse = Callable[[str], None]


def reading_engine(engine: Engine, refuse: Refuse) -> Engine:
    """Return the engine that reads where `engine` would; made once for each engine.

    Args:
        engine: an engine of the application's. It lends its connections and stays as it is.
        refuse: called with the words of a statement that would write; raises.
    """
    found: Engine | None = engine.__dict__.get(_READING)
    if found is not None:
        return found
    made: Engine = engine.__dict__.setdefault(_READING, _make(engine, refuse))
    return made


def _make(engine: Engine, refuse: Refuse) -> Engine:
    watch_engine(engine)  # first: the copy of its dialect has its listeners
    reading = engine.execution_options()
    reading.__dict__[_READING] = reading  # it reads already
    switch = switch_of(engine)
    reading.dialect = _ReadingDialect(engine.dialect, switch, refuse).copy
    if switch is not None:
        # On the pool, whatever gives the connection back: also the garbage collector.
        event.listen(engine, "checkin", partial(_restore, switch))
    return reading


def connection_ends_at_once(connection: Connection) -> bool:
    """Tell whether `connection` goes back to its pool without a word to the database."""
    dialect: _ReadingDialect | None = vars(connection.dialect).get(_READING)
    if dialect is None or connection.invalidated:
        return False
    return dialect.ends_at_once(connection)


def ask_outside_transaction(connection: Connection, statement: str) -> Any:
    """Execute a statement on a connection whose transaction has just ended; return its one row.

    By the driver's means: for SQLAlchemy the connection has ended its work. One round trip.
    """
    real: Any = connection.connection.dbapi_connection
    switch = switch_of(connection.engine)
    before = None if switch is None else switch.on(real)
    try:
        cursor = real.cursor()
        try:
            cursor.execute(statement)
            return cursor.fetchone()
        finally:
            cursor.close()
    finally:
        if switch is None:
            real.rollback()
        elif before is not None:
            switch.off(real, before)


class _ReadingDialect:
    """Makes the copy of a dialect that begins nothing and executes what reads."""

    def __init__(self, dialect: Dialect, switch: Switch | None, refuse: Refuse) -> None:
        self._dialect: Any = dialect
        self._switch = switch
        self._refuse = refuse
        self._is_ready = False
        # Server-side cursors of PostgreSQL live in a transaction.
        self._streams_in_transaction = dialect.name == "postgresql"
        self.copy: Any = copy.copy(dialect)
        self._override()

    def ends_at_once(self, connection: Connection) -> bool:
        info = connection.info
        return (
            self._switch is not None
            and _IN_USE not in info
            and self._switch.ends_at_once(connection.connection.dbapi_connection, _BEFORE in info)
        )

    def _override(self) -> None:
        setattr(self.copy, _READING, self)
        self.copy.do_begin = self._begin
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            setattr(self.copy, name, self._reading(getattr(self._dialect, name)))
        if self._switch is not None and self._switch.skips_rollback:
            self.copy.skip_autocommit_rollback = True

    def _begin(self, connection: PoolProxiedConnection) -> None:
        if not self._is_ready:
            # What the dialect has learnt from the pool's first connection.
            self.copy.__dict__.update(self._dialect.__dict__)
            self._override()
            self._is_ready = True
        if self._switch is not None:
            before = self._switch.on(connection.dbapi_connection)
            if before is not None:
                connection.info[_BEFORE] = before
        self._dialect.do_begin(connection)

    def _reading(self, execute: Callable[..., None]) -> Callable[..., None]:
        """Return what is called for `execute`, one of the dialect's three methods."""
        may_stream = self._streams_in_transaction
        told = None if self._switch is None else self._switch.told_in_use

        def execute_reading(cursor: DBAPICursor, statement: str, *more: Any, **named: Any) -> None:
            effect = effect_of(statement)
            context = named["context"] if named else more[-1]
            if effect is not READS:
                self._look_at(effect, context)
            if may_stream and "stream_results" in context.execution_options:
                self._leave_autocommit(context)
            if not told:
                execute(cursor, statement, *more, **named)
                return
            info = context.root_connection.info
            info[_IN_USE] = True
            try:
                execute(cursor, statement, *more, **named)
            finally:
                info.pop(_IN_USE, None)

        return execute_reading

    def _look_at(self, effect: Effect, context: ExecutionContext) -> None:
        if effect.writes:
            self._refuse(effect.writes)
        if effect.needs_transaction and self._streams_in_transaction:
            self._leave_autocommit(context)

    def _leave_autocommit(self, context: ExecutionContext) -> None:
        """For what lives in a transaction. That one lasts until the session's ends."""
        connection = context.root_connection.connection
        before = connection.info.pop(_BEFORE, None)
        if before is not None and self._switch is not None:
            self._switch.off(connection.dbapi_connection, before)


def _restore(switch: Switch, dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
    before = record.info.pop(_BEFORE, None)
    if dbapi_connection is None:
        return  # thrown away already
    if record.info.pop(_IN_USE, None):
        record.invalidate()  # a task goes on with it: nobody else may have it
    elif before is not None:
        switch.off(dbapi_connection, before)
