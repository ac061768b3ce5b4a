"""The tests on every supported Python and SQLAlchemy: `make test-all`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import nox

ROOT = Path(__file__).parents[1]

PYTHONS = ("3.11", "3.12", "3.13", "3.14", "3.15")
SQLALCHEMYS = ("2.0", "2.1")

nox.needs_version = ">=2025.2"
nox.options.sessions = ["tests"]
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = False  # the summary names it as skipped
nox.options.envdir = ROOT / ".venv-nox" / "sessions"


def runs(program: Path, version: str) -> bool:
    """Tell whether `program` is a Python of that version, and no shim that starts nothing."""
    probe = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run(  # noqa: S603
            [program, "-c", probe], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() == version


def find(version: str) -> Path | None:
    """Return a Python of that version: on PATH, or the newest that pyenv has installed."""
    name = f"python{version}"
    folders = [Path(folder) for folder in os.get_exec_path()]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    installed = (pyenv / "versions").glob(f"{version}.*")
    folders += sorted(
        (folder / "bin" for folder in installed),
        key=lambda folder: [int(part) for part in folder.parent.name.split(".") if part.isdigit()],
        reverse=True,
    )
    for folder in folders:
        program = shutil.which(name, path=str(folder))
        if program is not None and runs(Path(program), version):
            return Path(program)
    return None


# nox takes the first of that name on PATH, which may be a shim.
os.environ["PATH"] = os.pathsep.join(
    [*(str(found.parent) for found in map(find, PYTHONS) if found), os.environ.get("PATH", "")]
)


@nox.session(python=list(PYTHONS))
@nox.parametrize("sqlalchemy", SQLALCHEMYS)
def tests(session: nox.Session, sqlalchemy: str) -> None:
    """Run pytest with the arguments after ``--``."""
    session.chdir(ROOT)
    # Pinned as for `make test`, but for SQLAlchemy itself.
    pins = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    constraints = Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("\n".join(p for p in pins if not p.startswith("sqlalchemy==")))
    install = ("--disable-pip-version-check", "--constraint", str(constraints))
    session.install(*install, "pip")  # an older one does not know groups
    session.install(
        *(*install, "--build-constraint", str(constraints)),
        *("--editable", ".", "--group", "test", f"SQLAlchemy=={sqlalchemy}.*"),
    )
    session.run("python", "-m", "pytest", "--timeout=300", *session.posargs)
