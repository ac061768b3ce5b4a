"""Python programs in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.kit.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
"""The folder of the project."""


def run_python(
    *arguments: object, cwd: Path = ROOT, status: int | None = 0, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, where the package and the tests are found.

    Args:
        cwd: its folder.
        status: its exit status; None for any.
        env: more variables of its environment.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | env,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert status in (None, done.returncode), done.stdout + done.stderr
    return done
