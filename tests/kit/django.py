"""Django in the tests' process: its settings are made once, which URLs it knows each time.

::

    serve("<int:n>", view)
    app = RopeMiddleware(WSGIHandler())
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import django
from django.conf import settings
from django.urls import path

__all__ = ["serve"]


def serve(route: str, view: Callable[..., Any]) -> None:
    """Let Django's handlers answer `route` by `view`, and know no other URL."""
    if not settings.configured:
        settings.configure(ALLOWED_HOSTS=["*"], SECRET_KEY="of the tests", DATABASES={})
        django.setup()
    settings.ROOT_URLCONF = (path(route, view),)
