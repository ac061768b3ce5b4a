"""The counter of the documentation, on FastAPI with an AsyncSession.

    make run-fastapi

serves it on http://127.0.0.1:5042. Each visit counts one more, and the count survives a restart.
`PORT` and `DATABASE_URL` in the environment change where it listens and where it counts; the
driver must be an async one (``sqlite+aiosqlite``, ``postgresql+asyncpg``, ...).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from sqlalchemy import Engine, event, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from rope_middleware import AsyncSessionJenny, RopeMiddleware, open_scope

HOST = "127.0.0.1"
PORT = int(os.environ.get("PORT", "5042"))
DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///counter.sqlite")


class Base(DeclarativeBase):
    pass


class Data(Base):
    __tablename__ = "data"

    id: Mapped[int] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(default=0)


def begin_as_writer(engine: Engine) -> None:
    """Let SQLite take its write lock when a transaction begins, not at its first write.

    Python's sqlite3 begins a transaction at the first INSERT, UPDATE or DELETE. The SELECT
    before it stands outside: two requests read 7, and both write 8. A plain BEGIN is not enough
    either: both would read 7 inside of their transactions, and the second one to write would be
    refused with "database is locked". BEGIN IMMEDIATE lets one in. The next one waits (for as long
    as `timeout` says) before it reads.

    These are the events that SQLAlchemy documents for it; an async engine has them on its
    `sync_engine`:
    https://docs.sqlalchemy.org/en/latest/dialects/sqlite.html#sqlite-enabling-transactions
    """

    @event.listens_for(engine, "connect")
    def leave_begin_to_us(dbapi_connection: Any, connection_record: Any) -> None:
        dbapi_connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


if DATABASE_URL.startswith("sqlite"):
    engine = create_async_engine(DATABASE_URL, connect_args={"timeout": 30})
    begin_as_writer(engine.sync_engine)
else:
    # Of two requests that read 7, the one that writes second is refused, and `retries` below
    # has it run again.
    engine = create_async_engine(DATABASE_URL, isolation_level="REPEATABLE READ")

# expire_on_commit=False: the view reads the count after its commit. Were it to be loaded again
# there, it could be the next visitor's.
jenny = AsyncSessionJenny(async_sessionmaker(engine, expire_on_commit=False))


async def prepare() -> None:
    """Make the table and its first row. Once, before any server starts: workers would race."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    # Outside of a request an AsyncSession needs a scope by hand.
    async with open_scope("first row"):
        if (await jenny.scalars(select(Data))).first() is None:
            jenny.add(Data(count=0))
            await jenny.commit()
    await engine.dispose()  # its connections belong to this event loop, which ends here


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
app.add_middleware(RopeMiddleware, retries=100)


@app.get("/", response_class=PlainTextResponse)
async def count() -> str:
    data = (await jenny.scalars(select(Data))).one()
    data.count += 1
    await jenny.commit()
    return str(data.count)


if __name__ == "__main__":
    asyncio.run(prepare())
    print(f"Open http://{HOST}:{PORT}/ - each visit counts one more. Ctrl-C ends it.", flush=True)
    uvicorn.run(app, host=HOST, port=PORT, log_level="warning")
