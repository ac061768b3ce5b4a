"""The least that knows: what some promises of the contract ask of each request, in few steps.

A lower bound for anything in Python that keeps them, with all left out that only rare requests
need: failures of a commit, retries, streams, cancellation, forks, nested scopes, lent connections,
several engines. What happens in every request is written for speed, what happens when somebody
looks is written to be short.

- H1: `holders` lists the open transactions: their request, the line of the application's that began
  each, the thread or task, and where that is now.
- H3: whoever waits for a connection is listed as waiting, and a deadlock is refused at once.
- L1: what the ORM, Core or text has written, and nobody has committed, is told. (What Core has
  written also matters to J7, H4 and H5, so each statement is looked at.)
- S3: each session is closed; a connection that cannot be given back is invalidated, which
  `Session.close()` would forget.
- S4: after the end of its request a session begins no transaction, and no statement.
- W2, W3: the scope is current while code of the application runs, and not in between; it ends once,
  also where a server forgets to close the body.
"""

import asyncio
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from threading import get_ident
from time import monotonic
from types import CodeType
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import anyio.to_thread
import sqlalchemy
from greenlet import getcurrent
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session, SessionTransactionOrigin, sessionmaker
from sqlalchemy.pool import Pool

from benchmarks.database import POOL

logger = logging.getLogger(__name__)

Strand = object  # a thread's ident, or a task
Began = tuple[float, CodeType, int, Strand]

_began: dict[Session, Began] = {}  # when, code, instruction, who; some are over already
_waiting: dict[Strand, Pool] = {}
_written: dict[ReferenceType[Connection], list[str]] = {}  # by connections that still live


class Scope:
    """One request's; its slots are set by hand, which takes fewer steps than a call."""

    __slots__ = ("is_over", "request", "session")

    is_over: bool
    request: Any
    session: Any


_nobodys = Scope()
_nobodys.request, _nobodys.session, _nobodys.is_over = None, None, False


current: ContextVar[Scope] = ContextVar("current")


class Known(Session):
    """A session whose transactions are known; of a thread, or of a task: see below."""

    scope: Scope = _nobodys
    connection_out: Any = None  # the last one that it has taken

    def close(self) -> None:
        if (
            _written
            or self._new
            or self._deleted
            or self.identity_map._modified  # as Session._is_clean(), which is not public either
        ):
            _tell_lost(self)
        _began.pop(self, None)
        try:
            super().close()
        except BaseException:
            self.connection_out.invalidate()
            raise


class KnownInThread(Known):
    """A sync session."""


class KnownInTask(Known):
    """What an AsyncSession is made of."""


def sessions(engine: Any, is_async: bool) -> Any:
    """Return a factory of sessions that are known; `engine` becomes a known one."""
    known: Engine = engine.sync_engine if is_async else engine
    event.listen(known, "do_execute_no_params", _on_execute_no_params)
    for name in ("do_execute", "do_executemany"):
        event.listen(known, name, _on_execute)
    pool: Any = known.pool
    pool.connect = _through(pool, asyncio.current_task if is_async else get_ident)
    if is_async:
        return async_sessionmaker(engine, sync_session_class=KnownInTask)
    return sessionmaker(engine, class_=KnownInThread)


# -- the middleware --------------------------------------------------------------------------------


def opener(factory: Callable[[], Any], is_async: bool) -> Callable[[], Any]:
    """Return what the handlers get their session by."""

    def session() -> Any:
        scope = current.get()
        if scope.is_over:
            raise RuntimeError("its request has ended")
        found = scope.session
        if found is None:
            found = scope.session = factory()
            (found.sync_session if is_async else found).scope = scope
        return found

    return session


def wsgi(app: Any, commit: bool) -> Any:
    """Return the middleware around a WSGI application whose bodies are lists."""

    def wsgi_app(environ: Any, start_response: Any) -> Any:
        scope = Scope()
        scope.request, scope.session, scope.is_over = environ, None, False

        def start_committed(status: str, headers: Any, exc_info: Any = None) -> Any:
            if scope.session is not None and status < "4":
                scope.session.commit()
            return start_response(status, headers, exc_info)

        token = current.set(scope)
        try:
            body = Body()
            body.scope = scope
            body.chunks = app(environ, start_committed if commit else start_response)
            return body
        finally:
            current.reset(token)

    return wsgi_app


class Body:
    """A body whose chunks are there: none of the application's code runs between them."""

    __slots__ = ("chunks", "scope")

    chunks: list[bytes]
    scope: Scope

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.chunks)

    def close(self) -> None:
        scope = self.scope
        if scope.is_over:
            return
        scope.is_over = True
        if scope.session is not None:
            token = current.set(scope)
            try:
                scope.session.close()
            finally:
                current.reset(token)

    def __del__(self) -> None:
        if not self.scope.is_over:
            self.close()


def asgi(app: Any, commit: bool, is_async: bool) -> Any:
    """Return the middleware around an ASGI application."""

    async def do(call: Any) -> None:
        await (asyncio.shield(call()) if is_async else anyio.to_thread.run_sync(call))

    async def asgi_app(request: Any, receive: Any, send: Any) -> None:
        scope = Scope()
        scope.request, scope.session, scope.is_over = request, None, False

        async def send_committed(message: Any) -> None:
            if (
                scope.session is not None
                and message["type"] == "http.response.start"
                and message["status"] < 400
            ):
                await do(scope.session.commit)
            await send(message)

        token = current.set(scope)
        try:
            await app(request, receive, send_committed if commit else send)
        finally:
            scope.is_over = True
            session = scope.session
            if session is not None:
                if session.in_transaction():
                    await do(session.close)
                else:  # nothing is open: nobody waits
                    (session.sync_session if is_async else session).close()
            current.reset(token)

    return asgi_app


