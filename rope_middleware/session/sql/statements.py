"""What a statement would do, told from its text: write, or ask for a transaction.

The text is what goes over the wire, so that one look covers what the ORM flushes, what Core
compiles, and what the application wrote by hand. What a function or a procedure does inside of
the database cannot be seen here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from rope_middleware.session.sql.literals import bare, late

__all__ = ["READS", "STORING_PRAGMA", "Effect", "effect_of"]


class Effect(NamedTuple):
    """What a statement does beyond reading."""

    writes: str
    """The words that say so ("INSERT", "FOR UPDATE"); empty for one that reads."""
    needs_transaction: bool
    """Means nothing outside of a transaction (``SET LOCAL``, ``DECLARE`` a cursor)."""


READS = Effect("", False)

# How a statement begins that writes: DML, DDL and their like.
_VERBS = (
    *("INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE", "UPSERT", "TRUNCATE", "LOAD", "IMPORT"),
    *("CREATE", "ALTER", "DROP", "RENAME", "COMMENT", "GRANT", "REVOKE", "REASSIGN", "SECURITY"),
    *("LOCK", "VACUUM", "ANALYZE", "ANALYSE", "REINDEX", "CLUSTER", "REPACK", "REFRESH"),
    "OPTIMIZE",
)

# A text with none of these words reads. To look for words is a hundred times faster than to take a
# text apart, and few texts have one.
_WORDS = (*_VERBS, "COPY", "DO", "INTO", "PRAGMA", "SHARE", "SET", "DECLARE", "XACT_LOCK")

_BEGINS = late(rf"(?:{'|'.join(_VERBS)})\b", re.IGNORECASE)
_COPY_IN = late(r"COPY\s+(?![\s(]).*?\bFROM\b", re.DOTALL | re.IGNORECASE)
# PostgreSQL's block of code, quoted: it returns nothing, so it is there for what it does.
_BLOCK = late(r"DO\s+(?:LANGUAGE\s+\w+\s+)?(?:U&\s*)?q\b", re.IGNORECASE)
# SQLite's two numbers in the header of the file. Most others read, or last as long as a connection.
STORING_PRAGMA: Callable[[], re.Pattern[str]] = late(
    r"PRAGMA\s+(?:\w+\s*\.\s*)?(?:user_version|application_id)\s*[=(]", re.IGNORECASE
)
_RUN = late(r"(?:EXPLAIN\b[^;]*?\bANALY[ZS]E|PREPARE)\b|COPY\s*\(", re.IGNORECASE)
_IS_RUN = late(
    r"\b(?:INSERT\s+INTO|UPDATE|DELETE\s+FROM|MERGE\s+INTO|CREATE|REFRESH)\b", re.IGNORECASE
)
_WITHIN = late(
    r"""
    # A CTE that writes, the verb after the CTEs, a new table, locks.
      \bAS\s+(?:NOT\s+)?(?:MATERIALIZED\s+)?\(\s*(INSERT|UPDATE|DELETE|MERGE)\b
    | ^WITH\b.*\)\s*(INSERT\s+INTO|UPDATE(?=\s+\w)|DELETE\s+FROM|MERGE\s+INTO|REPLACE\s+INTO)\b
    | ^(?:SELECT|WITH)\b.*\b(INTO)\b(?!\s*@)
    | \b(FOR\s+(?:NO\s+KEY\s+)?UPDATE|FOR\s+(?:KEY\s+)?SHARE|LOCK\s+IN\s+SHARE\s+MODE)\b
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)

# PostgreSQL's: they last as long as the transaction.
_NEEDS_TRANSACTION = late(
    r"^SET\s+(?:LOCAL|TRANSACTION|CONSTRAINTS)\b|^DECLARE\b|\bset_config\s*\(|_xact_lock",
    re.IGNORECASE,
)

# What may stand before the first word: parentheses, what is left of an executable comment, and
# the comments of MariaDB and MySQL that begin with a hash (elsewhere that is an operator). The
# latter two only where nobody tells the dialect.
_BEFORE = late(r"(?:[\s(]|/\*!\w*|\#[^\n]*(?:\n|$))*", re.ASCII)


@lru_cache(maxsize=512)  # SQLAlchemy keeps as many compiled statements
def effect_of(text: str, dialect: str = "") -> Effect:
    """Return what `text`, one statement or several, does beyond reading.

    Args:
        text: SQL, as it goes to the driver.
        dialect: SQLAlchemy's name of it: who reads the text decides what in it is quoted.
    """
    upper = text.upper()
    if not any(word in upper for word in _WORDS):
        return READS
    needs_transaction = False
    if not dialect:
        text = _BEFORE().sub("", text, count=1)
    for statement in bare(text, dialect).split(";"):
        statement = _BEFORE().sub("", statement, count=1)
        words = _what_writes(statement)
        if words:
            return Effect(" ".join(words.split()).upper(), False)
        needs_transaction = needs_transaction or bool(_NEEDS_TRANSACTION().search(statement))
    return Effect("", True) if needs_transaction else READS


def _what_writes(statement: str) -> str:
    """Return the words of a bare statement that say that it writes."""
    begins = _BEGINS().match(statement)
    if begins is not None:
        return begins[0]
    if _COPY_IN().match(statement):
        return "COPY"
    if _BLOCK().match(statement):
        return "DO"
    if STORING_PRAGMA().match(statement):
        return "PRAGMA"
    run = _RUN().match(statement)
    found = None if run is None else _IS_RUN().search(statement, run.end())
    if found is not None:
        return found[0]
    within = _WITHIN().search(statement)
    return "" if within is None else next(words for words in within.groups() if words)
