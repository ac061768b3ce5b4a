"""SQLAlchemy-Rope: its session hangs by a rope on the handler's frame."""

from __future__ import annotations

from contextlib import AsyncExitStack

from sqlalchemy.orm import sessionmaker
from sqlalchemy_rope import SessionJenny

from benchmarks import sites
from benchmarks.contestants import WSGI, Contestant, Site
from benchmarks.database import Database


def _wsgi(database: Database, stack: AsyncExitStack) -> Site:
    engine = database.engine()
    stack.callback(engine.dispose)
    jenny = SessionJenny(sessionmaker(engine))

    # The rope is tied to the frame that asks for the session: that must be the handler's.
    def touch() -> str:
        jenny.session.is_active  # noqa: B018
        return "touch"

    def select() -> str:
        jenny.session.scalars(sites.select(sites.Item).where(sites.Item.id == 1)).one()
        return "select"

    def insert() -> str:
        jenny.session.add(sites.Note(text="a note"))
        jenny.session.commit()
        return "insert"

    none = sites.by_hand(sessionmaker(engine))["none"]
    handlers = {"none": none, "touch": touch, "select": select, "insert": insert}
    return Site(sites.wsgi(handlers))


CONTESTANTS = [Contestant("SQLAlchemy-Rope", WSGI, _wsgi, ("SQLAlchemy-Rope",))]
