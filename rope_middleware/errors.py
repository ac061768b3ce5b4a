"""Every error that this package raises on its own account, and the texts that places share."""

from __future__ import annotations

from sqlalchemy.exc import DontWrapMixin
from sqlalchemy.exc import TimeoutError as PoolTimeout

__all__ = [
    "CommitInDoubtError",
    "CrossLoopError",
    "NoScopeError",
    "PoolDeadlockError",
    "ReadOnlyError",
    "RopeError",
    "ScopeClosedError",
    "aborted",
    "async_callback",
    "async_engine",
    "belongs_to_parent",
    "in_doubt",
    "left_behind",
    "memory_of_thread",
    "no_engine",
    "no_scope",
    "no_such_name",
    "other_loop",
    "pool_deadlock",
    "scope_ended",
    "sync_scope",
]


class RopeError(Exception):
    """Base of every error raised by this package."""


class NoScopeError(RopeError, LookupError):
    """A scope is needed, and none is open.

    Wrap the application in `RopeMiddleware`, or open a scope by hand with `open_scope`.
    """


class ScopeClosedError(RopeError, DontWrapMixin):
    """The scope has ended; what belonged to it cannot be used any more.

    Code that runs on after its request (a thread, a task, a timed-out handler) gets it from
    ``jenny.session``, from `current_scope`, and from a session that it kept, if that would begin a
    transaction. Give such work a scope of its own with `open_scope`.
    """


class CrossLoopError(RopeError):
    """An async session was reached from another event loop than its scope's.

    Its connection belongs to the loop it was made in. Open a scope in the other loop, or send
    the work to the first one (`asyncio.run_coroutine_threadsafe`).
    """


class ReadOnlyError(RopeError):
    """A statement would have written in a read-only scope. Nothing is written.

    Put a scope that writes around it (``with open_scope():``), or serve it by another HTTP method.
    """


class PoolDeadlockError(RopeError, PoolTimeout):
    """Every connection of the pool is held by someone who waits for another one.

    Raised at once, in the one that would close the circle, instead of a time-out for all.
    """


class CommitInDoubtError(RopeError):
    """The connection broke after COMMIT was sent, and nobody can tell whether the rows are there.

    Its cause is the driver's error. Look for the rows before the work is done again. With
    ``retries`` PostgreSQL is asked, and most doubts end there.
    """


# -- texts ---------------------------------------------------------------------------------------


def no_scope() -> NoScopeError:
    """Make the error for code that needs a scope where none is open."""
    return NoScopeError(
        "No request scope is open. In a request: wrap the app in RopeMiddleware, around everything "
        'that uses the session. Anywhere else, open a scope by "with open_scope():" ("async with" '
        "for an AsyncSession): at the application's startup (lifespan), in scripts, threads and "
        "background jobs, and in Starlette's handler of Exception or 500, which runs outside of "
        "every middleware."
    )


def left_behind() -> RopeError:
    """Make the error for a scope that a framework would leave behind in a thread."""
    return RopeError(
        'This "with open_scope():" stands in a generator that the framework runs in a worker '
        "thread, in a copy of the request's context. No other code would find the scope, and its "
        'changes would be lost. Make the dependency an "async def" with '
        '"async with open_scope():"; endpoints and other dependencies may stay "def".'
    )


def scope_ended(name: str) -> ScopeClosedError:
    """Make the error for code that has outlived its scope."""
    return ScopeClosedError(
        f"The scope {name!r} has ended, and its sessions are closed. This code has "
        'outlived it (a thread, a task or a timed-out handler?). Use "with open_scope():" '
        "around work of its own."
    )


def belongs_to_parent(name: str | None) -> ScopeClosedError:
    """Make the error for a forked process that uses its parent's scope, or a session of none."""
    if name is None:
        return ScopeClosedError(
            "This session was in a transaction when this process was forked, and its connection "
            "belongs to the parent process. Call its close(), which says nothing over that "
            'connection, and it begins anew; or use "with open_scope():" around work of this '
            "process's own."
        )
    return ScopeClosedError(
        f"The scope {name!r} belongs to the process that this one was forked from, "
        'and so do its sessions and their connections. Use "with open_scope():" around '
        "work of this process's own."
    )


def other_loop(name: str) -> CrossLoopError:
    """Make the error for an AsyncSession that is reached from another event loop."""
    return CrossLoopError(
        f"The scope {name!r} belongs to another event loop than the one that runs here, "
        'and so do the connections of its AsyncSession. Use "async with open_scope():" in this '
        "loop (with an engine made for it), or come back to the scope's loop with "
        "asyncio.run_coroutine_threadsafe()."
    )


