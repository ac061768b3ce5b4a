"""What is to be done at a fork, where processes fork at all: on Windows they do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

__all__ = ["at_fork"]


def at_fork(**functions: Callable[[], object]) -> None:
    """Call functions at each fork, as `os.register_at_fork` names them."""
    register: Any = getattr(os, "register_at_fork", None)
    if register is not None:
        register(**functions)
