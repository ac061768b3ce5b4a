"""What of a text is quoted, as each database reads it: R1, S6 and T3 go by that."""

from __future__ import annotations

import ast
import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pymysql
import pytest
from pymysql.constants import CLIENT

from rope_middleware.session.sql.literals import bare
from rope_middleware.session.sql.statements import effect_of
from rope_middleware.session.sql.writes import may_write
from rope_middleware.testing.sql import Kind, read
from tests.e2e.async_app import seed
from tests.servers.mariadb import mariadb_server
from tests.servers.postgres import postgres_server

PACKAGE = Path(__file__).parents[1] / "rope_middleware"
TEXTS = 4000

# -- any text, as the database itself has read it ------------------------------------------------

COMMON = (*["a", " ", ", ", "; ", ";SELECT ", "'", "''", "\\", "\\'", "\\\\", '"', '""', "`", "1"],)
COMMON += ("--", "-- ", "\n", "/*", "*/", "/*/", "/**/", "#", "[", "]", "$", "$$", "$a$", "e'", "-")
COMMON += ("$A$", "/*m!", "--\x7f", "\ufeff")
QUOTES = {
    "postgresql": [("'", "'"), ("E'", "'"), ("e'", "'\n'"), ("$$", "$$"), ("$a$", "$a$")],
    "mariadb": [("'", "'"), ('"', '"'), ("N'", "'"), ("/*!", "*/"), ("#", "\n1")],
    "sqlite": [("'", "'"), ('"', '"'), ("1 AS [", "]"), ("1 AS `", "`")],
}
FOR_ALL = [("/*", "*/1"), ("-- ", "\n1"), ('1 AS "', '"'), ("1", ""), ("1 AS a$a$", "")]

Read = list[int] | None
"""The columns of each SELECT, as the database has read it; None if it could not."""


def some_text(chance: random.Random, dialect: str) -> str:
    """Make SELECTs of a few literals, most of which are well-formed."""

    def item() -> str:
        begin, end = chance.choice(QUOTES[dialect] + FOR_ALL)
        return begin + "".join(chance.choices(COMMON, k=chance.randrange(5))) + end

    items = [item() for _ in range(chance.randint(1, 4))]
    between = [chance.choice([", ", "; SELECT ", " ", "\n", "/**/, "]) for _ in items]
    return "SELECT " + "".join(map("".join, zip(items, between, strict=True))) + "1"


def as_we_read(text: str, dialect: str) -> list[int]:
    """Count the columns of each statement."""
    statements = [one.strip() for one in bare(text, dialect).split(";")]
    return [one.count(",") + 1 for one in statements if one not in ("", "SELECT")]


def of_postgresql() -> Iterator[Callable[[str], Read]]:
    with postgres_server().new_database() as database:
        import psycopg

        address = database.text_url("psycopg").replace("+psycopg", "")
        with psycopg.connect(address, autocommit=True) as connection:
            line = connection.pgconn

            def ask(text: str) -> Read:
                line.send_query(text.encode())
                results = []
                while (result := line.get_result()) is not None:
                    results.append(result)
                if any(result.error_message for result in results):
                    return None
                return [result.nfields for result in results]

            yield ask


def of_mariadb() -> Iterator[Callable[[str], Read]]:
    with mariadb_server().new_database() as database:
        url = database.url("mariadb+pymysql")
        where: dict[str, Any] = {"unix_socket": url.query.get("unix_socket")}
        if url.host and not where["unix_socket"]:
            where = {"host": url.host, "port": url.port or 3306}
        connection = pymysql.connect(
            **where,
            user=url.username or "",
            password=url.password or "",
            client_flag=CLIENT.MULTI_STATEMENTS,
        )

        def ask(text: str) -> Read:
            cursor = connection.cursor()
            read: list[int] = []
            try:
                cursor.execute(text)
                read.append(len(cursor.description or ()))
                while cursor.nextset():
                    read.append(len(cursor.description or ()))
            except pymysql.MySQLError:
                return None
            return read

        yield ask
        connection.close()


def of_sqlite() -> Iterator[Callable[[str], Read]]:
    connection = sqlite3.connect(":memory:")

    def ask(text: str) -> Read:
        try:
            return [len(connection.execute(text).description)]
        except (sqlite3.Error, sqlite3.Warning):
            return None  # also where there are several

    yield ask
    connection.close()


@pytest.mark.parametrize("dialect", ["postgresql", "mariadb", "sqlite"])
def test_R1_a_text_is_read_as_its_database_reads_it(dialect: str) -> None:
    """Whatever is quoted and commented, wherever it ends."""
    chance = random.Random(seed(20261127))
    servers = {"postgresql": of_postgresql, "mariadb": of_mariadb, "sqlite": of_sqlite}
    asked = 0
    with_server = servers[dialect]()
    ask = next(with_server)
    try:
        for _ in range(TEXTS):
            text = some_text(chance, dialect)
            read = ask(text)
            if read is not None:
                # PostgreSQL knows a SELECT of nothing, MariaDB a statement that is a comment.
                assert as_we_read(text, dialect) == [*filter(None, read)], repr(text)
                asked += 1
    finally:
        with_server.close()  # type: ignore[attr-defined]
    assert asked > TEXTS / 10


