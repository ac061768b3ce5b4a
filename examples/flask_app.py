"""The counter of the documentation, on Flask.

    make run-flask

serves it on http://127.0.0.1:5042. Each visit counts one more, and the count survives a restart.
`PORT` and `DATABASE_URL` in the environment change where it listens and where it counts.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from flask import Flask
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker
from werkzeug.serving import make_server

from rope_middleware import RopeMiddleware, SessionJenny

HOST = "127.0.0.1"
PORT = int(os.environ.get("PORT", "5042"))
DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///counter.sqlite")


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

    These are the events that SQLAlchemy documents for it:
    https://docs.sqlalchemy.org/en/latest/dialects/sqlite.html#sqlite-enabling-transactions
    """

    @event.listens_for(engine, "connect")
    def leave_begin_to_us(dbapi_connection: Any, connection_record: Any) -> None:
        dbapi_connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


if DATABASE_URL.startswith("sqlite"):
    engine = create_engine(DATABASE_URL, connect_args={"timeout": 30})
    begin_as_writer(engine)
else:
    engine = create_engine(DATABASE_URL)

# expire_on_commit=False: the view reads the count after its commit. Were it to be loaded again
# there, it could be the next visitor's.
jenny = SessionJenny(sessionmaker(engine, expire_on_commit=False))

app = Flask(__name__)
app.wsgi_app = RopeMiddleware(app.wsgi_app)  # type: ignore[method-assign]

# Outside of a request `jenny.session` works as well. Here it makes the first row.
Base.metadata.create_all(engine)
if jenny.session.query(Data).first() is None:
    jenny.session.add(Data(count=0))
    jenny.session.commit()
# This session would live as long as the module, with its transaction, which is a writer's.
jenny.remove()


@app.get("/")
def count() -> str:
    data = jenny.session.query(Data).first()
    data.count += 1
    jenny.session.commit()
    return str(data.count)


if __name__ == "__main__":
    # Werkzeug's threaded server is for trying things out; any WSGI server runs `flask_app:app`.
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = make_server(HOST, PORT, app, threaded=True)
    print(f"Open http://{HOST}:{PORT}/ - each visit counts one more. Ctrl-C ends it.", flush=True)
    server.serve_forever()
