"""Flask-SQLAlchemy-Session2024."""

from __future__ import annotations

from contextlib import AsyncExitStack

from flask_sqlalchemy_session import flask_scoped_session
from sqlalchemy.orm import sessionmaker

from benchmarks import sites
from benchmarks.contestants import FLASK, Contestant, Site
from benchmarks.database import Database


def _flask(database: Database, stack: AsyncExitStack) -> Site:
    engine = database.engine()
    stack.callback(engine.dispose)
    session = flask_scoped_session(sessionmaker(engine))
    app = sites.flask(sites.from_context(lambda: session))
    session.init_app(app)
    return Site(app)


CONTESTANTS = [
    Contestant(
        "Flask-SQLAlchemy-Session2024", FLASK, _flask, ("Flask-SQLAlchemy-Session2024", "Flask")
    )
]
