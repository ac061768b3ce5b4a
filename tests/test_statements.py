"""R1: which texts would write, and which only look so."""

from __future__ import annotations

import pytest

from rope_middleware.session.sql.statements import effect_of

WRITES = [
    "INSERT INTO t VALUES (1)",
    "  -- a comment\n delete from t",
    "/* c */ update t set x=1",
    "/* a /* nested */ c */ drop table t",
    "WITH x AS (INSERT INTO t VALUES (1) RETURNING id) SELECT * FROM x",
    "with x as materialized (delete from t returning *) select 1",
    "with x as not materialized (update t set a = 1 returning *) select 1",
    "WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x",
    "WITH x AS (SELECT 1), y (a) AS (SELECT 2) UPDATE t SET a = 1",
    "WITH x AS (SELECT 1) DELETE FROM t",
    "SELECT * FROM t FOR UPDATE",
    "SELECT * FROM t FOR NO KEY UPDATE SKIP LOCKED",
    "SELECT * FROM t FOR KEY SHARE",
    "SELECT * FROM t LOCK IN SHARE MODE",
    "(SELECT 1 FROM t FOR SHARE)",
    "SELECT 1; DELETE FROM t",
    "SELECT a INTO b FROM t",
    "COPY t (a) FROM STDIN",
    "EXPLAIN (ANALYZE, BUFFERS) DELETE FROM t",
    "explain analyze insert into t values (1)",
    "PREPARE p (int) AS INSERT INTO t VALUES ($1)",
    "DO $$ BEGIN PERFORM 1; END $$",
    "do language plpgsql 'begin delete from t; end'",
    "TRUNCATE t",
    "# MariaDB's comment\nDELETE FROM t",
    "/*!40101 DELETE FROM t */",
    "REPLACE INTO t VALUES (1)",
    "MERGE INTO t USING s ON true WHEN MATCHED THEN DO NOTHING",
    "CREATE TABLE x (id int)",
    "LOCK TABLE t",
    "REFRESH MATERIALIZED VIEW v",
    "SELECT 'it''s' FROM t FOR UPDATE",
    r"SELECT E'it\'s' FROM t FOR UPDATE",
    "SELECT $$ ' $$ FROM t FOR UPDATE",
    "SELECT $a$ $b$ ' $a$ FROM t FOR UPDATE",
    "SELECT a #> '{b}' FROM t FOR UPDATE",
]

READS = [
    "SELECT 'INSERT INTO t' FROM t",
    'SELECT "update" FROM t',
    "SELECT `delete` FROM t",
    "SELECT t.update, t.delete FROM t WHERE t.update = 1 AND (delete = 2)",
    "SELECT max(update) FROM t",
    "SELECT 1 -- FOR UPDATE",
    "SELECT /* FOR UPDATE */ 1",
    "SELECT $$FOR UPDATE$$",
    "SELECT $x$ DELETE FROM t; INSERT $x$",
    "SELECT a #> '{b}' FROM t",
    "WITH x AS (SELECT 1) SELECT * FROM x",
    "WITH x AS (SELECT 1) SELECT count(*) AS update_count FROM x",
    "COPY t TO STDOUT",
    "COPY (SELECT * FROM t) TO STDOUT",
    "EXPLAIN DELETE FROM t",
    "PREPARE p AS SELECT a FROM updates",
    "EXECUTE p",
    "DO RELEASE_LOCK('x')",
    "SELECT do FROM window",
    "EXPLAIN ANALYZE SELECT * FROM t",
    "SHOW search_path",
    "VALUES (1), (2)",
    "TABLE t",
    "SELECT updated_at, inserted_into FROM t",
    "SELECT count(*) INTO @x FROM t",
    "PRAGMA foreign_keys=ON",
    "BEGIN",
    "SELECT * FROM created",
    "SELECT replace(a, 'x', 'y') FROM t",
    "SELECT * FROM t WHERE name = %(p)s AND x = $1::INTEGER AND y = $2::VARCHAR",
    "SET search_path = x",
    'SELECT d AS "for update" FROM t',
    "SELECT 'never closed",
    "SELECT /* never closed",
    "",
]

NEEDS_TRANSACTION = [
    "SET LOCAL app.tenant = '1'",
    "SET CONSTRAINTS ALL DEFERRED",
    "SELECT set_config('app.tenant', '1', true)",
    "DECLARE c CURSOR FOR SELECT 1",
    "SELECT pg_advisory_xact_lock(1)",
]


@pytest.mark.parametrize("text", WRITES)
def test_R1_what_writes_is_seen(text: str) -> None:
    """DML, DDL, data-modifying CTEs and locks, behind comments and beside quoted text."""
    assert effect_of(text).writes


@pytest.mark.parametrize("text", READS + NEEDS_TRANSACTION)
def test_R1_what_reads_passes(text: str) -> None:
    """Words in texts, names and comments write nothing."""
    assert not effect_of(text).writes
    assert effect_of(text).needs_transaction is (text in NEEDS_TRANSACTION)


@pytest.mark.parametrize(
    "text", ["/* " * 20_000, "SELECT '" + "a" * 100_000, "EXPLAIN ANALYZE " * 5_000]
)
def test_R1_a_long_text_takes_no_long_time(text: str) -> None:
    """Its time grows with its length, not with the square of it."""
    import time

    before = time.thread_time()
    effect_of.__wrapped__("INSERT" + text)
    assert time.thread_time() - before < 1
