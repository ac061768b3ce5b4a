"""T3: what production would refuse the sandbox refuses, and what it cannot undo fails the test."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.pool import NullPool

from rope_middleware import AsyncSessionJenny, RopeError, ScopeClosedError, open_scope
from rope_middleware.testing import Sandbox
from tests.kit.either import now
from tests.kit.sandboxes import COUNT, Child, Parent, Place, Row
from tests.kit.sessions import beside
from tests.kit.waiting import eventually, poll

pytestmark = pytest.mark.anyio


def of(*kinds: str) -> pytest.MarkDecorator:
    """Mark a test that is about some databases alone."""
    return pytest.mark.parametrize("place", kinds, indirect=True)


defers = of("sqlite file", "sqlite memory", "postgresql")


def run_sql(place: Place, *statements: str) -> None:
    """Run statements on the real database."""
    with place.engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


class Both:
    """A sandbox and a session of either kind behind the same coroutines."""

    def __init__(self, place: Place, is_async: bool) -> None:
        self.place = place
        self.is_async = is_async
        self.jenny: Any = place.ajenny if is_async else place.jenny

    async def __call__(self, name: str, *args: Any) -> Any:
        found = getattr(self.jenny.session, name)(*args)
        return await found if self.is_async else found

    async def commit(self, *rows: Any) -> None:
        self.jenny.session.add_all(rows)
        await self("commit")


@pytest.fixture(params=["sync", "async"])
async def both(place: Place, request: pytest.FixtureRequest, anyio_backend: str) -> Both:
    if request.param == "async":
        await place.create()
    return Both(place, request.param == "async")


@defers
async def test_T3_a_deferred_constraint_is_checked_by_the_commit(both: Both) -> None:
    """The orphan fails at the commit as it would in production, and only it is gone."""
    async with Sandbox(both.jenny):
        await both.commit(Parent(n=1))
        both.jenny.session.add(Child(n=1, parent=7))
        await both("flush")
        with pytest.raises(IntegrityError):
            await both("commit")
        await both("rollback")
        assert await both("scalar", text("SELECT count(*) FROM child")) == 0
        assert await both("scalar", text("SELECT count(*) FROM parent")) == 1


@defers
async def test_T3_it_stays_deferred_until_each_commit(both: Both) -> None:
    """Child first, parent later: in the first transaction and in those after a commit."""
    async with Sandbox(both.jenny):
        for n in (1, 2, 3):
            both.jenny.session.add(Child(n=n, parent=n))
            await both("flush")
            await both.commit(Parent(n=n))
        with pytest.raises(IntegrityError):
            await both.commit(Child(n=4, parent=4))
        await both("rollback")
        both.jenny.session.add(Child(n=5, parent=5))
        await both("flush")
        await both.commit(Parent(n=5))
        assert await both("scalar", text("SELECT count(*) FROM child")) == 4


@defers
def test_T3_what_was_rolled_back_is_not_checked(place: Place) -> None:
    """An orphan that is gone fails nobody's commit."""
    jenny = place.jenny
    with Sandbox(jenny):
        jenny.session.add(Child(n=1, parent=7))
        jenny.session.flush()
        jenny.session.rollback()
        jenny.session.add(Parent(n=1))
        jenny.session.commit()
        with jenny.session.begin_nested() as savepoint:
            jenny.session.add(Child(n=2, parent=8))
            jenny.session.flush()
            savepoint.rollback()
        jenny.session.commit()


@defers
def test_T3_a_commit_on_success_that_fails_is_a_failed_commit(place: Place) -> None:
    """The application's own options meet the error where they would."""
    with Sandbox(place.jenny):
        with pytest.raises(IntegrityError), open_scope(commit_on_success=True):
            place.jenny.session.add(Child(n=1, parent=7))
        with open_scope(commit_on_success=True):
            place.jenny.session.add(Parent(n=1))
        with open_scope():
            assert place.jenny.session.scalar(text("SELECT count(*) FROM child")) == 0


