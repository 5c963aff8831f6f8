"""The server in the background: starting it, ending it, its log.

Owns the files `agent.json`, which says what was started and how, and `agent.log`, and the only signals that are
sent to a process by its number: never to one that `running` does not vouch for, and never to a server that was
started by hand. It must not know what the flags mean, nor how serving works.
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

from tinyoai.errors import UsageError
from tinyoai.host import datadir, instances, subproc
from tinyoai.host.instances import Process, Running

NOTE, LOG, LOCK = "agent.json", "agent.log", "agent.lock"
MAX_LOG = 1 << 20
"""Bytes; a longer log is put aside at the next start."""
SPARE_S = 10.0
"""Seconds beyond the grace time, or the time for loading, until the agent counts as hung."""
PROGRESS_S = 1.0
"""Waiting longer than this is told about."""
POLL_S = 0.05

_PROGRAM = [os.fsencode(word) for word in (*subproc.PYTHON[1:], "-m", "tinyoai", "serve")]
"""How the agent stands in the list of processes, behind the interpreter."""

Flags = Mapping[str, str | Sequence[str]]
"""What serve is given, by the option's name."""


class Note(msgspec.Struct, kw_only=True):
    """What is remembered of the agent, after its end too."""

    process: Process
    flags: dict[str, str | Sequence[str]]
    keyed: bool
    """Whether it was given API keys, which are not remembered."""


def note(place: Path) -> Note | None:
    """What is known of the agent that was started last; None if there never was one. Raises UsageError."""
    path = place / NOTE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Note)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.DecodeError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"{path} cannot be read: {reason}; move it away and no agent is known", exit_code=1
        ) from None


def current(place: Path) -> Process | None:
    """The agent's process, if it runs."""
    known = note(place)
    return known.process if known is not None and _alive(known.process) else None


def _alive(process: Process) -> bool:
    """Whether it runs and is an agent: whoever can write to the data directory could name any process there."""
    try:
        words = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return words[1 : 1 + len(_PROGRAM)] == _PROGRAM and instances.alive(process)


def server(place: Path, process: Process) -> Running | None:
    """What a server said of itself when it was ready; None while it is not."""
    return next((found for found in instances.servers(place) if found.process == process), None)


# -- starting ----------------------------------------------------------------------------------------


def start(
    place: Path, flags: Flags, variables: Mapping[str, str], *, keyed: bool, patience: float
) -> tuple[Running, bool]:
    """Starts the agent unless it runs, and waits until it is ready; and whether it was started just now.

    `variables` are put into its environment, where no list of processes shows them; `keyed` says that keys are
    among what will not be remembered. `patience` is how long loading may take, in seconds. Raises UsageError with
    the agent's own words if it ends instead.
    """
    place = place.absolute()
    with datadir.turn(place / LOCK):
        process = current(place)
        if process is not None:
            found = server(place, process)
            if found is None:
                raise UsageError(
                    f"the agent (pid {process.pid}) runs, but is not ready; see tinyoai agent logs",
                    exit_code=1,
                )
            return found, False
        return _start(place, flags, variables, keyed, patience), True


