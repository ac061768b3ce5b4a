"""The application's line: where in the user's code something happens.

A `Line` is a code object and the place of an instruction in it, not a frame: a frame would keep the
local variables of a request alive, and its line number costs more than the walk. `text_of` turns it
into ``file.py:12`` where somebody reads it.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import sqlalchemy

__all__ = [
    "Line",
    "application_line",
    "frames_from",
    "frames_of_task",
    "is_applications",
    "is_in_database",
    "is_ours",
    "is_sqlalchemys",
    "kinds",
    "line_of",
    "package_of",
    "place_of",
    "text_of",
    "variables_of",
]

Line = tuple[CodeType, int]
"""A code object, and the index of the instruction that runs in it (`FrameType.f_lasti`)."""

# Whose code a file holds. The application's line is the first that is _APPLICATION; where the
# application itself is installed among the libraries, the first that is _LIBRARY.
_APPLICATION, _LIBRARY, _BETWEEN = range(3)
_OUTSIDE = None  # Calls requests and tasks: beyond is none of their code. As false as _APPLICATION.

# What stands between the application and us: its code calls ours, or is called by it.
_FRAMEWORKS = frozenset(
    [
        *("_pytest", "a2wsgi", "aiohttp", "anyio", "asgiref", "asyncmy", "asyncpg"),
        *("blacksheep", "bottle", "celery", "channels", "cheroot", "cherrypy", "click"),
        *("daphne", "django", "dramatiq", "eventlet", "falcon", "fastapi", "flask", "gevent"),
        *("granian", "greenlet", "gunicorn", "huey", "hypercorn", "litestar", "meinheld"),
        *("pluggy", "psycopg", "psycopg_pool", "pydantic", "pymysql", "pyramid", "pytest"),
        *("quart", "responder", "robyn", "rq", "sanic", "sniffio", "starlette", "strawberry"),
        *("tornado", "trio", "tween", "typer", "uvicorn", "uvloop", "uwsgi", "waitress"),
        *("webob", "werkzeug", "wsproto", "zope"),
    ]
)

_DRIVERS = frozenset(
    [
        *("aiomysql", "aioodbc", "aiosqlite", "asyncmy", "asyncpg", "mysql", "MySQLdb", "mariadb"),
        *("oracledb", "pg8000", "psycopg", "psycopg2", "psycopg2cffi", "pymssql", "pymysql"),
    ]
)

_folder = os.path.dirname  # pathlib's takes a fifth of this module's import
_OURS = _folder(_folder(_folder(__file__))) + "/"
_SQLALCHEMY = _folder(sqlalchemy.__file__) + "/"
# The standard library, and the scripts of what is installed. (sysconfig takes 5 ms to import.)
_STANDARD = (f"{_folder(os.__file__)}/", f"{_folder(sys.executable)}/")
_CALLERS = frozenset(
    [f"{_OURS}{name}.py" for name in ("asgi/__init__", "wsgi/__init__", "wsgi/body")]
    + [f"{_STANDARD[0]}asyncio/{name}.py" for name in ("events", "runners")]
)


class _Kinds(dict[str, int | None]):
    """Whose code a file holds, by its name: what is no more looked through is false."""

    most: int = 10_000  # a template engine or a notebook may make up names for ever

    def __missing__(self, file: str) -> int | None:
        if len(self) >= self.most:
            self.clear()
        kind = self[file] = _look_at(file.replace("\\", "/"))
        return kind


kinds: dict[str, int | None] = _Kinds()
_getframe = sys._getframe  # noqa: SLF001 - inspect's is slower


def _look_at(file: str) -> int | None:
    if file.startswith("<"):
        # <stdin>, <python-input-0>, <ipython-input-1-...>, <doctest ...>: somebody types.
        if file.startswith(("<stdin", "<console", "<python-input", "<ipython", "<doctest")):
            return _APPLICATION
        return _BETWEEN if file.startswith("<frozen") else _LIBRARY
    if file in _CALLERS:
        return _OUTSIDE
    if file.startswith((_OURS, _SQLALCHEMY)):
        return _BETWEEN
    package = _installed_as(file)
    if package:
        return _BETWEEN if package in _FRAMEWORKS else _LIBRARY
    return _BETWEEN if file.startswith(_STANDARD) else _APPLICATION


_CYTHON = (".pyx", ".pxi", ".pxd")


def _installed_as(file: str) -> str:
    """Return the name of the installed package that `file` belongs to, or an empty string."""
    for folder in ("/site-packages/", "/dist-packages/"):
        _, found, rest = file.rpartition(folder)
        if found:
            return rest.partition("/")[0].removesuffix(".py")
    # Cython's frames name the file as it lay before it was compiled: asyncpg/protocol/protocol.pyx
    return file.partition("/")[0] if file.endswith(_CYTHON) and not file.startswith("/") else ""


def application_line(depth: int) -> Line:
    """Return the line of the application's that the running code was called from.

    Args:
        depth: how many frames, beginning with the caller's, are known not to be the application's.
            They are passed over without a look, which makes the walk cheap.
    """
    greenlet: Any = None
    frame: FrameType | None
    try:
        frame = _getframe(depth)
    except ValueError:  # the stack of a greenlet may end before
        frame = None
    # `line_of(frames_from(frame))`, without the price of a generator, which is 1.5 us where it
    # goes on beyond a greenlet: the walk belongs to each transaction.
    while True:
        while frame is not None:
            if not kinds[frame.f_code.co_filename]:  # _APPLICATION or _OUTSIDE
                if kinds[frame.f_code.co_filename] is _OUTSIDE:
                    return _line_of_library(_getframe(1))
                return frame.f_code, frame.f_lasti
            frame = frame.f_back
        if greenlet is None and (greenlets := sys.modules.get("greenlet")) is not None:
            greenlet = greenlets.getcurrent()  # as `_current_greenlet`, a call less
        greenlet = None if greenlet is None else greenlet.parent
        if greenlet is None:
            return _line_of_library(_getframe(1))
        frame = greenlet.gr_frame


def _current_greenlet() -> Any:
    greenlets: Any = sys.modules.get("greenlet")
    return None if greenlets is None else greenlets.getcurrent()


def _line_of_library(frame: FrameType) -> Line:
    """Name a line of what is installed: there is none of the application's."""
    return line_of(frames_from(frame)) or (frame.f_code, frame.f_lasti)


