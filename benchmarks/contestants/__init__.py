"""The contestants: a module for each, found by its being here.

A module has a list ``CONTESTANTS``. Each of them builds, in one *setting* (a framework and a kind
of session), the same small site; a setting has one that is made ``by_hand``, with which the
others of the setting are compared. So the figures are those of the way to a session, and not of
the framework.

The site answers each path of `PATHS` with its name; see `benchmarks.sites` for what the paths
do, and for helpers that make a site of a framework.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks.database import Database

PATHS = ("none", "touch", "select", "insert")

WSGI = "WSGI"
FLASK = "Flask"
PYRAMID = "Pyramid"
ASGI_THREADS = "ASGI, sync handlers in threads"
ASGI_ASYNC = "ASGI, AsyncSession"
FASTAPI_THREADS = "FastAPI, sync handlers"
FASTAPI_ASYNC = "FastAPI, AsyncSession"

SETTINGS = (WSGI, FLASK, PYRAMID, ASGI_THREADS, ASGI_ASYNC, FASTAPI_THREADS, FASTAPI_ASYNC)
WSGI_SETTINGS = (WSGI, FLASK, PYRAMID)


@dataclass(frozen=True)
class Site:
    """An application, ready to be called."""

    app: Any
    state: dict[str, Any] = field(default_factory=dict)
    """What its lifespan has put into the ASGI state."""


@dataclass(frozen=True)
class Contestant:
    """One way to have a session for each request."""

    title: str
    setting: str
    build: Callable[[Database, AsyncExitStack], Site | Awaitable[Site]]
    """Make the site; what is to be disposed of goes on the stack."""
    packages: tuple[str, ...] = ()
    """The distributions whose versions matter."""
    by_hand: bool = False
    ours: bool = False

    @property
    def is_wsgi(self) -> bool:
        """Tell the protocol."""
        return self.setting in WSGI_SETTINGS


@dataclass(frozen=True)
class Absent:
    """A contestant that could not even be imported."""

    title: str
    error: str


def find() -> Iterator[Contestant | Absent]:
    """Yield every contestant of every module here, those made by hand first, then ours."""
    found: list[Contestant | Absent] = []
    for module in pkgutil.iter_modules(__path__):
        try:
            made = importlib.import_module(f"{__name__}.{module.name}")
        except Exception as error:
            found.append(Absent(module.name, describe(error)))
        else:
            found += made.CONTESTANTS
    yield from sorted(found, key=_order)


def _order(one: Contestant | Absent) -> int:
    return 2 - one.by_hand * 2 - one.ours if isinstance(one, Contestant) else 3


def describe(error: BaseException) -> str:
    """Return an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
