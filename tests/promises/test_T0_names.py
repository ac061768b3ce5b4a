"""T0: the names of rope_middleware.testing, their errors, the pytest plugin, and what they cost."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

from rope_middleware import RopeError, SessionJenny, open_scope
from rope_middleware.testing import Sandbox
from tests.kit.programs import run_python
from tests.kit.sandboxes import COUNT, Base, Row
from tests.servers.postgres import postgres_server


@pytest.fixture
def jenny(tmp_path: Path) -> Iterator[Any]:
    engine = create_engine(f"sqlite:///{tmp_path}/s.db")
    Base.metadata.create_all(engine)
    yield SessionJenny(sessionmaker(engine))
    engine.dispose()


def test_T0_a_sandbox_has_a_name_and_a_token(jenny: Any) -> None:
    """The name is the running test's by default; the token is new each time, and url-safe."""
    one, two = Sandbox(jenny), Sandbox(jenny, name="two")
    assert one.name.endswith("test_T0_names.py::test_T0_a_sandbox_has_a_name_and_a_token")
    assert two.name == "two"
    assert one.token != two.token
    assert re.fullmatch(r"[\w-]{22,}", one.token)  # 128 bits at 6 for each
    assert one.headers == one.cookies == {"Rope-Sandbox": one.token}
    assert one.token not in repr(one)


