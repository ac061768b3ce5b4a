"""Flask-SQLAlchemy."""

from __future__ import annotations

from contextlib import AsyncExitStack

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from benchmarks import sites
from benchmarks.contestants import FLASK, Contestant, Site
from benchmarks.database import POOL, Database, tune


def _flask(database: Database, stack: AsyncExitStack) -> Site:
    app = Flask("bench")
    app.config["SQLALCHEMY_DATABASE_URI"] = database.url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = dict(POOL)
    db = SQLAlchemy(app)
    with app.app_context():
        tune(db.engine)
        stack.callback(db.engine.dispose)
    return Site(sites.flask(sites.from_context(lambda: db.session), app))


CONTESTANTS = [Contestant("Flask-SQLAlchemy", FLASK, _flask, ("Flask-SQLAlchemy", "Flask"))]
