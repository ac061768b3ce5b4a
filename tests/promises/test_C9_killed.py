"""C9: a server that was killed gives the id of a lost transaction away again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event

from tests.kit.shop import SHOPS, Shop
from tests.servers.replicas import Server, cluster

XID = "SELECT pg_current_xact_id()::text::int8"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with cluster(replicas=0) as found:
        yield found.primary


@pytest.mark.parametrize("kind", SHOPS)
def test_C9_an_id_that_is_anothers_now_is_not_taken_for_ours(kind: str, server: Server) -> None:
    """COMMIT goes to a server that is no more; when it is asked, others have committed that id."""
    with server.running.new_database() as database:
        database.query("CREATE TABLE row (n int PRIMARY KEY, name text NOT NULL DEFAULT '')")
        database.query("CHECKPOINT")
        xids: list[int] = []

        async def main() -> int:
            shop = Shop(kind, database.url(SHOPS[kind]), commit_on_success=True, retries=5)

            @event.listens_for(shop.engine, "commit")
            def _(connection: Any) -> None:
                if xids:
                    return
                xids.append(connection.exec_driver_sql(XID).scalar())
                server.kill()
                server.start()
                while xids[-1] <= xids[0] + 3:
                    xids.extend(xid for (xid,) in database.query(XID))

            answer = await shop.ask(1)
            assert shop.held() == 0
            await shop.close()
            return answer.status

        assert asyncio.run(main()) == 201
        assert xids[1] <= xids[0], "the server has kept what it had not to write: try again"
        assert database.query("SELECT n FROM row") == [(1,)]
