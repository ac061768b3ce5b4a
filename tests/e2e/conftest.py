"""Each end-to-end test is searched for leaks."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _search_for_leaks(no_leaks: None) -> None:
    """See `no_leaks`."""
