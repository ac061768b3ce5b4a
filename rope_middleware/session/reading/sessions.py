"""Sessions of read-only scopes: they read without a transaction, and write nothing.

Such a session is what the application's factory made, of a subclass of its class: that one says
which engine it reads from, and refuses what would write. Its engines, and all other sessions, stay
as they are.
"""

from __future__ import annotations

from inspect import currentframe
from itertools import takewhile
from types import FrameType, new_class
from typing import TYPE_CHECKING, Any, NoReturn

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session

from rope_middleware.errors import ReadOnlyError
from rope_middleware.scope.context import current
from rope_middleware.session.code.lines import frames_from, line_of, text_of
from rope_middleware.session.connections import connections_out
from rope_middleware.session.reading.autocommit import (
    READING,
    connection_ends_at_once,
    reading_engine,
)
from rope_middleware.session.sql.statements import effect_of
from rope_middleware.session.tie import tie_of
from rope_middleware.session.unsaved import pending

if TYPE_CHECKING:
    from sqlalchemy import ClauseElement, Engine

__all__ = ["Reading", "make_reading", "reading_bind", "refuse"]

_CLASS = "_rope_middleware_reading_class"
_CHANGED_AT = "_rope_middleware_changed_at"


def make_reading(session: Session, mixin: type[Reading] | None = None) -> None:
    """Make `session`, which has just been made, read without a transaction and write nothing.

    Args:
        session: what the application's factory made.
        mixin: what the session becomes besides; `Reading` or a class of it.
    """
    base = type(session)
    # Kept by the class itself: a sessionmaker makes one, which may go again.
    made: dict[type[Reading] | None, type[Session]] | None = base.__dict__.get(_CLASS)
    found = None if made is None else made.get(mixin)
    if found is None:
        if isinstance(session, Reading):
            return  # somebody has put one session in two scopes
        found = _make_class(base, mixin)
    session.__class__ = found
    session.twophase = False  # there is nothing to prepare


def _make_class(base: type[Session], mixin: type[Reading] | None) -> type[Session]:
    bases = (mixin or Reading, base)
    found = new_class(base.__name__, bases, {}, lambda body: body.update(_named(base)))
    event.listen(found, "before_flush", _refuse_flush)
    if _CLASS not in base.__dict__:
        setattr(base, _CLASS, {})
    base.__dict__[_CLASS][mixin] = found
    return found


def _named(base: type[Session]) -> dict[str, str]:
    return {"__module__": base.__module__, "__qualname__": base.__qualname__}


def reading_bind(bind: Engine | Connection, clause: ClauseElement | None) -> Engine | Connection:
    """Return where a reading session reads what it would read from `bind`.

    A connection that the application lent stays in its transaction, which is the application's.
    """
    if isinstance(bind, Connection):
        if clause is not None:
            words = effect_of(str(clause.compile(dialect=bind.dialect)), bind.dialect.name).writes
            if words:
                refuse(words)
        return bind
    return reading_engine(bind, refuse)


class Reading(Session if TYPE_CHECKING else object):  # type: ignore[misc]
    """What a session of a read-only scope does otherwise than its class."""

    def get_bind(self, *args: Any, **kw: Any) -> Engine | Connection:
        """Return the engine that reads: every statement of a session comes by here."""
        bind = super().get_bind(*args, **kw)
        reading: Engine | None = bind.__dict__.get(READING)
        return reading_bind(bind, kw.get("clause")) if reading is None else reading

    def _rope_middleware_ends_at_once(self) -> bool:
        """Tell whether ending the session says nothing to its databases."""
        tie = tie_of(self)
        if tie is None or tie.connections:
            return False
        for connection in connections_out(tie):  # noqa: SIM110 - a generator costs double
            if not connection_ends_at_once(connection):
                return False
        return True

    def begin(self, nested: bool = False) -> Any:
        """Begin a block, in which there is no transaction either."""
        if nested:
            refuse("SAVEPOINT")
        return super().begin()

    def begin_nested(self) -> Any:
        """Refuse: there is no transaction to set a savepoint in."""
        return self.begin(nested=True)

    def add(self, instance: object, *args: Any, **kw: Any) -> None:
        """Remember the line: it is what the error of the flush has to name."""
        self.__dict__.setdefault(_CHANGED_AT, _line())
        super().add(instance, *args, **kw)

    def delete(self, instance: object) -> None:
        """Remember the line: it is what the error of the flush has to name."""
        self.__dict__.setdefault(_CHANGED_AT, _line())
        super().delete(instance)


def _refuse_flush(session: Session, _: object, __: object) -> None:
    """Refuse a flush of what has changed; what is only touched passes."""
    changes = pending(session)
    if changes:
        refuse(f"a flush of {', '.join(changes)}", session.__dict__.get(_CHANGED_AT, ""))


def refuse(what: str, line: str = "") -> NoReturn:
    """Raise the error for something that would write.

    Raises:
        ReadOnlyError: always.
    """
    scope = current.get(None)
    where = line or _line()
    raise ReadOnlyError(
        f"{f'The scope {scope.name!r}' if scope is not None else 'This scope'} is read-only, and "
        f"this would write: {what}{f' (at {where})' if where else ''}. Nothing was written. Write "
        'in "with open_scope():", or in a request whose method is not in read_only.'
    )


def _line() -> str:
    """Return the application's line that called, or nothing where our own end did."""
    line = line_of(takewhile(_is_before_our_end, frames_from(currentframe())))
    return "" if line is None else text_of(line)


def _is_before_our_end(frame: FrameType) -> bool:
    """Tell whether `frame` is called by no commit of a scope: beyond it is no line that changed."""
    return frame.f_globals.get("__name__") not in _OUR_END


_OUR_END = ("rope_middleware.scope.order", "rope_middleware.scope.ending")
