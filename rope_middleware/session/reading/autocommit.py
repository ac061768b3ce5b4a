"""A second engine on the same pool that reads without a transaction and writes nothing.

It is made of what SQLAlchemy documents: an engine with execution options of its own shares the
pool and the listeners of the first one, and `Dialect` is where begin and execute can be overridden.
The dialect of the reading engine is a copy of the first one's; that one stays as it is.

Not ``isolation_level="AUTOCOMMIT"``: it is an event on the engine, and with one event every other
point of the engine looks for listeners, too. That was 10 % of a request with one SELECT.

To enter and leave autocommit for each request is 2 % of one. So where every connection leaves its
pool by a door of ours, and no listener of the application's would notice, one that has read stays
in autocommit until somebody takes it who does not read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from weakref import ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.pool import (
    ConnectionPoolEntry,
    PoolProxiedConnection,
    QueuePool,
)

from rope_middleware.session.holding.door import LEFT, came_by, through_door
from rope_middleware.session.reading.switches import Switch, switch_of
from rope_middleware.session.sql.notes import watch_engine
from rope_middleware.session.sql.statements import READS, effect_of

__all__ = ["READING", "ask_outside_transaction", "connection_ends_at_once", "reading_engine"]

READING = "_rope_middleware_reading"
"""In an engine's `__dict__`: the engine that reads where it would, once that is made."""

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
    found: Engine | None = engine.__dict__.get(READING)
    if found is not None:
        return found
    made: Engine = engine.__dict__.setdefault(READING, _make(engine, refuse))
    return made


def _make(engine: Engine, refuse: Refuse) -> Engine:
    watch_engine(engine)  # first: the copy of its dialect has its listeners
    reading: Any = engine.execution_options()
    reading.__class__ = _reading_class(reading.__class__)
    reading.__dict__[READING] = reading  # it reads already
    reading.dialect = _ReadingDialect(engine, refuse).copy
    return reading  # type: ignore[no-any-return]


@cache
def _reading_class(base: type[Engine]) -> type[Engine]:
    # SQLAlchemy's `_has_events` is a property that asks the first engine at six points of each
    # transaction. Here it is a plain attribute, and that one is asked where a connection is taken.
    # (test_R1_postgres.py pins the name.)
    own = {"_has_events": False, "raw_connection": _raw_connection, "__module__": base.__module__}
    return type(base.__name__, (base,), own)


def _raw_connection(reading: Any) -> PoolProxiedConnection:
    """Take a connection out of the first engine's pool: the method of a reading engine."""
    dialect: _ReadingDialect = reading.dialect.__dict__[READING]
    first: Any = dialect.engine()
    if first._has_events:  # noqa: SLF001
        reading._has_events = True  # noqa: SLF001
    elif dialect.leaves and not first.pool.dispatch.checkout:
        return through_door(first.pool)
    # Listeners may execute something: they find the connection as it always is.
    dialect.restore_at_checkin()
    return first.raw_connection()  # type: ignore[no-any-return]


