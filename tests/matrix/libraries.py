"""The libraries that are given a jenny or its session, or that stand beside it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """One entry of the table; `test_libraries` has a test of its name.

    Args:
        distribution: what it is installed as.
        given: what it gets from the application.
        use: what the requests do with it.
        note: what its users have to know.
    """

    distribution: str
    given: str
    use: str
    note: str = ""


LIBRARIES: dict[str, Library] = {
    "sqlmodel": Library(
        "sqlmodel", "its session classes in the session factory", "`exec()`, sync and async"
    ),
    "strawberry": Library(
        "strawberry-graphql", "`jenny.session`", "fields side by side, a mutation that fails"
    ),
    "socketio": Library(
        "python-socketio", "`jenny.session`", "events side by side, WebSocket and long polling"
    ),
    "flask_admin": Library(
        "Flask-Admin",
        "the jenny",
        "its pages list, add, edit and delete",
        note="it looks at `jenny.session` when a view is made. With `strict=True`, make its views "
        "within `with open_scope():`.",
    ),
    "wtforms": Library("WTForms-SQLAlchemy", "the jenny", "a form of a model, a choice of rows"),
    "marshmallow": Library("marshmallow-sqlalchemy", "the jenny", "a schema loads and dumps"),
    "factory_boy": Library("factory_boy", "the jenny", "`create()` in a request"),
    "mixins": Library(
        "sqlalchemy-mixins",
        "the jenny",
        "active records: create, find, change",
        note="`create()`, `update()` and `delete()` commit by themselves, unless they are told "
        "`commit=False`.",
    ),
    "pagination": Library("fastapi-pagination", "`jenny.session`", "pages, sync and async"),
    "continuum": Library("SQLAlchemy-Continuum", "nothing", "versions of rows, with commits"),
    "sqladmin": Library("sqladmin", "the engine", "its pages list and add, beside our routes"),
    "queryspy": Library("queryspy", "nothing", "inside and outside of ours, ASGI and WSGI"),
}
