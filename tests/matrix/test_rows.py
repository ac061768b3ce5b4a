"""The table leaves nothing out, and lists nothing that cannot be."""

from __future__ import annotations

from tests.kit.frameworks import FRAMEWORKS
from tests.matrix.databases import DRIVERS
from tests.matrix.rows import ASGI_ASYNC, ASGI_SYNC, ROWS, WSGI
from tests.matrix.servers import SERVERS


def test_every_framework_server_and_driver_is_in_the_table() -> None:
    """One that is added without a row is found here."""
    assert {row.framework for row in ROWS} == set(FRAMEWORKS)
    assert {row.server for row in ROWS} == set(SERVERS)
    assert {row.driver for row in ROWS} == set(DRIVERS)
    assert len(set(ROWS)) == len(ROWS)


def test_every_asgi_framework_has_both_kinds_of_session() -> None:
    """And every one of WSGI the sync one, which is all that it can have."""
    of_asgi = {name for name, found in FRAMEWORKS.items() if found.protocol == "asgi"}
    assert {row.framework for row in ASGI_SYNC} == of_asgi
    assert {row.framework for row in ASGI_ASYNC} == of_asgi
    assert not any(row.is_async for row in ASGI_SYNC + WSGI)
    assert all(row.is_async for row in ASGI_ASYNC)


def test_every_database_is_used_by_both_protocols() -> None:
    """The sync driver of each one under ASGI and under WSGI."""
    sync = {row.driver for row in ROWS if not row.is_async}
    assert {row.driver for row in ASGI_SYNC} == {row.driver for row in WSGI} == sync


def test_no_row_mixes_the_protocols() -> None:
    """A framework stands on a server of its own protocol, and asyncio's drivers not on trio."""
    for row in ROWS:
        protocol = "wsgi" if row in WSGI else "asgi"
        assert FRAMEWORKS[row.framework].protocol == SERVERS[row.server].protocol == protocol
        assert not (row.server == "hypercorn-trio" and row.is_async)