def _start(place: Path, flags: Flags, variables: Mapping[str, str], keyed: bool, patience: float) -> Running:
    before = note(place)
    log = _open_log(place / LOG)
    with open(log, "ab", buffering=0) as file:
        begin = os.fstat(log).st_size
        started = subprocess.Popen(
            [subproc.PYTHON[0], *map(os.fsdecode, _PROGRAM), *_words(flags)],
            cwd="/",
            env={**subproc.environment(), **variables, "TINYOAI_HOME": str(place)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        process = instances.of(started.pid)
        if process is not None:
            _remember(place, Note(process=process, flags=dict(flags), keyed=keyed))
        return _wait(place, started, begin, patience + SPARE_S)
    except BaseException:
        started.terminate()  # nobody would know of it, or want it
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(SPARE_S)
        started.kill()
        started.wait()
        _remember(place, before)  # a restart is to take flags that are known to do
        raise


def _remember(place: Path, known: Note | None) -> None:
    if known is not None:
        datadir.write(place / NOTE, msgspec.json.encode(known))
    else:
        (place / NOTE).unlink(missing_ok=True)


def _wait(place: Path, started: "subprocess.Popen[bytes]", begin: int, patience: float) -> Running:
    for waited in _ticks(patience, f"starting; what the agent says is in {place / LOG} ..."):
        process = instances.of(started.pid)
        if process is not None and (found := server(place, process)):
            started.returncode = 0  # not to be waited for here any more: who adopts it will
            for line in _said(place / LOG, begin):
                if " WARNING " in line:
                    print(line, file=sys.stderr)
            return found
        if started.poll() is not None:
            raise UsageError(_reason(place / LOG, begin, started.returncode), exit_code=1)
        if waited > patience:
            break
    raise UsageError(f"the agent was not ready within {patience:g} s; see {place / LOG}", exit_code=1)


def _words(flags: Flags) -> list[str]:
    """Flags as a command line has them."""
    words = []
    for name, given in flags.items():
        for text in [given] if isinstance(given, str) else given:
            words.append(f"--{name.replace('_', '-')}={text}")
    return words


def _open_log(path: Path) -> int:
    """The log to append to, the old one put aside if it is long. Raises UsageError."""
    try:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > MAX_LOG:
                os.replace(path, path.with_name(path.name + ".1"))
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        os.write(log, time.strftime("---- %Y-%m-%d %H:%M:%S tinyoai agent start\n").encode())
        return log
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}", exit_code=1) from None


def _said(path: Path, begin: int) -> list[str]:
    """The log's lines from a position on."""
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            return file.read(MAX_LOG).decode("utf-8", "replace").splitlines()
    except OSError:
        return []


def _reason(path: Path, begin: int, code: int) -> str:
    """Why the agent ended, in its own words if it left any."""
    for line in reversed(_said(path, begin)):
        if line.startswith("tinyoai: "):
            return line.removeprefix("tinyoai: ")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"the agent ended with {how} before it was ready; see {path}"


def _ticks(patience: float, told: str) -> Iterator[float]:
    """The seconds waited so far, again and again until a little beyond `patience`; says so if it takes long."""
    begun, silent = time.monotonic(), True
    while (waited := time.monotonic() - begun) <= patience + 2 * POLL_S:
        yield waited
        if silent and waited > PROGRESS_S:
            print(told, file=sys.stderr, flush=True)
            silent = False
        time.sleep(POLL_S)


# -- ending ------------------------------------------------------------------------------------------


def stop(place: Path) -> str:
    """Ends the agent: asks it to, and kills it if it does not within its grace time. What happened, in a sentence."""
    process = current(place)
    if process is None:
        return "no agent is running"
    found = server(place, process)
    grace = found.grace if found is not None else 0.0
    _signal(process, signal.SIGTERM)
    if _ended(process, grace + SPARE_S, f"waiting at most {grace:g} s for running answers to finish ..."):
        return f"the agent (pid {process.pid}) has stopped"
    _signal(process, signal.SIGKILL)
    if not _ended(process, SPARE_S, f"waiting for pid {process.pid} to be gone ..."):
        raise UsageError(f"the agent (pid {process.pid}) cannot be ended", exit_code=1)
    instances.servers(place)  # its file is removed, which it could not do itself
    return f"the agent (pid {process.pid}) did not stop within {grace + SPARE_S:g} s and was killed"


def _ended(process: Process, patience: float, told: str) -> bool:
    return any(not _alive(process) for _ in _ticks(patience, told))


def _signal(process: Process, number: signal.Signals) -> None:
    if _alive(process):  # right before: the number may be another's by now
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


# -- its log -----------------------------------------------------------------------------------------


def logs(place: Path, n_lines: int, *, follow: bool) -> Iterator[bytes]:
    """The log's last lines; and if asked to follow, what is added, for ever, of a new log too. Raises UsageError."""
    path = place / LOG
    try:
        file = open(path, "rb")  # noqa: SIM115 # it is another one after a rotation
    except FileNotFoundError:
        raise UsageError("there is no log: no agent was ever started here", exit_code=1) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", exit_code=1) from None
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
