"""The models of the tests."""

from __future__ import annotations

from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The tests' models."""


class Data(Base):
    """The counter of the documentation."""

    __tablename__ = "data"
    id: Mapped[int] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(default=0)


class Row(Base):
    """One of many."""

    __tablename__ = "row"
    n: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="", server_default="")


class Child(Base):
    """A row whose missing parent is found out by the commit alone."""

    __tablename__ = "child"
    n: Mapped[int] = mapped_column(primary_key=True)
    parent: Mapped[int] = mapped_column(ForeignKey("row.n", deferrable=True, initially="DEFERRED"))
