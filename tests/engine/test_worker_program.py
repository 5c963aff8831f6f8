"""The worker program over its socket: order of events, starts, heartbeats and exit."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tinyoai import wire
from tinyoai.engine.fake import TOKEN_MS
from tinyoai.host import subproc


def _program(prelude: str) -> list[str]:
    if not prelude:
        return ["-m", "tinyoai.engine"]
    return [
        "-c",
        f"{prelude}\nimport os, sys\nfrom tinyoai.engine.__main__ import main\nos._exit(main(int(sys.argv[1])))",
    ]


class Program:
    """A worker program and the server's end of its socket."""

    def __init__(self, load: wire.Load, *, prelude: str = "", **env: str) -> None:
        """`prelude` is Python code that runs in the program before it starts."""
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [*subproc.PYTHON, *_program(prelude), str(theirs.fileno())],
                env={**subproc.environment(), **env},
                pass_fds=(theirs.fileno(),),
                stderr=subprocess.DEVNULL,
            )
        self.socket.settimeout(30)
        self.events: list[wire.ToServer] = []
        self._reader = wire.ServerReader()
        self.send(load)
        self.until(lambda: bool(self.events))
        self.first = self.events.pop(0)

    def send(self, *messages: Any) -> None:
        """Sends one frame."""
        self.socket.sendall(wire.frame(messages))

    def until(self, condition: Any) -> None:
        """Reads events until the condition holds."""
        while not condition():
            data = self.socket.recv(1 << 16)
            assert data, "the worker closed its socket"
            self.events += [m for m in self._reader.feed(data) if not isinstance(m, wire.Heartbeat)]

    def of(self, request_id: int) -> list[str]:
        """Returns the kinds of a request's events so far."""
        return [type(e).__name__ for e in self.events if getattr(e, "id", 0) == request_id]

    def ended(self, *ids: int) -> bool:
        """Returns whether all of these requests have ended."""
        return all({"Done", "Failed"} & set(self.of(i)) for i in ids)

    def close(self) -> int:
        """Closes the socket and returns the exit code."""
        self.socket.close()
        return self.process.wait(10)


FAKE = wire.Load(path="", name="fake", engine="fake", n_slots=2)


@pytest.fixture
def program() -> Iterator[Program]:
    """A worker program that has loaded the scripted engine."""
    started = Program(FAKE)
    yield started
    started.close()


def ask(request_id: int, text: str, **fields: Any) -> wire.Request:
    """Returns a chat request."""
    conversation = wire.Conversation(messages=[wire.Message(role="user", content=text)])
    body = wire.Generate(prompt=conversation, sampling=wire.Sampling(temperature=0.0), **fields)
    return wire.Request(id=request_id, body=body)


def test_it_loads_answers_and_exits_with_its_socket(program: Program) -> None:
    assert isinstance(program.first, wire.Ready)
    assert (program.first.info.engine, program.first.n_slots, program.first.template) == ("fake", 2, "chatml")
    program.send(ask(1, "hi"))
    program.until(lambda: program.ended(1))
    assert program.of(1) == ["Started", "Queued", "Accepted", "Content", "Content", "ChoiceDone", "Done"]
    assert program.close() == 0


def test_a_grant_of_threads_counts_from_the_next_step_on(program: Program) -> None:
    def said(request_id: int) -> str:
        program.until(lambda: program.ended(request_id))
        return "".join(e.text for e in program.events if isinstance(e, wire.Content) and e.id == request_id)

    program.send(ask(1, '!{"show_threads": true}'))
    assert said(1) == "[]"
    program.send(wire.Threads(3), ask(2, '!{"show_threads": true}'), wire.Threads(0))
    assert said(2) in ("[3]", "[3, 1]")
    # also while a request runs
    program.send(ask(3, '!{"text": "x", "repeat": 3000, "step_ms": 1}'))
    program.until(lambda: "Content" in program.of(3))
    program.send(wire.Threads(2), ask(4, '!{"show_threads": true}'))
    assert said(4) == "[3, 1, 2]"
    assert not program.ended(3)
    program.send(wire.Cancel(3))
    program.until(lambda: program.ended(3))


