"""The agent, a server in the background: starts and stops its process, and reads its log.

Signals go only to a process that `instances` and its command line confirm to be the agent. Files in the data
directory: agent.json, the record of the last start, and agent.log.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from tinyoai.config.options import OPTIONS
from tinyoai.errors import UsageError
from tinyoai.host import datadir, file_lock, instances, subproc
from tinyoai.host.instances import InstanceRecord, Process

RECORD, LOG, LOCK = "agent.json", "agent.log", "agent.lock"
MAX_LOG = 1 << 20
"""Bytes. A longer log is renamed at the next start."""
SPARE_S = 10.0
"""Seconds after the grace time, or after the load timeout, until the agent counts as hung."""
PROGRESS_S = 1.0
"""A longer wait is announced."""
POLL_S = 0.05

_PROGRAM = [os.fsencode(word) for word in (*subproc.PYTHON[1:], "-m", "tinyoai", "serve")]
"""The agent's command line after the interpreter."""

_BOOLEAN = {option.name for option in OPTIONS if isinstance(option.default, bool)}
"""Options whose flag has no value."""

Flags = Mapping[str, str | Sequence[str]]
"""Flags of serve, by the option's name."""


class AgentRecord(msgspec.Struct, kw_only=True):
    """The last start of the agent. It outlives the process."""

    process: Process
    flags: dict[str, str | Sequence[str]]
    had_api_keys: bool = msgspec.field(name="keyed")
    """True if the agent was started with API keys, which are not stored."""


def read_record(data_dir: Path) -> AgentRecord | None:
    """The record of the last start; None if there was none. Raises UsageError."""
    path = data_dir / RECORD
    try:
        return msgspec.json.decode(path.read_bytes(), type=AgentRecord)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.DecodeError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"cannot read {path}: {reason}; if no agent runs, move the file away", exit_code=1
        ) from None


def current(data_dir: Path) -> Process | None:
    """The agent's process; None if it does not run."""
    record = read_record(data_dir)
    return record.process if record is not None and _alive(record.process) else None


def _alive(process: Process) -> bool:
    """Returns whether the process runs and is an agent. The record alone could name any process."""
    try:
        words = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return words[1 : 1 + len(_PROGRAM)] == _PROGRAM and instances.alive(process)


def _instance(data_dir: Path, process: Process) -> InstanceRecord | None:
    """The process's own record; None until it is ready."""
    return next((found for found in instances.servers(data_dir) if found.process == process), None)


# -- starting ----------------------------------------------------------------------------------------


def start(
    data_dir: Path, flags: Flags, variables: Mapping[str, str], *, has_api_keys: bool, load_timeout: float
) -> tuple[InstanceRecord, bool]:
    """Starts the agent unless it runs, and waits until it is ready. Returns its record and whether it is new.

    `variables` are added to its environment, since other users can read command lines. Raises UsageError with the
    agent's own message if it ends or is not ready in time.
    """
    with file_lock.held(data_dir / LOCK):
        process = current(data_dir)
        if process is None:
            return _start(data_dir, flags, variables, has_api_keys, load_timeout), True
        record = _instance(data_dir, process)
        if record is None:
            raise UsageError(
                f"the agent (pid {process.pid}) runs, but is not ready; see tinyoai agent logs", exit_code=1
            )
        return record, False


