"""Child processes under both event loops: their lines, their exit, and that nothing of them remains."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from tinyoai.host import process as module
from tinyoai.host.process import DEVNULL, MAX_LINE, PIPE, Process

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop", "no pidfd"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a test in each kind of loop, and checks that no descriptor is left open."""
    if request.param == "no pidfd":
        monkeypatch.delattr(os, "pidfd_open")

    def run(work: Coroutine[Any, Any, None]) -> None:
        factory = uvloop.new_event_loop if request.param == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.sleep(0))  # uvloop's first loop opens descriptors for all later ones
        before = set(os.listdir("/proc/self/fd"))
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(work, 30))
        assert set(os.listdir("/proc/self/fd")) <= before

    return run


def python(code: str, **options: Any) -> Process:
    """Returns the command of a child that runs this code."""
    return Process([sys.executable, "-S", "-c", code], **options)


def is_gone(pid: int) -> bool:
    """Returns whether the process was reaped."""
    return not os.path.exists(f"/proc/{pid}")


def test_lines_and_exit_code_of_a_child_started_before_the_loop(run: Run) -> None:
    child = python(
        "import sys; print('one\\n\\ntwo\\nrest', end='', file=sys.stderr); sys.exit(7)", stderr=PIPE
    )
    lines: list[bytes] = []
    codes: list[int] = []

    async def body() -> None:
        child.attach(on_line=lines.append, on_exit=codes.append)
        assert await child.wait() == 7
        assert await child.wait() == 7

    run(body())
    assert lines == [b"one", b"", b"two", b"rest"]
    assert codes == [7]
    assert child.returncode == 7
    assert is_gone(child.pid)


def test_a_long_line_is_dropped_and_the_next_is_not(run: Run) -> None:
    lines: list[bytes] = []

    async def body() -> None:
        child = python(f"print('a'); print('x' * {5 * MAX_LINE}); print('b')", stdout=PIPE)
        child.attach(on_line=lines.append)
        await child.wait()

    run(body())
    assert lines == [b"a", b"b"]


def test_attach_after_the_child_was_killed_and_reaped(run: Run) -> None:
    child = python("import time; time.sleep(60)", stderr=PIPE)
    child.kill()
    child._popen.wait()

    async def body() -> None:
        child.attach()
        assert await child.wait() == -signal.SIGKILL
        child.kill()
        child.terminate()

    run(body())


@pytest.mark.parametrize("gentle", [True, False])
def test_stop_is_gentle_first(run: Run, gentle: bool) -> None:
    async def body() -> None:
        ignore = "" if gentle else "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        ready = asyncio.Event()
        child = python(
            f"import signal, time; {ignore} print('up', flush=True); time.sleep(60)",
            stdout=PIPE,
            stdin=DEVNULL,
        )
        child.attach(on_line=lambda line: ready.set())
        await ready.wait()
        assert await child.stop(30 if gentle else 0.05) == gentle
        assert await child.wait() == -(signal.SIGTERM if gentle else signal.SIGKILL)
        assert is_gone(child.pid)
        assert await child.stop(1)

    run(body())


def test_a_child_that_ends_with_its_stdin(run: Run) -> None:
    async def body() -> None:
        child = python("import sys; sys.stdin.read(); sys.exit(3)", stdin=PIPE)
        child.attach()
        assert await child.stop(30, child.close_stdin)
        assert child.returncode == 3

    run(body())


def test_a_grandchild_that_holds_the_pipe_does_not_hold_up_the_exit(run: Run) -> None:
    async def body() -> None:
        lines: list[bytes] = []
        child = python(
            "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)", stdout=PIPE
        )
        child.attach(on_line=lines.append)
        assert await child.wait() == 0
        os.kill(int(lines[0]), signal.SIGKILL)

    run(body())


@pytest.mark.parametrize("attached", [True, False])
def test_close_leaves_nothing(run: Run, attached: bool) -> None:
    async def body() -> None:
        child = python("import time; time.sleep(60)", stdin=PIPE, stderr=PIPE)
        if attached:
            child.attach()
        child.close()
        child.close()
        assert is_gone(child.pid)
        if attached:
            assert await child.wait() == -signal.SIGKILL

    run(body())


def test_a_program_that_does_not_exist() -> None:
    with pytest.raises(FileNotFoundError):
        Process(["/nonexistent"])


def test_its_import_costs_no_event_loop() -> None:
    code = f"import sys, {module.__name__}, tinyoai.models.spawn; sys.exit('asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