# -- what follows from it ------------------------------------------------------------------------

LOCKS_BEHIND_A_LITERAL = [
    (r"SELECT E'it\'s' FROM t FOR UPDATE", "postgresql"),
    ("SELECT E'a'\n 'it\\'s' FROM t FOR UPDATE", "postgresql"),
    (r"SELECT 'C:\' FROM t FOR UPDATE", "postgresql"),
    ("SELECT a$b$c FROM t FOR UPDATE", "postgresql"),
    ("SELECT a`b FROM t FOR UPDATE", "postgresql"),
    (r"SELECT 'it\'s' FROM t FOR UPDATE", "mariadb"),
    (r'SELECT "say \"" FROM t FOR UPDATE', "mysql"),
    ("SELECT 1 # it's\n FROM t FOR UPDATE", "mariadb"),
    ("SELECT 1 /*! FROM t FOR UPDATE */", "mariadb"),
    ("SELECT 1 /* /* */ FROM t FOR UPDATE", "mariadb"),
    ("SELECT 1 /*m! ' */ FROM t FOR UPDATE", "mariadb"),
    ("SELECT 1 --\x7f it's\n FROM t FOR UPDATE", "mariadb"),
    ("SELECT $a$x$A$ $a$ FROM t FOR UPDATE", "postgresql"),
    ("SELECT 1--'\n FROM t FOR UPDATE", "sqlite"),
    ("SELECT a AS [it's] FROM t FOR UPDATE", "sqlite"),
]
READS_ALL_THE_SAME = [
    (r"SELECT E'it\'s; DELETE FROM t FOR UPDATE'", "postgresql"),
    ("SELECT /* a /* nested */ FOR UPDATE */ 1", "postgresql"),
    ("SELECT /*! FOR UPDATE */ 1", "postgresql"),
    ("SELECT $ä$ FOR UPDATE $ä$", "postgresql"),
    (r"SELECT 'it\'s FOR UPDATE'", "mariadb"),
    ("SELECT 1 # FOR UPDATE", "mysql"),
    ("SELECT a AS [FOR UPDATE] FROM t", "sqlite"),
]


@pytest.mark.parametrize(("text", "dialect"), LOCKS_BEHIND_A_LITERAL)
def test_R1_a_lock_behind_a_literal_is_seen(text: str, dialect: str) -> None:
    """The literal ends where its database ends it."""
    assert effect_of(text, dialect).writes == "FOR UPDATE"
    assert may_write(text, dialect)
    assert read(text, dialect).kind is Kind.LOCK


@pytest.mark.parametrize(("text", "dialect"), READS_ALL_THE_SAME)
def test_R1_words_in_a_literal_write_nothing(text: str, dialect: str) -> None:
    """And it does not end before."""
    assert not effect_of(text, dialect).writes
    assert not may_write(text, dialect)
    assert read(text, dialect).kind is Kind.READ


SAID = [
    (r"SELECT E'it\'s; COMMIT'", "postgresql", Kind.READ),
    ("SELECT E'a'\n'\\'; COMMIT'", "postgresql", Kind.READ),
    ("SELECT E'a'--'\n'\\'; COMMIT'", "postgresql", Kind.READ),
    ("SELECT $a$ $$; COMMIT $a$", "postgresql", Kind.READ),
    ('SELECT 1 AS "; COMMIT"', "postgresql", Kind.READ),
    ("SELECT /* /* */ ; COMMIT */ 1", "postgresql", Kind.READ),
    (r"SELECT 'C:\'; COMMIT", "postgresql", Kind.REFUSED),
    (r"SELECT E'C:\\'; COMMIT", "postgresql", Kind.REFUSED),
    ('SELECT 1 AS "it\'s"; COMMIT', "postgresql", Kind.REFUSED),
    ("SELECT 1 AS a$b$c; COMMIT", "postgresql", Kind.REFUSED),
    ("SELECT 1; /* /* */ */ COMMIT", "postgresql", Kind.REFUSED),
    ("/* /* */ */ COMMIT", "postgresql", Kind.COMMIT),
    ("COMMIT /* now */ PREPARED 'a'", "postgresql", Kind.COMMIT),
    ("ROLLBACK /* only */ TO a", "postgresql", Kind.ROLLBACK_TO),
    (r"SELECT 'it\'s; COMMIT'", "mariadb", Kind.READ),
    (r"SELECT 'it\\'; COMMIT", "mariadb", Kind.REFUSED),
    ("# by whom\nINSERT INTO t VALUES (1)", "mariadb", Kind.WRITE),
    ("# by whom\nCREATE TABLE t (n int)", "mariadb", Kind.DDL),
    ("/*!40101 CREATE TABLE t (n int) */", "mariadb", Kind.DDL),
    ("SELECT 2*/* ' */3; COMMIT", "mariadb", Kind.REFUSED),
    ("SELECT /*! 2 */ */* ' */3; COMMIT", "mariadb", Kind.REFUSED),
    ("SELECT 1 AS [;COMMIT]", "sqlite", Kind.READ),
    # Several statements, of which none may be lost or run unseen.
    ("COMMIT;", "sqlite", Kind.COMMIT),
    ("COMMIT; INSERT INTO t VALUES (1)", "postgresql", Kind.REFUSED),
    ("BEGIN; INSERT INTO t VALUES (1)", "postgresql", Kind.REFUSED),
    ("SET TRANSACTION READ WRITE; DELETE FROM t", "postgresql", Kind.REFUSED),
    ("SELECT 1; UPDATE t SET a = 1", "postgresql", Kind.WRITE),
    ("SELECT 1; ;", "postgresql", Kind.READ),
    ("\ufeffCOMMIT", "sqlite", Kind.COMMIT),
    ("\ufeffSELECT 1", "sqlite", Kind.READ),
    ('PRAGMA "main".user_version(5)', "sqlite", Kind.WRITE),
    ("PRAGMA user_version", "sqlite", Kind.READ),
    # An END that ends no transaction.
    ("CREATE TRIGGER x AFTER INSERT ON t BEGIN DELETE FROM u; END;", "sqlite", Kind.DDL),
    ("CREATE TRIGGER x AFTER INSERT ON t BEGIN DELETE FROM u; END; END", "sqlite", Kind.REFUSED),
    ("CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; END", "postgresql", Kind.DDL),
    ("CREATE PROCEDURE f() BEGIN ATOMIC END; COMMIT; END", "postgresql", Kind.REFUSED),
    ("CREATE TABLE begin (n int); COMMIT; END", "postgresql", Kind.REFUSED),
    ("CREATE TABLE begin (n int); COMMIT; END", "sqlite", Kind.REFUSED),
]


