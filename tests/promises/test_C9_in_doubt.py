"""C9: the line breaks after COMMIT was sent and before its answer: the server is asked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextvars import Context
from typing import Any

import psycopg
import pytest
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from rope_middleware import CommitInDoubtError
from tests.kit.models import Row
from tests.kit.shop import SHOPS, Answer, Work, add, add_and_commit, ask_once
from tests.servers.postgres import Database, postgres_server
from tests.servers.wire import COMMIT, DOWN, UP, Cut, Wire, socket_of

ANSWERS = [Cut(DOWN, COMMIT), Cut(DOWN, COMMIT, part=13, rude=True)]
COMMITS = [Cut(UP, COMMIT), Cut(UP, COMMIT, part=5)]


@pytest.fixture
def database() -> Iterator[Database]:
    with postgres_server().new_database(
        "CREATE TABLE row (n int PRIMARY KEY, name text NOT NULL DEFAULT '')",
        "CREATE TABLE child (n int PRIMARY KEY)",
    ) as found:
        yield found


@pytest.fixture
def wire(database: Database) -> Iterator[Wire]:
    with Wire(socket_of(database)) as found:
        yield found


def rows(database: Database, n: int = 1) -> int:
    return int(database.query("SELECT count(*) FROM row WHERE n = %s", n)[0][0])


def ask(kind: str, database: Database, wire: Wire, work: Work = add, **options: object) -> Answer:
    return ask_once(kind, wire.url(database, SHOPS[kind]), work, **options)


@pytest.mark.parametrize("cut", [*ANSWERS, *COMMITS], ids=lambda cut: cut.kind)
def test_C9_with_retries_the_server_is_asked_and_the_answer_is_the_truth(
    kind: str, database: Database, wire: Wire, cut: Cut
) -> None:
    """It stands: the success goes out. It does not: the request is run again. One row each time."""
    wire.cut_next(cut)
    assert ask(kind, database, wire, commit_on_success=True, retries=3).status == 201
    assert rows(database) == 1
    assert sum(wire.cuts.values()) == 1


@pytest.mark.parametrize("cut", [ANSWERS[0], COMMITS[0]], ids=lambda cut: cut.kind)
def test_C9_what_code_without_the_scope_has_written_counts(
    kind: str, database: Database, wire: Wire, cut: Cut
) -> None:
    """A thread or a task of an empty context has written in the request's transaction."""

    def work(session: Session, n: int) -> int:
        session.connection()
        return Context().run(add, session, n)

    wire.cut_next(cut)
    assert ask(kind, database, wire, work, commit_on_success=True, retries=3).status == 201
    assert rows(database) == 1


@pytest.mark.parametrize("cut", [ANSWERS[0], COMMITS[0]], ids=lambda cut: cut.kind)
def test_C9_without_retries_it_is_an_error_that_says_in_doubt(
    kind: str, database: Database, wire: Wire, cut: Cut, caplog: pytest.LogCaptureFixture
) -> None:
    """A 5xx by `CommitInDoubtError`, and one log line with the request."""
    wire.cut_next(cut)
    answer = ask(kind, database, wire, commit_on_success=True)
    assert answer.status == 500
    assert answer.body != b"of the app"
    if kind != "wsgi":
        assert isinstance(answer.error, CommitInDoubtError)
        assert answer.error.__cause__ is not None
    told = [r.getMessage() for r in caplog.records if r.name == "rope_middleware"]
    assert len([line for line in told if line.startswith("commit of 'POST /1' in doubt")]) == 1


@pytest.mark.parametrize("cut", [ANSWERS[0], COMMITS[0]], ids=lambda cut: cut.kind)
def test_C9_a_commit_of_the_applications_own_is_run_again_only_where_it_does_not_stand(
    kind: str, database: Database, wire: Wire, cut: Cut, caplog: pytest.LogCaptureFixture
) -> None:
    """The application got an error for a commit that stands: its own 5xx goes out, and is told."""
    wire.cut_next(cut)
    answer = ask(kind, database, wire, add_and_commit, retries=3)
    assert rows(database) == 1
    if cut in ANSWERS:
        assert answer.status == 500
        assert (
            "a commit of 'POST /1', by the application itself, is in doubt no more, and stands"
            in (caplog.text)
        )
    else:
        assert answer.status == 201


