"""The worker program writes conversations while it is idle and before it ends, and a kill spoils nothing."""

import contextlib
import itertools
import subprocess
import time
from pathlib import Path

import pytest

from tests import architectures, fixtures, llama_server
from tests.engine.test_worker_program import Program
from tinyoai import wire

IDLE = "from tinyoai.engine import saving\nsaving.IDLE_S, saving.KEY_IDLE_S = 0.4, 0.1"
IDS = itertools.count(1)
STORY = "The keeper of the lighthouse counts the ships that pass in the night. " * 12


@pytest.fixture
def load(tmp_path: Path) -> wire.Load:
    """The load of a small model with a folder for its conversations."""
    if not llama_server.installed():
        fixtures.absent("xllamacpp is not installed: run `make test`")
    return wire.Load(
        path=str(architectures.model("llama")), name="m", engine="llamacpp", n_ctx=2048, n_slots=2, n_batch=64,
        n_threads=1, cache_ram=64 << 20, cache_disk=1 << 30, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def ask(program: Program, text: str = STORY, **fields: object) -> tuple[str, int]:
    """Returns the answer, and how many tokens of the prompt were reused."""
    request = generate(text, **fields)
    program.send(request)
    program.until(lambda: program.ended(request.id))
    assert "Failed" not in program.of(request.id), program.events
    found = [e for e in program.events if getattr(e, "id", 0) == request.id]
    text = "".join(e.text for e in found if isinstance(e, wire.Content))
    return text, next(e.n_cached for e in found if isinstance(e, wire.Accepted))


def generate(text: str, **fields: object) -> wire.Request:
    prompt = wire.Conversation(messages=[wire.Message(role="user", content=text)])
    body = wire.Generate(**{
        "prompt": prompt, "sampling": wire.Sampling(temperature=0.0), "max_tokens": 5, "ignore_eos": True, **fields
    })  # fmt: skip
    return wire.Request(id=next(IDS), body=body)


def files(load: wire.Load) -> list[Path]:
    return sorted(Path(load.cache_dir).glob("*.kv"))


def wait(program: Program, load: wire.Load, n: int) -> None:
    deadline = time.monotonic() + 30
    while len(files(load)) != n:
        assert program.process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_idle_worker_writes_and_a_killed_one_has_lost_nothing(load: wire.Load) -> None:
    program = Program(load, prelude=IDLE)
    expected, n_cached = ask(program)
    assert n_cached == 0
    assert files(load) == []  # not within a request
    wait(program, load, 1)
    ask(program, f"Another one. {STORY}")
    wait(program, load, 2)
    program.process.kill()
    program.close()
    program = Program(load)
    answer, n_cached = ask(program)
    assert (answer, n_cached > 150) == (expected, True)
    program.close()


def test_a_shutdown_saves_also_while_an_answer_runs(load: wire.Load) -> None:
    program = Program(load)
    ask(program)
    running = generate(f"A long answer. {STORY}", max_tokens=1500)
    program.send(running)
    program.until(lambda: "Content" in program.of(running.id))
    begin = time.monotonic()
    program.send(wire.Shutdown())
    assert program.process.wait(30) == 0
    assert time.monotonic() - begin < wire.SAVE_S
    assert len(files(load)) == 2
    program.socket.close()


def test_without_a_folder_a_shutdown_is_immediate(load: wire.Load) -> None:
    program = Program(
        wire.Load(path=load.path, name="m", engine="llamacpp", n_ctx=512, n_slots=1, n_threads=1)
    )
    program.send(wire.Shutdown())
    assert program.process.wait(5) == 0
    program.socket.close()


def test_a_worker_killed_while_it_saves_leaves_nothing_wrong(load: wire.Load) -> None:
    program = Program(load)
    texts = [STORY, f"Another. {STORY}"]
    expected = [ask(program, text)[0] for text in texts]
    program.process.kill()
    program.close()
    for delay in (0.05, 0.2, 0.3, 10.0):
        program = Program(load)
        for text, answer in zip(texts, expected, strict=True):
            assert ask(program, text)[0] == answer
        program.send(wire.Shutdown())
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.process.wait(delay)
        program.process.kill()
        program.close()
    program = Program(load)
    assert all(ask(program, text)[1] > 150 for text in texts)  # the last one had its time
    program.close()
