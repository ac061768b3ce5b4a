"""What the text of a statement says to a sandbox: does it read, write, or steer a transaction?

Whatever is not plainly a read counts as a write. The price of a mistake in that direction is a
turn that is taken too early; in the other direction it would be a row that nobody rolls back.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from functools import lru_cache
from typing import Any, NamedTuple, cast

from rope_middleware.session.sql.literals import bare
from rope_middleware.session.sql.statements import STORING_PRAGMA

__all__ = ["Kind", "Said", "body_of", "local_settings", "read"]


class Kind(Enum):
    """What a statement does."""

    READ = auto()
    WRITE = auto()
    LOCK = auto()  # SELECT ... FOR UPDATE: it reads, and others have to wait for its end
    DDL = auto()
    SETTING = auto()  # SET ...: gone with the savepoint, so it is said again after a turn
    BEGIN = auto()
    COMMIT = auto()
    ROLLBACK = auto()
    SAVEPOINT = auto()
    RELEASE = auto()
    ROLLBACK_TO = auto()
    NOTHING = auto()  # SET TRANSACTION ...: the sandbox's transaction has begun long ago
    REFUSED = auto()  # would end the sandbox's transaction in a way that nothing can stop


class Said(NamedTuple):
    """What a statement's text says."""

    kind: Kind
    name: str = ""
    """Of a savepoint; of what is refused, its first words."""
    words: frozenset[str] = frozenset()
    """The names that a read calls as functions."""


_BEFORE = re.compile(r"[\s(]*")
_FIRST = re.compile(r"[A-Za-z_]+")
_LOCKS = re.compile(
    r"\bFOR\s+(?:NO\s+KEY\s+UPDATE|UPDATE|KEY\s+SHARE|SHARE)\b|\bLOCK\s+IN\s+SHARE\b",
    re.IGNORECASE,
)
_INTO = re.compile(r"\bINTO\b", re.IGNORECASE)
_WRITES = re.compile(r"\b(?:INSERT|UPDATE|DELETE|MERGE|REPLACE)\b", re.IGNORECASE)
_CALLED = re.compile(r"([^\W\d]\w*)[\"`\]]?\s*\(")
_ENDS = re.compile(
    r";\s*(?:COMMIT|END|ROLLBACK|ABORT|BEGIN|START\s+TRANSACTION|PREPARE\s+TRANSACTION)\b(?!\s+TO\b)",
    re.IGNORECASE,
)
# A body whose END commits nothing: SQLite's of a trigger, PostgreSQL's of a function. (MariaDB
# commits before what has one.) No more than that: elsewhere "begin" may be a name.
_BODY = re.compile(
    r"CREATE\s+(?:TEMP\w*\s+)?TRIGGER\b[^;]*?\bBEGIN\b.*?;\s*END\b", re.DOTALL | re.IGNORECASE
)
_ATOMIC = re.compile(
    r"CREATE\b[^;]*?\bBEGIN\s+ATOMIC\b(?!\s*END\b).*?;\s*END\b", re.DOTALL | re.IGNORECASE
)
_MORE = re.compile(r";[\s;]*[^\s;]")
_NAME = re.compile(
    r"(?:SAVEPOINT\s+)?(?P<name>\"[^\"]+\"|`[^`]+`|'[^']+'|\[[^\]]+\]|\w+)\s*;?\s*$",
    re.IGNORECASE,
)
_ANALYZE = re.compile(r"EXPLAIN\s*(?:\([^)]*\bANALY[SZ]E\b|ANALY[SZ]E\b)", re.IGNORECASE)
_SET_TRANSACTION = re.compile(
    r"SET\s+(?:LOCAL\s+|SESSION\s+CHARACTERISTICS\s+AS\s+)?TRANSACTION\b", re.IGNORECASE
)
_CONFIG = re.compile(r"\bset_config\s*\(", re.IGNORECASE)
# The statements of a commit in two phases, by their first two words. Nothing is prepared: until
# the second phase comes it is a transaction like any other.
_TWO_PHASES = {
    "PREPARE TRANSACTION": Kind.NOTHING,
    "COMMIT PREPARED": Kind.COMMIT,
    "ROLLBACK PREPARED": Kind.ROLLBACK,
    "XA BEGIN": Kind.BEGIN,
    "XA START": Kind.BEGIN,
    "XA END": Kind.NOTHING,
    "XA PREPARE": Kind.NOTHING,
    "XA COMMIT": Kind.COMMIT,
    "XA ROLLBACK": Kind.ROLLBACK,
}

_READS = frozenset({"SELECT", "VALUES", "SHOW", "WITH", "EXPLAIN", "DESCRIBE", "DESC", "PRAGMA"})
_STEERS = {
    "BEGIN": Kind.BEGIN,
    "START": Kind.BEGIN,
    "COMMIT": Kind.COMMIT,
    "END": Kind.COMMIT,
    "ROLLBACK": Kind.ROLLBACK,
    "ABORT": Kind.ROLLBACK,
    "SAVEPOINT": Kind.SAVEPOINT,
    "RELEASE": Kind.RELEASE,
}
_LASTS = frozenset({Kind.DDL, Kind.SAVEPOINT, Kind.RELEASE, Kind.ROLLBACK_TO})
_NOT_SENT = frozenset({Kind.BEGIN, Kind.COMMIT, Kind.ROLLBACK, Kind.NOTHING})
_DDL = frozenset(
    [
        "CREATE",
        "ALTER",
        "DROP",
        "TRUNCATE",
        "RENAME",
        "ANALYZE",
        "OPTIMIZE",
        "REPAIR",
        "GRANT",
        "REVOKE",
        "LOCK",
        "UNLOCK",
        "FLUSH",
        "REINDEX",
        "COMMENT",
        "DO",
        "CALL",
    ]
)


