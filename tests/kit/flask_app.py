"""A counter on Flask: a view that writes, one that streams, one that fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from rope_middleware import SessionJenny, current_scope
from tests.kit.models import Row
from tests.kit.sessions import touch


def flask_app(jenny: SessionJenny[Session]) -> Any:
    flask = pytest.importorskip("flask")
    app = flask.Flask("counter")

    @app.get("/count")
    def count() -> str:
        jenny.session.add(Row())
        jenny.session.commit()
        return str(jenny.session.scalar(select(func.count()).select_from(Row)))

    @app.get("/stream")
    def stream() -> Any:
        session = touch(jenny)

        def chunks() -> Iterator[str]:
            for _ in range(3):
                assert touch(jenny) is session
                yield "x"

        return app.response_class(chunks())

    @app.get("/fail")
    def fail() -> Any:
        touch(jenny)
        raise ValueError("the view's own")

    @app.get("/scope")
    def scope() -> str:
        touch(jenny)
        return current_scope().name

    return app