@of("sqlite file", "sqlite memory")
def test_T3_defer_foreign_keys_lasts_for_one_transaction(place: Place) -> None:
    """The pragma makes every foreign key deferred, until the next commit or rollback."""
    run_sql(
        place,
        "CREATE TABLE IF NOT EXISTS strict (n INTEGER PRIMARY KEY, p INTEGER REFERENCES parent(n))",
    )
    jenny = place.jenny
    with Sandbox(jenny):
        jenny.session.execute(text("PRAGMA defer_foreign_keys=ON"))
        jenny.session.execute(text("INSERT INTO strict VALUES (1, 1)"))
        with pytest.raises(IntegrityError):
            jenny.session.commit()
        jenny.session.rollback()
        with pytest.raises(IntegrityError):  # at once
            jenny.session.execute(text("INSERT INTO strict VALUES (1, 1)"))
        jenny.session.rollback()
        jenny.session.execute(text("PRAGMA defer_foreign_keys=ON"))
        jenny.session.execute(text("INSERT INTO strict VALUES (1, 1)"))
        jenny.session.execute(text("INSERT INTO parent VALUES (1)"))
        jenny.session.commit()


@of("sqlite file", "sqlite memory")
def test_T3_what_was_wrong_before_is_not_blamed_on_the_test(place: Place) -> None:
    """A row that violated its foreign key before the sandbox fails no commit in it."""
    run_sql(place, "PRAGMA foreign_keys=OFF")
    with place.engine.connect() as connection:
        raw: Any = connection.connection.dbapi_connection
        raw.commit()
        raw.execute("PRAGMA foreign_keys=OFF")
        raw.execute("INSERT INTO child VALUES (900, 900)")
        raw.commit()
        raw.execute("PRAGMA foreign_keys=ON")
    try:
        with Sandbox(place.jenny):
            place.jenny.session.add(Parent(n=1))
            place.jenny.session.commit()
            place.jenny.session.add(Child(n=901, parent=901))
            with pytest.raises(IntegrityError):
                place.jenny.session.commit()
    finally:
        run_sql(place, "DELETE FROM child WHERE n = 900")


@of("postgresql")
def test_T3_no_constraints_mode_is_changed(place: Place) -> None:
    """SET CONSTRAINTS lasts for its transaction; what is initially immediate stays so."""
    run_sql(
        place,
        "CREATE TABLE IF NOT EXISTS now (n int PRIMARY KEY,"
        " p int CONSTRAINT now_p REFERENCES parent DEFERRABLE INITIALLY IMMEDIATE)",
    )
    jenny = place.jenny
    with Sandbox(jenny):
        for _ in range(2):
            with pytest.raises(IntegrityError):
                jenny.session.execute(text("INSERT INTO now VALUES (1, 1)"))
            jenny.session.rollback()
            jenny.session.execute(text("SET CONSTRAINTS now_p DEFERRED"))
            jenny.session.execute(text("INSERT INTO now VALUES (1, 1)"))
            with pytest.raises(IntegrityError):
                jenny.session.commit()
            jenny.session.rollback()
            jenny.session.execute(text("SET CONSTRAINTS now_p DEFERRED"))
            jenny.session.add(Parent(n=5))
            jenny.session.commit()
            jenny.session.execute(text("DELETE FROM parent"))
            jenny.session.commit()


@of("postgresql")
def test_T3_two_constraints_of_one_name_keep_their_modes(place: Place) -> None:
    """They cannot be told apart in SET CONSTRAINTS; neither mode changes all the same."""
    run_sql(
        place,
        "CREATE TABLE IF NOT EXISTS late (n int PRIMARY KEY, p int CONSTRAINT twin"
        " REFERENCES parent DEFERRABLE INITIALLY DEFERRED)",
        "CREATE TABLE IF NOT EXISTS early (n int PRIMARY KEY, p int CONSTRAINT twin"
        " REFERENCES parent DEFERRABLE INITIALLY IMMEDIATE)",
    )
    jenny = place.jenny
    try:
        with Sandbox(jenny):
            for n in (1, 2):
                jenny.session.execute(text(f"INSERT INTO late VALUES ({n}, {n})"))
                with pytest.raises(IntegrityError):
                    jenny.session.commit()
                jenny.session.rollback()
                jenny.session.execute(text(f"INSERT INTO late VALUES ({n}, {n})"))
                jenny.session.add(Parent(n=n))
                jenny.session.commit()
                with pytest.raises(IntegrityError):
                    jenny.session.execute(text(f"INSERT INTO early VALUES ({n}, 99)"))
                jenny.session.rollback()
    finally:
        run_sql(place, "DROP TABLE late", "DROP TABLE early")


