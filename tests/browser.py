"""A headless Chromium for tests, spoken with over its DevTools pipe: no driver, no port, no package.

Owns the browser's process and its empty profile. What a page asked for is kept, so a test can hold that
nothing left for another place.
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
    """Chromium's path, if there is one."""
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
        """Every URL that the page asked for."""
        self.messages: list[str] = []
        """What was written to its console: errors of scripts and of the content policy among them."""

    def attach(self) -> None:
        """Takes the browser's one tab."""
        targets = self._call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Goes there."""
        self._call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for. Raises AssertionError if it throws."""
        done = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str) -> Any:
        """Polls an expression until it is truthy, as the page goes on; its value."""
        return self.run(
            "new Promise((found, lost) => { let n = 0; const look = () => { let value;"
            f" try {{ value = {condition}; }} catch (error) {{ value = null; }}"
            " if (value) found(typeof value === 'object' ? true : value); else if (++n > 1200) lost(new Error('it never came')); else setTimeout(look, 50);"
            " }; look(); })"
        )

    def press(self, selector: str) -> None:
        """Waits for an element, and clicks it."""
        quoted = json.dumps(selector)
        self.wait(f"document.querySelector({quoted})")
        self.run(f"document.querySelector({quoted}).click()")

    def picture(self, path: Path) -> None:
        """A PNG of what is in the window."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            said = self._receive()
            if said.get("id") == self._last_id:
                assert "error" not in said, said["error"]
                return dict(said["result"])
            self._note(said)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = self._in.read(1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        said, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(said))

    def _note(self, said: dict[str, Any]) -> None:
        method, params = said.get("method"), said.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(params["exceptionDetails"]))

    def close(self) -> None:
        """Ends the browser."""
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self._call("Browser.close")
        self._in.close()
        self._out.close()


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A browser with an empty profile in this folder."""
    chromium = executable()
    assert chromium, f"there is no Chromium here: {INSTALL}"
    its_in, ours_out = os.pipe()
    ours_in, its_out = os.pipe()
    # it reads its commands from descriptor 3 and answers on 4
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
