"""The benchmarks name this module; the server is in `tests.servers.postgres`."""

from __future__ import annotations

from tests.servers.postgres import postgres_server

__all__ = ["postgres_server"]
