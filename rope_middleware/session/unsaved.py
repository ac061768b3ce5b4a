"""Changes that a scope or a rope ends without a commit are lost, and it says so (L1).

What is flushed is counted at each flush, by class and savepoint; what is pending is looked at when
the session ends. A commit and a rollback forget both.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import InstanceState, Session

from rope_middleware.scope.outcome import commits_itself, expects_nothing
from rope_middleware.scope.reading import reads_only
from rope_middleware.scope.scope import is_request
from rope_middleware.session.code.lines import Line, text_of
from rope_middleware.session.code.telling import tell_once
from rope_middleware.session.connections import connections_of, is_autocommit
from rope_middleware.session.holding.begun import is_open

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from rope_middleware.session.tie import Tie

__all__ = [
    "Written",
    "dropped",
    "forget_committed",
    "forget_rolled_back",
    "has_pending",
    "lost_by_closing",
    "note_dropped",
    "note_flush",
    "pending",
    "tell_expired",
    "tell_lost",
]

_Counts = Counter[tuple[int, str, str]]
"""How often: how deep in savepoints, what was done, to which class."""

_ADDED, _CHANGED, _DELETED, _DROPPED = "added", "changed", "deleted", "dropped by expunge_all()"


class Written:
    """What a session has flushed, and neither committed nor rolled back."""

    __slots__ = ("counts", "last")

    def __init__(self) -> None:
        self.counts: _Counts = Counter()
        # The flush, or the object dropped, that is counted already: classes may hear it twice.
        self.last: object = None


def note_flush(tie: Tie, session: Session) -> None:
    """Count what the session of `tie` has just flushed."""
    written = _written_of(tie)
    if tie.flush is None or written.last is not tie.flush[0]:
        written.last = None if tie.flush is None else tie.flush[0]
        _count_pending(session, written.counts, _depth(session))


def _written_of(tie: Tie) -> Written:
    written = tie.written
    if written is None:
        written = tie.written = Written()
    return written


def note_dropped(tie: Tie, session: Session, state: InstanceState[Any]) -> Written:
    """Count a pending object, of which this is the state, that ``expunge_all()`` has dropped."""
    written = _written_of(tie)
    if written.last is not state:
        written.last = state
        written.counts[_depth(session), _DROPPED, state.class_.__name__] += 1
    return written


def dropped(written: Written) -> str:
    """Name what was dropped so, and not rolled back since; "" for nothing."""
    counts = written.counts.items()
    return ", ".join(_counted(Counter({key: n for key, n in counts if key[1] == _DROPPED})))


def _count_pending(session: Session, counts: _Counts, depth: int) -> None:
    for thing in session.new:
        counts[depth, _ADDED, type(thing).__name__] += 1
    _count_changed(session, counts, depth)
    for thing in session.deleted:
        counts[depth, _DELETED, type(thing).__name__] += 1


def _count_changed(session: Session, counts: _Counts, depth: int) -> None:
    for thing in session.dirty:
        if session.is_modified(thing):
            counts[depth, _CHANGED, type(thing).__name__] += 1


def _depth(session: Session) -> int:
    """Return how many savepoints are open."""
    depth, transaction = 0, session.get_nested_transaction()
    while transaction is not None:
        depth += transaction.nested
        transaction = transaction.parent
    return depth


def forget_rolled_back(tie: Tie, session: Session) -> None:
    """Forget what the application has rolled back itself: all, or down to a savepoint."""
    if tie.written is not None:
        depth, counts = _depth(session), tie.written.counts
        for key in [key for key in counts if key[0] >= depth]:
            del counts[key]
        if not counts:
            tie.written = None


def forget_committed(tie: Tie, session: Session) -> None:
    """Forget what is committed; what a released savepoint holds belongs to the one around it."""
    if tie.written is None:
        return
    depth = _depth(session)
    if not depth:
        tie.written = None
        return
    counts: _Counts = Counter()
    for (at, what, name), count in tie.written.counts.items():
        counts[min(at, depth - 1), what, name] += count
    tie.written.counts = counts


def tell_lost(tie: Tie, session: Session) -> None:
    """Say that changes are lost, where the session of `tie` is about to end with some.

    Not where nobody expects them to stay: an error has left the scope, the response was no success,
    the scope was doomed.
    """
    written, tie.written = tie.written, None
    if written is None and not has_pending(session):
        return
    line, scope = tie.line, tie.scope
    if line is None or (scope is not None and expects_nothing(scope)):
        return
    is_late = not is_open(tie)  # then the application has ended what it has flushed
    what = _lost(tie, session, None if is_late else written)
    if not what:
        return
    if is_late:
        _tell_late(tie, line, what)
        return
    if scope is not None and reads_only(scope):
        tell_once(
            "lost",
            line,
            "%r is read-only, and changes are lost: %s (transaction begun at %s). Write in a scope "
            'that may write, "with open_scope():", or serve it by another method; if it was meant, '
            "call rollback().",
            scope.name,
            what,
            text_of(line),
        )
        return
    if scope is not None and is_request(scope) and commits_itself(scope):
        tell_once(
            "lost",
            line,
            "%r ended without its commit, and changes are lost: %s (transaction begun at %s). Its "
            "response never started, or was not read to its end and closed. Call commit() for what "
            "has to stay whatever the client does; if it was meant, call rollback().",
            scope.name,
            what,
            text_of(line),
        )
        return
    tell_once(
        "lost",
        line,
        "%s ended without a commit, and changes are lost: %s (transaction begun at %s). Call "
        "commit(), or use commit_on_success=True; if it was meant, call rollback().",
        _name_of(tie),
        what,
        text_of(line),
    )


def _name_of(tie: Tie) -> str:
    return "A session outside of scopes" if tie.scope is None else repr(tie.scope.name)


def _tell_late(tie: Tie, line: Line, what: str) -> None:
    tell_once(
        "late",
        line,
        "%s has ended, and changes are lost that were made while its last commit was under way, or "
        "by a listener of it: %s (the commit's transaction was begun at %s). A listener of "
        "after_commit that adds would need one commit after the other: let it add in "
        "before_commit.",
        _name_of(tie),
        what,
        text_of(line),
    )


def tell_expired(tie: Tie, session: Session) -> None:
    """Say that changes are lost that were made while the commit was under way (C10).

    Called in the instant after the commit: SQLAlchemy is about to expire every object. The commit
    stands, and does not fail for a note.
    """
    line = tie.line
    if line is None or not session.expire_on_commit:
        return
    lost: _Counts = Counter()
    with suppress(Exception):  # another thread changes one more
        _count_changed(session, lost, 0)
    if lost:
        tell_once(
            "expired",
            line,
            "%s: objects were changed while the commit was under way, and expire_on_commit=True "
            "has dropped that: %s (transaction begun at %s). Change them before the response "
            "starts, or use expire_on_commit=False: then the end of the scope writes it.",
            _name_of(tie),
            ", ".join(_counted(lost)),
            text_of(line),
        )


def lost_by_closing(tie: Tie, session: Session) -> str:
    """Name what a ``close()`` of the application's is about to roll back; "" for nothing."""
    if (tie.written is None and not has_pending(session)) or not is_open(tie):
        return ""
    return _lost(tie, session, tie.written)


