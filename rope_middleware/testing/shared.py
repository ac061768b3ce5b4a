"""One real connection of a sandbox, and whose turn it is on it.

Everything of a sandbox happens in one transaction of one connection, so its sessions take turns.
A turn begins with a session's first write and ends with its commit or rollback. Reading takes no
turn: what a session has only read can be undone at any time without anybody noticing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from rope_middleware.errors import RopeError
from rope_middleware.testing import errors
from rope_middleware.testing.database import Database
from rope_middleware.testing.lanes import Lane
from rope_middleware.testing.sql import Kind, Said, local_settings
from rope_middleware.testing.statement import Statement
from rope_middleware.testing.turn import take_turn

if TYPE_CHECKING:
    from rope_middleware.testing.virtual import VirtualConnection

__all__ = ["SharedConnection"]

_TAKES_TURN = (Kind.WRITE, Kind.DDL, Kind.LOCK)
_UNDOES = (Kind.ROLLBACK, Kind.NOTHING)  # NOTHING: XA END comes before XA ROLLBACK
_LASTS = (Kind.WRITE, Kind.DDL, Kind.LOCK, Kind.SETTING)


class SharedConnection:
    """The real connection of one sandbox to one engine.

    Args:
        name: the sandbox's.
        database: speaks to the real connection, in whose transaction everything happens.
        lane: where its statements run.
        wait: seconds that a session waits for another one's turn.
    """

    def __init__(self, name: str, database: Database, lane: Lane, wait: float) -> None:
        self.name = name
        self.database = database
        self.lane = lane
        self.is_closed: bool = False
        self.gone: str = ""
        """Why the transaction is gone before the end, if it is: the test proves nothing."""
        self.busy: Statement | None = None  # the one under way
        self.writer: VirtualConnection | None = None  # whose turn it is
        self.since: float = 0.0  # the turn began
        self.in_line: list[Statement] = []  # first come, first served, when the turn is over
        self.line: str = ""  # of the write that began the turn
        self.wrote: str = ""  # the line of the last turn's, for other sandboxes that wait for a row
        # Who has done something since TURN that has to be undone before somebody else may go on:
        # settings, savepoints, or an error that has spoilt the transaction.
        self.tainting: VirtualConnection | None = None
        self.seconds = wait
        self.pid: int | None = database.pid()
        self.others: Callable[[], list[SharedConnection]] = list
        """Other sandboxes' connections to such a server, for whose rows this one may wait."""

    # What virtual connections call. It runs in the lane.

    def say(self, virtual: VirtualConnection, statement: Statement) -> Any:
        """Carry a statement out, when the turn of `virtual` has come.

        Raises:
            RopeError: the turn has not come in time.
            ScopeClosedError: the sandbox has ended.
        """
        if self.is_closed and statement.kind in _UNDOES:
            return None  # all of it is rolled back already
        take_turn(self, virtual, statement)
        try:
            return self._say(virtual, statement)
        finally:
            self.busy = None
            self.lane.wake()

    def cancel(self, statement: Statement) -> None:
        """Stop a statement whose sender was cancelled; it may not have got its turn yet."""
        statement.cancel()
        self.lane.wake()

    def commit(self, virtual: VirtualConnection) -> None:
        """Make what `virtual` has written a part of the sandbox's transaction.

        Raises:
            Exception: the driver's, where a deferred constraint is violated.
        """
        self._end(virtual, self._commit)

    def roll_back(self, virtual: VirtualConnection) -> None:
        """Undo what `virtual` has done."""
        self._end(virtual, self._roll_back)

    def close(self) -> None:
        """Roll everything back, once the statement under way has ended."""
        self.is_closed = True
        self.lane.wake()
        self.lane.wait(lambda: self.busy is None, None)
        try:
            if not self.database.close():
                self.gone = self.gone or errors.behind(self.name)
        finally:
            self.writer = self.tainting = None
            self.lane.wake()

    # What the watch says.

    def blocked_by(self, other: SharedConnection) -> str:
        """Say that a statement waits for a row of another sandbox."""
        return errors.blocked(self.name, other.name, other.line if other.writer else other.wrote)

    def blocked_by_own(self, other: SharedConnection) -> RopeError:
        """Make the error for a statement that waits for another engine of its own sandbox."""
        return errors.blocked_by_own(self.name, other.line if other.writer else other.wrote)

    # Statements

    def _enter(self, virtual: VirtualConnection) -> None:
        """Bring the real connection to where `virtual` left it."""
        if self.tainting not in (None, virtual):
            self.database.back()
            self.tainting = None
        if self.tainting is None and virtual.again:
            # Its turn was interrupted. Nothing that it read is lost.
            self.tainting = virtual
            for _, repeat in virtual.again:
                repeat()

    def _say(self, virtual: VirtualConnection, statement: Statement) -> Any:
        kind, said = statement.kind, statement.said
        virtual.is_used = True
        if kind is Kind.REFUSED:
            raise errors.refused(self.name, said.name)
        if kind is not Kind.ROLLBACK:
            self._check()
        if kind is Kind.BEGIN:
            virtual.is_in_block = True
        elif kind is Kind.COMMIT:
            self._commit(virtual)
        elif kind is Kind.ROLLBACK:
            self._roll_back(virtual)
        elif kind is not Kind.NOTHING:
            return self._send(virtual, statement)
        return None

    def _send(self, virtual: VirtualConnection, statement: Statement) -> Any:
        database = self.database
        database.refuse(statement.said, statement.text)
        if self.tainting is not virtual:
            self._enter(virtual)
        if statement.kind is Kind.READ and statement.said.words and database.writes(statement.said):
            statement.kind = Kind.WRITE
        if statement.kind in _TAKES_TURN:
            database.before_write(statement.text)
            if self.writer is None:
                self.writer, self.line, self.since = virtual, statement.line, monotonic()
            virtual.has_written = virtual.has_written or statement.kind is not Kind.LOCK
        elif statement.kind is Kind.SETTING and database.undoes_settings:
            for name in local_settings(statement.text, statement.parameters):
                if name not in virtual.settings:
                    virtual.settings[name] = database.setting(name)
        try:
            result = self.lane.run(statement)
        except BaseException as error:
            self._failed(virtual, error)
            if statement.verdict is not None:
                raise statement.verdict from error
            raise
        self._note(virtual, statement)
        return result

    def _note(self, virtual: VirtualConnection, statement: Statement) -> None:
        """Remember what a statement has changed besides rows."""
        kind, name = statement.kind, statement.said.name
        if kind is Kind.DDL:
            self.database.after_ddl()
        if kind is Kind.SAVEPOINT:
            virtual.again.append((name, partial(self.database.run, f"SAVEPOINT {name}")))
        elif kind in (Kind.RELEASE, Kind.ROLLBACK_TO):
            virtual.forget(name, keep_settings=kind is Kind.RELEASE)
        elif kind is Kind.SETTING and self.database.undoes_settings:
            virtual.again.append(
                ("", partial(self.database.repeat, statement.text, statement.parameters))
            )
        self._check()
        if virtual.commits_itself and kind in _LASTS:
            self._commit(virtual)
        elif virtual.again:
            self.tainting = virtual

    def _failed(self, virtual: VirtualConnection, error: BaseException) -> None:
        if self.database.ends_wait(error):
            for other in self.others():
                error.add_note(self.blocked_by(other))
        if self.database.is_victim(error):
            self.gone = errors.victim(self.name)
        elif not self.database.in_transaction():
            self.gone = errors.behind(self.name)
        if self.gone:
            error.add_note(self.gone)
            return
        is_spoilt = self.database.is_spoilt(error)
        if virtual.commits_itself:
            if is_spoilt or self.writer is virtual:
                self.database.back()
            self._ended(virtual)
        elif is_spoilt and not virtual.is_spoilt:
            virtual.is_spoilt = True
            virtual.again.append(("", self.database.spoil))
            self.tainting = virtual
            if self.writer is virtual and not any(name for name, _ in virtual.again):
                # Whatever it does, all that it wrote is gone: nobody has to wait for that.
                self.writer = None

    def _check(self) -> None:
        """Check that the sandbox's transaction stands: without one each write would be real.

        Raises:
            RopeError: it does not.
        """
        if not self.gone and not self.database.in_transaction():
            self.gone = errors.behind(self.name)
        if self.gone:
            raise RopeError(self.gone)

    # Ends

    def _end(self, virtual: VirtualConnection, end: Callable[[VirtualConnection], None]) -> None:
        under_way = self.busy
        if (self.writer is not virtual and self.tainting is not virtual) or (
            # The garbage collector has come in the middle of somebody's statement, who undoes what
            # is to be undone.
            under_way is not None and self.lane.is_own(under_way.thread)
        ):
            virtual.reset()
            return
        mine = Statement(Said(Kind.NOTHING), "", None, lambda: None, "")

        def take() -> bool:
            if not self.is_closed and self.busy is not None:
                return False
            self.busy = self.busy or mine
            return True

        self.lane.wait(take, None)
        try:
            if self.is_closed:
                virtual.reset()
            else:
                end(virtual)
        finally:
            if self.busy is mine:
                self.busy = None
            self.lane.wake()

    def _commit(self, virtual: VirtualConnection) -> None:
        self._check()
        if virtual.is_spoilt or (self.writer is not virtual and not virtual.has_settings):
            self._roll_back(virtual)
            return
        try:
            if self.writer is virtual:
                self.database.check()
        except BaseException:
            self._roll_back(virtual)
            raise
        self.database.release()
        if virtual.settings:
            self.database.restore(virtual.settings)
        self.wrote = self.line
        self._ended(virtual)

    def _roll_back(self, virtual: VirtualConnection) -> None:
        if virtual in (self.writer, self.tainting) and not self.gone:
            self.database.back()
        self._ended(virtual)

    def _ended(self, virtual: VirtualConnection) -> None:
        if self.writer is virtual:
            self.writer = None
        if self.tainting is virtual:
            self.tainting = None
        virtual.reset()
        self.database.after_end()
