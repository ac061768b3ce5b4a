"""One round over real servers: uvicorn and gunicorn, each with one process, and wrk as the client.

The server runs as its own process and takes its socket from this one, so that its port is one
that the system has chosen. Client and server share the machine's CPUs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contestants import Absent, Contestant, describe
from benchmarks.database import Database
from benchmarks.measure import Spread

START_LIMIT = 30.0
"""Seconds that a server may take to answer."""

CONNECTIONS = 4
"""Fewer than the pool has: waiting for a connection is not what is compared."""
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Served:
    """What one contestant serves over a socket."""

    database: str
    setting: str
    title: str
    path: str
    server: str
    per_second: Spread | None = None
    latency: str = ""
    """Mean and 99th percentile, as wrk says it."""
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it as what JSON knows."""
        return vars(self) | {"per_second": self.per_second and self.per_second.as_json()}


def serve(
    contestants: list[Contestant | Absent],
    where: Database,
    settings: tuple[str, ...],
    rounds: int = 3,
    seconds: int = 3,
    path: str = "select",
) -> Iterator[Served]:
    """Yield what every contestant of these settings serves; interleaved rounds.

    Raises:
        RuntimeError: wrk is not installed.
    """
    wrk = shutil.which("wrk")
    if wrk is None:
        raise RuntimeError("wrk is not installed; on Debian and Ubuntu: apt-get install wrk")
    group = [one for one in contestants if isinstance(one, Contestant)]
    for setting in settings:
        ours = [one for one in group if one.setting == setting]
        rates: dict[str, list[float]] = {one.title: [] for one in ours}
        latency: dict[str, str] = {}
        errors: dict[str, str] = {}
        for _ in range(rounds):
            for one in ours:
                if one.title in errors:
                    continue
                try:
                    rate, latency[one.title] = _round(wrk, one, where, path, seconds)
                    rates[one.title].append(rate)
                except Exception as error:
                    errors[one.title] = describe(error)
        for one in ours:
            yield Served(
                where.name,
                setting,
                one.title,
                path,
                "gunicorn" if one.is_wsgi else "uvicorn",
                Spread.of(rates[one.title]) if one.title not in errors else None,
                latency.get(one.title, ""),
                errors.get(one.title, ""),
            )


def _round(
    wrk: str, one: Contestant, where: Database, path: str, seconds: int
) -> tuple[float, str]:
    with _server(one, where) as port:
        url = f"http://127.0.0.1:{port}/{path}"
        _wait_for(url)
        command = [wrk, "-t1", f"-c{CONNECTIONS}", "--latency", f"-d{seconds}s", url]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=seconds + 30
        )
    out = done.stdout
    figures, _, distribution = out.partition("Latency Distribution")
    if "Non-2xx" in out or "Socket errors" in out:
        raise RuntimeError(out)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", out)
    mean = re.search(r"Latency\s+(\S+)", figures)
    tail = re.search(r"99%\s+(\S+)", distribution)
    if not (rate and mean and tail):
        raise RuntimeError(out)
    return float(rate[1]), f"{mean[1]}, {tail[1]}"


@contextlib.contextmanager
def _server(one: Contestant, where: Database) -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        descriptor = str(listener.fileno())
        if one.is_wsgi:
            command = ["gunicorn", "--bind", f"fd://{descriptor}", "--threads", str(CONNECTIONS),
                       "--keep-alive", "60", "--log-level", "error",
                       "benchmarks.served:app"]  # fmt: skip
        else:
            command = ["benchmarks.served", descriptor]
        told = {"BENCH_SETTING": one.setting, "BENCH_TITLE": one.title,
                "BENCH_URL": where.url, "BENCH_ASYNC_URL": where.async_url}  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=os.environ | told,
            pass_fds=[listener.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            yield int(listener.getsockname()[1])
        finally:
            process.terminate()
            try:
                _, text = process.communicate(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                _, text = process.communicate()
            if process.returncode not in (0, -15):
                print(text.decode(errors="replace")[-2000:], file=sys.stderr)


def _wait_for(url: str) -> None:
    limit = time.monotonic() + START_LIMIT
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                response.read()
            return
        except OSError:
            if time.monotonic() > limit:
                raise
            time.sleep(0.1)
