"""The type of `jenny.session`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, assert_type

from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    scoped_session,
    sessionmaker,
)

from rope_middleware import AsyncSessionJenny, SessionJenny, SessionRope


class Base(DeclarativeBase):
    pass


class Data(Base):
    __tablename__ = "data"

    id: Mapped[int] = mapped_column(primary_key=True)
    count: Mapped[int]


class MySession(Session):
    def hello(self) -> str:
        return "hello"


class MyAsyncSession(AsyncSession):
    async def hello(self) -> str:
        return "hello"


def make_session(**kw: Any) -> MySession:
    return MySession(**kw)


def key() -> int:
    return 1


def sync(engine: Engine) -> None:
    jenny = SessionJenny(sessionmaker(engine))
    assert_type(jenny, SessionJenny[Session])
    assert_type(jenny.session, Session)
    assert_type(jenny(), Session)
    assert_type(jenny(expire_on_commit=False), Session)
    assert_type(jenny.rope, SessionRope[Session])
    assert_type(jenny.rope.session, Session)
    assert_type(jenny.create_rope_name(), str)
    # SQLAlchemy's own methods keep their types on the way through.
    assert_type(jenny.get(Data, 1), Data | None)
    assert_type(jenny.session.get(Data, 1), Data | None)
    assert_type(jenny.scalars(select(Data)).all(), Sequence[Data])
    jenny.remove()
    jenny.remove("a name")
    jenny.release()
    jenny.set_rope()
    jenny._rope_name_callback = lambda: "a name"
    assert_type(jenny._rope_name_callback, Callable[[], str] | None)

    SessionJenny(sessionmaker(engine), key)
    SessionJenny(sessionmaker(engine), scopefunc=key, strict=True)

    # It goes wherever a scoped_session goes.
    as_scoped: scoped_session[Session] = jenny
    as_scoped.remove()


def sync_subclass(engine: Engine) -> None:
    from_maker = SessionJenny(sessionmaker(engine, class_=MySession))
    assert_type(from_maker, SessionJenny[MySession])
    assert_type(from_maker.session, MySession)
    assert_type(from_maker.session.hello(), str)
    assert_type(from_maker.rope.session, MySession)
    assert_type(SessionJenny(make_session).session, MySession)
    assert_type(SessionJenny(MySession).session, MySession)
    declared: SessionJenny[MySession] = SessionJenny(make_session)
    assert_type(declared.session, MySession)


def by_hand(engine: Engine) -> None:
    jenny = SessionJenny(sessionmaker(engine, class_=MySession))
    rope = SessionRope(jenny.registry)
    assert_type(rope, SessionRope[MySession])
    assert_type(rope.session, MySession)
    rope.remove()


async def asynchronous(engine: AsyncEngine) -> None:
    jenny = AsyncSessionJenny(async_sessionmaker(engine))
    assert_type(jenny, AsyncSessionJenny[AsyncSession])
    assert_type(jenny.session, AsyncSession)
    assert_type(jenny(), AsyncSession)
    assert_type(await jenny.get(Data, 1), Data | None)
    assert_type(await jenny.session.get(Data, 1), Data | None)
    await jenny.remove()
    await jenny.release()
    AsyncSessionJenny(async_sessionmaker(engine), key)
    AsyncSessionJenny(async_sessionmaker(engine), scopefunc=key, strict=True)

    as_scoped: async_scoped_session[AsyncSession] = jenny
    await as_scoped.remove()


async def asynchronous_subclass(engine: AsyncEngine) -> None:
    from_maker = AsyncSessionJenny(async_sessionmaker(engine, class_=MyAsyncSession))
    assert_type(from_maker, AsyncSessionJenny[MyAsyncSession])
    assert_type(from_maker.session, MyAsyncSession)
    assert_type(await from_maker.session.hello(), str)
    assert_type(AsyncSessionJenny(MyAsyncSession).session, MyAsyncSession)