# -- H1: who has a transaction open ----------------------------------------------------------------

_AUTOBEGIN, _BEGIN = SessionTransactionOrigin.AUTOBEGIN, SessionTransactionOrigin.BEGIN
_DEPTH = 5  # the listener, its call, SessionTransaction.__init__, _autobegin_t, and its caller


class _Between(dict[str, bool]):
    """Whether a file is SQLAlchemy's, Python's own, or this one: not the application's."""

    def __missing__(self, file: str) -> bool:
        library, standard = (f"{Path(module.__file__).parent}/" for module in (sqlalchemy, os))
        self[file] = (
            file == __file__
            or file.startswith((library, "<"))  # what SQLAlchemy generates has no file
            or (file.startswith(standard) and "site-packages" not in file)
        )
        return self[file]


_between = _Between()


@event.listens_for(KnownInThread, "after_transaction_create")
def _on_begin(session: Any, transaction: Any) -> None:
    if transaction.origin is _AUTOBEGIN or transaction.origin is _BEGIN:
        if session.scope.is_over:
            _refuse(session)
        frame: Any = sys._getframe(_DEPTH)
        while _between[frame.f_code.co_filename]:
            frame = frame.f_back
        _began[session] = monotonic(), frame.f_code, frame.f_lasti, get_ident()


@event.listens_for(KnownInTask, "after_transaction_create")
def _on_begin_in_task(session: Any, transaction: Any) -> None:
    if transaction.origin is _AUTOBEGIN or transaction.origin is _BEGIN:
        if session.scope.is_over:
            _refuse(session)
        outer = getcurrent().parent  # of SQLAlchemy's greenlet: where the application awaits
        frame: Any = sys._getframe(_DEPTH) if outer is None else outer.gr_frame
        while _between[frame.f_code.co_filename]:
            frame = frame.f_back
        _began[session] = monotonic(), frame.f_code, frame.f_lasti, asyncio.current_task()


@event.listens_for(KnownInThread, "after_begin")
@event.listens_for(KnownInTask, "after_begin")
def _on_connection(session: Any, _: Any, connection: Connection) -> None:
    session.connection_out = connection


def _refuse(session: Session) -> None:
    Session.close(session)  # for the next use to come by here again
    raise RuntimeError("its request has ended")


class Holder(NamedTuple):
    """An open transaction."""

    scope: Any
    engine: str
    seconds: float
    began: str
    now: str
    has_connection: bool
    waits: bool


def holders() -> list[Holder]:
    """Return the open transactions, the oldest first."""
    return [
        Holder(session.scope.request, str(_engine(session).url), monotonic() - since,
               _text(code, instruction), _now(strand), _has_connection(session),
               strand in _waiting and not _has_connection(session))
        for session, (since, code, instruction, strand) in list(_began.items())
        if session.in_transaction()
    ]  # fmt: skip


def _engine(session: Any) -> Engine:
    engine: Engine = session.get_bind().engine
    return engine


def _has_connection(session: Any) -> bool:
    return session.connection_out is not None and not session.connection_out.closed


def _text(code: CodeType, instruction: int) -> str:
    lines = (line for start, end, line in code.co_lines() if start <= instruction < end)
    return f"{code.co_filename.rpartition('/')[2]}:{next(lines)}"


def _now(strand: Any) -> str:
    """Return where a thread or task is, in the application."""
    frames = (
        [sys._current_frames().get(strand)] if type(strand) is int else strand.get_stack()[::-1]
    )
    frame: Any = frames[0] if frames else None
    while frame is not None and _between[frame.f_code.co_filename]:
        frame = frame.f_back
    return _text(frame.f_code, frame.f_lasti) if frame else ""


# -- H3: who waits for a connection ----------------------------------------------------------------


def _through(pool: Any, strand: Callable[[], Strand]) -> Callable[[], Any]:
    connect, most = pool.connect, POOL["max_overflow"]

    def through() -> Any:
        who = strand()
        _waiting[who] = pool
        try:
            if pool.overflow() >= most and not pool.checkedin():
                _refuse_deadlock(pool, who)
            return connect()
        finally:
            del _waiting[who]

    return through


def _refuse_deadlock(pool: Any, who: Strand) -> None:
    """Raise where each connection is held by a thread or task that waits for another one."""
    holding = [
        strand for session, (*_, strand) in list(_began.items())
        if session.in_transaction() and _engine(session).pool is pool and _has_connection(session)
    ]  # fmt: skip
    is_full = len(holding) == pool.checkedout()
    if is_full and who in holding and all(_waiting.get(one) is pool for one in holding):
        raise PoolTimeout(f"deadlock: {holders()}")


# -- L1: what is written, and not committed --------------------------------------------------------

_WRITES = re.compile(r"\s*(insert|update|delete|replace|merge)\b", re.I)


def _on_execute(_: Any, statement: str, __: Any, context: Any) -> None:
    if context.root_connection.closed:  # S4: given back, since this thread has begun to use it
        raise RuntimeError("its request has ended")
    if context.is_crud or (context.is_text and _WRITES.match(statement)):
        connection = ref(context.root_connection, _written.pop)  # a new one for each transaction
        _written.setdefault(connection, []).append(statement)


def _on_execute_no_params(_: Any, statement: str, context: Any) -> None:
    _on_execute(_, statement, None, context)


def _tell_lost(session: Any) -> None:
    lost = [type(one).__name__ for one in (*session.new, *session.dirty, *session.deleted)]
    if _has_connection(session):
        lost += _written.get(ref(session.connection_out), [])
    if lost:
        _, code, instruction, _ = _began[session]
        line = _text(code, instruction)
        logger.warning("%s has lost %s, begun at %s", session.scope.request, lost, line)
