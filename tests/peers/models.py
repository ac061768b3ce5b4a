"""The database of all sites: an order whose customer is missing is refused by the commit alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Engine, ForeignKey, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

POOL = {"pool_timeout": 3}
"""Seconds; 30 by default. Sizes are SQLAlchemy's own: 5 connections, and 10 more."""


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customer"
    id: Mapped[int] = mapped_column(primary_key=True)


class Order(Base):
    __tablename__ = "order"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int] = mapped_column(
        ForeignKey("customer.id", deferrable=True, initially="DEFERRED")
    )


def tune(engine: Engine) -> Engine:
    """Have SQLite look at foreign keys."""

    @event.listens_for(engine, "connect")
    def look(dbapi_connection: Any, record: object) -> None:
        dbapi_connection.execute("PRAGMA foreign_keys = ON")

    return engine


def make_database(folder: Path) -> str:
    """Make the tables and one customer; return the file."""
    file = str(folder / "peers.db")
    engine = create_engine(f"sqlite:///{file}")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Customer(id=1))
        session.commit()
    engine.dispose()
    return file


def sync_engine(file: str) -> Engine:
    return tune(create_engine(f"sqlite:///{file}", **POOL))  # type: ignore[arg-type]


def async_engine(file: str) -> AsyncEngine:
    engine = create_async_engine(f"sqlite+aiosqlite:///{file}", **POOL)  # type: ignore[arg-type]
    tune(engine.sync_engine)
    return engine
