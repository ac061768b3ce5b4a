"""What a session's connections have executed: has it written, is a result unread?

SQLAlchemy's events for sessions tell of flushes, but neither of Core DML on a session's connection
nor whether a result is still open. So statements are noted where every one passes by: in the
`do_execute` events of the engine's dialect, for the engines that our sessions use. That costs
0.5 us for each statement. The engine's own events (`before_cursor_execute`) would cost each
transaction 17 us, and `do_orm_execute` each statement 5 us; a SELECT on SQLite takes 90 us.

The notes are an attribute of the connection. A session that takes its connection from a pool gets
a new `Connection` object for each transaction, so its notes begin anew after each commit.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, ExceptionContext, ExecutionContext
from sqlalchemy.orm import Session, SessionTransaction

from rope_middleware.errors import async_engine
from rope_middleware.running.forks import lock_of_module
from rope_middleware.session.connections import refuse_begun

if TYPE_CHECKING:
    from rope_middleware.scope.scope import Scope

__all__ = [
    "NOTES",
    "Notes",
    "is_watched",
    "notes_of",
    "watch",
    "watch_binds",
    "watch_engine",
]

NOTES = "_rope_middleware_notes"
_WATCHED = "_rope_middleware_watches"
_MAX_NOTES = 200  # statements after which the notes are put together
_MAX_NAMES = 20  # names that are kept then
_STREAMS = ("stream_results", "yield_per")  # options of a result that comes bit by bit


class Notes(list[tuple[Callable[[], "ExecutionContext | None"], Any]]):
    """The statements that were executed on one connection.

    Of each there is its context, for as long as that lives, and the statement: what SQLAlchemy has
    compiled, or the text that was given to the driver.
    """

    # There are some for each transaction. What most never change has its value on the class.
    __slots__ = ("__dict__", "gone")

    gone: tuple[Scope | None, int] | None  # once it is taken from who uses it: see `taking`

    _over: Collection[Any] = ()  # statements whose context is not kept any more, each once
    _dml: Sequence[str] = ()  # of statements that are not kept, either
    _texts: Sequence[str] = ()
    is_whole: bool = True  # False once there were so many that not all of them are kept
    many: int = _MAX_NOTES  # statements that are noted before they are looked through

    def contexts(self) -> list[ExecutionContext]:
        """Return the contexts that live, in the order of their statements."""
        return [context for one, _ in list(self) if (context := one()) is not None]

    def statements(self) -> Collection[Any]:
        """Return what was executed, each once; all of it where `is_whole`."""
        return dict.fromkeys((*self._over, *map(_statement_of, self)))

    def sql(self) -> list[str]:
        """Return the SQL of `statements`."""
        return [_sql(statement) for statement in self.statements()]

    def dml(self) -> list[str]:
        """Name what was inserted, updated and deleted through the ORM or Core, each once."""
        return _names(self._dml, map(_dml, self.statements()))

    def textual_dml(self) -> list[str]:
        """Name what was written by text, as far as its first word tells."""
        return _names(self._texts, map(_textual_dml, self.statements()))

    def has_unread(self) -> bool:
        """Tell whether a statement is under way, or a result still has its cursor open."""
        return any(map(_is_open, self.contexts()))

    def is_executing(self) -> bool:
        """Tell whether a statement is under way: it has no description of its rows yet."""
        return any(_is_open(context) and _has_no_rows_yet(context) for context in self.contexts())

    def is_read_in_parts(self) -> bool:
        """Tell whether a result is open that the database hands out bit by bit."""
        return any(
            any(map(context.execution_options.get, _STREAMS)) and _is_open(context)
            for context in self.contexts()
        )

    def forget(self, context: ExecutionContext) -> None:
        """Forget the context of a statement that is over, though somebody keeps it."""
        for one, statement in list(self):
            if one() is context:
                self.insert(0, (_none, statement))  # the last is what may be under way
                self.remove((one, statement))

    def put_together(self) -> None:
        """Keep no more than is needed of statements that are over."""
        self._over = over = self.statements()  # first: another thread may be asking
        self[:] = [one for one in self if one[0]() is not None]
        self.many = max(_MAX_NOTES, 2 * len(self))  # somebody may keep all results
        if len(over) > _MAX_NOTES:
            self._dml = self.dml()[:_MAX_NAMES]
            self._texts = self.textual_dml()[:_MAX_NAMES]
            self._over = ()
            self.is_whole = False


_statement_of = itemgetter(1)


def _none() -> None:
    """Be a weak reference to what is gone."""


_making = lock_of_module()  # a statement and the end of its scope may do so in one instant


def notes_of(connection: Connection) -> Notes:
    """Return what is executed on `connection` from when it came from its pool on."""
    # By no look at its __dict__: on Python 3.11 and 3.12 that has an object make one, and what
    # SQLAlchemy looks up in the object afterwards takes longer. It saves 0.3 us and more.
    notes: Any = getattr(connection, NOTES, None)
    if notes is None:
        made = Notes()
        made.gone = None  # an `__init__` would cost twice as much, in each transaction
        with _making:
            notes = getattr(connection, NOTES, made)
            setattr(connection, NOTES, notes)
    return notes  # type: ignore[no-any-return]


def _on_execute(_: Any, statement: str, __: Any, context: ExecutionContext) -> None:
    connection = context.root_connection
    notes: Any = getattr(connection, NOTES, None)
    if notes is None:  # as `notes_of`, without the price of a call: most requests have one
        made = Notes()
        made.gone = None
        with _making:
            notes = getattr(connection, NOTES, made)
            setattr(connection, NOTES, notes)
    compiled = context.compiled
    notes.append((ref(context), statement if compiled is None else compiled))
    if notes.gone is not None:  # after the append: see `taking`
        from rope_middleware.session.sql.taking import refuse_gone  # few ever are

        refuse_gone(notes, context)
    if len(notes) > _MAX_NOTES and len(notes) > notes.many:
        notes.put_together()


def _on_execute_no_params(_: Any, statement: str, context: ExecutionContext) -> None:
    _on_execute(_, statement, None, context)


def _on_error(error: ExceptionContext) -> None:
    """A statement that failed is over, though its error's traceback keeps its cursor alive."""
    failed = error.execution_context
    if failed is not None:
        notes: Notes | None = getattr(failed.root_connection, NOTES, None)
        if notes is not None:
            notes.forget(failed)