def _lost(tie: Tie, session: Session, written: Written | None) -> str:
    lost: _Counts = Counter()
    if written is not None and not _stands(tie):
        lost.update(written.counts)
    _count_pending(session, lost, 0)  # of what was set to what it was before, nothing
    return ", ".join(_counted(lost))


def _stands(tie: Tie) -> bool:
    """Tell whether what was flushed stands, or is the application's to end: not this session's.

    By AUTOCOMMIT it stands. On a connection that the application has lent, its own transaction
    goes on. The session is about to end: nothing may fail or wait here.
    """
    known = connections_of(tie.transaction)
    try:
        return bool(known) and all(
            not (is_ended or is_made) or _stands_at_once(connection)
            for connection, _, is_ended, is_made in known
        )
    except Exception:  # a driver's connection that is broken: it is said
        return False


def _stands_at_once(connection: Connection) -> bool:
    return not connection.invalidated and is_autocommit(connection, may_ask=False)


def has_pending(session: Session) -> bool:
    """Tell whether `session` has something to flush."""
    # What is public costs more: `Session.dirty` looks at every object, and `Session.new` and
    # `Session.deleted` make a set each time. `Session.flush` asks the same.
    return not session._is_clean()  # noqa: SLF001


def pending(session: Session) -> list[str]:
    """Name what a flush of `session` would write, as "2 new User"; not what is only touched."""
    changed = [thing for thing in session.dirty if session.is_modified(thing)]
    return [
        f"{count} {how} {name}"
        for how, objects in (
            ("new", session.new),
            ("changed", changed),
            ("deleted", session.deleted),
        )
        for name, count in Counter(type(thing).__name__ for thing in objects).items()
    ]


def _counted(lost: _Counts) -> list[str]:
    """Return what is lost, as "2 User added"."""
    counts: Counter[tuple[str, str]] = Counter()
    for (_, what, name), count in lost.items():
        counts[what, name] += count
    return [f"{count} {name} {what}" for (what, name), count in sorted(counts.items())]
