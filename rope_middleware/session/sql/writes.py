"""Which statements may write: what their text says, or a function that may do anything.

Asked for each statement of a request that may be run again (``retries``): what has only read
leaves no doubt behind, whatever becomes of its COMMIT. In doubt the answer is yes: it costs one
question to the server.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from rope_middleware.session.sql.literals import bare, late
from rope_middleware.session.sql.notes import is_watched, notes_of
from rope_middleware.session.sql.statements import effect_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

__all__ = ["ends_transaction", "has_only_read", "may_write"]

# What stands before the first word.
_BEFORE = late(r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*", re.DOTALL)

_READS = frozenset({"select", "values", "table", "with", "show", "set", "savepoint", "release"})

# SQLAlchemy's recipe for SQLite sends its BEGIN as a statement, before there is a transaction:
# https://docs.sqlalchemy.org/en/21/dialects/sqlite.html#serializable-isolation-savepoints-transactional-ddl
_BEGIN = late(r"\s*(?:BEGIN|START\s+TRANSACTION)\b[^;]*;?\s*$", re.IGNORECASE)

_CALL = late(r"([\w.\"`\]]+)\s*\(")

# Words before a bracket that are no functions, and functions known to write nothing. Any other
# function may do anything.
_HARMLESS = frozenset(
    """
    all and any array as between by case cast char distinct else end except exists filter from
    full group having ilike in inner intersect interval is join lateral left like limit not
    numeric decimal offset on or order outer over overlay partition precision right row select
    some then time timestamp union using values varchar when where with within
    abs array_agg avg bool_and bool_or ceil ceiling char_length coalesce concat concat_ws count
    current_setting date date_part date_trunc dense_rank extract first_value floor format
    generate_series greatest group_concat ifnull initcap json_agg json_array_length
    json_build_array json_build_object json_extract json_object_agg jsonb_agg
    jsonb_array_elements jsonb_array_length jsonb_build_array jsonb_build_object
    jsonb_object_agg lag last_value lead least left length localtimestamp lower lpad ltrim max
    md5 min mod now nullif position power rank regexp_replace replace right round row_number
    row_to_json rpad rtrim sign similarity split_part sqrt string_agg strpos substr substring
    sum to_char to_date to_json to_jsonb to_number to_timestamp to_tsquery to_tsvector
    total trim ts_rank unnest upper version
    """.split()  # noqa: SIM905 - a list of 150 words, one on a line, is no easier to read
)


@lru_cache(maxsize=1024)
def may_write(statement: str, dialect: str = "") -> bool:
    """Tell whether `statement` may write something.

    Args:
        statement: SQL, as it goes to the driver.
        dialect: SQLAlchemy's name of it.
    """
    if _BEGIN().match(statement):
        return False
    match = _BEFORE().match(statement)
    start = match.end() if match else 0
    word = re.match(r"\w*", statement[start:])
    if word is None or word[0].lower() not in _READS:
        return True
    if effect_of(statement, dialect).writes:
        return True
    found = _CALL().findall(bare(statement, dialect, names=True))
    calls = (name.strip('"`').lower() for name in found)
    return any(call not in _HARMLESS for call in calls)


def has_only_read(connection: Connection) -> bool:
    """Tell whether all that was executed on `connection` is known, and none of it may write."""
    notes = notes_of(connection)
    if not is_watched(connection) or not notes.is_whole:
        return False
    dialect = connection.dialect.name
    return not any(may_write(sql, dialect) for sql in notes.sql())


_END = late(r"\s*(?:COMMIT|PREPARE\s+TRANSACTION|XA\s+(?:END|PREPARE|COMMIT))\b", re.IGNORECASE)


def ends_transaction(statement: str | None) -> bool:
    """Tell whether a statement commits: SQLAlchemy's events name none for a plain COMMIT."""
    return statement is None or _END().match(statement) is not None