@of("postgresql")
def test_T3_a_deferred_trigger_has_run_after_the_commit(place: Place) -> None:
    """What it writes is there, as it would be."""
    run_sql(
        place,
        "CREATE OR REPLACE FUNCTION copy_parent() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO row VALUES (NEW.n, 'by trigger'); RETURN NULL; END $$",
        "CREATE CONSTRAINT TRIGGER copying AFTER INSERT ON parent"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION copy_parent()",
    )
    jenny = place.jenny
    try:
        with Sandbox(jenny):
            jenny.session.add(Parent(n=1))
            jenny.session.flush()
            assert jenny.session.scalar(COUNT) == 0
            jenny.session.commit()
            assert jenny.session.scalar(COUNT) == 1
            jenny.session.add(Parent(n=2))
            jenny.session.commit()
            assert jenny.session.scalar(COUNT) == 2
    finally:
        run_sql(place, "DROP TRIGGER copying ON parent")


@of("postgresql")
def test_T3_set_local_ends_with_its_transaction(place: Place) -> None:
    """The tenant of one request is not the next one's; an interruption does not lose it."""
    jenny = place.jenny
    tenant = text("SELECT current_setting('app.tenant', true)")

    def stray() -> None:
        assert not jenny.session.scalar(tenant)
        jenny.session.add(Row(n=1))
        jenny.session.commit()

    with Sandbox(jenny):
        jenny.session.execute(text("SELECT set_config('app.tenant', :name, true)"), {"name": "a"})
        jenny.session.execute(text("SET LOCAL statement_timeout = 4321"))
        with open_scope():
            stray()
        assert jenny.session.scalar(tenant) == "a"
        assert jenny.session.scalar(text("SHOW statement_timeout")) == "4321ms"
        jenny.session.add(Row(n=2))
        jenny.session.commit()
        assert not jenny.session.scalar(tenant)
        assert jenny.session.scalar(text("SHOW statement_timeout")) == "0"


@of("postgresql")
@pytest.mark.parametrize(
    ("setting", "shown", "value"),
    [
        ("TIME ZONE 'Asia/Tokyo'", "TimeZone", "Asia/Tokyo"),
        ("SCHEMA 'pg_catalog'", "search_path", "pg_catalog"),
        ("app.tenant = 'a'", "app.tenant", "a"),
    ],
)
def test_T3_set_local_ends_with_its_transaction_however_it_is_written(
    place: Place, setting: str, shown: str, value: str
) -> None:
    """By the words of the SQL standard, and behind a comment that says who asks."""
    show = text("SELECT current_setting(:name, true)").bindparams(name=shown)
    with Sandbox(place.jenny), open_scope():
        session = place.jenny.session
        before = session.scalar(show)
        session.execute(text(f"-- of the middleware\n/* too */ SET LOCAL {setting}"))
        assert session.scalar(show) == value
        session.commit()
        assert (session.scalar(show) or None) == (before or None)


@of("postgresql")
def test_T3_a_select_that_writes_takes_the_turn(place: Place) -> None:
    """A function of the application's may write; what it wrote is rolled back with it."""
    run_sql(
        place,
        "CREATE OR REPLACE FUNCTION add_row(n int) RETURNS int LANGUAGE sql AS"
        " $$ INSERT INTO row VALUES (n, '') RETURNING n $$",
    )
    jenny = place.jenny
    with Sandbox(jenny, wait=0.1):
        jenny.session.execute(text("SELECT add_row(1)"))
        with open_scope(), pytest.raises(RopeError, match=r"SELECT that writes"):
            jenny.session.scalar(COUNT)
        jenny.session.rollback()
        assert jenny.session.scalar(COUNT) == 0


async def test_T3_a_commit_that_is_sent_as_text_lasts_no_longer(both: Both) -> None:
    """COMMIT and ROLLBACK as statements are the session's own."""
    async with Sandbox(both.jenny):
        both.jenny.session.add(Row(n=1))
        await both("flush")
        await both("execute", text("COMMIT"))
        await both("execute", text("BEGIN"))
        await both("execute", text("INSERT INTO row (n, name) VALUES (2, '')"))
        await both("execute", text("ROLLBACK"))
        await both("rollback")
        assert await both("scalar", COUNT) == 1
    assert (await both.place.arows() if both.is_async else both.place.rows()) == 0


