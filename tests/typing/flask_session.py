"""The drop-in for Flask-SQLAlchemy-Session."""

from __future__ import annotations

from typing import assert_type

from flask import Flask
from sqlalchemy import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from rope_middleware import SessionJenny
from rope_middleware.flask import current_session, flask_scoped_session
from tests.typing.sessions import Data, MySession


def with_app(engine: Engine, app: Flask) -> None:
    session = flask_scoped_session(sessionmaker(engine), app)
    assert_type(session, flask_scoped_session[Session])
    assert_type(session.session, Session)
    assert_type(session(), Session)
    assert_type(session.get(Data, 1), Data | None)
    jenny: SessionJenny[Session] = session
    as_scoped: scoped_session[Session] = session
    jenny.remove()
    as_scoped.remove()


def later(engine: Engine, app: Flask) -> None:
    session = flask_scoped_session(sessionmaker(engine, class_=MySession))
    session.init_app(app)
    assert_type(session, flask_scoped_session[MySession])
    assert_type(session.session, MySession)


def current() -> None:
    assert_type(current_session, flask_scoped_session[Session])
    assert_type(current_session.session, Session)
    assert_type(current_session.get(Data, 1), Data | None)
    current_session.remove()