def read(statement: object, dialect: str) -> Said:
    """Return what `statement` says; what is no plain text is a write.

    Args:
        statement: as it goes to the driver.
        dialect: SQLAlchemy's name of it.
    """
    return _read(statement, dialect) if isinstance(statement, str) else Said(Kind.WRITE)


@lru_cache(maxsize=2000)
def _read(text: str, dialect: str) -> Said:
    body = body_of(text, dialect)
    found = _FIRST.match(body)
    word = found[0].upper() if found else ""
    said = _first(word, body, _begins(bare(text, dialect, names=True)))
    if _MORE.search(body):
        if said.kind in _NOT_SENT or _ENDS.search(_without_body(body, dialect)):
            return Said(Kind.REFUSED, " ".join(text.split())[:40])
        return said if said.kind in _LASTS else Said(Kind.WRITE)
    return said


def _without_body(text: str, dialect: str) -> str:
    body = _ATOMIC if dialect == "postgresql" else _BODY
    return body.sub("", text, count=1)


def _first(word: str, body: str, with_names: str) -> Said:
    """Return what a text says by its first statement."""
    two_phases = _TWO_PHASES.get(" ".join(body.split()[:2]).upper())
    if two_phases is not None:
        return Said(two_phases)
    if word in _STEERS:
        return _steering(word, with_names)
    if word == "SET":
        return Said(Kind.NOTHING if _SET_TRANSACTION.match(body) else Kind.SETTING)
    if word in _DDL:
        return Said(Kind.DDL, word)
    return _query(body, with_names) if word in _READS else Said(Kind.WRITE)


def body_of(text: str, dialect: str) -> str:
    """Return a statement without the brackets in front of it, comments, and what is quoted."""
    return _begins(bare(text, dialect))


def _begins(text: str) -> str:
    return _BEFORE.sub("", text, count=1)


def _steering(word: str, body: str) -> Said:
    kind = _STEERS[word]
    to = re.match(r"ROLLBACK\s+(?:WORK\s+|TRANSACTION\s+)?TO\b", body, re.IGNORECASE)
    if to is not None:
        kind, body = Kind.ROLLBACK_TO, body[to.end() :]
    elif kind in (Kind.SAVEPOINT, Kind.RELEASE):
        body = body[len(word) :]
    else:
        return Said(kind)
    name = _NAME.match(body.strip())
    return Said(kind, name["name"] if name else body.strip())


def _query(body: str, with_names: str) -> Said:
    if _INTO.search(body) or _ANALYZE.match(body) or STORING_PRAGMA().match(body):
        return Said(Kind.WRITE)
    if body[:4].upper() == "WITH" and _WRITES.search(body):
        return Said(Kind.WRITE)
    if _LOCKS.search(body):
        return Said(Kind.LOCK)
    if _CONFIG.search(with_names):
        return Said(Kind.SETTING)
    return Said(Kind.READ, words=frozenset(name.lower() for name in _CALLED.findall(with_names)))


_SET_LOCAL = re.compile(r"SET\s+LOCAL\s+([\w.\"]+)", re.IGNORECASE)
# What SQL calls otherwise than current_setting() does, by its first word:
# https://www.postgresql.org/docs/current/sql-set.html
_CALLED_OTHERWISE = {
    "time": "TimeZone",
    "session": "session_authorization",
    "schema": "search_path",
    "names": "client_encoding",
    "xml": "xmloption",
}
_SET_CONFIG = re.compile(
    r"set_config\s*\(\s*(?:CAST\s*\(\s*)?(?:'(?P<text>[^']+)'|%\((?P<key>\w+)\)s|\$(?P<number>\d+)|(?P<next>%s))",
    re.IGNORECASE,
)


def local_settings(text: str, parameters: Any) -> list[str]:
    """Return the names of what a SETTING sets until the end of its transaction.

    A plain SET lasts longer than the transaction, and needs nothing.

    Args:
        text: the statement's.
        parameters: as the driver gets them: a mapping or a sequence.
    """
    found = _SET_LOCAL.match(_begins(bare(text, "postgresql", names=True)))
    if found is not None:
        name = found[1].strip('"')
        return [_CALLED_OTHERWISE.get(name.lower(), name)]
    names: list[Any] = []
    given: Any = parameters
    for call in _SET_CONFIG.finditer(text):
        if call["text"]:
            names.append(call["text"])
        elif call["key"] and isinstance(given, dict):
            names.append(cast("dict[str, Any]", given).get(call["key"]))
        elif call["number"] and given:
            names.append(given[int(call["number"]) - 1])
        elif call["next"] and given:
            names.append(given[text[: call.start()].count("%s")])
    return [name for name in names if isinstance(name, str)]
