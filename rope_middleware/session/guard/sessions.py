"""The commit has its sessions for itself, also from who has kept one (C10).

Who asks a jenny meanwhile gets another session (see `settling`). But the application may have kept
the commit's own one: ``session = jenny.session`` in the view, for the body's generator. So in a
scope that commits while its application goes on, the methods of a session are guarded: a call waits
for a commit that is under way, and the commit waits for calls that are under way.

Such a session becomes one of a subclass of its class, as those of read-only scopes do. On the class
itself the guards would cost every use of every session. On the session they would be eleven objects
for each.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import get_ident
from types import new_class
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session

from rope_middleware.running.forks import lock_of_module
from rope_middleware.scope.scope import Scope
from rope_middleware.scope.settling import GUARDED, TELLING, Calls, calls_of
from rope_middleware.session.guard.by_error import CLOSING, note_errors, notes_errors
from rope_middleware.session.holding.begun import strand
from rope_middleware.session.unsaved import has_pending

__all__ = [
    "CALLS",
    "CLOSES",
    "WITHOUT",
    "become",
    "call_at_close",
    "calling",
    "commit_unguarded",
    "guard",
    "in_turn",
    "is_guarded",
    "plain_class",
    "reset",
]

# What begins, uses or ends a transaction.
_METHODS = (
    "execute",
    "scalar",
    "scalars",
    "connection",
    "flush",
    "commit",
    "rollback",
    "begin",
    "begin_nested",
    "refresh",
)


_at_close: list[Callable[[Session, str], None]] = []


def call_at_close(func: Callable[[Session, str], None]) -> None:
    """Call `func` where the application is about to close a session of a scope that commits.

    Args:
        func: called with the session, and with what the application calls.
    """
    _at_close.append(func)


class _Telling(Session if TYPE_CHECKING else object):  # type: ignore[misc]
    """A session that tells of what rolls back what it has written."""

    def close(self) -> None:
        """Tell who waits for it, and close."""
        for func in _at_close:
            func(self, "close()")
        super().close()

    def reset(self) -> None:
        """Tell who waits for it, and reset."""
        for func in _at_close:
            func(self, "reset()")
        super().reset()

    def rollback(self) -> None:
        """Roll back what was added while the commit before was under way, too: it began nothing."""
        if not self.in_transaction() and has_pending(self):
            self.begin()
        super().rollback()


class _Guarded(_Telling):
    """One whose calls and the commits of its scope wait for each other, too."""

    _rope_middleware_calls: Calls


def _guarded(name: str, above: type[Session] = _Guarded) -> Callable[..., Any]:
    """Make what stands in front of the method of that name of what is `above` in the classes."""

    def guarded(self: _Guarded, /, *args: Any, **named: Any) -> Any:
        calls = self._rope_middleware_calls
        me: object = get_ident()  # as `_who`, without the price of a call
        if me == calls.thread:
            me = strand()
        # Order matters. We note the call, then look for a commit; a commit makes itself known, then
        # looks for calls. So one of the two sees the other.
        calls.append(me)
        try:
            if calls.settling is not None:
                _wait(calls, me)
            return getattr(super(above, self), name)(*args, **named)
        finally:
            calls.remove(me)
            del me  # a task that may keep an error, whose traceback refers to this frame

    return guarded


for _name in (*_METHODS, *CLOSING):
    setattr(_Guarded, _name, _guarded(_name))


@contextmanager
def calling(calls: Calls) -> Generator[bool]:
    """Be inside of a call, as `guarded` is; gives whether a commit was waited for."""
    me = _who(calls)
    calls.append(me)
    try:
        yield calls.settling is not None and _wait(calls, me)
    finally:
        calls.remove(me)


def _who(calls: Calls) -> object:
    """Return who makes a call: a thread, or of the scope's own event loop a task.

    (In another loop's thread no other task runs until a call is over.)
    """
    me = get_ident()
    return strand() if me == calls.thread else me


def _wait(calls: Calls, me: object) -> bool:
    """Let a commit under way end, unless the running code is part of it; tell whether it was so.

    Not in a call within a call: the commit waits for the outer one.
    """
    settling = calls.settling
    if settling is None or settling.is_ours() or calls.count(me) > 1:
        return False
    calls.remove(me)
    try:
        from rope_middleware.session.guard.turns import wait_for  # few ever wait

        wait_for(settling)
    finally:
        calls.append(me)
    return True


# -- sessions that are of a subclass ---------------------------------------------------------------

WITHOUT = "_rope_middleware_class_without"
"""In the ``__dict__`` of a class that we have made: the class without that."""

CALLS = "_rope_middleware_calls"
"""In a guarded session's ``__dict__``: who is inside of a call."""


def become(session: Session, needed: int, scope: Scope, handed_out: Any) -> None:
    """Make `session` one that has what a session of `scope` needs.

    Args:
        session: of whatever class.
        needed: TELLING or GUARDED.
        scope: its own.
        handed_out: itself, or the AsyncSession around it.
    """
    base: type[Any] = type(session)
    # Kept by the class itself: a sessionmaker makes one, which may go again.
    found: type[Session] | None = base.__dict__.get(_CLASSES[needed])
    if found is None:
        found = base if issubclass(base, _MIXINS[needed]) else _class_for(needed, base)
    if needed == GUARDED:
        session.__dict__[CALLS] = calls_of(scope)  # first: another thread may be using it
        if handed_out is not session:
            note_errors(handed_out)
    session.__class__ = found


_CLASSES = {TELLING: "_rope_middleware_telling", GUARDED: "_rope_middleware_guarded"}
_MIXINS: dict[int, type[Session]] = {TELLING: _Telling, GUARDED: _Guarded}
_making = lock_of_module()


def _class_for(needed: int, base: type[Session]) -> type[Session]:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, WITHOUT: base}
    with _making:
        if _CLASSES[needed] not in base.__dict__:
            bases = _MIXINS[needed], base
            made = new_class(base.__name__, bases, {}, lambda body: body.update(names))
            setattr(base, _CLASSES[needed], made)
    found: type[Session] = base.__dict__[_CLASSES[needed]]
    return found