def line_of(frames: Iterable[FrameType], like: Line | None = None) -> Line | None:
    """Return the application's line in a stack, or None.

    Args:
        frames: the innermost first.
        like: a line that is known to be the application's. Where the application is installed among
            the libraries, only lines of the same package are taken for its own.
    """
    package = "" if like is None else _installed_as(like[0].co_filename.replace("\\", "/"))
    fallback: Line | None = None
    for frame in frames:
        file = frame.f_code.co_filename
        kind = kinds[file]
        if kind is _OUTSIDE:
            break
        if kind == _APPLICATION:
            return frame.f_code, frame.f_lasti
        if kind != _LIBRARY or fallback is not None:
            continue
        if like is None or (package and _installed_as(file.replace("\\", "/")) == package):
            fallback = frame.f_code, frame.f_lasti
    return fallback


def frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    """Give `frame` and what called it, the innermost first.

    SQLAlchemy's asyncio half runs its sync code in a greenlet: the stack goes on where that was
    started from.
    """
    current = _current_greenlet()
    while True:
        while frame is not None:
            yield frame
            frame = frame.f_back
        current = None if current is None else current.parent
        if current is None:
            return
        frame = current.gr_frame


def frames_of_task(task: Any) -> list[FrameType]:
    """Return the frames of what a task of asyncio is awaiting, the innermost first."""
    frames: list[FrameType] = []
    awaited: Any = task.get_coro()
    while awaited is not None and len(frames) < _DEEPEST:
        frame = _attribute(awaited, "cr_frame", "gi_frame", "ag_frame")
        if frame is not None:
            frames.append(frame)
            awaited = _attribute(awaited, "cr_await", "gi_yieldfrom", "ag_await")
        else:
            awaited = _generator_behind(awaited)
    return frames[::-1]


_DEEPEST = 1000


def _attribute(thing: object, *names: str) -> Any:
    for name in names:
        if hasattr(thing, name):
            return getattr(thing, name)
    return None


def _generator_behind(awaited: object) -> Any:
    """Return the async generator whose ``__anext__()`` is awaited, or None.

    A stream's body is such a generator. Nothing but the garbage collector tells it.
    """
    if type(awaited).__name__ not in ("async_generator_asend", "coroutine_wrapper"):
        return None
    behind: list[Any] = gc.get_referents(awaited)
    return next(
        (thing for thing in behind if hasattr(thing, "ag_frame") or hasattr(thing, "cr_frame")),
        None,
    )


def is_in_database(frames: Iterable[FrameType]) -> bool:
    """Tell whether a stack is inside of a call of SQLAlchemy's or of a driver's."""
    for frame in frames:
        file = frame.f_code.co_filename
        if file.startswith(_SQLALCHEMY) or _installed_as(file.replace("\\", "/")) in _DRIVERS:
            return True
        if kinds[file] == _APPLICATION:
            return False
    return False


def is_applications(frame: FrameType) -> bool:
    """Tell whether `frame` runs code of the application's."""
    return kinds[frame.f_code.co_filename] == _APPLICATION


def is_sqlalchemys(frame: FrameType) -> bool:
    """Tell whether `frame` runs code of SQLAlchemy's."""
    return frame.f_code.co_filename.startswith(_SQLALCHEMY)


def is_ours(frame: FrameType) -> bool:
    """Tell whether `frame` runs code of this package."""
    return frame.f_code.co_filename.startswith(_OURS)


def package_of(frame: FrameType) -> str:
    """Return the name of the installed package whose code `frame` runs, or an empty string."""
    return _installed_as(frame.f_code.co_filename.replace("\\", "/"))


# Before Python 3.13 what is read is a copy that stays in the frame, and keeps what it refers to.
_COPIES = sys.version_info < (3, 13)


def variables_of(frame: FrameType) -> dict[str, Any]:
    """Return the local variables of `frame`; nothing stays in it."""
    variables = frame.f_locals
    found = dict(variables)
    if _COPIES:
        variables.clear()
    return found


def place_of(line: Line) -> tuple[str, int]:
    """Return the file and the number of a line."""
    code, instruction = line
    for start, end, number in code.co_lines():
        if start <= instruction < end and number is not None:
            return code.co_filename, number
    return code.co_filename, code.co_firstlineno


def text_of(line: Line) -> str:
    """Return a line as ``file.py:12``, or ``package/file.py:12`` of what is installed."""
    file, number = place_of(line)
    path = Path(file)
    # Every package has an __init__.py.
    package = path.parent.name if path.stem[:2] == "__" else _installed_as(path.as_posix())
    return f"{'' if package in ('', path.stem) else package + '/'}{path.name}:{number}"
