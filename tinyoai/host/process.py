"""Child processes that are started without an event loop and then watched from one.

`Process(...)` starts the child at once, so it can run before asyncio is imported. `attach` watches it from the
running loop, asyncio's or uvloop's: its lines of output and its exit. A child that is gone is always reaped and
every descriptor is closed.
"""

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from subprocess import DEVNULL, PIPE
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

__all__ = ["DEVNULL", "PIPE", "Process"]

MAX_LINE = 1 << 16
"""Bytes. A longer line of output is dropped."""
_CHUNK = 1 << 16
_LAST_CHUNKS = 16
"""Reads after the exit, at most: another process may hold the pipe and write forever."""


class _Lines:
    """Splits a byte stream into lines and drops lines that are too long."""

    __slots__ = ("_dropping", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._dropping = False

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that these bytes complete, without their newlines."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if lines and self._dropping:
            del lines[0]
            self._dropping = False
        if len(self._rest) > MAX_LINE or self._dropping:
            self._rest, self._dropping = b"", True
        return [line for line in lines if len(line) <= MAX_LINE]

    def end(self) -> list[bytes]:
        """The last line, if the stream did not end with a newline."""
        return [self._rest] if self._rest else []


class Process:
    """A child process. At most one of stdout and stderr may be PIPE; `attach` reads it."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        stdin: int = DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        start_new_session: bool = False,
    ) -> None:
        """Starts the child. Raises OSError if it cannot be started."""
        self._popen = subprocess.Popen(
            argv,
            bufsize=0,
            env=env,
            pass_fds=pass_fds,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=start_new_session,
        )
        self._output = self._popen.stdout or self._popen.stderr
        self._lines = _Lines()
        self._on_line: Callable[[bytes], None] | None = None
        self._on_exit: Callable[[int], None] | None = None
        # only while attached
        self._loop: asyncio.AbstractEventLoop | None = None
        self._exited: asyncio.Future[int] | None = None
        self._pidfd = -1

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while the exit was not seen."""
        return self._popen.returncode

    # -- watching --------------------------------------------------------------------------------

    def attach(
        self,
        *,
        on_line: Callable[[bytes], None] | None = None,
        on_exit: Callable[[int], None] | None = None,
    ) -> None:
        """Watches the child from the running loop: once in its life, also after its exit.

        `on_line` gets each line of the piped output. `on_exit` gets the exit code after the last line.
        """
        import asyncio

        self._loop = loop = asyncio.get_running_loop()
        self._exited = loop.create_future()
        self._on_line, self._on_exit = on_line, on_exit
        if self._output is not None:
            os.set_blocking(self._output.fileno(), False)
            loop.add_reader(self._output.fileno(), self._read)
        try:
            self._pidfd = os.pidfd_open(self.pid)
            loop.add_reader(self._pidfd, self._finish)
        except ProcessLookupError:  # it was reaped already, by a kill
            loop.call_soon(self._finish)
        except (OSError, AttributeError):  # no such system call here
            threading.Thread(target=self._wait_in_thread, args=(loop,), daemon=True).start()

    async def wait(self) -> int:
        """The exit code, once the child is gone. It must be attached."""
        import asyncio

        assert self._exited is not None, "attach first"
        return await asyncio.shield(self._exited)

    # -- ending ----------------------------------------------------------------------------------

    def terminate(self) -> None:
        """Sends SIGTERM. Harmless once the child is gone."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.terminate()

    def kill(self) -> None:
        """Sends SIGKILL. Harmless once the child is gone."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.kill()

    def close_stdin(self) -> None:
        """Closes a piped stdin, which asks many programs to end."""
        if self._popen.stdin is not None:
            self._popen.stdin.close()

    async def stop(self, grace_s: float, ask: Callable[[], None] | None = None) -> bool:
        """Asks the child to end, by SIGTERM or by `ask`, and kills it after `grace_s` seconds.

        Returns true if it ended before it was killed. It must be attached.
        """
        import asyncio

        assert self._exited is not None, "attach first"
        if self._exited.done():
            return True
        (ask or self.terminate)()
        # not asyncio.timeout, which Python 3.11.2, Debian's, loses on a task that was cancelled, as this may be
        await asyncio.wait({self._exited}, timeout=grace_s)
        if self._exited.done():
            return True
        self.kill()
        # not forever: a process in an uninterruptible call survives SIGKILL until that returns
        await asyncio.wait({self._exited}, timeout=grace_s)
        return False

    def close(self) -> None:
        """Kills the child if it still runs, reaps it and closes every descriptor. Blocks for a moment."""
        self.kill()
        self._popen.wait()
        self._finish()

    # -- inside ----------------------------------------------------------------------------------

    def _read(self) -> bool:
        """Reads once; false if nothing is left for now."""
        assert self._output is not None
        try:
            data = os.read(self._output.fileno(), _CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._close_output()
            return False
        for line in self._lines.feed(data):
            self._emit(line)
        return True

    def _emit(self, line: bytes) -> None:
        if self._on_line is not None:
            self._on_line(line)

    def _close_output(self) -> None:
        output, self._output = self._output, None
        if output is None:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(output.fileno())
        output.close()
        for line in self._lines.end():
            self._emit(line)

    def _wait_in_thread(self, loop: "asyncio.AbstractEventLoop") -> None:
        self._popen.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._finish)

    def _finish(self) -> None:
        """The child has exited: reads the rest of its output, closes everything and reports the exit code."""
        code = self._popen.poll()
        if code is None or (self._exited is not None and self._exited.done()):
            return
        if self._loop is not None and not self._loop.is_closed():
            for _ in range(_LAST_CHUNKS):
                if self._output is None or not self._read():
                    break
        self._close_output()
        self.close_stdin()
        if self._pidfd >= 0:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._exited is not None and self._loop is not None and not self._loop.is_closed():
            self._exited.set_result(code)
            if self._on_exit is not None:
                self._on_exit(code)
