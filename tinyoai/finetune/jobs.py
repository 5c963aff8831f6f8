"""Jobs: which there are, which one runs, and what became of each.

Owns a folder for each job, its processes and its life: one runs at a time, the others wait in order. What is on
disk is whole after a power cut, and a job that was under way goes on from its last checkpoint when the server
starts again. Of servers on the same data directory the one that holds a job's lock file works on it. It must not
know HTTP, nor how the new model is served: `on_made` is told of its file.

    initializing ──process──▶ running ──▶ completed
          │                      ├──────▶ failed
          └───────stop───────────┴──────▶ stopped
"""

import asyncio
import contextlib
import fcntl
import importlib.util
import logging
import os
import re
import shutil
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from tinyoai import errors
from tinyoai.finetune.dataset import Example
from tinyoai.finetune.train_config import Failed, Made, Order, Running, Said, Spec, Status, Step
from tinyoai.host import atomic, subproc
from tinyoai.models import registry

log = logging.getLogger("tinyoai.finetune")

MAX_WAITING = 16
"""Jobs that may wait for their turn."""
MAX_POINTS = 1000
"""Points of a learning curve that are kept: of a longer one, evenly spaced ones and the last."""
MAX_LINES = 200
STOP_S = 2.0
"""Seconds a process has to leave by itself before it is killed."""
LOOK_S = 1.0
"""Seconds between two looks at whether another server has left one of its jobs."""
NEEDED = ("torch", "gguf")
INSTALL = "pip install 'tinyoai[finetune]'"


class Job(Struct, kw_only=True):
    """One job. Times are Unix seconds; None: not yet."""

    id: int
    status: Status = "initializing"
    model: str
    """The name of the model that is trained further."""
    model_id: int | None
    name: str
    """The new model's."""
    dataset: str
    spec: Spec
    created: float
    started: float | None = None
    ended: float | None = None
    error: str | None = None
    running: Running | None = None
    """What its process said at its start."""
    last: Step | None = None
    result_id: int | None = None
    """The new model's number in the registry."""


_JOB = "job.json"
_METRICS = "metrics.jsonl"
_LOG = "log.txt"
_LOCK = "lock"
_PATH = re.compile(r"(?:/[^/\s'\":]+)+/(?=[^/\s'\":])")
"""The folders before a file's name."""
_encode = msgspec.json.Encoder().encode
_job = msgspec.json.Decoder(Job)
_said = msgspec.json.Decoder(Said)
_step = msgspec.json.Decoder(Step)


def installed() -> bool:
    """Whether this installation can train."""
    return all(importlib.util.find_spec(name) is not None for name in NEEDED)


