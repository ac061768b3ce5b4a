"""WSGI frameworks: the rows of the table, see `checks`."""

from __future__ import annotations

from tests.matrix import rows
from tests.matrix.checks import Checks


class Test(Checks):
    """Each check for each row."""

    rows = rows.WSGI
