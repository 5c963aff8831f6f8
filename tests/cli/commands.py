"""Helpers of the command tests: a data directory, and the command on it."""

import json
import subprocess
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tests.serving import command, environment

ROOT = Path(__file__).parent.parent.parent
KEY = "sk-0123456789abcdefghij"


class Place:
    """A data directory and the command on it."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def env(self, **extra: str) -> dict[str, str]:
        """Returns the environment for the commands."""
        return environment(TINYOAI_HOME=str(self.home), **extra)

    def run(self, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
        """Runs the command and waits for its end."""
        return subprocess.run(
            command(*words), capture_output=True, text=True, timeout=200, env=self.env(**env), check=False
        )

    def start(self, *flags: str, **env: str) -> "subprocess.CompletedProcess[str]":
        """Starts an agent with the fake engine on a free port."""
        return self.run("agent", "start", "--engine", "fake", "--port", "0", *flags, **env)

    def servers(self, *words: str) -> list[Any]:
        """Returns the JSON of `status`."""
        done = self.run(*(words or ("status",)), "--json")
        found = json.loads(done.stdout)
        assert done.returncode == (0 if found else 3), done
        return list(found)

    def agent(self) -> Any:
        """Returns the agent's entry in `status`."""
        (found,) = self.servers("agent", "status")
        assert found["agent"] is True
        return found

    def wait(self, condition: Callable[[], object]) -> None:
        """Waits until the condition is true."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def ask(port: int, key: str = "") -> int:
    """Returns the HTTP status of a request that needs a key if the server has keys."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
        return connection.getresponse().status
    finally:
        connection.close()


def port_of(found: Any) -> int:
    """Returns the port of a server in `status`."""
    return int(found["server"].rpartition(":")[2])


def refused(done: "subprocess.CompletedProcess[str]", code: int) -> str:
    """Checks that the command failed with one line on stderr, and returns the line."""
    assert done.returncode == code, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("tinyoai: ")
    return line


def of_box(text: str) -> dict[str, str]:
    """Returns the rows of a printed table."""
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1, text
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line[0] == "|"]
    assert rows[0] == ["Property", "Value"]
    return {row[0]: row[1] for row in rows}