@pytest.mark.parametrize(("text", "dialect", "kind"), SAID)
def test_T3_what_a_text_says_to_a_sandbox(text: str, dialect: str, kind: Kind) -> None:
    """What ends a transaction is seen where it stands, and not where it is quoted."""
    assert read(text, dialect).kind is kind


def test_T3_a_name_in_quotes_is_known() -> None:
    """Of a savepoint, and of a function that may write."""
    assert read('SAVEPOINT "it\'s"', "postgresql").name == '"it\'s"'
    assert read('SELECT "note"(1)', "postgresql").words == {"note"}
    assert read("SELECT `note` (1)", "mariadb").words == {"note"}
    assert read("SAVEPOINT 'a'", "sqlite").name == read("RELEASE SAVEPOINT 'a'", "sqlite").name
    assert read("SAVEPOINT 'a'", "sqlite").name != read("SAVEPOINT 'b'", "sqlite").name


WRITES = [
    ("COPY (DELETE FROM t RETURNING n) TO '/tmp/t'", "postgresql", "DELETE FROM"),
    ("DO U&'BEGIN DELETE FROM t; END'", "postgresql", "DO"),
    ("\ufeffINSERT INTO t VALUES (1)", "sqlite", "INSERT"),
    ("PRAGMA main.user_version = 5", "sqlite", "PRAGMA"),
    ('PRAGMA "main".application_id(5)', "sqlite", "PRAGMA"),
]


@pytest.mark.parametrize(("text", "dialect", "words"), WRITES)
def test_R1_what_a_text_writes(text: str, dialect: str, words: str) -> None:
    """However it is wrapped."""
    assert effect_of(text, dialect).writes == words


def test_R1_a_copy_of_what_a_query_reads_writes_nothing() -> None:
    """With whatever there is between the two words."""
    for between in ("", " ", "\n  ", " /* what */ "):
        assert not effect_of(f"COPY{between}(SELECT n FROM t) TO STDOUT", "postgresql").writes


def test_C6_a_function_may_write_however_it_is_called() -> None:
    """With a comment before its bracket, or by a name in quotes; a text in brackets calls none."""
    assert may_write("SELECT note/* it */(1)", "postgresql")
    assert may_write("SELECT `note`(1)", "mariadb")
    assert may_write("SELECT [note](1)", "sqlite")
    assert not may_write("SELECT lower('a note (of his)')", "postgresql")


def test_R1_no_pattern_needs_what_older_pythons_match_wrongly() -> None:
    """Possessive quantifiers, up to Python 3.11.4; most runs of these tests are on a newer one."""
    files = [PACKAGE / "testing/sql.py", *(PACKAGE / "session/sql").glob("*.py")]
    strings = [
        node.value
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(strings) > 100
    assert not [one for one in strings if re.search(r"[*+?}]\+|\(\?>", one)]


@pytest.mark.parametrize("dialect", ["postgresql", "mysql", "sqlite", ""])
@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "''",
        "\\'",
        "'\n'",
        "'-- \n",
        "' -- -- ",
        "-- ",
        "`",
        '"',
        "/*",
        "*/",
        "$a$",
        "[",
        "--\n'",
    ],
)
def test_R1_a_long_text_is_read_in_a_time_that_grows_with_it(dialect: str, piece: str) -> None:
    """Whatever is never closed in it."""

    for begins in ("SELECT E'", "SELECT E'a'"):
        began = time.process_time()
        bare(begins + piece * 20_000, dialect)
        assert time.process_time() - began < 2.0
