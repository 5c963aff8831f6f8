"""Running servers of a data directory: one file run/PID.json for each.

A file counts only while its process lives: same pid, same start time, same user. Pids are reused, and anyone who
can write to the folder could name any pid.
"""

import contextlib
import os
from pathlib import Path

import msgspec

from tinyoai.errors import UsageError
from tinyoai.host import datadir

FOLDER = "run"


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """The identity of a process: a reused pid has another start time."""

    pid: int
    start: int
    """Start time in clock ticks since the machine booted."""


class InstanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a server that is ready. Sizes are in bytes, lengths in tokens."""

    process: Process
    version: str
    host: str
    """The address to connect to; the server may listen on all addresses."""
    port: int
    url: str = msgspec.field(name="server")
    """Scheme, host and port."""
    since: float
    """When the server became ready, in seconds of Unix time."""
    grace: float
    """Seconds that running answers may take when the server stops."""
    model: str
    architecture: str
    quantization: str
    n_ctx: int
    n_slots: int
    file_size: int
    engine: str
    engine_version: str = ""
    flash_attention: bool = False
    n_gpu_layers: int

    @property
    def base_url(self) -> str:
        """The base URL for clients."""
        return f"{self.url}/v1"


def current_process() -> Process:
    """This process. Raises UsageError if /proc does not show it."""
    process = process_of(os.getpid())
    if process is None:
        raise UsageError("/proc does not show this process", exit_code=1)
    return process


def process_of(pid: int) -> Process | None:
    """The process that has this pid now; None if there is none or it has ended."""
    start = _start_ticks(pid)
    return None if start is None else Process(pid=pid, start=start)


def alive(process: Process) -> bool:
    """Returns whether the process runs and belongs to this user."""
    return process.pid > 0 and _start_ticks(process.pid) == process.start and _is_mine(process.pid)


def announce(record: InstanceRecord, data_dir: Path) -> Path:
    """Writes the record's file and returns its path, for `withdraw`. Raises UsageError."""
    path = data_dir / FOLDER / f"{record.process.pid}.json"
    datadir.write(path, msgspec.json.encode(record))
    return path


def withdraw(path: Path) -> None:
    """Removes a record's file; does nothing if it cannot."""
    with contextlib.suppress(OSError):
        path.unlink()


def servers(data_dir: Path) -> list[InstanceRecord]:
    """The running servers, the oldest first. Removes the files of dead ones."""
    found = []
    try:
        paths = sorted((data_dir / FOLDER).glob("[0-9]*.json"))
    except OSError:
        return []
    for path in paths:
        try:
            record = msgspec.json.decode(path.read_bytes(), type=InstanceRecord)
        except FileNotFoundError:
            continue  # the server has just ended
        except (OSError, msgspec.DecodeError, UnicodeError):
            # a newer version may have written it: keep the file while the process lives
            if path.stem.isdecimal() and _start_ticks(int(path.stem)) is None:
                withdraw(path)
            continue
        if alive(record.process) and path.stem == str(record.process.pid):
            found.append(record)
        else:
            withdraw(path)
    return sorted(found, key=lambda record: record.since)


def family(pid: int) -> list[int]:
    """The pids of a process and of all its descendants."""
    found = [pid]
    for parent in found:  # the list grows during the loop
        with contextlib.suppress(OSError, ValueError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [
                    int(child) for child in (task / "children").read_text().split() if int(child) not in found
                ]
    return found


def _start_ticks(pid: int) -> int | None:
    """A process's start time in clock ticks; None if there is no such process or it is a zombie."""
    try:
        # the name in parentheses may itself contain parentheses and spaces
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _is_mine(pid: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.geteuid()
    except OSError:
        return False