@pytest.mark.parametrize(
    "script",
    [
        "INSERT INTO row (n, name) VALUES (1, 'a; b'); COMMIT; BEGIN",
        "SELECT 1; /* now */ commit",
        "SELECT 1; PREPARE TRANSACTION 'x'",
        "BEGIN; INSERT INTO row (n, name) VALUES (1, '')",
    ],
)
def test_T3_a_script_that_would_commit_is_not_sent(place: Place, script: str) -> None:
    """Nothing comes of it, and the test goes on."""
    with Sandbox(place.jenny, name="mine"):
        with pytest.raises(RopeError, match=r"'mine'.+not sent"):
            place.jenny.session.execute(text(script))
        place.jenny.session.rollback()
        assert place.jenny.session.scalar(COUNT) == 0
    assert place.rows() == 0


@pytest.mark.parametrize(
    ("place", "script"),
    [
        ("postgresql", r"SELECT E'it\'s; COMMIT'"),
        ("postgresql", 'SELECT 1 AS "; COMMIT"'),
        ("mariadb", r"SELECT 'it\'s; COMMIT'"),
        ("sqlite file", "SELECT 1 AS [; COMMIT]"),
    ],
    indirect=["place"],
)
def test_T3_a_commit_in_a_literal_is_none(place: Place, script: str) -> None:
    """It is sent as it stands, and reads."""
    with Sandbox(place.jenny):
        place.jenny.session.connection().exec_driver_sql(script).all()


@of("sqlite file", "sqlite memory")
def test_T3_the_end_of_a_trigger_ends_no_transaction(place: Place) -> None:
    """DDL that has statements of its own can be sent."""
    with Sandbox(place.jenny):
        place.jenny.session.execute(
            text(
                "CREATE TRIGGER twice AFTER INSERT ON row WHEN new.n = 1 BEGIN"
                " INSERT INTO row (n, name) VALUES (2, ''); END"
            )
        )
        place.jenny.session.add(Row(n=1))
        place.jenny.session.commit()
        assert place.jenny.session.scalar(COUNT) == 2
    assert place.rows() == 0


@of("mariadb")
@pytest.mark.parametrize(
    "statement",
    [
        "TRUNCATE TABLE row",
        "/*!40101 CREATE TABLE t (n int) */",
        "# by whom\nCREATE TABLE t (n int)",
        "CREATE TABLE t (n int)",
        "/* by whom */ -- why\n CREATE TABLE t (n int)",
    ],
)
def test_T3_ddl_on_mariadb_is_not_sent(place: Place, statement: str) -> None:
    """It would commit by itself; a temporary table does not."""
    with Sandbox(place.jenny):
        place.jenny.session.add(Row(n=1))
        place.jenny.session.commit()
        with pytest.raises(RopeError, match=r"MariaDB commits by itself"):
            place.jenny.session.execute(text(statement))
        place.jenny.session.rollback()
        place.jenny.session.execute(text("CREATE TEMPORARY TABLE t (n int)"))
        place.jenny.session.execute(text("DROP TEMPORARY TABLE t"))
        assert place.jenny.session.scalar(COUNT) == 1
    assert place.rows() == 0


@defers
def test_T3_ddl_is_rolled_back(place: Place) -> None:
    """Where the database can."""
    jenny = place.jenny
    with Sandbox(jenny):
        jenny.session.execute(text("CREATE TABLE t (n int)"))
        jenny.session.commit()
        jenny.session.execute(text("INSERT INTO t VALUES (1)"))
        jenny.session.commit()
        assert jenny.session.scalar(text("SELECT n FROM t")) == 1
    with Sandbox(jenny), pytest.raises(DBAPIError):
        jenny.session.execute(text("SELECT n FROM t"))


def behind(place: Place) -> Any:
    """Return a function that commits behind the back of the sandbox of the block."""

    def commit() -> None:
        connection = place.jenny.session.connection().connection
        driver: Any = connection.dbapi_connection
        name = place.engine.dialect.name
        if name == "postgresql":
            driver.pgconn.exec_(b"COMMIT")
        elif name == "sqlite":
            place.jenny.session.execute(text("INSERT INTO row (n, name) VALUES (77, '')"))
            place.jenny.session.execute(
                text("INSERT OR ROLLBACK INTO row (n, name) VALUES (77, '')")
            )
        else:
            driver.query("COMMIT")

    return commit