def test_C9_the_session_goes_on_as_after_a_commit(database: Database, wire: Wire) -> None:
    """Objects that the lost commit has written are in the session still, and can be changed."""
    states: list[bool] = []

    def work(session: Session, n: int) -> int:
        row = Row(n=n)
        session.add(row)

        @event.listens_for(session, "after_rollback")
        def _(session: Session) -> None:
            states.append(row in session)

        return 201

    wire.cut_next(ANSWERS[0])
    assert ask("wsgi", database, wire, work, commit_on_success=True, retries=1).status == 201
    assert rows(database) == 1
    assert states == []  # nothing was rolled back


def test_C9_still_in_progress_is_asked_again(kind: str, database: Database, wire: Wire) -> None:
    """A COMMIT that takes its time on the server has an outcome in the end."""
    database.query(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$"
    )
    database.query(
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON row DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    wire.cut_next(Cut(UP, COMMIT, part=99))  # the server gets all of it, and nobody waits
    assert ask(kind, database, wire, commit_on_success=True, retries=2).status == 201
    assert rows(database) == 1


CUT_OFF = [
    psycopg.OperationalError("connection socket closed"),
    RuntimeError("of a signal handler"),
]


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("error", CUT_OFF, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", [kind for kind in SHOPS if SHOPS[kind] == "psycopg"])
def test_C9_psycopg_leaves_its_commit_and_takes_the_line_for_open(
    kind: str, database: Database, monkeypatch: pytest.MonkeyPatch, error: Exception, retries: int
) -> None:
    """A reset in the instant in which psycopg looks at its socket tells nobody of a lost line."""
    left: list[object] = []

    def leave(wait: Any) -> Any:
        def waiting(self: Any, work: Any, *args: Any, **named: Any) -> Any:
            if work.__name__ == "_commit_gen" and not left:
                left.append(next(work))  # it is sent
                raise error
            return wait(self, work, *args, **named)

        return waiting

    for made in (psycopg.Connection, psycopg.AsyncConnection):
        monkeypatch.setattr(made, "wait", leave(made.wait))
    url = database.url("psycopg")
    answer = ask_once(kind, url, commit_on_success=True, retries=retries)
    assert left
    if retries:
        assert answer.status == 201
        assert rows(database) == 1
    else:
        assert answer.status == 500
        assert kind == "wsgi" or isinstance(answer.error, CommitInDoubtError)


def test_C9_what_has_only_read_is_not_asked_for(kind: str, database: Database, wire: Wire) -> None:
    """No question to the server before the COMMIT of a SELECT, and no doubt after it."""
    statements: list[str] = []

    def read(session: Session, n: int) -> int:
        @event.listens_for(session.get_bind(), "before_cursor_execute")
        def _(conn: object, cursor: object, statement: str, *rest: object) -> None:
            statements.append(statement)

        session.get(Row, n)
        return 200

    wire.cut_next(ANSWERS[0])
    assert ask(kind, database, wire, read, commit_on_success=True, retries=2).status == 200
    assert len(statements) == 1


@pytest.mark.parametrize("retries", [0, 2])
def test_C9_the_server_is_asked_for_the_id_only_with_retries(
    kind: str, database: Database, wire: Wire, retries: int
) -> None:
    """One question before a COMMIT that may have written something."""
    statements: list[str] = []

    def work(session: Session, n: int) -> int:
        @event.listens_for(session.get_bind(), "before_cursor_execute")
        def _(conn: object, cursor: object, statement: str, *rest: object) -> None:
            statements.append(statement)

        session.execute(text("INSERT INTO row (n) VALUES (1)"))
        return 201

    assert ask(kind, database, wire, work, commit_on_success=True, retries=retries).status == 201
    asked = [one for one in statements if "pg_current_xact_id_if_assigned" in one]
    assert len(asked) == (1 if retries else 0)


def test_C9_nobody_can_tell_in_time(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    """The server stays away for longer than `close_timeout`: the request is in doubt."""
    with Wire(socket_of(database)) as wire:
        wire.cut_next(ANSWERS[0])
        wire.leaves_after_cut = True
        answer = ask(
            "asgi-asyncpg", database, wire, commit_on_success=True, retries=2, close_timeout=0.3
        )
    assert answer.status == 500
    assert isinstance(answer.error, CommitInDoubtError)
    assert "in doubt" in caplog.text


@pytest.fixture(autouse=True)
def _hear(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rope_middleware")
