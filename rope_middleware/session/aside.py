"""The commit has its sessions for itself, also from who has kept one (C10).

Who asks a jenny meanwhile gets another session (see `settling`). But the application may have kept
the commit's own one: ``session = jenny.session`` in the view, for the body's generator. So for as
long as the commit is under way, the methods of its sessions wait. They are put on the session
itself: on its class they would cost every use of every session.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from rope_middleware.scope.scope import Scope
from rope_middleware.session.turns import wait_for_commit

__all__ = ["Waiting", "is_aside", "put_aside", "put_back"]

# What begins, uses or ends a transaction. (`close` has to stay as it is: whether it is SQLAlchemy's
# own is asked for elsewhere.)
_METHODS = (
    "execute",
    "scalar",
    "scalars",
    "connection",
    "flush",
    "commit",
    "rollback",
    "begin",
    "begin_nested",
    "refresh",
)


class Waiting:
    """A method of a session, for whoever is not part of the commit that is under way."""

    __slots__ = ("_method", "_scope")

    def __init__(self, method: Any, scope: Scope) -> None:
        self._method = method
        self._scope = scope

    def __call__(self, *args: Any, **named: Any) -> Any:
        wait_for_commit(self._scope)
        return self._method(*args, **named)


def put_aside(session: Session, scope: Scope) -> None:
    """Let whoever calls `session` wait for the commit of `scope`."""
    own = session.__dict__
    for name in _METHODS:
        if name not in own:  # else the application's own: nobody knows what it does
            own[name] = Waiting(getattr(session, name), scope)


def put_back(session: Session) -> None:
    """Give `session` its methods back."""
    own = session.__dict__
    for name in _METHODS:
        if isinstance(own.get(name), Waiting):
            del own[name]


def is_aside(session: Session) -> bool:
    """Tell whether a commit has `session` for itself."""
    return isinstance(session.__dict__.get("flush"), Waiting)
