"""Row-level security: fifty tenants, a pool of five connections, and no row of another tenant.

The application is that of `docs/howto/tenants.md`, word by word. ``REQUESTS=20000`` in the
environment sends more of them.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from rope_middleware import AsyncSessionJenny, open_scope
from tests.servers.pgbouncer import MISSING, pgbouncer
from tests.servers.postgres import Database, postgres_server
from tests.servers.wsgi import ROOT

TENANTS = [f"tenant-{number}" for number in range(50)]
REQUESTS = int(os.environ.get("REQUESTS", "400"))
CLIENTS = 12
BLOCK = re.compile(r"^```\{code-block\} python\n:caption: (\w+)\.py\n\n(.*?)^```$", re.M | re.S)


class Place:
    """The application of the page, at one address."""

    def __init__(self, database: Database, url: URL) -> None:
        self.database = database
        self.url = url
        self.app: ModuleType = importlib.import_module("app")
        self.rows: dict[str, set[str]] = defaultdict(set)
        """What each tenant was told to be there."""

    def check(self, tenant: str, found: list[str]) -> None:
        foreign = [one for one in found if not one.startswith(f"{tenant} ")]
        assert not foreign, f"{tenant} sees {foreign}"
        assert len(found) == len(set(found))


@pytest.fixture(params=["direct", "pgbouncer"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    if request.param == "pgbouncer" and MISSING:
        pytest.skip(MISSING)
    for name, block in BLOCK.findall((ROOT / "docs" / "howto" / "tenants.md").read_text()):
        (tmp_path / f"{name}.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    with ExitStack() as stack:
        database = stack.enter_context(postgres_server().new_database())
        url = stack.enter_context(database.role())
        if request.param == "pgbouncer":
            users = {str(url.username): str(url.password)}
            bouncer = stack.enter_context(pgbouncer(3, users=users))
            url = bouncer.url(database, "psycopg").set(username=url.username, password=url.password)
        monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
        monkeypatch.setenv("OWNER_URL", database.text_url("psycopg"))
        try:
            importlib.import_module("init_db").main()
            place = Place(database, url)
            yield place
            assert place.app.engine.pool.checkedout() == 0
            place.app.engine.dispose()
        finally:
            for name in ("app", "init_db"):
                sys.modules.pop(name, None)


def test_no_request_sees_a_row_of_another_tenant(place: Place) -> None:
    """Requests of all tenants at once, some of which fail; each finds its own rows, all of them."""

    def ask(number: int) -> None:
        dice = random.Random(number)
        tenant = dice.choice(TENANTS)
        client, headers = place.app.app.test_client(), {"Tenant": tenant}
        if dice.random() < 0.4:
            note = f"{tenant} {number}"
            assert client.post(f"/notes/{note}", headers=headers, buffered=True).status_code == 201
            place.rows[tenant].add(note)
        elif dice.random() < 0.2:
            # PostgreSQL takes no such character: the transaction fails, its connection goes back.
            assert client.post("/notes/%00", headers=headers, buffered=True).status_code == 500
        else:
            place.check(tenant, client.get("/notes", headers=headers, buffered=True).json)

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(ask, range(REQUESTS)))
    for tenant in TENANTS:
        found = (
            place.app.app.test_client()
            .get("/notes", headers={"Tenant": tenant}, buffered=True)
            .json
        )
        assert set(found) == place.rows[tenant]
    told = {(tenant, note) for tenant, notes in place.rows.items() for note in notes}
    assert set(place.database.query("SELECT tenant, text FROM note")) == told


def test_no_task_sees_a_row_of_another_tenant(place: Place) -> None:
    """The same with an AsyncSession, and with tasks that are cancelled anywhere."""
    asyncio.run(_ask_all(place))
    told = {note for notes in place.rows.values() for note in notes}
    found = {note for (note,) in place.database.query("SELECT text FROM note")}
    assert told <= found


async def _ask_all(place: Place) -> None:
    engine = create_async_engine(
        place.url.set(drivername="postgresql+asyncpg"),
        pool_size=5,
        max_overflow=0,
        connect_args={"statement_cache_size": 0},
    )
    Note, make = place.app.Note, async_sessionmaker(sync_session_class=place.app.TenantSession)  # noqa: N806
    make.configure(bind=engine, expire_on_commit=False)
    jenny: AsyncSessionJenny[Any] = AsyncSessionJenny(make)

    async def ask(number: int) -> None:
        dice = random.Random(number)
        tenant = dice.choice(TENANTS)
        async with open_scope(commit_on_success=True) as scope:
            scope.info["tenant"] = tenant
            if dice.random() < 0.4:
                jenny.session.add(Note(text=f"{tenant} {number}"))
                await jenny.session.flush()
            place.check(tenant, list(await jenny.session.scalars(select(Note.text))))
            wrote = bool(jenny.session.identity_map)
        if wrote:
            place.rows[tenant].add(f"{tenant} {number}")

    async def cancelled(number: int) -> None:
        task = asyncio.create_task(ask(number))
        if number % 7 == 0:
            await asyncio.sleep(random.Random(number).random() / 50)
            task.cancel()
        await asyncio.gather(task, return_exceptions=number % 7 == 0)

    for first in range(0, REQUESTS, CLIENTS):
        await asyncio.gather(*map(cancelled, range(first, min(first + CLIENTS, REQUESTS))))
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    await engine.dispose()


def test_the_rule_is_the_databases(place: Place) -> None:
    """Not the ORM's: SQL by hand is held by it, and who is told no tenant finds nothing."""
    client = place.app.app.test_client()
    assert client.post("/notes/mine", headers={"Tenant": "one"}, buffered=True).status_code == 201
    assert client.get("/notes", buffered=True).status_code == 401  # no tenant
    with open_scope() as scope:
        scope.info["tenant"] = "two"
        assert place.app.jenny.session.execute(text("DELETE FROM note")).rowcount == 0
        with pytest.raises(DBAPIError, match="row-level security"):
            place.app.jenny.session.execute(
                text("INSERT INTO note (tenant, text) VALUES ('one', 'forged')")
            )
        place.app.jenny.session.rollback()
    with open_scope(), pytest.raises(KeyError, match="tenant"):
        place.app.jenny.session.execute(text("SELECT 1"))
    engine = create_engine(place.url, connect_args={"prepare_threshold": None})
    with engine.connect() as connection:
        try:
            assert connection.execute(text("SELECT * FROM note")).all() == []
        except DBAPIError as error:
            assert "app.tenant" in str(error)  # noqa: PT017
    engine.dispose()
