"""pyramid_tm with zope.sqlalchemy: commits by itself, as Pyramid's cookiecutter has it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import pyramid_tm as pyramid_tm
import zope.sqlalchemy
from sqlalchemy.orm import sessionmaker

from benchmarks import sites
from benchmarks.contestants import PYRAMID, Contestant, Site
from benchmarks.database import Database


def _pyramid(database: Database, stack: AsyncExitStack) -> Site:
    engine = database.engine()
    stack.callback(engine.dispose)
    factory = sessionmaker(engine)

    def dbsession(request: Any) -> Any:
        session = factory()
        zope.sqlalchemy.register(session, transaction_manager=request.tm)
        return session

    def view(work: Any) -> Any:
        return lambda request: work(request.dbsession, False)

    views = {"none": lambda request: "none"}
    views |= {path: view(work) for path, work in sites.WORK.items()}
    config = sites.pyramid(views, **{"tm.manager_hook": "pyramid_tm.explicit_manager"})
    config.include("pyramid_tm")
    config.add_request_method(dbsession, "dbsession", reify=True)
    return Site(config.make_wsgi_app())


CONTESTANTS = [
    Contestant(
        "pyramid_tm, zope.sqlalchemy",
        PYRAMID,
        _pyramid,
        ("pyramid_tm", "zope.sqlalchemy", "pyramid"),
    )
]