def test_T3_a_commit_behind_its_back_fails_the_test_itself(place: Place) -> None:
    """The RopeError at the end has the sandbox's name."""
    with pytest.raises(RopeError, match=r"'false'.+behind its back"):
        with Sandbox(place.jenny, name="false"):
            try:
                behind(place)()
                place.jenny.session.scalar(COUNT)
            except Exception:  # the application may swallow what it meets
                pass
    with Sandbox(place.jenny):  # the next one has nothing of it
        assert place.jenny.session.scalar(COUNT) == 0


def test_T3_after_a_commit_behind_its_back_nothing_more_is_written(place: Place) -> None:
    """Else every later statement would be a transaction of its own on the real database."""
    jenny = place.jenny
    with pytest.raises(RopeError, match=r"'false'.+behind its back"):
        with Sandbox(jenny, name="false"):
            with pytest.raises(Exception):  # noqa: B017 - the driver's own, or ours
                behind(place)()
                jenny.session.scalar(COUNT)
            jenny.session.rollback()
            for n in (8, 9):
                jenny.session.add(Row(n=n))
                with pytest.raises(RopeError, match=r"'false'.+behind its back"):
                    jenny.session.commit()
                jenny.session.rollback()
    assert place.rows() == 0


def test_T3_over_an_error_of_the_block_it_is_a_note(place: Place) -> None:
    """The block's own error goes on."""
    with pytest.raises(ZeroDivisionError) as raised:
        with Sandbox(place.jenny, name="false"):
            try:
                behind(place)()
                place.jenny.session.scalar(COUNT)
            except Exception:
                pass
            raise ZeroDivisionError
    (note,) = raised.value.__notes__
    assert "'false'" in note