def guard(session: Session, scope: Scope) -> None:
    """Let calls on `session` and commits of `scope` wait for each other."""
    if not isinstance(session, _Guarded):
        become(session, GUARDED, scope, session)


_SESSION_CLOSE = Session.close
CLOSES = (_Guarded.close, _Telling.close)
"""What stands in front of a session's ``close()``."""


def plain_class(session: Any, original: Any = _SESSION_CLOSE) -> Any:
    """Return the class of `session` without what we have put in front of it.

    None where somebody has put another close() in the place of SQLAlchemy's.
    """
    if "close" in session.__dict__ and not notes_errors(session):
        return None
    cls: Any = type(session)  # pyright: ignore[reportUnknownVariableType]
    while (close := cls.close) is not original:
        if close not in CLOSES:
            return None
        cls = cls._rope_middleware_class_without
    return cls


def reset(session: Session) -> None:
    """Reset a session, and tell nobody of it: it is not the application that does."""
    if isinstance(session, _Telling):
        super(_Telling, session).reset()
    else:
        session.reset()


def is_guarded(session: Session) -> bool:
    """Tell whether calls on `session` wait for commits."""
    # The application may have put a flush() of its own there: nobody knows what that does.
    return isinstance(session, _Guarded) and "flush" not in session.__dict__


def commit_unguarded(session: Session) -> None:
    """Commit `session` past its guard: all others wait for the commit that this is part of."""
    if isinstance(session, _Guarded) and "commit" not in session.__dict__:
        super(_Guarded, session).commit()
    else:
        session.commit()


def in_turn(session: Session, call: Callable[[Session], None]) -> None:
    """Make `call`, which uses `session`, as if it were one of its methods."""
    if not isinstance(session, _Guarded):
        call(session)
        return
    with calling(session.__dict__[CALLS]):
        call(session)