# -- which engines are watched ---------------------------------------------------------------------

_classes: WeakSet[type[Session]] = WeakSet()


def watch(session: Session) -> None:
    """Watch the engine that `session` is bound to; called at each begin of a transaction."""
    bind = session.bind
    if bind is None:
        watch_binds(type(session))
        return
    try:
        is_new = _WATCHED not in bind.__dict__
    except AttributeError:  # an AsyncEngine has none
        raise async_engine(bind) from None
    if is_new:
        if isinstance(bind, Connection):
            bind.__dict__.pop(NOTES, None)  # it is lent: of an earlier transaction
        else:
            bind.__dict__[_WATCHED] = True
        watch_engine(bind.engine)


def watch_binds(session_class: type[Session]) -> None:
    """Watch whatever sessions of a class connect to, where their `bind` does not tell it.

    It costs each transaction 0.4 us more, so it is for those alone.
    """
    if session_class not in _classes:
        _classes.add(session_class)
        event.listen(session_class, "after_begin", _on_connection)


def _on_connection(_: Session, __: SessionTransaction, connection: Connection) -> None:
    if _WATCHED not in connection.dialect.__dict__:
        watch_engine(connection.engine)


def is_watched(connection: Connection) -> bool:
    """Tell whether the statements on `connection` have been noted; from now on they are."""
    if _WATCHED in connection.dialect.__dict__:
        return True
    watch_engine(connection.engine)
    return False


def watch_engine(engine: Engine) -> None:
    """Note from now on what is executed by `engine`."""
    # The dialect is one for an engine and all that its execution_options() has made.
    if _WATCHED not in engine.dialect.__dict__:
        engine.dialect.__dict__[_WATCHED] = True
        event.listen(engine, "do_execute", _on_execute)
        event.listen(engine, "do_executemany", _on_execute)
        event.listen(engine, "do_execute_no_params", _on_execute_no_params)
        event.listen(engine, "handle_error", _on_error)
        refuse_begun(engine)


# -- what a statement is ---------------------------------------------------------------------------


def _sql(statement: Any) -> str:
    return statement if isinstance(statement, str) else str(statement.string)


def _dml(statement: Any) -> str | None:
    for flag, words in _KINDS:
        if getattr(statement, flag, False):
            table = getattr(statement.statement, "table", None)
            return f"{words} {getattr(table, 'name', None) or '(a query)'}"
    return None


_KINDS = (("isinsert", "INSERT INTO"), ("isupdate", "UPDATE"), ("isdelete", "DELETE FROM"))


_WRITES = r"\s*(?:/\*.*?\*/\s*)*(insert|update|delete|replace|merge)\b"  # compiled by first use


def _textual_dml(statement: Any) -> str | None:
    if _dml(statement) is None and (match := re.match(_WRITES, _sql(statement), re.I | re.S)):
        return f"{match[1].upper()} (text)"
    return None


def _names(known: Iterable[str], more: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys((*known, *(name for name in more if name is not None))))


# -- open cursors ----------------------------------------------------------------------------------


class _Sole:
    def __init__(self) -> None:
        self.cursor: Any = object()


_sole = _Sole()
_SOLE = sys.getrefcount(_sole.cursor)


def _has_no_rows_yet(context: ExecutionContext) -> bool:
    cursor: Any = context.cursor
    if cursor is None or cursor.description is None:
        return cursor is not None
    # asyncpg tells what the rows will look like before it asks for them.
    is_early = context.dialect.driver == "asyncpg" and not cursor.server_side
    return is_early and cursor.rowcount == -1


def _is_open(context: ExecutionContext) -> bool:
    """Tell whether somebody besides the context itself has its cursor.

    A `CursorResult` has the DBAPI cursor until its last row is read or it is closed, the code of
    SQLAlchemy while it executes. No attribute tells this for every kind of result:
    `Result.closed` is false of one that was read to its end, and of an ORM result there is no
    public way to its cursor. The count of references is exact, on every driver.
    """
    cursor: Any = context.cursor
    if cursor is None or getattr(cursor, "closed", False) is True:
        return False
    del cursor
    return sys.getrefcount(context.cursor) > _SOLE