def sync_scope(name: str) -> RopeError:
    """Make the error for an AsyncSession in a sync scope."""
    return RopeError(
        f"The scope {name!r} is a sync one (WSGI, or a plain "
        '"with open_scope():"), where nothing can await the end of an AsyncSession. '
        'Use "async with open_scope():", or a SessionJenny here.'
    )


def async_callback(method: str, fn: object, name: str) -> RopeError:
    """Make the error for an async function that a sync scope is to call."""
    return RopeError(
        f"{method}() was given the async function {fn!r}, and the scope {name!r} "
        "is a sync one (WSGI, or a plain 'with open_scope():'), where nothing can await "
        "it. Give a plain function."
    )


def aborted(name: str) -> RopeError:
    """Make the error for a commit that the database would answer with a rollback."""
    return RopeError(
        f"The commit of {name!r} would be a rollback, and nothing is written: the database has "
        "aborted the transaction because a statement failed, and the application went on after "
        "that error. Let the error pass, or put the statement that may fail into "
        '"with session.begin_nested():".'
    )


def in_doubt(name: str, why: str) -> CommitInDoubtError:
    """Make the error for a commit whose answer was lost.

    Args:
        name: of the scope.
        why: nobody can tell.
    """
    return CommitInDoubtError(
        f"The commit of {name!r} is in doubt: the connection was lost after COMMIT was sent and "
        f"before its answer came, and {why}. It may stand, or not: look for its rows before you "
        "do the work again."
    )


def pool_deadlock(engine: str, size: int, holders: str) -> PoolDeadlockError:
    """Make the error for whoever would wait for a connection for ever.

    Args:
        engine: the URL of the pool's engine.
        size: how many connections the pool gives.
        holders: who holds them, a row each.
    """
    return PoolDeadlockError(
        f"Every connection of the pool of {engine} ({size} at most) is held by a thread or task "
        "that itself waits for another one, so none would ever come back. Give back the outer "
        "connection before an inner scope asks for one: commit() or rollback(). Or make the pool "
        f"larger than the number of such requests at once.\n{holders}"
    )


def async_engine(bind: object) -> RopeError:
    """Make the error for a plain Session whose engine can only be awaited."""
    return RopeError(
        f"A plain Session cannot use the async engine {bind!r}: nothing in it can await. Make "
        "async sessions, AsyncSessionJenny(async_sessionmaker(engine)), or a sync engine, "
        "SessionJenny(sessionmaker(create_engine(url)))."
    )


def no_engine(example: str) -> RopeError:
    """Make the error for sessions that were made by the bare class of sessions.

    Args:
        example: what makes sessions that have an engine.
    """
    return RopeError(
        "This session has no engine, because the session factory is the bare class of sessions. "
        f"Give a factory that has one: {example}."
    )


def memory_of_thread(*, is_async: bool) -> RopeError:
    """Make the error for an in-memory SQLite database that each thread has for itself."""
    where = (
        "an async scope ends its sessions in another thread than the one that used them"
        if is_async
        else "another thread has used this engine before, and its tables are not here"
    )
    return RopeError(
        "This engine gives each thread an in-memory SQLite database of its own "
        "(SingletonThreadPool), "
        f'and {where}. Make it one database for all threads: create_engine("sqlite://", '
        'poolclass=StaticPool, connect_args={"check_same_thread": False}), or use a file.'
    )


def no_such_name(jenny: object, name: str) -> AttributeError:
    """Make the error for a name that a jenny does not have.

    Args:
        jenny: sync or async, or its class.
        name: SQLModel's `exec`, say, which only a session class of the user's has; or a
            sessionmaker's, which sqladmin asks for.
    """
    owner = jenny if isinstance(jenny, type) else type(jenny)
    text = f"{owner.__name__!r} object has no attribute {name!r}"
    # Not by attribute: a copy of a jenny has none yet.
    made = vars(jenny).get("_session_class")
    if name in ("class_", "kw"):
        text += ". A session factory has it: where one is asked for, pass jenny.session_factory"
    elif hasattr(made, name):
        text += f". Your session class has it: write jenny.session.{name}"
    elif made is None:  # its factory is any function, which has made no session yet
        text += f". If your session class has it, write jenny.session.{name}"
    return AttributeError(text, name=name, obj=jenny)
