"""C8, C9: MariaDB ends and comes again while requests write."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Iterator

import pytest

from tests.kit.shop import MARIA, Answer, Shop, insert, load_over_a_restart
from tests.servers.mariadb import MariaDBServer, start

CLIENTS = 16


@pytest.fixture(scope="module")
def server() -> Iterator[MariaDBServer]:
    found = start()  # one of our own: others may use the server of the whole run
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def _collected(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """PyMySQL leaves the socket open where it cannot connect: collect it where that is no error."""
    yield
    caplog.get_records("call").clear()  # they keep errors, and these the sockets
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", MARIA)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_C8_a_restart_of_mariadb_costs_time_and_leaves_what_is_in_doubt(
    kind: str, server: MariaDBServer, how: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    """Each success has its row, once. An error is a commit in doubt: MariaDB cannot be asked."""
    with server.new_database() as database:
        # What a killed process has committed is there: see SETTINGS.
        database.query("SET GLOBAL innodb_flush_log_at_trx_commit = 2")
        database.query("CREATE TABLE written (id INTEGER AUTO_INCREMENT PRIMARY KEY, n INTEGER)")

        async def main() -> dict[int, Answer]:
            url = database.url(MARIA[kind])
            shop = Shop(kind, url, insert, commit_on_success=True, retries=5)
            return await load_over_a_restart(shop, lambda: server.restart(how), CLIENTS)

        answers = asyncio.run(main())
        found = dict(database.query("SELECT n, count(*) FROM written GROUP BY n"))
    failed = {n: answer for n, answer in answers.items() if answer.status != 201}
    lines = [record.getMessage() for record in caplog.records]
    assert all(any(f"'POST /{n}' in doubt" in line for line in lines) for n in failed), failed
    assert len(failed) <= CLIENTS
    assert set(found.values()) == {1}
    assert set(answers) - set(failed) <= set(found) <= set(answers)
