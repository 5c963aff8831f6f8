"""A headless Chromium for tests, driven over its DevTools pipe: no driver, no port, no package.

The URLs that a page requests are recorded, so a test can check that nothing is fetched from elsewhere.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = "apt-get install -y chromium"

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--remote-debugging-pipe", "--window-size=1200,1600", "--hide-scrollbars",
)  # fmt: skip


def executable() -> str | None:
    """Returns the path of Chromium, or None if it is not installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, reading: int, writing: int) -> None:
        self._in = os.fdopen(reading, "rb", buffering=0)
        self._out = os.fdopen(writing, "wb", buffering=0)
        self._rest = b""
        self._last_id = 0
        self._session: str | None = None
        self.requests: list[str] = []
        """Every URL that the page requested."""
        self.messages: list[str] = []
        """Lines of the console, with errors of scripts and of the content policy."""

    def attach(self) -> None:
        """Attaches to the browser's one tab."""
        targets = self._call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Loads a URL."""
        self._call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Evaluates an expression in the page and returns its value; waits for a promise. Raises AssertionError if it throws."""
        done = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str) -> Any:
        """Polls an expression until it is truthy and returns its value."""
        return self.run(
            "new Promise((found, lost) => { let n = 0; const look = () => { let value;"
            f" try {{ value = {condition}; }} catch (error) {{ value = null; }}"
            " if (value) found(typeof value === 'object' ? true : value); else if (++n > 1200) lost(new Error('the condition never held')); else setTimeout(look, 50);"
            " }; look(); })"
        )

    def press(self, selector: str) -> None:
        """Waits for an element and clicks it."""
        quoted = json.dumps(selector)
        self.wait(f"document.querySelector({quoted})")
        self.run(f"document.querySelector({quoted}).click()")

    def picture(self, path: Path) -> None:
        """Saves a screenshot as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self._last_id:
                assert "error" not in reply, reply["error"]
                return dict(reply["result"])
            self._note(reply)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = self._in.read(1 << 20)
            assert data, "the browser exited"
            self._rest += data
        reply, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(reply))

    def _note(self, reply: dict[str, Any]) -> None:
        method, params = reply.get("method"), reply.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(params["exceptionDetails"]))

    def close(self) -> None:
        """Closes the browser."""
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self._call("Browser.close")
        self._in.close()
        self._out.close()


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Starts a browser with an empty profile in this folder, and ends it afterwards."""
    chromium = executable()
    assert chromium, f"Chromium is not installed: {INSTALL}"
    its_in, ours_out = os.pipe()
    ours_in, its_out = os.pipe()
    # Chromium reads commands from descriptor 3 and answers on descriptor 4
    script = f'exec "$@" 3<&{its_in} 4>&{its_out}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", chromium, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(its_in, its_out),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_in)
    os.close(its_out)
    page = Page(ours_in, ours_out)
    try:
        page.attach()
        yield page
    finally:
        page.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
