"""What a newcomer types: `make` finds a Python, installs what is pinned, and says what is wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.11", "3.12", "3.13", "3.14", "3.15")
OPTIONS = [*re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE), "PYTHON"]
PINNED = ROOT / ".ci" / "constraints.txt"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here"),
]


def make(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `make` as a person does, whoever has started these tests."""
    # What the `make` that runs the tests was given: an override comes down by the environment.
    own = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", *OPTIONS}}
    return subprocess.run(
        ["make", "--no-print-directory", *args],
        cwd=ROOT,
        env=own | env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


# -- what is installed -------------------------------------------------------------------------


def group(name: str) -> list[Requirement]:
    """Return what a group asks for, with the groups that it includes."""
    found: list[Requirement] = []
    for entry in PROJECT["dependency-groups"][name]:
        if isinstance(entry, dict):
            found += group(entry["include-group"])
        else:
            found.append(Requirement(entry))
    return found


def pins(python: str) -> dict[str, str]:
    """Return the version of each package for that Python on Linux."""
    versions: dict[str, str] = {}
    marks = {"python_version": python, "python_full_version": f"{python}.9"}
    marks |= {"sys_platform": "linux", "os_name": "posix", "platform_machine": "x86_64"}
    for line in PINNED.read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(marks):
            assert pin.name not in versions, f"two versions of {pin.name} for Python {python}"
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            versions[canonicalize_name(pin.name)] = specifier.version
    return versions


def test_the_constraints_hold_no_address() -> None:
    """Neither an index nor a path: they mean the same wherever they are read."""
    for line in PINNED.read_text().splitlines():
        assert "://" not in line, line
        assert line.startswith("#") or not re.search(r"--|@|/", line), line


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", PROJECT["dependency-groups"])
def test_each_package_of_each_group_is_pinned_for_each_python(name: str, python: str) -> None:
    """To one version, which the group and the package itself allow."""
    versions = pins(python)
    for wanted in (*group(name), *map(Requirement, PROJECT["project"]["dependencies"])):
        marks = {"python_version": python, "sys_platform": "linux", "platform_machine": "x86_64"}
        if wanted.marker is None or wanted.marker.evaluate(marks):
            version = versions[canonicalize_name(wanted.name)]
            assert wanted.specifier.contains(version, prereleases=True), wanted


def test_the_tests_have_what_each_extra_brings() -> None:
    """An extra for users is tried out by somebody."""
    tested = {canonicalize_name(wanted.name) for wanted in group("test")}
    for extra, wanted in PROJECT["project"]["optional-dependencies"].items():
        assert {canonicalize_name(Requirement(each).name) for each in wanted} <= tested, extra


@pytest.mark.parametrize("target", ["run", "run-flask", "run-fastapi"])
def test_an_example_is_served_with_its_own_group(target: str, tmp_path: Path) -> None:
    """`make run-flask` installs the group run-flask, not what the tests need."""
    told = make("-n", target, f"VENV={tmp_path / 'venv'}")
    assert f"--group {target} " in told.stdout, told.stderr
    assert len(group(target)) <= 4


# -- the Python --------------------------------------------------------------------------------


def make_environment(folder: Path, python: str = "") -> subprocess.CompletedProcess[str]:
    """Have `make` look after the virtual environment in `folder`."""
    return make(f"{folder}/.python", f"VENV={folder}", *([f"PYTHON={python}"] if python else []))


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that `make` has made."""
    folder = tmp_path_factory.mktemp("make") / "venv"
    done = make_environment(folder, sys.executable)
    assert done.returncode == 0, done.stderr
    assert f"Making {folder} with {sys.executable}" in done.stdout
    return folder


def script(file: Path, text: str) -> str:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_python_that_cannot_be_used_is_told(is_there: bool, venv: Path, tmp_path: Path) -> None:
    """Also where an environment is there already: nothing is silently done with another Python."""
    folder = venv if is_there else tmp_path / "venv"
    nothing = make_environment(folder, "python3.99")
    assert nothing.returncode != 0
    assert "PYTHON=python3.99 starts no Python" in nothing.stderr

    version = 'case "$2" in *platform*) echo 3.10.13;; *) exit 1;; esac'
    old = make_environment(folder, script(tmp_path / "old", version))
    assert old.returncode != 0
    assert "is Python 3.10.13. rope_middleware needs 3.11 or newer" in old.stderr


def test_an_environment_stays_as_it_is(venv: Path) -> None:
    """Without PYTHON, and with the Python that it was made with, by whichever name."""
    made = (venv / ".python").stat().st_mtime_ns
    for python in ("", sys.executable, str(venv / "bin" / "python")):
        done = make_environment(venv, python)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (venv / ".python").stat().st_mtime_ns == made


def test_another_python_makes_the_environment_anew(tmp_path: Path) -> None:
    """And says so: what was installed for the former one is gone."""
    folder = tmp_path / "venv"
    make_environment(folder, sys.executable)
    python = folder / "bin" / "python"
    python.unlink()
    script(python, "echo 3 11 0 cpython /elsewhere")  # as one made elsewhere would answer
    done = make_environment(folder, sys.executable)
    assert done.returncode == 0, done.stderr
    assert f"{folder} was made with another Python. It is made anew" in done.stdout
    subprocess.run([python, "-c", "import pip"], check=True)


def test_a_folder_that_holds_other_things_is_left_alone(tmp_path: Path) -> None:
    """A wrong VENV= never empties a folder."""
    (tmp_path / "precious").touch()
    done = make_environment(tmp_path, sys.executable)
    assert done.returncode != 0
    assert f"VENV={tmp_path} is a folder that holds other things" in done.stderr
    assert (tmp_path / "precious").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder to try it in")
def test_a_folder_that_cannot_be_written_is_told() -> None:
    """With its name, and not as a missing package of Debian."""
    done = make_environment(Path("/proc/venv"), sys.executable)
    assert done.returncode != 0
    assert "VENV=/proc/venv cannot be written here" in done.stderr


# -- what it says ------------------------------------------------------------------------------


def test_help_begins_with_the_two_commands_of_a_newcomer() -> None:
    """Each public target is told once, `run` and `test` first."""
    told = make("help").stdout
    targets = re.findall(r"^  make ([a-z-]+)", told, re.MULTILINE)
    assert targets[:2] == ["run", "test"]
    named = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(targets) == sorted(named)


def test_the_whole_suite_says_how_long_it_takes(venv: Path) -> None:
    """Before it starts, with the name of the shorter one; a part of it says nothing."""
    told = make("-n", "test", f"VENV={venv}").stdout
    assert re.search(r"All tests: about \d+ minutes .*make quick.*\n.*pytest", told)
    assert "minutes" not in make("-n", "test", f"VENV={venv}", "PYTEST_ARGS=tests/x.py").stdout
    assert "-m quick -n 2" in make("-n", "quick", f"VENV={venv}").stdout


@pytest.mark.parametrize("left", ["a.py.orig", "docs/b.rej", "c.bak", "counter.sqlite", "d.db"])
def test_a_backup_file_in_the_repository_fails_the_check(left: str, tmp_path: Path) -> None:
    """What an editor, a merge or an example leaves behind is not committed."""
    (tmp_path / ".ci").mkdir()
    check = tmp_path / ".ci" / "no-backups"
    shutil.copy(ROOT / ".ci" / "no-backups", check)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    assert subprocess.run([check], check=False).returncode == 0
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).touch()
    subprocess.run(["git", "add", "--force", "."], cwd=tmp_path, check=True)
    done = subprocess.run([check], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert left in done.stderr


def test_the_first_hour_names_what_is_there() -> None:
    """Each file, function and command that CONTRIBUTING.md shows a newcomer exists."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    package = ROOT / "rope_middleware"
    for name in re.findall(r"\b(?:[a-z_]+/)*[a-z_]+\.py\b", text):
        assert any((folder / name).is_file() for folder in (ROOT, package)), name
    shown = re.findall(r"([a-z_/]+\.py)`?,? +`?(?:[A-Z]\w+\.)?(\w+)\(\)", text)
    assert len(shown) >= 10
    for name, function in shown:
        assert f"def {function}(" in (package / name).read_text(), (name, function)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|\$ )make ([a-z-]+)", text)) <= set(targets)
