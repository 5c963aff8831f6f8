"""Which servers run on a data directory: a small file for each, and whether its process still lives.

Owns the files `run/PID.json` and the reading of /proc that tells a server from another process that was given
the same number later. A file alone is never believed: a number counts only if its process started when the
file says, belongs to this user and has not ended. It must not know what a server does, nor end one.
"""

import contextlib
import os
from pathlib import Path

import msgspec

from tinyoai.errors import UsageError
from tinyoai.host import datadir

FOLDER = "run"


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """One process, past all doubt: numbers are used again, but not with the same start."""

    pid: int
    start: int
    """When it started, in the kernel's clock ticks since the machine did."""


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """What a server that is ready says of itself. Sizes are in bytes, lengths in tokens, times in seconds."""

    process: Process
    version: str
    host: str
    """Where it is to be called; not what it listens on, which may be every address."""
    port: int
    server: str
    """Scheme, host and port as a client writes them."""
    since: float
    """When it was ready, as seconds of Unix time."""
    grace: float
    model: str
    architecture: str
    quantization: str
    n_ctx: int
    n_slots: int
    file_size: int
    engine: str
    n_gpu_layers: int

    @property
    def base_url(self) -> str:
        """What clients are configured with."""
        return f"{self.server}/v1"


def this() -> Process:
    """The process that asks. Raises UsageError where /proc says nothing."""
    start = _start(os.getpid())
    if start is None:
        raise UsageError("/proc does not show this process", exit_code=1)
    return Process(pid=os.getpid(), start=start)


def of(pid: int) -> Process | None:
    """A child that was just started; None if it is gone."""
    start = _start(pid)
    return None if start is None else Process(pid=pid, start=start)


def alive(process: Process) -> bool:
    """Whether it runs, is the one that is meant, and belongs to this user."""
    return process.pid > 0 and _start(process.pid) == process.start and _ours(process.pid)


def announce(server: Running, place: Path) -> Path:
    """Writes a server's file into the data directory; the file, to be removed at its end. Raises UsageError."""
    path = place / FOLDER / f"{server.process.pid}.json"
    datadir.write(path, msgspec.json.encode(server))
    return path


def withdraw(path: Path) -> None:
    """Removes a server's file, whatever is wrong with it."""
    with contextlib.suppress(OSError):
        path.unlink()


def servers(place: Path) -> list[Running]:
    """The servers that run on a data directory, the oldest first. Files of those that are gone are removed."""
    found = []
    try:
        paths = sorted((place / FOLDER).glob("[0-9]*.json"))
    except OSError:
        return []
    for path in paths:
        try:
            server = msgspec.json.decode(path.read_bytes(), type=Running)
        except FileNotFoundError:
            continue  # it has just ended
        except (OSError, msgspec.DecodeError, UnicodeError):
            if path.stem.isdecimal() and _start(int(path.stem)) is None:
                withdraw(path)  # whatever it was, its process is gone; a newer version's may well live
            continue
        if alive(server.process) and path.stem == str(server.process.pid):
            found.append(server)
        else:
            withdraw(path)
    return sorted(found, key=lambda server: server.since)


def family(pid: int) -> list[int]:
    """A process, its children and theirs."""
    found = [pid]
    for parent in found:  # it grows while it is walked
        with contextlib.suppress(OSError, ValueError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [
                    int(child) for child in (task / "children").read_text().split() if int(child) not in found
                ]
    return found


def _start(pid: int) -> int | None:
    """A process's start in clock ticks; None if there is none, or it has ended and only waits to be collected."""
    try:
        # the name in parentheses may hold anything, parentheses and blanks too
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _ours(pid: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.geteuid()
    except OSError:
        return False
