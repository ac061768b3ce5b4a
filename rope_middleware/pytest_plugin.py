"""The pytest plugin: two fixtures, and nothing else. pytest finds it by itself.

In conftest.py::

    import pytest
    from myapp import jenny

    @pytest.fixture(scope="session")
    def rope_jennies():
        return jenny

In a test::

    def test_books(rope_sandbox, client):
        client.post("/books", json={"title": "Emma"})
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rope_middleware.testing import Sandbox

__all__ = ["rope_jennies", "rope_sandbox"]


@pytest.fixture(scope="session")
def rope_jennies() -> Any:
    """The jenny, or a list of jennies, whose work `rope_sandbox` rolls back: yours to define."""
    raise pytest.UsageError(
        "The fixture rope_sandbox rolls back what your jennies do, and has to know them. Define in "
        'conftest.py a fixture of scope "session" named rope_jennies that returns your jenny, or a '
        "list of them."
    )


@pytest.fixture
def rope_sandbox(rope_jennies: Any) -> Iterator[Sandbox]:
    """A `Sandbox` around the test: what its jennies do is rolled back at its end.

    A plain fixture, also for async tests: the sandbox's connections belong to no test's loop.
    """
    # pytest imports this module wherever it runs; the package only where a test asks for it.
    from rope_middleware.testing import Sandbox

    jennies: Any = rope_jennies
    with Sandbox(*(jennies if isinstance(jennies, list | tuple) else [jennies])) as sandbox:
        yield sandbox
