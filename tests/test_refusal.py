"""Which errors of which drivers ask for the transaction to be tried again (C6)."""

from __future__ import annotations

import asyncmy.errors
import asyncpg
import psycopg.errors
import pymysql.err
import pytest

from rope_middleware.session.failures.refusal import is_refusal


def error_of(module: str, *args: object, **attributes: object) -> Exception:
    """Make an error as a driver does that is not installed for the tests."""
    made = type("OperationalError", (Exception,), {"__module__": module})(*args)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    "error",
    [
        psycopg.errors.SerializationFailure("could not serialize access"),
        psycopg.errors.DeadlockDetected("deadlock detected"),
        asyncpg.SerializationError("could not serialize access"),
        asyncpg.DeadlockDetectedError("deadlock detected"),
        error_of("psycopg2.errors", "could not serialize", pgcode="40001"),
        error_of("pg8000.exceptions", {"S": "ERROR", "C": "40001"}),
        error_of("pyodbc", "40001", "deadlock victim"),
        error_of("sqlite3", "database is locked", sqlite_errorcode=5),
        error_of("sqlite3", "database is locked", sqlite_errorcode=5 | 2 << 8),
        error_of("sqlite3", "database table is locked", sqlite_errorcode=6),
        *(
            make(code)
            for code in (1205, 1213)
            for make in (
                lambda code: pymysql.err.OperationalError(code, "try restarting transaction"),
                lambda code: asyncmy.errors.OperationalError(code, "try restarting transaction"),
                lambda code: error_of("MySQLdb", code, "try restarting transaction"),
                lambda code: error_of("mysql.connector.errors", "text", errno=code),
                lambda code: error_of("mariadb", "text", errno=code),
            )
        ),
    ],
    ids=lambda error: f"{type(error).__module__}-{type(error).__name__}-{error.args}",
)
def test_C6_a_refusal_is_known_from_every_driver(error: Exception) -> None:
    """Each driver has its own place for the code."""
    assert is_refusal(error)


@pytest.mark.parametrize(
    "error",
    [
        None,
        psycopg.errors.UniqueViolation("duplicate key"),
        asyncpg.UniqueViolationError("duplicate key"),
        pymysql.err.IntegrityError(1062, "duplicate entry"),
        asyncmy.errors.IntegrityError(1062, "duplicate entry"),
        error_of("sqlite3", "UNIQUE constraint failed", sqlite_errorcode=2067),
        error_of("pyodbc", "23000", "duplicate key"),
        error_of("mysql.connector.errors", 1205, errno=1062),
        error_of("somebody.elses", 1205),
        error_of("sqlite3"),
    ],
    ids=repr,
)
def test_C6_another_error_is_none(error: Exception | None) -> None:
    """A broken constraint would break again."""
    assert not is_refusal(error)