@of("postgresql", "mariadb")
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_T3_a_row_of_another_sandbox_is_told(
    place: Place, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """One WARNING with both names, while the wait goes on; it ends with the other's end.

    The statement of an AsyncSession waits on the sandboxes' loop.
    """
    both, done = Both(place, is_async), threading.Event()

    def write() -> None:
        work = both.commit(Row(n=5))
        asyncio.run(work) if is_async else now(work)

    def wait() -> None:
        with Sandbox(both.jenny, name="waiting"):
            write()
        done.set()

    with ExitStack() as stack:
        with Sandbox(both.jenny, name="holding"):
            write()
            stack.enter_context(beside(wait))
            eventually(lambda: caplog.records, "the warning")
            assert not done.is_set()
    assert done.is_set()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "'waiting'" in record.getMessage()
    assert "'holding'" in record.getMessage()
    assert is_async or "test_T3_no_false_green.py:" in record.getMessage()


@of("postgresql", "mariadb")
def test_T3_an_error_that_ends_the_wait_names_both(place: Place) -> None:
    """A lock time-out, or a deadlock, of two sandboxes."""
    jenny = place.jenny
    timeout = {"postgresql": "SET LOCAL lock_timeout = '200ms'"}.get(
        place.engine.dialect.name, "SET innodb_lock_wait_timeout = 1"
    )
    with Sandbox(jenny, name="holding"):
        jenny.session.add(Row(n=5))
        jenny.session.commit()
        with Sandbox(jenny, name="waiting"):
            jenny.session.execute(text(timeout))
            with pytest.raises(OperationalError) as raised:
                jenny.session.execute(text("INSERT INTO row (n, name) VALUES (5, '')"))
            notes = " ".join(raised.value.__notes__)
            assert "'holding'" in notes
            assert "'waiting'" in notes
            jenny.session.rollback()


@of("mariadb")
def test_T3_the_victim_of_a_deadlock_is_told_what_it_is(place: Place) -> None:
    """MariaDB rolls back all of its transaction, which is the sandbox's: the test cannot go on."""
    jenny = place.jenny
    jenny.session.add_all([Row(n=1), Row(n=2)])
    jenny.session.commit()
    both_have_written = threading.Barrier(2)
    ends: dict[bool, BaseException] = {}

    def work(first: int, second: int) -> None:
        is_victim = False
        try:
            with Sandbox(jenny, name=f"of {first}"):
                jenny.session.add(Row(n=10 + first))
                jenny.session.commit()
                jenny.session.execute(text(f"UPDATE row SET name = 'x' WHERE n = {first}"))
                both_have_written.wait(10)
                try:
                    jenny.session.execute(text(f"UPDATE row SET name = 'x' WHERE n = {second}"))
                except OperationalError as error:
                    told = error.__notes__
                    assert len(told) == len(set(told))
                    assert any("victim" in note for note in told)
                    is_victim = True
                    jenny.session.rollback()
                    jenny.session.scalar(COUNT)
        except RopeError as error:
            ends[is_victim] = error

    threads = [threading.Thread(target=work, args=pair) for pair in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert list(ends) == [True]
    assert "deadlock" in str(ends[True])
    assert "rolled back" in str(ends[True])
    assert place.rows() == 2


@of("postgresql")
async def test_T3_two_engines_of_one_sandbox_do_not_wait_for_ever(place: Place) -> None:
    """Both are transactions of their own until the end: an error in words, after `wait`."""
    async with Sandbox(place.jenny, place.ajenny, name="both", wait=0.5):
        place.jenny.session.add(Row(n=5))
        place.jenny.session.commit()
        place.ajenny.session.add(Row(n=5))
        with pytest.raises(RopeError, match=r"'both'.+another engine"):
            await place.ajenny.session.commit()
        await place.ajenny.session.rollback()
        assert await place.ajenny.session.scalar(COUNT) == 0


@of("postgresql")
async def test_T3_the_end_waits_for_a_statement_under_way(place: Place) -> None:
    """Not for what comes after it."""
    seen: list[object] = []

    async def work() -> None:
        async with open_scope():
            seen.append(await place.ajenny.session.scalar(text("SELECT 1 FROM pg_sleep(1)")))
            try:
                await place.ajenny.session.scalar(COUNT)
            except ScopeClosedError as error:
                seen.append(error)

    def sleeping() -> list[Any]:
        with place.engine.connect() as connection:
            return list(
                connection.exec_driver_sql(
                    "SELECT 1 FROM pg_stat_activity WHERE state = 'active'"
                    " AND starts_with(query, 'SELECT 1 FROM pg_sleep')"
                )
            )

    async with Sandbox(place.ajenny, name="short"):
        task = asyncio.create_task(work())
        await poll(lambda: bool(sleeping()))
        assert not seen
    await task
    assert seen[0] == 1
    assert "'short'" in str(seen[1])


@of("sqlite file", "sqlite memory")
def test_T0_an_sqlite_file_that_another_sandbox_holds_is_an_error_in_words(place: Place) -> None:
    """Both are named, and the cure."""
    with Sandbox(place.jenny, name="one"):
        place.jenny.session.scalar(COUNT)
        with Sandbox(place.jenny, name="two"):
            with pytest.raises(RopeError, match=r"'two'.+'one'.+PostgreSQL"):
                place.jenny.session.scalar(COUNT)


@of("postgresql")
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg", "psycopg async"])
async def test_T3_an_aborted_transaction_is_no_success(place: Place, driver: str) -> None:
    """C3 in a sandbox: the application has swallowed an error, and others have worked meanwhile."""
    async_engine = create_async_engine(place.engine.url, poolclass=NullPool)
    jenny: Any = {
        "psycopg": place.jenny,
        "asyncpg": place.ajenny,
        "psycopg async": AsyncSessionJenny(async_sessionmaker(async_engine)),
    }[driver]
    is_async = driver != "psycopg"

    async def do(name: str, *args: Any) -> Any:
        found = getattr(jenny.session, name)(*args)
        return await found if is_async else found

    async with Sandbox(jenny):
        for others_work in (False, True):
            with pytest.raises(RopeError, match=r"abort"):
                async with open_scope(commit_on_success=True):
                    jenny.session.add(Row(n=1))
                    await do("flush")
                    with pytest.raises(DBAPIError):
                        await do("execute", text("SELECT 1/0"))
                    if others_work:
                        async with open_scope():
                            assert await do("scalar", COUNT) == 0
            async with open_scope():
                assert await do("scalar", COUNT) == 0
    await async_engine.dispose()