class Jobs:
    """All jobs of a data directory."""

    def __init__(self, home: str, on_made: Callable[[Job, Path], Awaitable[int]]) -> None:
        """`on_made(job, path)` registers a new model and returns its number; it may raise registry.RegistryError."""
        self._home = home
        self._on_made = on_made
        self._jobs: dict[int, Job] = {}
        self._waiting: deque[Job] = deque()
        self._starting: set[str] = set()
        """Names of new models whose jobs are being written down."""
        self._locks: dict[int, int] = {}
        """Lock files of the jobs that are this server's, until they have ended."""
        self._claiming = asyncio.Lock()
        self._keeping = asyncio.Lock()
        self._more = asyncio.Event()
        self._opened = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._current: Job | None = None
        self._process: asyncio.subprocess.Process | None = None
        """The current job's, once it is started."""

    # -- asking ----------------------------------------------------------------------------------

    @property
    def root(self) -> Path:
        """The folder of all jobs. Raises registry.RegistryError."""
        return registry.folder(self._home) / "finetune"

    @property
    def datasets(self) -> Path:
        """The folder of data sets. Raises registry.RegistryError."""
        return registry.folder(self._home) / "datasets"

    def place(self, name: str) -> Path:
        """Where the file of a new model is put. Raises registry.RegistryError."""
        return registry.folder(self._home) / "models" / (name.replace("/", "__") + ".gguf")

    def all(self) -> list[Job]:
        """Every job, the newest first."""
        return [self._jobs[id_] for id_ in sorted(self._jobs, reverse=True)]

    def find(self, id_: int) -> Job | None:
        """One job."""
        return self._jobs.get(id_)

    def names(self) -> set[str]:
        """Of models that are being made."""
        return self._starting | {job.name for job in self._jobs.values() if job.ended is None}

    def metrics(self, job: Job) -> list[Step]:
        """The learning curve, of at most MAX_POINTS points and the last. Blocks."""
        try:
            lines = (self._folder(job.id) / _METRICS).read_bytes().splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            with contextlib.suppress(msgspec.MsgspecError):  # the last line may be half written
                found.append(_step.decode(line))
        last = job.last
        return [*found, last] if last is not None and found and last.step > found[-1].step else found

    def lines(self, job: Job) -> list[str]:
        """The last lines of its log, files without their folders. Blocks."""
        try:
            with open(self._folder(job.id) / _LOG, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16)))
                lines = file.read().decode("utf-8", "replace").splitlines()[-MAX_LINES:]
                return [_PATH.sub("", line) for line in lines]
        except OSError:
            return []

    # -- telling ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Finds the jobs of earlier runs; those that were under way go on."""
        try:
            for job in await asyncio.to_thread(self._read):
                self._jobs[job.id] = job
                if job.ended is None:
                    job.status = "initializing"
                    self._enqueue(job)
        finally:
            self._opened.set()

    async def opened(self) -> None:
        """Returns when the jobs of earlier runs are known."""
        await self._opened.wait()

    async def start(
        self,
        order: Order,
        examples: Sequence[Example],
        *,
        model: str,
        model_id: int | None,
        name: str,
        dataset: str,
    ) -> Job:
        """A new job. Raises errors.Overloaded where too many wait, errors.Unavailable where nothing can be kept."""
        n_own = sum(job.id in self._locks for job in self._waiting)
        if n_own + len(self._starting) >= MAX_WAITING:
            raise errors.Overloaded(
                f"{MAX_WAITING} fine-tuning jobs wait already; try again when one has ended",
                headers={"retry-after": "60"},
            )
        job = Job(
            id=0,
            model=model,
            model_id=model_id,
            name=name,
            dataset=dataset,
            spec=order.spec,
            created=round(time.time(), 3),
        )
        self._starting.add(name)
        # who asked may leave meanwhile: what is written down is begun all the same, or it would be unseen
        return await asyncio.shield(self._begin(job, order, examples))

    async def stop(self, job: Job) -> None:
        """Ends a job that waits or runs; harmless for one that has ended. Raises errors.BadRequest if it cannot."""
        if job.ended is None and not await self._claim(job):
            raise errors.BadRequest(
                f"another server on the same data directory works on the job {job.id}; stop it there"
            )
        if job in self._waiting:
            self._waiting.remove(job)
            if job.ended is None:
                await self._end(job, "stopped")
            else:  # by another server, meanwhile
                self._let_go(job.id)
        elif self._current is job and job.ended is None:
            job.status, job.ended = "stopped", round(time.time(), 3)
            if self._process is not None:
                self._leave(self._process)
            await self._keep(job)  # it must not go on with the next server, whatever comes

    async def close(self) -> None:
        """Ends the process that runs, if any; its job goes on with the next server."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        for id_ in list(self._locks):
            self._let_go(id_)

    # -- inside ----------------------------------------------------------------------------------

    async def _begin(self, job: Job, order: Order, examples: Sequence[Example]) -> Job:
        try:
            await asyncio.to_thread(self._make, job, order, examples)
        except (OSError, registry.RegistryError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise errors.Unavailable(
                f"the data directory cannot be written: {reason}; start the server with another --home",
                code="not_kept",
                headers={"x-should-retry": "false"},
            ) from None
        finally:
            self._starting.discard(job.name)
        self._jobs[job.id] = job
        self._enqueue(job)
        return job

    async def _claim(self, job: Job) -> bool:
        """Whether the job is this server's from now on; what another has made of it is known then."""
        async with self._claiming:
            return job.id in self._locks or await asyncio.to_thread(self._lock, job)

    def _lock(self, job: Job) -> bool:
        try:
            number = os.open(self._folder(job.id) / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return True  # its folder is gone or cannot be written: running it will say so
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(number)
        else:
            self._locks[job.id] = number
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            found = _job.decode((self._folder(job.id) / _JOB).read_bytes())
            for field in Job.__struct_fields__:
                setattr(job, field, getattr(found, field))
        return job.id in self._locks

    def _let_go(self, id_: int) -> None:
        number = self._locks.pop(id_, None)
        if number is not None:
            os.close(number)

    def _folder(self, id_: int) -> Path:
        return self.root / str(id_)

    def _read(self) -> list[Job]:
        found = []
        try:
            folders = [path for path in self.root.iterdir() if re.fullmatch(r"[1-9]\d{0,17}", path.name)]
        except (OSError, registry.RegistryError):
            return []
        for folder in folders:
            try:
                job = _job.decode((folder / _JOB).read_bytes())
            except (OSError, msgspec.MsgspecError):
                continue  # it was never begun: its description is written last
            if job.id == int(folder.name):
                found.append(job)
        return sorted(found, key=lambda job: job.id)

    def _make(self, job: Job, order: Order, examples: Sequence[Example]) -> None:
        root = self.root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        Path(order.out).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        job.id = 1 + max((int(p.name) for p in root.iterdir() if p.name.isdecimal()), default=0)
        while True:
            try:
                self._folder(job.id).mkdir(mode=0o700)
                break
            except FileExistsError:
                job.id += 1  # another server on the same folder was faster
        folder = self._folder(job.id)
        try:
            self._lock(job)
            atomic.replace(folder / "data.jsonl", b"\n".join(map(_encode, examples)))
            atomic.replace(folder / "order.json", _encode(order))
            atomic.replace(folder / _JOB, _encode(job))
            atomic.settle(root)
        except BaseException:
            self._let_go(job.id)
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _enqueue(self, job: Job) -> None:
        self._waiting.append(job)
        self._more.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        while True:
            job = await self._next()
            try:
                await self._run(job)
                continue
            except OSError as error:
                reason = error.strerror or "a file cannot be read or written"
            except Exception:
                log.exception("the fine-tuning job %d failed", job.id)
                reason = "the server's log says why"
            self._current = self._process = None
            await self._end(job, "failed", f"it could not be run: {reason}")

    async def _next(self) -> Job:
        """The first that waits and that no other server works on."""
        while True:
            self._more.clear()
            for job in list(self._waiting):
                mine = await self._claim(job)
                if job in self._waiting and (mine or job.ended is not None):
                    self._waiting.remove(job)
                    if job.ended is None:
                        job.status = "initializing"
                        return job
                    self._let_go(job.id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if self._waiting else None):
                    await self._more.wait()

    async def _keep(self, job: Job) -> None:
        """Writes down how it is; a full disk must not end the job."""
        try:
            async with self._keeping:  # or an older word could be written over a newer one
                await asyncio.to_thread(atomic.replace, self._folder(job.id) / _JOB, _encode(job))
        except OSError as error:
            log.warning("the fine-tuning job %d cannot be kept: %s", job.id, error.strerror or error)

    async def _end(self, job: Job, status: Status, error: str | None = None) -> None:
        job.status, job.error, job.ended = status, error, round(time.time(), 3)
        log.info("fine-tuning job %d %s%s", job.id, status, f": {error}" if error else "")
        await self._keep(job)
        place = self.place(job.name)
        left = [self._folder(job.id) / name for name in ("checkpoint.pt", ".checkpoint.pt.part")]
        for path in (*left, place.with_name(f".{place.name}.part")):
            with contextlib.suppress(OSError):
                path.unlink()
        self._let_go(job.id)

    async def _run(self, job: Job) -> None:
        folder, self._current = self._folder(job.id), job
        lock = self._locks.get(job.id)
        log.info("fine-tuning job %d begins: %s out of %s", job.id, job.name, job.model)
        with open(folder / _LOG, "ab") as said:
            process = await asyncio.create_subprocess_exec(
                *subproc.PYTHON,
                "-m",
                "tinyoai.finetune",
                str(folder),
                env=subproc.environment(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=said,
                # it holds the job as long as it lives: nobody else may begin before it is gone
                pass_fds=() if lock is None else (lock,),
                start_new_session=True,  # Ctrl-C reaches the whole group; the server decides
            )
        self._process = process
        if job.status == "stopped":  # while it was started
            self._leave(process)
        last: Made | Failed | None = None
        try:
            last = await self._listen(job, process, folder)
            code = await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            self._current = self._process = None
        if job.status == "stopped":
            self.place(job.name).unlink(missing_ok=True)  # it may just have been made
            await self._end(job, "stopped")
        elif isinstance(last, Made):
            try:
                job.result_id = await self._on_made(job, self.place(job.name)) or None
            except registry.RegistryError as error:
                await self._end(job, "failed", f"the new model cannot be registered: {error}")
            else:
                await self._end(job, "completed")
        elif isinstance(last, Failed):
            await self._end(job, "failed", last.message)
        else:
            await self._end(job, "failed", _died(code, self.lines(job)))

    async def _listen(
        self, job: Job, process: asyncio.subprocess.Process, folder: Path
    ) -> Made | Failed | None:
        assert process.stdout is not None
        last: Made | Failed | None = None
        every = 1
        with open(folder / _METRICS, "ab") as curve:
            while line := await process.stdout.readline():
                try:
                    said = _said.decode(line)
                except msgspec.MsgspecError:
                    continue
                if isinstance(said, Running):
                    job.running, every = said, max(1, -(-said.n_steps // MAX_POINTS))
                    if job.last is not None and job.last.step > said.from_step:
                        job.last = None
                    if job.status == "initializing":
                        job.status = "running"
                        job.started = job.started or round(time.time(), 3)
                    _rewind(curve.fileno(), folder / _METRICS, said.from_step)
                    await self._keep(job)
                elif isinstance(said, Step):
                    job.last = said
                    if (said.step - 1) % every == 0:
                        curve.write(_encode(said) + b"\n")
                        curve.flush()
                else:
                    last = said
        return last

    def _leave(self, process: asyncio.subprocess.Process) -> None:
        if process.stdin is not None:
            process.stdin.close()  # it ends with its stdin

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

        asyncio.get_running_loop().call_later(STOP_S, kill)


def _rewind(number: int, path: Path, n_steps: int) -> None:
    """Takes back what was told of steps that are made again."""
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            known = line.endswith(b"\n") and _step.decode(line).step <= n_steps
        except msgspec.MsgspecError:
            break
        if not known:
            break
        size += len(line)
    os.ftruncate(number, size)


def _died(code: int, lines: Sequence[str]) -> str:
    how = f"its process {subproc.ended(code)}"
    if code < 0:
        return how + ("; take a smaller batch_size or max_length" if code == -signal.SIGKILL else "")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return how + (f": {last}" if last else "")
