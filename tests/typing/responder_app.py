"""Responder, which says that it is typed and annotates little of what is used here."""
# mypy: allow-untyped-calls
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import assert_type

import responder

from rope_middleware import ASGIRopeMiddleware, RopeMiddleware
from tests.typing.middlewares import veto

api = responder.API()
api.add_middleware(RopeMiddleware)
api.add_middleware(RopeMiddleware, commit_on_success=True, commit_veto=veto, retries=3)
api.add_middleware(ASGIRopeMiddleware, close_timeout=2.5)
assert_type(RopeMiddleware(api), ASGIRopeMiddleware)
