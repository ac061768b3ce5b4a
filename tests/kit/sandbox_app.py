"""A Flask application around which a SandboxMiddleware stands: served in processes of its own.

DATABASE_URL=... gunicorn tests.kit.sandbox_app:application
DATABASE_URL=... python -m tests.kit.sandbox_app waitress 8000
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from flask import Flask
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from rope_middleware import RopeMiddleware, SessionJenny
from rope_middleware.testing import SandboxMiddleware
from tests.kit.sandboxes import COUNT, Row

app = Flask(__name__)
jenny = SessionJenny(sessionmaker(create_engine(os.environ["DATABASE_URL"])))


@app.post("/<int:n>")
def add(n: int) -> tuple[str, int]:
    """Write a row; it is committed with the response."""
    jenny.session.add(Row(n=n))
    return "", 201


@app.get("/")
def count() -> Iterator[str]:
    """Count the rows, when the body is read."""
    yield str(jenny.session.scalar(COUNT))


application = SandboxMiddleware(RopeMiddleware(app.wsgi_app, commit_on_success=True), jenny)

if __name__ == "__main__":
    import waitress

    assert sys.argv[1] == "waitress"
    waitress.serve(application, host="127.0.0.1", port=int(sys.argv[2]), threads=8)
