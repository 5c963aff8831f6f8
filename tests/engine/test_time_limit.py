"""The limit on time: an exception in the code, never after it, and the end of the process as the last resort."""

import signal
import subprocess
import time

import pytest

from tinyoai.engine.time_limit import TimedOut, TimeLimit
from tinyoai.host import subproc


def test_a_value_and_an_error_pass_through() -> None:
    limit = TimeLimit(60)
    assert [limit.run(lambda i=i: i * 2, 60) for i in range(3)] == [0, 2, 4]  # type: ignore[misc]
    with pytest.raises(ZeroDivisionError):
        limit.run(lambda: 1 // 0, 60)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_endless_code_is_ended_whatever_it_catches() -> None:
    limit = TimeLimit(60)

    def endless() -> None:
        while True:
            try:
                while True:
                    pass
            except Exception:
                continue

    for _ in range(3):
        with pytest.raises(TimedOut, match=r"did not end within 0\.05 seconds"):
            limit.run(endless, 0.05)
    assert limit.run(lambda: 5, 60) == 5


def test_no_exception_arrives_late() -> None:
    """Functions that end just when their time is up, many times."""
    limit = TimeLimit(60)

    def spin(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass

    ended = {True: 0, False: 0}
    for i in range(80):
        try:
            # another thread gets a turn every 5 ms: some functions end before their time is up, some after
            limit.run(lambda: spin(0.02), 0.02 * (0.25 + i % 20 / 16))
            ended[True] += 1
        except TimedOut:
            ended[False] += 1
        spin(0.01)  # an exception on its way would be raised here
    assert all(ended.values())


def test_a_call_that_nothing_interrupts_ends_the_process() -> None:
    code = (
        "from tinyoai.engine.time_limit import TimeLimit\n"
        "a, b = [1], [1]\n"
        "for i in range(60): a, b = [a, a], [b, b]\n"
        "TimeLimit(0.5).run(lambda: a == b, 0.1)"
    )
    done = subprocess.run([*subproc.PYTHON, "-c", code], env=subproc.environment(), timeout=60)
    assert done.returncode == -signal.SIGALRM
    assert "chat template" in subproc.describe_exit(done.returncode)
