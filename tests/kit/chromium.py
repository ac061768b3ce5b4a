"""A headless Chromium, driven by the DevTools protocol: pages with cookies of their own.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.kit.waiting import PATIENCE, eventually

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
MISSING = "no Chromium is there: apt-get install chromium"


class Page:
    """A tab with a cookie jar of its own."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        context = browser.send("Target.createBrowserContext")["browserContextId"]
        target = browser.send("Target.createTarget", url="about:blank", browserContextId=context)
        attached = browser.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session: str = attached["sessionId"]
        self._do("Page.enable")

    def _do(self, method: str, **params: Any) -> Any:
        return self._browser.send(method, self._session, **params)

    def run(self, script: str) -> Any:
        """Return what a script's expression, or its promise, gives."""
        done = self._do(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in done:
            raise AssertionError(done["exceptionDetails"])
        return done["result"].get("value")

    def go(self, url: str) -> None:
        """Load a page."""
        self._do("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression is true."""

        def holds() -> bool:
            try:
                return bool(self.run(condition))
            except AssertionError:  # between two pages
                return False

        eventually(holds, lambda: f"{condition}, in {self.run('document.body.innerHTML')}")


class Browser:
    """A running browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)

    def send(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Send a command and return its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=PATIENCE))
            if answer.get("id") == number:
                if "error" in answer:
                    raise AssertionError(answer["error"])
                return answer["result"]

    def new_page(self) -> Page:
        """Open a tab."""
        return Page(self)


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Run Chromium for the length of the block."""
    assert PROGRAM is not None
    port_file = folder / "DevToolsActivePort"
    process = subprocess.Popen(
        [
            *(PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-dev-shm-usage", "--remote-debugging-port=0"),
            *("--disable-background-networking", "--disable-component-update"),
            *(f"--user-data-dir={folder}", "about:blank"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        eventually(lambda: port_file.exists() and port_file.read_text(), "Chromium answers")
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/version") as answer:
            url = json.load(answer)["webSocketDebuggerUrl"]
        with connect(url, max_size=None) as socket:
            found = Browser(socket)
            yield found
            with contextlib.suppress(Exception):
                found.send("Browser.close")
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()