def test_a_model_that_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"")
    refused = Program(wire.Load(path=str(path), name="m", engine="ctransformers"))
    assert isinstance(refused.first, wire.LoadFailed)
    assert "empty" in refused.first.message
    assert refused.process.wait(10) == 3
    refused.close()


def test_tokenize_and_detokenize_end_in_done(program: Program) -> None:
    program.send(
        wire.Request(id=1, body=wire.Tokenize(prompt=[wire.Text("ab")])),
        wire.Request(id=2, body=wire.Detokenize(ids=[97])),
        wire.Request(id=3, body=wire.Detokenize(ids=[9999])),
    )
    program.until(lambda: program.ended(1, 2, 3))
    assert program.of(1) == ["Started", "Tokens", "Done"]
    assert program.of(2) == ["Started", "PlainText", "Done"]
    assert program.of(3) == ["Started", "Failed"]


def test_started_arrives_before_a_tokenizer_that_crashes(program: Program) -> None:
    program.send(ask(1, '!{"tokenize_kill": true}'), *[ask(i, "innocent") for i in range(2, 30)])
    with pytest.raises((AssertionError, ConnectionResetError)):
        program.until(lambda: program.ended(1))
    assert program.of(1) == ["Started"]
    # the others can be sent to another worker, except those that were about to run
    assert sum(program.of(i) == [] for i in range(2, 30)) >= 24
    assert program.process.wait(10) == -signal.SIGKILL


def test_slow_tokenizing_delays_no_running_answer_and_no_cancel(program: Program) -> None:
    program.send(ask(1, '!{"text": "x", "repeat": 3000, "step_ms": 1}'))
    program.until(lambda: "Content" in program.of(1))
    program.send(ask(2, '!{"tokenize_ms": 60000}'))
    program.until(lambda: "Started" in program.of(2))
    before = len(program.of(1))
    program.until(lambda: len(program.of(1)) > before + 20)
    program.send(wire.Cancel(1), wire.Cancel(2))
    program.until(lambda: program.ended(1, 2))
    assert program.of(2) == ["Started", "Failed"]


def test_the_tokenizer_s_stack_takes_deep_recursion() -> None:
    code = (
        "import threading; from tinyoai.engine.__main__ import TOKENIZER_STACK as size\n"
        "import re, sys; threading.stack_size(size)\n"
        "sys.setrecursionlimit(10**6)\n"
        "def deep(n): return 0 if n == 0 else 1 + [*map(deep, (n - 1,))][0]\n"
        "t = threading.Thread(target=lambda: print(deep(20_000))); t.start(); t.join()"
    )
    done = subprocess.run(
        [*subproc.PYTHON, "-c", code], env=subproc.environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "20000", done.stderr[-300:]


def test_a_slow_engine_s_steps_stay_short_for_any_batch_size() -> None:
    """The engine evaluates two tokens a second, and a batch may hold 512 prompt tokens."""
    load = wire.Load(path="", name="slow", engine="fake", n_slots=1, n_batch=512)
    slow = Program(load, **{TOKEN_MS: "500"})
    assert isinstance(slow.first, wire.Ready)
    assert slow.first.max_step_s == 1.0
    slow.send(ask(1, "x" * 300))
    slow.until(lambda: "Accepted" in slow.of(1))
    quiet, heard = 0.0, time.monotonic()
    slow.socket.settimeout(10)
    for _ in range(4):
        assert slow.socket.recv(1 << 16)  # a Progress or a Heartbeat
        quiet, heard = max(quiet, time.monotonic() - heard), time.monotonic()
    assert quiet < 9.0  # far less than the 256 s that the whole prompt would take in one step
    os.kill(slow.process.pid, signal.SIGKILL)
    slow.close()
