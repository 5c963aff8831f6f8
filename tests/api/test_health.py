"""Health endpoints: liveness, readiness, the state of each model, and draining."""

import itertools
import json
import signal
import time
from functools import partial
from http.client import HTTPConnection

import pytest

from tests.serving import Server, serve
from tinyoai.api.health import status
from tinyoai.models.pool import State


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/v1/health/ready", "/health/"])
def test_ready(fake: Server, path: str) -> None:
    reply = fake.get(path)
    assert reply.status == 200
    assert reply.json == {"status": "ok", "models": [{"id": "fake", "state": "ready", "reason": ""}]}


def test_live(fake: Server) -> None:
    reply = fake.get("/health/live")
    assert (reply.status, reply.json) == (200, {"status": "ok"})


def test_draining_is_live_and_not_ready() -> None:
    with serve("--engine", "fake") as server:
        stream = HTTPConnection("127.0.0.1", server.port, timeout=60)
        script = '!{"text": "x", "repeat": 100000, "step_ms": 20}'
        ask = {"model": "fake", "stream": True, "messages": [{"role": "user", "content": script}]}
        stream.request("POST", "/v1/chat/completions", json.dumps(ask))
        stream.getresponse().read(1)
        # connections opened before the signal: afterwards the server accepts no new ones
        probes = [server.connect(), server.connect()]
        for probe in probes:
            probe.sendall(b"GET /health")
        server.process.send_signal(signal.SIGTERM)
        until_refused(server)
        for probe, rest, code, word in (
            (probes[0], b"", 503, b"draining"),
            (probes[1], b"/live", 200, b"ok"),
        ):
            with probe:
                probe.sendall(rest + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = b"".join(iter(partial(probe.recv, 65536), b""))
            assert answer.startswith(b"HTTP/1.1 %d " % code)
            assert b'"status":"%b"' % word in answer
        stream.close()


def until_refused(server: Server) -> None:
    """Waits until the server no longer listens."""
    while True:
        try:
            server.connect().close()
        except ConnectionRefusedError:
            return
        time.sleep(0.01)


def test_overall_health_from_the_states_of_models() -> None:
    for first, second in itertools.product(State, State):
        said = status({first, second}, draining=False)
        assert (said == "ok") == bool({State.READY, State.UNLOADED} & {first, second})
        assert status({first, second}, draining=True) == "draining"
    assert status([State.FAILED, State.LOADING], draining=False) == "loading"
    assert status([State.FAILED], draining=False) == "failed"
    assert status([], draining=False) == "failed"