def test_T0_without_a_running_test_it_is_called_sandbox(
    jenny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a shell, or under another runner."""
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    assert Sandbox(jenny).name == "sandbox"


def test_T0_it_is_entered_once(jenny: Any) -> None:
    """Inside of its block, and after it."""
    sandbox = Sandbox(jenny)
    with sandbox as entered:
        assert entered is sandbox
        with pytest.raises(RuntimeError, match=r"entered already"):
            sandbox.__enter__()
    with pytest.raises(RuntimeError, match=r"entered already"):
        sandbox.__enter__()


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ([], {}, TypeError),
        ([None], {}, TypeError),
        ([[]], {}, TypeError),
        ([SessionJenny], {}, TypeError),
        (["engine"], {}, TypeError),
        (None, {"name": 1}, TypeError),
        (None, {"wait": "5"}, TypeError),
        (None, {"wait": True}, TypeError),
        (None, {"wait": -1}, ValueError),
        (None, {"wait": float("nan")}, ValueError),
        (None, {"wayt": 1}, TypeError),
    ],
)
def test_T0_wrong_arguments_are_errors_in_words(
    jenny: Any, arguments: Any, options: dict[str, Any], error: type[Exception]
) -> None:
    """Each says what is wrong, when the sandbox is made."""
    with pytest.raises(error, match=r"\w+ \w+"):
        Sandbox(*([jenny] if arguments is None else arguments), **options)


def test_T0_a_session_bound_to_a_connection_is_an_error_in_words(jenny: Any) -> None:
    """Nobody would roll it back."""
    engine = jenny.session.get_bind()
    with engine.connect() as connection:
        lent = SessionJenny(sessionmaker(connection))
        with Sandbox(lent), pytest.raises(RopeError, match=r"Bind the session factory to the engi"):
            lent.session.scalar(COUNT)


def test_T0_another_database_is_an_error_in_words(jenny: Any) -> None:
    """One that cannot roll everything back to a savepoint, or that nobody has tried."""
    engine = jenny.session.get_bind()
    engine.dialect.name = "oracle"
    try:
        with Sandbox(jenny), pytest.raises(RopeError, match=r"SQLite, PostgreSQL and MariaDB"):
            jenny.session.scalar(COUNT)
    finally:
        engine.dialect.name = "sqlite"


def test_T0_an_error_of_the_block_goes_on(jenny: Any) -> None:
    """And everything is rolled back."""
    with pytest.raises(ZeroDivisionError), Sandbox(jenny):
        jenny.session.add(Row(n=1))
        jenny.session.commit()
        raise ZeroDivisionError
    with open_scope():
        assert jenny.session.scalar(COUNT) == 0


def test_T0_nothing_of_it_is_imported_in_production() -> None:
    """What a request runs through is the same object, with and without the module on the disk."""
    code = """
import sys
from rope_middleware import *
import rope_middleware.flask, rope_middleware.asgi, rope_middleware.wsgi
assert not [name for name in sys.modules if name.startswith("rope_middleware.testing")]
assert "rope_middleware.pytest_plugin" not in sys.modules
"""
    run_python("-c", code)


def test_T0_a_process_with_async_sandboxes_ends_without_a_word() -> None:
    """Their connections are closed before the event loop is, whenever the engine was disposed."""
    code = """
import asyncio, sys
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from rope_middleware import AsyncSessionJenny
from rope_middleware.testing import Sandbox

async def main():
    engines = [create_async_engine(sys.argv[1]) for _ in range(9)]
    for engine in engines:
        jenny = AsyncSessionJenny(async_sessionmaker(engine))
        async with Sandbox(jenny):
            await jenny.execute(text("SELECT 1"))
    for engine in engines:
        await engine.dispose()

asyncio.run(main())
"""
    with postgres_server().new_database() as database:
        done = run_python("-c", code, database.text_url("asyncpg"))
    assert done.stderr == ""


CONFTEST = """
import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from rope_middleware import AsyncSessionJenny, SessionJenny
from tests.kit.sandboxes import Base

path = {path!r}
engine = create_engine(f"sqlite:///{{path}}/sync.db")
async_engine = create_async_engine(f"sqlite+aiosqlite:///{{path}}/async.db")
jenny = SessionJenny(sessionmaker(engine))
ajenny = AsyncSessionJenny(async_sessionmaker(async_engine))


@pytest.fixture(scope="session")
def rope_jennies():
    other = create_engine(f"sqlite:///{{path}}/async.db")
    for one in engine, other:
        Base.metadata.create_all(one)
        one.dispose()
    yield [jenny, ajenny]
    engine.dispose()


@pytest.fixture(params=["asyncio"])
def anyio_backend(request):
    return request.param
"""

TESTS = """
import pytest
from tests.kit.sandboxes import COUNT, Row
from conftest import ajenny, jenny


def write_once():
    jenny.session.add(Row(n=1))  # a second time it would be there already
    jenny.session.commit()


async def awrite_once():
    ajenny.session.add(Row(n=1))
    await ajenny.session.commit()
    assert await ajenny.session.scalar(COUNT) == 1


@pytest.fixture
async def arow(rope_sandbox):
    await awrite_once()


@pytest.mark.parametrize("again", [1, 2])
def test_sync(rope_sandbox, again):
    assert rope_sandbox.name.endswith(f"test_sync[{again}]")
    write_once()


@pytest.mark.parametrize("again", [1, 2])
@pytest.mark.MARK
async def test_async(rope_sandbox, again):
    write_once()
    await awrite_once()
"""


def run_pytest(folder: Path, *options: str, status: int = 0) -> str:
    plugin = ("-p", "rope_middleware.pytest_plugin")
    done = run_python("-m", "pytest", *plugin, "-q", *options, cwd=folder, status=status)
    return done.stdout


def run_tests(folder: Path, kind: str, *options: str) -> str:
    (folder / "conftest.py").write_text(CONFTEST.format(path=str(folder)))
    (folder / "test_it.py").write_text(TESTS.replace("MARK", kind))
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    return run_pytest(folder, "--rootdir", ".", *options)


@pytest.mark.slow
def test_T0_the_plugin_works_in_sync_tests_and_under_anyio(tmp_path: Path) -> None:
    """Each test begins with what the last one found."""
    assert "4 passed" in run_tests(tmp_path, "anyio", "-p", "no:asyncio")


@pytest.mark.slow
def test_T0_the_plugin_works_under_pytest_asyncio(tmp_path: Path) -> None:
    """Its loops are made and closed around each test."""
    if importlib.util.find_spec("pytest_asyncio") is None:
        pytest.skip("pytest-asyncio is not installed")
    options = ("-o", "asyncio_default_fixture_loop_scope=function", "-p", "no:anyio")
    assert "4 passed" in run_tests(tmp_path, "asyncio", *options)


@pytest.mark.slow
def test_T0_without_rope_jennies_the_plugin_says_what_to_define(tmp_path: Path) -> None:
    """The error of the first test that asks for a sandbox."""
    (tmp_path / "test_it.py").write_text("def test(rope_sandbox): pass")
    told = run_pytest(tmp_path, status=1)
    assert "conftest.py a fixture of scope" in told
    assert "rope_jennies" in told


def test_T0_the_plugin_only_defines_fixtures() -> None:
    """It changes nothing for those who do not ask for them."""
    from rope_middleware import pytest_plugin

    assert pytest_plugin.__all__ == ["rope_jennies", "rope_sandbox"]
    assert not [name for name in vars(pytest_plugin) if name.startswith("pytest_")]
