"""What a jenny is given to make sessions by: it is looked at before any session is in use."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, cast

from sqlalchemy.orm import Session

from rope_middleware.errors import RopeError, async_engine
from rope_middleware.scope.context import is_async_callable
from rope_middleware.session.listeners import listen

__all__ = ["check_arguments", "check_session", "class_of_made", "listen_to_factory"]


def check_arguments(
    factory: object, scopefunc: object, strict: object, example: str, *, is_async: bool
) -> None:
    """Check the arguments of a jenny.

    Args:
        factory: makes the sessions.
        scopefunc: makes the key of a session outside of scopes, or is None.
        strict: whether there is none outside of scopes.
        example: what a factory looks like.
        is_async: whether the jenny is that of AsyncSessions.

    Raises:
        TypeError: one of them is of a wrong type, or the factory makes the other kind of sessions.
        RopeError: the factory makes plain sessions on an async engine.
    """
    if not callable(factory):
        raise TypeError(
            f"session_factory must be callable and return a new session, like {example}; "
            f"{factory!r} is not callable."
        )
    if scopefunc is not None and not callable(scopefunc):
        raise TypeError(
            "scopefunc must be a callable without arguments that returns the key of the "
            f"current session; {scopefunc!r} is not callable."
        )
    if not isinstance(strict, bool):
        raise TypeError(f"strict is True or False, not {strict!r}.")
    made = getattr(factory, "class_", None)  # of a sessionmaker
    if not isinstance(made, type):
        return
    makes_async = hasattr(made, "sync_session_class")
    if makes_async and not is_async:
        raise TypeError(
            f"SessionJenny was given {factory!r}, which makes AsyncSessions: nothing awaits them "
            "here. Use AsyncSessionJenny(async_sessionmaker(engine)), or a sync engine: "
            "SessionJenny(sessionmaker(create_engine(url)))."
        )
    if is_async and issubclass(made, Session):
        raise TypeError(
            f"AsyncSessionJenny was given {factory!r}, which makes plain Sessions. Use "
            "AsyncSessionJenny(async_sessionmaker(engine)), or SessionJenny for plain Sessions."
        )
    options: Any = getattr(factory, "kw", None)
    bind: Any = cast("dict[str, Any]", options).get("bind") if isinstance(options, dict) else None
    if not makes_async and hasattr(bind, "sync_engine"):
        raise async_engine(bind)


def class_of_made(factory: object) -> type | None:
    """Return of what class a factory's sessions are, or None where only a session tells."""
    while isinstance(factory, partial):
        factory = cast("object", factory.func)
    made = getattr(factory, "class_", factory)  # of a sessionmaker, or a class itself
    return made if isinstance(made, type) else None


def listen_to_factory(factory: object) -> None:
    """Listen to the class of a sessionmaker's sessions before any of them is in use."""
    session_class: object = getattr(factory, "class_", None)
    if isinstance(session_class, type) and issubclass(session_class, Session):
        listen(session_class)


def check_session(session: object, expected: type, factory: object, example: str) -> None:
    """Check what a session factory gave that is no `expected`.

    Raises:
        RopeError: it cannot be closed, or not here.
    """
    close = getattr(session, "close", None)
    is_class = isinstance(session, type)
    is_other_kind = (
        is_async_callable(close) if expected is Session else isinstance(session, Session)
    )
    # They have a close(), too: of a `get_db` for Depends(), and of an async function.
    is_generator = inspect.isgenerator(session) or inspect.iscoroutine(session)
    if is_generator and callable(close):
        close()
    if is_class or not callable(close) or is_other_kind or is_generator:
        what = f"an instance of {type(session).__qualname__}"
        if session is None or is_class:
            what = "None" if session is None else f"the class {session!r}"
        raise RopeError(
            f"The session factory {factory!r} returned {what}; it must return a new sqlalchemy "
            f"{expected.__name__}, as {example} does."
        )
