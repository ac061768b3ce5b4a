"""The errors of sandboxes, and what they say."""

from __future__ import annotations

from rope_middleware.errors import RopeError, ScopeClosedError

__all__ = ["behind", "blocked", "blocked_by_own", "closed", "not_your_turn", "refused", "victim"]


def closed(name: str) -> ScopeClosedError:
    """Make the error for what has outlived its sandbox."""
    return ScopeClosedError(
        f"The sandbox {name!r} has ended, and all that was written in it is rolled back. This "
        "code has outlived its test (a request, a thread or a task?): let the test wait for it, "
        "or open a scope of its own for it."
    )


def behind(name: str) -> str:
    """Say that something was committed behind a sandbox's back."""
    return (
        f"Something has ended the transaction of the sandbox {name!r} behind its back (a COMMIT "
        "inside of a script or a procedure, DDL on MariaDB, the driver's own connection, another "
        "user of an in-memory database's only one?). What was written before that may be in the "
        "database now, and this test proves nothing."
    )


def victim(name: str) -> str:
    """Say that the database has rolled back all of a sandbox, to end a deadlock."""
    return (
        f"The database has made the sandbox {name!r} the victim of a deadlock, and rolled back "
        "everything that was done in it, commits of the application too: this test cannot go on. "
        "Two tests that write the same keys lock each other out: give each its own."
    )


def not_your_turn(name: str, seconds: float, line: str) -> RopeError:
    """Make the error for who has waited for an uncommitted write of the same sandbox."""
    return RopeError(
        f"In the sandbox {name!r} this session has waited {seconds:g} s for another one that has "
        f"written, at {line}, and has not ended its transaction. All sessions of a sandbox share "
        "one connection, where nobody can look past an uncommitted write: call commit() there "
        "first (or rollback())."
    )


def refused(name: str, words: str) -> RopeError:
    """Make the error for a statement that would end the sandbox's transaction."""
    return RopeError(
        f"In the sandbox {name!r} {words!r} would end the transaction that all sessions of the "
        "sandbox share, so it was not sent. Call commit() or rollback() of the session, or send "
        "COMMIT and ROLLBACK as statements of their own."
    )


def blocked(name: str, other: str, line: str) -> str:
    """Say that one sandbox waits for another one's row.

    Args:
        name: who waits.
        other: who has written.
        line: where it has; "" if that is not known.
    """
    return (
        f"The sandbox {name!r} waits for a row that the sandbox {other!r} has written"
        f"{f' at {line}' if line else ''}; it goes on when that one ends. Two tests that write the "
        "same key wait for one another: give each its own."
    )


def blocked_by_own(name: str, line: str) -> RopeError:
    """Make the error for who waits for a row that another engine of its sandbox has written."""
    return RopeError(
        f"In the sandbox {name!r} a statement waited for a row that the same sandbox has written "
        f"by another engine{f', at {line}' if line else ''}. Each engine of a sandbox has a "
        "transaction of its own until the end, also where both are engines of one database and "
        "the writer has called commit(). Write a row by one of them."
    )
