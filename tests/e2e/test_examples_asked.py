"""Each file of examples/ answers more than once, and a server that runs it logs nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import httpx
import pytest

from tests.kit.programs import ROOT
from tests.kit.waiting import PATIENCE
from tests.servers.asgi import HOST, free_port, run_command

EXAMPLES = ROOT / "examples"
TOKEN = {"Authorization": "Bearer let-me-see"}

# Each with the command that its own text names, and what it answers to three visits.
STARTED_BY_ITS_NAME = ("responder_app", "flask_app", "fastapi_async_app")
ASKED = {
    **dict.fromkeys(STARTED_BY_ITS_NAME, ("/", ["1", "2", "3"])),
    "holders_app": ("/", ["1", "1", "1"]),
}


def command(name: str, port: int) -> list[str]:
    if name in STARTED_BY_ITS_NAME:
        return [sys.executable, str(EXAMPLES), name]
    quiet = ["--host", HOST, "--port", str(port), "--log-level", "warning"]
    return [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), *quiet, f"{name}:app"]


def test_every_example_is_asked() -> None:
    """A new file finds its place here."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} - {"__main__"} == set(ASKED)


@pytest.mark.parametrize("name", ASKED)
def test_an_example_answers_three_times_and_logs_nothing(name: str, tmp_path: Path) -> None:
    """Its server prints where it listens, and no warning; started again it counts on."""
    address, expected = ASKED[name]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    by_name = name in STARTED_BY_ITS_NAME
    for more in (expected, ["4"]) if by_name else (expected,):
        port = free_port()
        with run_command(
            command(name, port), cwd=tmp_path, PORT=str(port), PYTHONPATH=path
        ) as served:
            served.wait_for_port(port)
            url = f"http://{HOST}:{port}{address}"
            answers = [httpx.get(url, headers=TOKEN, timeout=PATIENCE) for _ in more]
            assert [answer.text.split()[-1] for answer in answers] == more
            assert {answer.status_code for answer in answers} == {200}
            if by_name:
                served.wait_for_output(f"Open http://{HOST}:{port}/ ")
            ended = served.interrupt()
        assert not by_name or ended == 0
        assert [
            line for line in served.output.splitlines() if not line.startswith("Open http")
        ] == []
    assert not by_name or [file.name for file in tmp_path.iterdir()] == ["counter.sqlite"]