def connection_ends_at_once(connection: Connection) -> bool:
    """Tell whether `connection` goes back to its pool without a word to the database."""
    dialect: _ReadingDialect | None = vars(connection.dialect).get(READING)
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

    def __init__(self, engine: Engine, refuse: Refuse) -> None:
        self.engine: ref[Engine] = ref(engine)
        self.leaves: bool = False
        """Whether a connection stays in autocommit until somebody takes it who does not read."""
        self._dialect: Any = engine.dialect
        self._switch = switch_of(engine)
        self._refuse = refuse
        self._is_ready = False
        # Server-side cursors of PostgreSQL live in a transaction.
        self._streams_in_transaction = engine.dialect.name == "postgresql"
        self.copy: Any = copy.copy(engine.dialect)
        self._override()
        if self._switch is not None:
            self.leaves = True
            if not (self._switch.may_stay and isinstance(engine.pool, QueuePool)):
                self.restore_at_checkin()

    def restore_at_checkin(self) -> None:
        """From now on, let a connection come back to its pool as it was."""
        engine, switch = self.engine(), self._switch
        if self.leaves and engine is not None and switch is not None:
            self.leaves = False
            # On the pool, whatever gives the connection back: also the garbage collector.
            event.listen(engine, "checkin", partial(_restore, switch))

    def ends_at_once(self, connection: Connection) -> bool:
        if self._switch is None:
            return False
        lent = connection.connection
        is_on = _left(lent) is not None or _BEFORE in lent.info
        return _IN_USE not in lent.info and self._switch.ends_at_once(lent.dbapi_connection, is_on)

    def _override(self) -> None:
        setattr(self.copy, READING, self)
        self.copy.do_begin = self._begin
        self.copy.do_execute = self._reading(self._dialect.do_execute)
        self.copy.do_executemany = self._reading(self._dialect.do_executemany)
        self.copy.do_execute_no_params = self._execute_no_params
        if self._switch is not None and self._switch.skips_rollback:
            self.copy.skip_autocommit_rollback = True

    def _begin(self, connection: PoolProxiedConnection) -> None:
        if not self._is_ready:
            # What the dialect has learnt from the pool's first connection.
            self.copy.__dict__.update(self._dialect.__dict__)
            self._override()
            self._is_ready = True
        if _left(connection) is None:
            self._enter_autocommit(connection)
        self._dialect.do_begin(connection)

    def _enter_autocommit(self, connection: PoolProxiedConnection) -> None:
        switch, real, info = self._switch, connection.dbapi_connection, connection.record_info
        before = None if switch is None else switch.on(real)
        if switch is None or before is None:
            return
        door = came_by(connection) if self.leaves else None
        if door is not None and info is not None:
            door.has_left = True  # first: who comes by then looks
            info[LEFT] = real, partial(_bring_back, switch, before)
        else:
            self.restore_at_checkin()
            connection.info[_BEFORE] = before

    def _reading(self, execute: Callable[..., None]) -> Callable[..., None]:
        """Return what is called for `execute`: `do_execute` or `do_executemany`."""
        looks_at, may_stream = self._look_at, self._streams_in_transaction
        dialect = self._dialect.name
        if self._switch is not None and self._switch.told_in_use:
            execute = _telling(execute)

        def execute_reading(
            cursor: DBAPICursor, statement: str, parameters: Any, context: ExecutionContext
        ) -> None:
            if effect_of(statement, dialect) is not READS or (
                may_stream and "stream_results" in context.execution_options
            ):
                looks_at(statement, context)
            execute(cursor, statement, parameters, context)

        return execute_reading

    def _execute_no_params(
        self, cursor: DBAPICursor, statement: str, context: ExecutionContext
    ) -> None:
        def execute(cursor: Any, statement: str, _: None, context: ExecutionContext) -> None:
            self._dialect.do_execute_no_params(cursor, statement, context)

        self._reading(execute)(cursor, statement, None, context)

    def _look_at(self, statement: str, context: ExecutionContext) -> None:
        effect = effect_of(statement, self._dialect.name)
        if effect.writes:
            self._refuse(effect.writes)
        if self._streams_in_transaction and (
            effect.needs_transaction or "stream_results" in context.execution_options
        ):
            self._leave_autocommit(context)

    def _leave_autocommit(self, context: ExecutionContext) -> None:
        """For what lives in a transaction. That one lasts until the session's ends."""
        connection = context.root_connection.connection
        left, before = _left(connection), connection.info.pop(_BEFORE, None)
        if left is not None:
            left(connection.dbapi_connection)
            (connection.record_info or {}).pop(LEFT, None)
        elif before is not None and self._switch is not None:
            self._switch.off(connection.dbapi_connection, before)


def _telling(execute: Callable[..., None]) -> Callable[..., None]:
    """Return `execute` with a note on the connection while it runs."""

    def tell_and_execute(
        cursor: DBAPICursor, statement: str, parameters: Any, context: ExecutionContext
    ) -> None:
        info = context.root_connection.connection.info
        info[_IN_USE] = True
        try:
            execute(cursor, statement, parameters, context)
        finally:
            info.pop(_IN_USE, None)

    return tell_and_execute


def _left(connection: PoolProxiedConnection) -> Callable[[Any], None] | None:
    """Return what brings `connection` back, where a read-only scope has left it in autocommit."""
    info = connection.record_info
    left: Any = None if info is None else info.get(LEFT)
    # The record of a connection outlives it: this may be a new one.
    return left[1] if left is not None and left[0] is connection.dbapi_connection else None


def _bring_back(switch: Switch, before: Any, dbapi_connection: Any) -> None:
    switch.off(dbapi_connection, before)


def _restore(switch: Switch, dbapi_connection: Any, record: ConnectionPoolEntry) -> None:
    info = record.info
    before = info.pop(_BEFORE, None)
    if dbapi_connection is None:
        return  # thrown away already
    if info.pop(_IN_USE, None):
        record.invalidate()  # a task goes on with it: nobody else may have it
    elif before is not None:
        switch.off(dbapi_connection, before)
