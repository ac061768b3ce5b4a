"""L1 says what is lost, and nothing of what stands without a commit: by each driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, func, make_url, select
from sqlalchemy.orm import sessionmaker

from rope_middleware import SessionJenny, open_scope
from tests.kit.either import ONE, Either
from tests.kit.engines import create_tables, rows, small_engine
from tests.kit.models import Base, Row
from tests.kit.said import Said
from tests.servers.postgres import postgres_server

pytestmark = [pytest.mark.anyio, pytest.mark.told]


@pytest.fixture(params=["sqlite", "sqlite+aiosqlite", "psycopg", "asyncpg", "psycopg_async"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Of a database with the models' tables."""
    if "sqlite" in request.param:
        create_tables(tmp_path / "x.db")
        yield make_url(f"{request.param}:///{tmp_path / 'x.db'}")
        return
    with postgres_server().new_database() as database:
        engine = create_engine(database.url("psycopg"))
        Base.metadata.create_all(engine)
        engine.dispose()
        yield database.url("psycopg").set(drivername=f"postgresql+{request.param}")


@pytest.mark.parametrize("where", ["driver", "engine"])
async def test_L1_nothing_is_said_of_what_stands_without_a_commit(
    url: URL, where: str, said: Said
) -> None:
    """AUTOCOMMIT: what was flushed is there, and what is pending is lost."""
    is_async = "async" in url.drivername or "aio" in url.drivername
    level = {"isolation_level": "AUTOCOMMIT"}
    options = ONE | (level if where == "driver" else {"execution_options": level})
    async with Either([url], is_async=is_async, engine=options) as either:
        async with either.scope():
            either.jenny.add(Row(n=1))
            await either.do("flush")
        assert said.warnings == []
        async with either.scope():
            assert await either.do("scalar", select(func.count()).select_from(Row)) == 1
            either.jenny.add(Row(n=2))
        (warning,) = said.warnings
        assert "1 Row added" in warning


@pytest.mark.parametrize(
    ("mode", "is_lost"),
    [
        ("conditional_savepoint", False),
        ("rollback_only", False),
        ("create_savepoint", True),
        ("control_fully", True),
    ],
)
def test_L1_nothing_is_said_of_rows_in_the_applications_own_transaction(
    tmp_path: Path, said: Said, mode: Any, is_lost: bool
) -> None:
    """On a lent connection they are the application's to commit, unless the session ends it."""
    engine = small_engine(tmp_path / "x.db")
    with engine.begin() as connection:
        jenny = SessionJenny(sessionmaker(connection, join_transaction_mode=mode))
        with open_scope():
            jenny.add(Row(n=1))
            jenny.flush()
    assert (rows(engine), len(said.warnings)) == ((0, 1) if is_lost else (1, 0))
    engine.dispose()
