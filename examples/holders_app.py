"""Who holds the connections, as a page behind a token.

Run it with ``HOLDERS_TOKEN=let-me-see uvicorn holders_app:app`` and ask with
``curl -H 'Authorization: Bearer let-me-see' http://127.0.0.1:8000/holders``. Where no token is set,
nobody knows it.
"""

import hmac
import os
import secrets

from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from rope_middleware import RopeMiddleware, SessionJenny, holders

TOKEN = os.environ.get("HOLDERS_TOKEN") or secrets.token_urlsafe()
jenny = SessionJenny(sessionmaker(create_engine("sqlite:///app.db")))


def one(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(jenny.session.scalar(text("SELECT 1"))))


def show_holders(request: Request) -> PlainTextResponse:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), TOKEN.encode()):
        return PlainTextResponse("no", status_code=403)
    return PlainTextResponse(str(holders()))


app = Starlette(routes=[Route("/", one), Route("/holders", show_holders)])
app.add_middleware(RopeMiddleware)
