"""Runs the code blocks of a documentation page as a reader would, from its top to its end.

A page is read by Sybil. What is done with a block depends on its language:

- ``python``: executed in one namespace for the page, in an empty folder. Where the block has a
  caption, or begins with ``# name.py`` (GitHub shows no captions), it is a file of that name:
  written, and imported if it is a module of the folder. What pytest collects is written only, and
  the page has to go on with ``$ pytest``. ``name.py, at the end`` adds the block to that file.
- ``none``: a drawing.
- ``text``: what the python block before it has printed; ``...`` stands for anything.
- ``console``: each command is run, or checked as far as it can be: see `Console`. Lines without
  ``$`` are what the command prints.
- ``ini``: a unit for systemd, whose command is checked as one of the console's.

A block of any other language fails its page.
"""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from packaging.requirements import Requirement
from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer, RawFencedCodeBlockLexer
from sybil.parsers.myst.lexers import DirectiveLexer

from tests.kit.waiting import PATIENCE
from tests.servers.asgi import HOST, Command, free_port, run_command

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COLLECTED = re.compile(r"(?:^|/)(test_\w+|tests|conftest)\.py$")
NAMED = re.compile(r"# ([\w/]+\.py)$", re.M)
SERVERS = {"uvicorn", "gunicorn", "hypercorn", "granian", "waitress-serve", "celery", "rq", "flask"}
AT_THE_END = ", at the end"
CHECKOUT = "../rope_middleware"  # where the pages say that it lies
WHEEL = "dist/rope_middleware-*.whl"

_LEXERS = (
    FencedCodeBlockLexer(r"[^\s{][^\n]*"),
    DirectiveLexer(r"[\w:-]+"),
    RawFencedCodeBlockLexer(),  # without any language
)


def pages() -> list[str]:
    """Return every page that has to be looked at, from the root of the project."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    return sorted(str(p.relative_to(ROOT)) for p in found if "_build" not in p.parts)


def _parser(evaluate: Callable[[Example], None]) -> Callable[[Document], Iterable[Region]]:
    def parse(document: Document) -> Iterator[Region]:
        for lexer in _LEXERS:
            for region in lexer(document):
                directive = region.lexemes.get("directive")
                options = region.lexemes.get("options") or {}
                if directive == "eval-rst":  # no code, and MyST takes no colons for it
                    continue
                if directive not in (None, "code-block"):
                    raise AssertionError(f"{document.path}: write {directive!r} with colons (:::)")
                region.parsed = region.lexemes["source"]
                region.lexemes["language"] = region.lexemes.get(
                    "arguments", region.lexemes.get("language", "")
                )
                named = NAMED.match(region.parsed)
                region.lexemes["caption"] = options.get("caption", named[1] if named else "")
                region.evaluator = evaluate
                yield region

    return parse


class Page:
    """One page, run in the current folder, which has to be empty.

    Args:
        name: its path from the root of the project.
        served: start its servers for real, each on a port of its own.
        environment: stands in for what the page exports under the same name.
    """

    def __init__(
        self, name: str, *, served: bool = False, environment: dict[str, str] | None = None
    ) -> None:
        self.name = name
        self.folder = Path.cwd()
        assert not any(self.folder.iterdir())
        # A module, for whatever resolves annotations or names by it.
        self._module = ModuleType("page")
        self.printed: list[tuple[int, str]] = []
        """What each block of Python has printed, with the line the block begins on."""
        self._uncollected = ""
        self._engines: dict[int, Engine] = {}  # all that have connected
        self._python = PythonEvaluator()
        self._console = Console(self, served, environment or {})
        self._document = Document.parse(str(ROOT / name), _parser(self._evaluate))
        self._document.namespace = self._module.__dict__

    @property
    def names(self) -> dict[str, Any]:
        return self._module.__dict__

    def run(self) -> int:
        """Run every block and clean up; return how many there were."""
        sys.modules["page"] = self._module
        sys.path.insert(0, str(self.folder))
        examples = list(self._document)
        event.listen(Engine, "engine_connect", self._note_engine)
        try:
            for example in examples:
                example.evaluate()
            assert not self._uncollected, f"nobody runs {self._uncollected}: $ pytest"
        finally:
            self._console.stop()
            sys.path.remove(str(self.folder))
            del sys.modules["page"]
            self._forget_modules()
            try:
                self._dispose()  # a subclass may have engines connect in it
            finally:
                event.remove(Engine, "engine_connect", self._note_engine)
        return len(examples)

    def _evaluate(self, example: Example) -> None:
        language = example.region.lexemes["language"]
        evaluate = getattr(self, f"_run_{language}", None)
        if evaluate is None:
            pytest.fail(f"{self.name}:{example.line}: nothing checks a block of {language!r}")
        try:
            evaluate(example, example.region.lexemes["caption"])
        except Exception as error:
            error.add_note(f"in the block at {self.name}:{example.line}")
            raise

    def _run_python(self, example: Example, caption: str) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if caption:
                self._write(example, caption)
            else:
                self._python(example)
        self.printed.append((example.line, printed.getvalue()))

    def _write(self, example: Example, caption: str) -> None:
        name = caption.removesuffix(AT_THE_END)
        path = self.folder / self._console.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        before = "" if name == caption else path.read_text() + "\n\n"
        path.write_text(before + example.parsed)
        compile(path.read_text(), path, "exec", dont_inherit=True)
        if COLLECTED.search(name):
            self._uncollected = name
        elif path.stem.isidentifier() and "/" not in name and not self._console.served:
            importlib.invalidate_caches()
            sys.modules.pop(path.stem, None)  # shown once more, longer
            module = importlib.import_module(path.stem)
            self.names.update({k: v for k, v in vars(module).items() if not k.startswith("__")})

    def collected(self) -> None:
        """Note that pytest, or another runner, has run the tests that were written."""
        assert self._uncollected, "there is no test to run"
        self._uncollected = ""

    def _run_text(self, example: Example, caption: str) -> None:
        check_output(example.parsed, self.printed[-1][1])

    def _run_none(self, example: Example, caption: str) -> None:
        """Leave a drawing to who looks at it."""

    def _run_console(self, example: Example, caption: str) -> None:
        self._console.run(example.parsed)

    def _run_ini(self, example: Example, caption: str) -> None:
        unit = configparser.ConfigParser(interpolation=None)
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        unit.read_string(example.parsed.replace("\\\n", " "))  # as systemd reads it
        assert unit.sections() == ["Unit", "Service", "Install"]
        program, *arguments = shlex.split(unit["Service"]["ExecStart"])
        self._console.check_server([Path(program).name, *arguments])

    def _forget_modules(self) -> None:
        """Have the page's own modules be imported anew by the next page."""
        gone = [
            name
            for name, module in list(sys.modules.items())  # a lazy one imports others
            if str(getattr(module, "__file__", None) or "").startswith(f"{self.folder}{os.sep}")
        ]
        for name in gone:
            del sys.modules[name]

    def _note_engine(self, connection: Connection) -> None:
        self._engines[id(connection.engine)] = connection.engine

    def _dispose(self) -> None:
        self.names.clear()
        gc.collect()
        for engine in self._engines.values():
            checked_out = getattr(engine.pool, "checkedout", lambda: 0)
            assert checked_out() == 0, f"{engine} has connections out at the end of {self.name}"
            if engine.dialect.is_async:
                asyncio.run(AsyncEngine(engine).dispose())
            else:
                engine.dispose()


