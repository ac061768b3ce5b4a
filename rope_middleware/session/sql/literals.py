r"""What of a text is SQL: all but its comments, its literals and the names that stand in quotes.

Each database reads them in its own way. A backslash escapes in MariaDB's literals and in
PostgreSQL's ``E'...'``; comments are nested in PostgreSQL; a hash begins a comment in MariaDB.

The settings of the server are taken to be the usual ones: ``standard_conforming_strings`` is on,
and neither ``NO_BACKSLASH_ESCAPES`` nor ``ANSI_QUOTES`` is set.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial

__all__ = ["bare", "late"]


def late(pattern: str, flags: int = 0) -> Callable[[], re.Pattern[str]]:
    """Compile `pattern` when it is first asked for: all of them would be 2 ms of the import."""
    return cache(partial(re.compile, pattern, flags))


def _reader(*parts: str) -> Callable[[], re.Pattern[str]]:
    # Not re.IGNORECASE: $a$ does not end at $A$, and /*m! begins no SQL.
    return late("|".join(parts), re.DOTALL)


# No literal goes back for another way to match: what follows its repetition always does. They do
# without possessive quantifiers, which Python matches wrongly up to 3.11.4 (Debian 12 has 3.11.2):
# https://github.com/python/cpython/issues/100061
_LITERAL = r"'(?:[^']+|'')*(?:'|\Z)"
_DOUBLE = r'"(?:[^"]+|"")*(?:"|\Z)'
_BACKTICKS = r"`(?:[^`]+|``)*(?:`|\Z)"

# https://www.postgresql.org/docs/current/sql-syntax-lexical.html
# Not in the middle of a name: a$b$c is one, and so is nameE.
_STARTS = r"(?<![\w$\u0080-\U0010ffff])"
# A literal goes on after a new line, and is of the same kind there. Comments may lie between.
_GOES_ON = r"'[ \t\f\v]*(?:--[^\r\n]*)?[\r\n](?:\s|--[^\r\n]*[\r\n])*'"
_POSTGRESQL = (
    rf"{_STARTS}[eE]'(?:[^'\\]+|\\(?:.|\Z)|''|{_GOES_ON})*(?:'|\Z)",
    rf"{_STARTS}\$(?P<tag>(?:(?!\d)[\w\u0080-\U0010ffff]+)?)\$.*?(?:\$(?P=tag)\$|\Z)",
    r"(?P<comment>--[^\r\n]*)",
    _LITERAL,
)
# https://dev.mysql.com/doc/refman/en/comments.html
# A comment that begins with an exclamation mark is SQL, and 1--1 are two minus signs.
_MYSQL = (
    r"(?P<runs>/\*M?!(?:\d{5,6})?)|(?P<ends>\*/)",
    r"(?P<comment>(?:--(?=[\x00-\x20\x7f]|\Z)|\#)[^\n]*|/\*.*?(?:\*/|\Z))",
    r"'(?:[^'\\]+|\\(?:.|\Z)|'')*(?:'|\Z)",
    r'"(?:[^"\\]+|\\(?:.|\Z)|"")*(?:"|\Z)',
    rf"(?P<name>{_BACKTICKS})",
)
# https://www.sqlite.org/lang_keywords.html
# A name may stand in the quotes of a literal. What marks a file as UTF-8 is a space.
_SQLITE = (
    rf"(?P<comment>--[^\n]*|/\*.*?(?:\*/|\Z)|{_STARTS}\ufeff+)",
    rf"(?P<name>{_LITERAL}|{_DOUBLE}|{_BACKTICKS}|\[[^\]]*(?:\]|\Z))",
)
_READERS = {
    "postgresql": _reader(*_POSTGRESQL, rf"(?P<nests>/\*)|(?P<name>{_DOUBLE})"),
    "mysql": _reader(*_MYSQL),
    "mariadb": _reader(*_MYSQL),
    "sqlite": _reader(*_SQLITE),
}
# Another database, or one that nobody names: what most of them read.
_ANY = _reader(*_POSTGRESQL, rf"(?P<nests>/\*(?!!))|(?P<name>{_DOUBLE}|{_BACKTICKS})")
_NOTHING = frozenset({"comment", "nests", "runs", "ends"})
_COMMENT_MARK = late(r"/\*|\*/")


def bare(text: str, dialect: str = "", *, names: bool = False) -> str:
    """Return `text` without comments, and with a short word for everything that is quoted.

    Args:
        text: of one statement or several.
        dialect: SQLAlchemy's name of it; empty where it is not known.
        names: leave names in quotes as they are.
    """
    read = _READERS.get(dialect, _ANY)()
    parts: list[str] = []
    at = 0
    runs = False  # within a comment that is SQL
    while (found := read.search(text, at)) is not None:
        parts.append(text[at : found.start()])
        at, kind = found.end(), found.lastgroup
        if kind == "nests":
            at = _end_of_comment(text, at)
        elif kind == "ends" and not runs:  # a star, and what may begin a comment
            parts.append("*")
            at -= 1
            continue
        runs = kind == "runs" or (runs and kind != "ends")
        is_kept = names and kind == "name"
        parts.append(found[0] if is_kept else " " if kind in _NOTHING else " q ")
    parts.append(text[at:])
    return "".join(parts)


def _end_of_comment(text: str, at: int) -> int:
    """Return where the comment ends whose text begins at `at`. PostgreSQL nests them."""
    depth = 1
    while depth:
        mark = _COMMENT_MARK().search(text, at)
        if mark is None:
            return len(text)
        depth += 1 if mark[0] == "/*" else -1
        at = mark.end()
    return at
