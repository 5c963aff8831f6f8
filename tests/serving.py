"""Starts real servers for tests and sends them requests over real sockets.

Each test starts the program as users do, on a free port of the loopback address, and ends it. This module imports
only the standard library, because the environments of the clients import it too.
"""

import atexit
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPConnection, HTTPResponse
from typing import Any

READY = re.compile(r"http://(127\.0\.0\.1|\[::1\]):(\d+)/v1")


class Reply:
    """A complete response."""

    def __init__(self, response: HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self) -> Any:
        """Returns the body, parsed as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """Checks the shape of the body's `error` object and returns it."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["message"]
        return dict(error)

    @property
    def events(self) -> list[Any]:
        """Returns the events of a stream, parsed as JSON; "[DONE]" stays a string."""
        found = []
        for block in self.body.decode().split("\n\n"):
            if block.startswith("data: "):
                data = block.removeprefix("data: ")
                found.append(data if data == "[DONE]" else json.loads(data))
            else:
                assert not block or block.startswith(":"), block
        return found


class Server:
    """A running server."""

    def __init__(self, process: "subprocess.Popen[str]", port: int, banner: str) -> None:
        self.process = process
        self.port = port
        self.banner = banner
        self.url = f"http://127.0.0.1:{port}/v1"

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> Reply:
        """Sends one request on a new connection; a body that is not bytes is sent as JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
                headers = {"Content-Type": "application/json", **(headers or {})}
            connection.request(method, path, body, headers or {})
            return Reply(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str) -> Reply:
        """Sends a GET."""
        return self.request("GET", path)

    def post(self, path: str, **fields: Any) -> Reply:
        """Sends a POST with a JSON object; `model` defaults to the first model of the server."""
        return self.request("POST", path, {"model": self.model, **fields})

    def chat(self, text: str, **fields: Any) -> Reply:
        """Sends a chat request with one user message."""
        fields.setdefault("messages", [{"role": "user", "content": text}])
        return self.post("/v1/chat/completions", **fields)

    def say(self, text: str, **fields: Any) -> str:
        """Asks one question at temperature 0 and returns the text of the answer."""
        fields.setdefault("temperature", 0)
        return str(self.chat(text, **fields).json["choices"][0]["message"]["content"])

    @property
    def model(self) -> str:
        """Returns the id of the first model."""
        return str(self.get("/v1/models").json["data"][0]["id"])

    @property
    def workers(self) -> list[int]:
        """Returns the process ids of the workers in order of their start."""
        pid = self.process.pid
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]

    def status(self, headers: dict[str, str] | None = None) -> dict[str, Any]:
        """Returns the entry of the first model in /v1/models/status."""
        return dict(self.request("GET", "/v1/models/status", headers=headers).json["data"][0])

    def connect(self) -> socket.socket:
        """Opens a TCP connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def stop(self) -> int:
        """Sends SIGTERM and waits; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def wait_until(condition: Callable[[], Any], failure: str = "the condition never held") -> Any:
    """Polls a condition until it is truthy and returns its value. Fails after 30 s."""
    deadline = time.monotonic() + 30
    while not (value := condition()):
        assert time.monotonic() < deadline, failure
        time.sleep(0.01)
    return value


PYTHON = os.environ.get("SERVER_PYTHON", sys.executable)
"""The Python that has tinyoai. Tests in a client's environment get it from this variable."""


def command(*flags: str) -> list[str]:
    """Returns the program's command line."""
    return [PYTHON, "-m", "tinyoai", *flags]


_homes = tempfile.TemporaryDirectory(prefix="tinyoai-tests-")
_numbers = itertools.count(1)
atexit.register(_homes.cleanup)


def environment(**extra: str) -> dict[str, str]:
    """Returns an environment without the user's TINYOAI_ variables and with a new data directory."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TINYOAI_")}
    return {**kept, "TINYOAI_HOME": f"{_homes.name}/{next(_numbers)}", **extra}


def _with_engine(env: dict[str, str]) -> dict[str, str]:
    """The environment for tests that name no engine: they expect ctransformers, installed extras or not."""
    return {"TINYOAI_ENGINE": "ctransformers", **env}


@contextlib.contextmanager
def serve(
    *flags: str, env: dict[str, str] | None = None, wait: float = 60, prefix: Sequence[str] = ()
) -> Iterator[Server]:
    """Starts a server on a free port and waits for its banner; kills it at the end if it still runs."""
    process = subprocess.Popen(
        [*prefix, *command("--port", "0", *flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_with_engine(env or environment()),
    )
    try:
        assert process.stdout is not None
        banner, deadline = "", time.monotonic() + wait
        while "curl -N" not in banner:
            line = process.stdout.readline()
            banner += line
            if not line or time.monotonic() > deadline:
                process.kill()
                assert process.stderr is not None
                raise AssertionError(f"no banner but {banner!r}; stderr: {process.stderr.read()}")
        found = READY.search(banner)
        assert found, banner
        yield Server(process, int(found[2]), banner)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
