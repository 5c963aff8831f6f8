"""The server modules that one streamed chat enters: few enough for a reader to follow the request."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.serving import READY, Server, environment

MOST = 9
BESIDE = ("tinyoai.web", "tinyoai.wire", "tinyoai.frames", "tinyoai.errors")
"""Modules that do not count: HTTP, the protocol and the errors."""

_TRACED = """
import json, sys
from tinyoai.cli.main import main

entered, marks = set(), 0

def profile(frame, event, arg):
    global marks
    name = frame.f_globals.get("__name__", "")
    if event != "call" or not name.startswith("tinyoai."):
        return
    if name == "tinyoai.api.health":  # a request to /health/live begins the record and another ends it
        if frame.f_code.co_name == "live":
            marks += 1
            if marks % 2:
                entered.clear()
            else:
                with open(sys.argv[1], "w") as file:
                    json.dump(sorted(entered), file)
        return
    entered.add(name)

sys.setprofile(profile)
main(["--engine", "fake", "--port", "0"])
"""


def test_a_streamed_chat_enters_few_modules(tmp_path: Path) -> None:
    out = tmp_path / "modules.json"
    process = subprocess.Popen(
        [sys.executable, "-c", _TRACED, str(out)],
        stdout=subprocess.PIPE,
        text=True,
        env={**environment(), "PYTHONPATH": os.getcwd()},
    )
    try:
        assert process.stdout is not None
        banner = ""
        while "curl -N" not in banner:
            line = process.stdout.readline()
            assert line, banner
            banner += line
        found = READY.search(banner)
        assert found
        server = Server(process, int(found[2]), banner)
        body = {"model": "fake", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
        for _ in range(2):
            assert server.request("POST", "/v1/chat/completions", body).events[-1] == "[DONE]"
        found_sets = []
        for _ in range(5):  # background work after startup may also show up
            server.get("/health/live")
            events = server.request("POST", "/v1/chat/completions", body).events
            assert "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]) == "hello"
            server.get("/health/live")
            found_sets.append([n for n in json.loads(out.read_text()) if not n.startswith(BESIDE)])
        entered = min(found_sets, key=len)
        assert 3 <= len(entered) <= MOST, " ".join(entered)
        assert "tinyoai.api.openai.chat" in entered
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
