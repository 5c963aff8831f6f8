"""The child process that trains: start it, read its events, stop it."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from tinyoai.finetune import protocol
from tinyoai.finetune.protocol import ProgressEvent
from tinyoai.host import subproc
from tinyoai.host.process import PIPE, Process

STOP_S = 2.0
"""Seconds that a process has to exit by itself before it is killed."""


class TrainingProcess:
    """One run of `python -m tinyoai.finetune FOLDER`."""

    def __init__(self, folder: Path, log: Path) -> None:
        """stderr is appended to `log`."""
        self._folder, self._log = folder, log
        self._process: Process | None = None

    async def run(self, on_event: Callable[[ProgressEvent], Awaitable[None]]) -> int:
        """Run to the end and return the exit code. Cancelling kills the process. Raises OSError."""
        lines: asyncio.Queue[bytes | None] = asyncio.Queue()
        with open(self._log, "ab") as log:
            self._process = process = Process(
                [*subproc.PYTHON, "-m", "tinyoai.finetune", str(self._folder)],
                env=subproc.environment(),
                stdin=PIPE,
                stdout=PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches a whole process group; the server decides
            )
        process.attach(on_line=lines.put_nowait, on_exit=lambda code: lines.put_nowait(None))
        try:
            while (line := await lines.get()) is not None:
                try:
                    event = protocol.read_event(line)
                except msgspec.MsgspecError:
                    continue
                await on_event(event)
            return await process.wait()
        finally:
            process.kill()
            await process.wait()

    def stop(self) -> None:
        """Make the process exit. Does not wait for it."""
        if self._process is not None:
            self._process.close_stdin()  # it exits when stdin closes
            asyncio.get_running_loop().call_later(STOP_S, self._process.kill)


def describe_exit(code: int, log_lines: Sequence[str]) -> str:
    """Returns the reason for the end of a process that reported neither success nor failure."""
    text = f"its process {subproc.describe_exit(code)}"
    if code < 0:
        return text + ("; use a smaller batch_size or max_length" if code == -signal.SIGKILL else "")
    last = next((line for line in reversed(log_lines) if line.strip()), "")
    return text + (f": {last}" if last else "")
