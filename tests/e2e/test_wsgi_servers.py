"""Real WSGI servers and frameworks: mixed loads leave nothing, and nobody sees another's session.

Where a server is not installed on this Python its tests are skipped, with that reason.
"""

from __future__ import annotations

import http.client
import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.kit.waiting import eventually
from tests.matrix.app import CHUNKS
from tests.servers.asgi import stream_and_leave
from tests.servers.wsgi import SERVERS, WSGIServer, serve_wsgi

FRAMEWORKS = ("bare", "flask", "pyramid", "bottle", "falcon", "django")
REQUESTS = {"concurrent": 70, "stream": 50, "raise": 30, "break": 20, "file": 15, "slow": 15}
CLIENTS = 8

SEED = int(os.environ.get("ROPE_TEST_SEED") or random.randrange(1 << 32))
"""The order of the requests; printed with each test, settable to have it again."""


@pytest.fixture(scope="module", params=SERVERS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WSGIServer]:
    """Each server in turn, for the tests of all the frameworks."""
    name = request.param
    if missing := SERVERS[name].missing:
        pytest.skip(f"{name}: {missing}")
    with serve_wsgi(name, tmp_path_factory.mktemp(name)) as server:
        yield server


def at_rest(server: WSGIServer) -> dict[str, Any]:
    """Wait until the process has given everything back, and return its last report."""
    states: list[dict[str, Any]] = []

    def rests() -> bool:
        states.append(server.state())
        return states[-1]["checked_out"] == 0 and not states[-1]["open"]

    eventually(rests, lambda: f"{server.name} at rest: {states[-1]}\n{server.output[-3000:]}")
    return states[-1]


def one_request(server: WSGIServer, framework: str, kind: str, token: str) -> int | None:
    """Send one request and check its answer; return the number where it is one that counts."""
    path = f"/{framework}/{kind}?token={token}"
    if kind == "slow":
        stream_and_leave(server.port, path, after=token.encode())
        return None
    try:
        status, body = server.get(path)
    except http.client.RemoteDisconnected:
        # Pyramid and the bare application raise through, and uwsgi has no error page.
        assert (kind, server.name) == ("raise", "uwsgi")
        assert framework in ("bare", "pyramid")
        return None
    if kind == "raise":
        assert status == 500, (token, status)
        return None
    assert status == 200, (token, status, body[:500])
    if kind == "stream":
        assert body == token.encode() * CHUNKS
    elif kind == "break":
        assert body.startswith(token.encode()), (token, body[:500])
        assert body != token.encode() * CHUNKS
    elif kind == "file":
        assert len(body) == 1 << 18, (token, len(body))
    else:
        return int(body)
    return None


@pytest.mark.skipif(os.name != "posix", reason="sockets are handed to the servers as files")
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_W4_mixed_requests_leave_nothing_and_mix_nothing_up(
    server: WSGIServer, framework: str
) -> None:
    """200 plain, streamed, raising and abandoned requests from eight clients at a time."""
    print(f"ROPE_TEST_SEED={SEED}")
    kinds = [kind for kind, number in REQUESTS.items() for _ in range(number)]
    random.Random(SEED).shuffle(kinds)
    before = at_rest(server)

    tokens = [f"{framework}-{number}" for number in range(len(kinds))]
    with ThreadPoolExecutor(CLIENTS) as clients:
        futures = [
            clients.submit(one_request, server, framework, kind, token)
            for kind, token in zip(kinds, tokens, strict=True)
        ]
        numbers = [number for future in futures if (number := future.result()) is not None]

    state = at_rest(server)
    assert state["mixed_up"] == []
    assert state["showing"] == []
    assert state["seen"] - before["seen"] == sum(REQUESTS.values())
    # Every stream whose client went away was closed, inside its scope.
    left = [token for token, kind in zip(tokens, kinds, strict=True) if kind == "slow"]
    cut = Counter(state["cut"]) - Counter(before["cut"])
    assert cut == Counter(left)
    # Each number once, and nothing of the requests that raised.
    assert sorted(numbers) == list(range(1, REQUESTS["concurrent"] + 1))
    assert state["counts"][framework] == REQUESTS["concurrent"]
    assert "garbage collector is trying to clean up" not in server.output
    assert "Exception ignored in" not in server.output