def _start(
    data_dir: Path, flags: Flags, variables: Mapping[str, str], has_api_keys: bool, load_timeout: float
) -> InstanceRecord:
    previous = read_record(data_dir)
    log = _open_log(data_dir / LOG)
    with open(log, "ab", buffering=0) as file:
        log_start = os.fstat(log).st_size
        child = subprocess.Popen(
            [subproc.PYTHON[0], *map(os.fsdecode, _PROGRAM), *_command_line(flags)],
            cwd="/",
            env={**subproc.environment(), **variables, "TINYOAI_HOME": str(data_dir)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        process = instances.process_of(child.pid)
        if process is not None:
            record = AgentRecord(process=process, flags=dict(flags), had_api_keys=has_api_keys)
            _write_record(data_dir, record)
        return _wait_ready(data_dir, child, log_start, load_timeout + SPARE_S)
    except BaseException:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(SPARE_S)
        child.kill()
        child.wait()
        _write_record(data_dir, previous)  # a later restart uses the last flags that worked
        raise


def _write_record(data_dir: Path, record: AgentRecord | None) -> None:
    if record is not None:
        datadir.write(data_dir / RECORD, msgspec.json.encode(record))
    else:
        (data_dir / RECORD).unlink(missing_ok=True)


def _wait_ready(
    data_dir: Path, child: "subprocess.Popen[bytes]", log_start: int, timeout: float
) -> InstanceRecord:
    """The child's record once it is ready. Raises UsageError if it ends or takes longer than `timeout`."""
    for _ in _poll(timeout, f"starting; the log is {data_dir / LOG} ..."):
        process = instances.process_of(child.pid)
        if process is not None and (record := _instance(data_dir, process)):
            child.returncode = 0  # init adopts the process: Popen must not warn that it still runs
            for line in _log_lines(data_dir / LOG, log_start):
                if " WARNING " in line:
                    print(line, file=sys.stderr)
            return record
        if child.poll() is not None:
            raise UsageError(_exit_reason(data_dir / LOG, log_start, child.returncode), exit_code=1)
    raise UsageError(f"the agent was not ready within {timeout:g} s; see {data_dir / LOG}", exit_code=1)


def _command_line(flags: Flags) -> list[str]:
    """The flags as words of a command line."""
    words = []
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if name in _BOOLEAN:
            words.append(flag)
            continue
        for text in [value] if isinstance(value, str) else value:
            words.append(f"{flag}={text}")
    return words


def _open_log(path: Path) -> int:
    """A descriptor that appends to the log; a long log is renamed first. Raises UsageError."""
    try:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > MAX_LOG:
                os.replace(path, path.with_name(path.name + ".1"))
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        os.write(log, time.strftime("---- %Y-%m-%d %H:%M:%S tinyoai agent start\n").encode())
        return log
    except OSError as error:
        raise datadir.cannot_write(path, error) from None


def _log_lines(path: Path, begin: int) -> list[str]:
    """The log's lines from a byte offset on."""
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            return file.read(MAX_LOG).decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def _exit_reason(path: Path, log_start: int, code: int) -> str:
    """Returns the reason why the agent ended: its own error message if it logged one."""
    for line in reversed(_log_lines(path, log_start)):
        if line.startswith("tinyoai: "):
            return line.removeprefix("tinyoai: ")
    return f"the agent {subproc.describe_exit(code)} before it was ready; see {path}"


def _poll(timeout: float, announcement: str) -> Iterator[None]:
    """Yields every POLL_S for `timeout` seconds, and once more. Prints the announcement if that takes long."""
    begin, announced = time.monotonic(), False
    while (waited := time.monotonic() - begin) <= timeout + POLL_S:
        yield
        if not announced and waited > PROGRESS_S:
            print(announcement, file=sys.stderr, flush=True)
            announced = True
        time.sleep(POLL_S)


# -- stopping ----------------------------------------------------------------------------------------


def stop(data_dir: Path) -> str:
    """Stops the agent, and kills it if it does not end within its grace time. Returns a sentence for the user."""
    process = current(data_dir)
    if process is None:
        return "no agent is running"
    record = _instance(data_dir, process)
    grace = record.grace if record is not None else 0.0
    _send(process, signal.SIGTERM)
    if _ends(process, grace + SPARE_S, f"waiting up to {grace:g} s for running answers to finish ..."):
        return f"the agent (pid {process.pid}) has stopped"
    _send(process, signal.SIGKILL)
    if not _ends(process, SPARE_S, f"waiting for pid {process.pid} to end ..."):
        raise UsageError(f"cannot stop the agent (pid {process.pid})", exit_code=1)
    instances.servers(data_dir)  # removes the record that a killed server leaves
    return f"the agent (pid {process.pid}) did not stop within {grace + SPARE_S:g} s and was killed"


def _ends(process: Process, timeout: float, announcement: str) -> bool:
    return any(not _alive(process) for _ in _poll(timeout, announcement))


def _send(process: Process, number: signal.Signals) -> None:
    if _alive(process):  # the pid may belong to another process by now
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


# -- log ---------------------------------------------------------------------------------------------


def logs(data_dir: Path, n_lines: int, *, follow: bool) -> Iterator[bytes]:
    """Yields the log's last lines; with `follow` also new ones, across renames, without end. Raises UsageError."""
    path = data_dir / LOG
    try:
        file = open(path, "rb")  # noqa: SIM115 # replaced after a rename
    except FileNotFoundError:
        raise UsageError("no log: no agent was ever started here", exit_code=1) from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", exit_code=1) from None
    try:
        file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_LOG))
        yield b"".join(file.read().splitlines(keepends=True)[-n_lines:] if n_lines else [])
        while follow:
            if data := file.read(1 << 16):
                yield data
                continue
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino != os.fstat(file.fileno()).st_ino:
                    new = open(path, "rb")  # noqa: SIM115
                    file.close()
                    file = new
                    continue
            time.sleep(4 * POLL_S)
    finally:
        file.close()
