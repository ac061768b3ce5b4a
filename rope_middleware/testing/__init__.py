"""Tests in transactions that are rolled back, many at once, against the application as it is.

    with Sandbox(jenny) as sandbox:
        client.post("/books", json={"title": "Emma"}, headers=sandbox.headers)
        assert jenny.session.scalar(select(Book.title)) == "Emma"

The objects, and who calls whom:

- A `Sandbox` is one test's block. It has an `Opened` for each engine that its jennies use, and the
  scopes of the test's own (scopes).
- A `Route` (routes) belongs to a jenny, from its first sandbox on. It puts a way on each of the
  jenny's sessions. When a session asks which engine it uses, the way asks the route which sandbox
  the code belongs to (the one that the request names, that of the block, the only one), and that
  sandbox for its engine.
- A `SandboxEngine` (connections) is the application's engine with a pool that hands out a
  `VirtualConnection` for each session's transaction. Sessions, events and options above do not
  know.
- A `VirtualConnection` hands each statement to the `SharedConnection` of its sandbox and engine.
  That one knows whose turn it is, and speaks to the one real connection through a `Database`
  (database, sqlite, postgresql, mariadb: what their servers do differently).
- A `Stock` (connections) keeps an engine's real connections from one sandbox to the next.
- A lane (lanes) is where statements run: in the calling thread, or, for an async driver, on a loop
  of the sandboxes' own.
- The watch asks the server, over another connection, who waits for whose row.
- `SandboxMiddleware` asks a `Desk` which sandbox a request names, and what to answer where it opens
  or ends one. The ContextVar `named` carries it to the route.

Nothing of this is imported in production.
"""

from __future__ import annotations

from rope_middleware.testing.middleware import SandboxMiddleware
from rope_middleware.testing.sandbox import Sandbox

__all__ = ["Sandbox", "SandboxMiddleware"]
