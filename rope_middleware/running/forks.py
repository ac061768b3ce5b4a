"""What is to be done at a fork, where processes fork at all: on Windows they do not."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

__all__ = ["at_fork", "lock_of_module"]

_locks: list[Any] = []


def at_fork(**functions: Callable[[], object]) -> None:
    """Call functions at each fork, as `os.register_at_fork` names them."""
    register: Any = getattr(os, "register_at_fork", None)
    if register is not None:
        register(**functions)


def lock_of_module() -> AbstractContextManager[bool]:
    """Return a lock that is free in a forked process.

    The thread that held it at the fork is not there to release it. For what lives as long as the
    process, and what is held for an instant that leaves nothing half done.

    A thread that holds it may take it again: the garbage collector runs finalisers at any time,
    and they close bodies and sessions.
    """
    lock = threading.RLock()
    _locks.append(lock)
    return lock


def _free_locks() -> None:
    for lock in _locks:
        lock._at_fork_reinit()  # noqa: SLF001 - as logging does it: nothing public frees an RLock


# Here, so that it comes before what any other module does in a forked process.
at_fork(after_in_child=_free_locks)