def check_output(want: str, got: str) -> None:
    """Check that `want`, whose ``...`` stand for anything, is somewhere in `got`."""
    assert want.strip()
    words = re.escape(" ".join(want.split()))
    if not re.search(words.replace(re.escape("..."), ".*"), " ".join(got.split())):
        raise AssertionError(f"wanted:\n{want}\ngot:\n{got}")


class Console:
    """Runs what can be run of the commands of a page, and checks the others.

    - ``pip install``: the package's extras exist, and every other package is installed here.
    - ``make``: the target exists.
    - servers and workers: they know the options, and the application is one of the page's. Where
      the page is `served` those on port 8000 are started, and ``curl`` asks the one that runs.
    - everything else is run, and has to end without an error.
    """

    def __init__(self, page: Page, served: bool, environment: dict[str, str]) -> None:
        self._page = page
        self.served = served
        self.here = Path()
        self._stands_in = environment
        # The page's `python` and `pytest` are those that run the tests.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        # What the tests themselves were started with is no matter of a page's own pytest.
        self._environment = {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
        self._server: contextlib.ExitStack = contextlib.ExitStack()
        self._port: int | None = None

    def run(self, block: str) -> None:
        """Run each line with a prompt; the lines after it are what it prints."""
        block = block.replace("\\\n", " ")
        commands = re.split(r"^\$ ", block, flags=re.MULTILINE)
        assert not commands[0].strip(), f"no prompt: {commands[0]}"
        for command in commands[1:]:
            line, _, output = command.partition("\n")
            words = shlex.split(line, comments=True)
            with_values = []
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                with_values.append(words.pop(0))
            printed = self._command(words, dict(v.split("=", 1) for v in with_values))
            if output.strip() and printed is not None:
                check_output(output, printed)

    def stop(self) -> None:
        self._server.close()

    def _command(self, words: list[str], values: dict[str, str]) -> str | None:
        """Return what the command has printed; None where it is not run."""
        special = getattr(self, f"_{re.sub(r'[^a-z]', '_', words[0])}", None)
        if special is not None:
            printed: str | None = special(words[1:])
            return printed
        if words[0] in SERVERS and not (words[0] == "flask" and "run" not in words):
            return self._serve(words, values)
        if self.served:
            words = [word.replace(":8000", f":{self._port}") for word in words]
        if words[1:3] == ["-m", "venv"]:
            words.append("--without-pip")  # which takes seconds, and is not needed here
        elif words[0] == "pytest":
            self._page.collected()
            # A reader has anyio's plugin and ours. Those of these tests cost more than a page's.
            values = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **values}
            plugins = ("anyio", "rope_middleware.pytest_plugin", "no:cacheprovider")
            told = [word for plugin in plugins for word in ("-p", plugin)]
            words = ["pytest", "-q", *told, *words[1:]]
        elif words[:3] == ["python", "manage.py", "test"]:
            self._page.collected()
        return self._run(words, values)

    def _run(self, words: list[str], values: dict[str, str]) -> str:
        done = subprocess.run(
            [self._program(words[0]), *words[1:]],
            cwd=self._page.folder / self.here,
            env=os.environ | self._environment | values,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * PATIENCE,
        )
        assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def _program(self, name: str) -> str:
        # Either name may be missing where the tests run.
        is_python = name in ("python", "python3")
        return sys.executable if is_python else str(Path(sys.executable).with_name(name))

    # -- commands of the shell -------------------------------------------------------------

    def _mkdir(self, words: list[str]) -> None:
        (self._page.folder / self.here / words[0]).mkdir(parents=True)

    def _cd(self, words: list[str]) -> None:
        self.here /= words[0]
        assert (self._page.folder / self.here).is_dir()

    def _export(self, words: list[str]) -> None:
        name, value = words[0].split("=", 1)
        self._environment[name] = self._stands_in.get(name, value)

    def _source(self, words: list[str]) -> None:
        # What it is for, the tests' own environment stands in for.
        assert (self._page.folder / self.here / words[0]).is_file()

    def _curl(self, words: list[str]) -> str | None:
        if not self.served:
            return None
        assert self._port is not None, "no server is running"
        url = httpx.URL(words[-1])
        method = words[words.index("-X") + 1] if "-X" in words else "GET"
        answer = httpx.request(
            method,
            url.copy_with(host=HOST, port=self._port),
            content=words[words.index("-d") + 1] if "-d" in words else None,
            timeout=PATIENCE,
            verify=False,
            trust_env=False,
        )
        assert answer.status_code < 400, answer.text
        return answer.text

    # -- what is checked only --------------------------------------------------------------

    def _pip(self, words: list[str]) -> None:
        if words[0] == "wheel":  # tests/test_package.py builds one
            assert words[1:] == ["--no-deps", "--wheel-dir", "dist", CHECKOUT], words
            return
        assert words[0] == "install"
        for word in words[1:]:
            if word.startswith(("-", WHEEL)):
                continue
            wanted = Requirement(word.replace(CHECKOUT, "checkout"))
            assert wanted.name != "rope-middleware", "it is not on PyPI: pip finds nothing"
            if wanted.name == "checkout":
                assert wanted.extras <= set(PROJECT["optional-dependencies"]), word
            else:
                importlib.metadata.version(wanted.name)  # it exists, and what is run here uses it

    def _make(self, words: list[str]) -> None:
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets, words

    # -- servers ---------------------------------------------------------------------------

    def check_server(self, words: list[str]) -> None:
        """Check that the program knows its options, and that its application is there."""
        program, *rest = words
        known = _help_of(program, _subcommand(program, rest))
        for word in rest:
            if word.startswith("-"):
                option = word.split("=")[0]
                assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", known), words
        for word in rest:
            if re.fullmatch(r"[\w.]+:[a-z]\w*", word):
                module, _, name = word.partition(":")
                path = self._page.folder / self.here / f"{module.replace('.', '/')}.py"
                assert re.search(rf"^{name}\b", path.read_text(), re.MULTILINE), words
        if program == "celery":
            assert (self._page.folder / f"{rest[rest.index('-A') + 1]}.py").exists(), words

    def _serve(self, words: list[str], values: dict[str, str]) -> str | None:
        self.check_server(words)
        if not self.served or "8000" not in " ".join(words):
            return None  # in production the port is another matter
        # Two servers of a page would want the same port: the one before is stopped first.
        self.stop()
        self._port = free_port()
        words = [re.sub(r"\b8000$", str(self._port), word) for word in words]
        command: Command = self._server.enter_context(
            run_command(
                [self._program(words[0]), *words[1:]],
                cwd=self._page.folder / self.here,
                **self._environment,
                **values,
            )
        )
        command.wait_for_port(self._port)
        self._server.callback(command.interrupt)
        return None


def _subcommand(program: str, words: list[str]) -> tuple[str, ...]:
    """Return the words that ask for the right page of help."""
    if program == "celery":
        return tuple(word for word in words if word == "worker")
    if program == "flask":
        return tuple(word for word in words if word == "run")
    return tuple(words[:1]) if program == "rq" else ()


@functools.cache
def _help_of(program: str, subcommand: tuple[str, ...]) -> str:
    texts = []
    for words in {(), subcommand}:  # celery has options before its subcommand, too
        done = subprocess.run(
            [str(Path(sys.executable).with_name(program)), *words, "--help"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    return "\n".join(texts)
