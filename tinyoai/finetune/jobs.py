"""The queue of fine-tuning jobs: one runs at a time, the others wait in order.

An unfinished job continues from its last checkpoint when the server starts again. Of the servers on one data
directory, the first one holds the queue; the others only list its jobs.

    initializing ──process──▶ running ──▶ completed
          │                      ├──────▶ failed
          └───────stop───────────┴──────▶ stopped
"""

import asyncio
import importlib.util
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from tinyoai import errors
from tinyoai.finetune import runner
from tinyoai.finetune.dataset import Example
from tinyoai.finetune.job_store import JobStore, Status, TrainingJob
from tinyoai.finetune.protocol import Finished, JobSpec, ProgressEvent, Step, TrainingFailed, TrainingStarted
from tinyoai.finetune.queue_lock import QueueHeld, QueueLock
from tinyoai.host import datadir

log = logging.getLogger("tinyoai.finetune")

MAX_WAITING = 16
"""Jobs that may wait while one runs."""
NEEDED = ("torch", "gguf")
INSTALL = "pip install 'tinyoai[finetune]'"


def installed() -> bool:
    """Returns whether this installation can train."""
    return all(importlib.util.find_spec(name) is not None for name in NEEDED)


class Jobs:
    """All jobs of a data directory."""

    def __init__(self, home: str, on_finished: Callable[[TrainingJob, Path], Awaitable[int]]) -> None:
        """`on_finished(job, path)` registers a new model and returns its id. It may raise TinyoaiError."""
        self._home = home
        self._on_finished = on_finished
        self._jobs: dict[int, TrainingJob] = {}
        self._waiting: deque[TrainingJob] = deque()
        self._starting: set[str] = set()
        """Names of new models whose jobs are being written."""
        self._lock = QueueLock()
        self._owner = False
        """This process holds the lock, and `_jobs` is the truth."""
        self._opened = asyncio.Event()
        self._closed = False
        self._taking = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._not_empty = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._current: TrainingJob | None = None
        self._process: runner.TrainingProcess | None = None
        """Of the current job."""

    # -- paths: each raises UsageError if there is no data directory ----------------------------------

    @property
    def store(self) -> JobStore:
        """The jobs on disk."""
        return JobStore(datadir.folder(self._home) / "finetune")

    @property
    def datasets(self) -> Path:
        """The folder of data sets."""
        return datadir.folder(self._home) / "datasets"

    def model_path(self, name: str) -> Path:
        """The file of a new model."""
        return datadir.folder(self._home) / "models" / (name.replace("/", "__") + ".gguf")

    # -- reading ----------------------------------------------------------------------------------

    def all(self) -> list[TrainingJob]:
        """Every job, the newest first, as of the last `refresh`."""
        return [self._jobs[id_] for id_ in sorted(self._jobs, reverse=True)]

    def find(self, id_: int) -> TrainingJob | None:
        """One job, as of the last `refresh`."""
        return self._jobs.get(id_)

    def names(self) -> set[str]:
        """Names of the models that unfinished jobs will make."""
        return self._starting | {job.name for job in self._jobs.values() if job.ended is None}

    # -- the queue: at most one server holds it -------------------------------------------------------

    async def open(self) -> None:
        """Start to use the data directory. Finished jobs need the registry, so it is opened before."""
        self._opened.set()
        await self.refresh()

    async def refresh(self) -> None:
        """Take the queue if no server holds it, and resume its jobs; otherwise read the holder's jobs again."""
        try:
            await self._take()
        except (errors.ApiError, errors.UsageError):
            return  # what can be read is known now

    async def acquire(self) -> None:
        """Take the queue. Raises errors.BadRequest if another server holds it, or errors.Unavailable."""
        await self._take(create=True)

    async def _take(self, *, create: bool = False) -> None:
        await self._opened.wait()
        if not self._owner:
            # shielded: a client that leaves must not separate taking the lock from reading the jobs
            await asyncio.shield(asyncio.ensure_future(self._take_once(create)))

    async def _take_once(self, create: bool) -> None:
        async with self._taking:
            if self._owner:
                return
            if self._closed:
                raise errors.Unavailable("the server is shutting down")
            held: QueueHeld | None = None
            try:
                await asyncio.to_thread(self._lock_folder, create)
            except QueueHeld as error:
                held = error
            except (OSError, errors.UsageError) as error:
                raise _not_writable(error) from None
            finally:
                jobs = await asyncio.to_thread(self._read_all)
                self._jobs = {job.id: job for job in jobs}
            if held is not None:
                holder = f"the tinyoai server with pid {held.pid}" if held.pid else "another tinyoai server"
                raise errors.BadRequest(
                    f"fine-tuning in this data directory is run by {holder}; ask that server"
                )
            if self._lock.held:
                self._owner = True
                for job in jobs:
                    if job.ended is None:
                        job.status = "initializing"
                        self._enqueue(job)

    def _lock_folder(self, create: bool) -> None:
        root = self.store.root
        if create:
            datadir.make(root)
        if root.is_dir():  # a server that never trains leaves no folder behind
            self._lock.acquire(root)

    def _read_all(self) -> list[TrainingJob]:
        try:
            store = self.store
        except errors.UsageError:
            return []
        jobs = store.read_all()
        if not self._lock.held:
            for job in jobs:  # a job's description is not written at every step
                if job.status == "running" and (curve := store.curve(job)):
                    job.last_step = curve[-1]
        return jobs

    async def start(
        self,
        spec: JobSpec,
        examples: Sequence[Example],
        *,
        model: str,
        model_id: int | None,
        name: str,
        dataset: str,
    ) -> TrainingJob:
        """Add a job to the queue. Raises errors.Overloaded if the queue is full, and as `acquire`."""
        await self.acquire()
        if len(self._waiting) + len(self._starting) >= MAX_WAITING:
            raise errors.Overloaded(
                f"{MAX_WAITING} fine-tuning jobs are waiting already; try again when one has ended",
                headers={"retry-after": "60"},
            )
        job = TrainingJob(
            id=0,
            model=model,
            model_id=model_id,
            name=name,
            dataset=dataset,
            config=spec.config,
            created=_now(),
        )
        self._starting.add(name)
        # shielded: if the client leaves, a job that is on disk still has to be in the queue
        return await asyncio.shield(asyncio.ensure_future(self._create(job, spec, examples)))

    async def stop(self, id_: int) -> TrainingJob | None:
        """Stop a job that waits or runs, and return it. One that has ended stays as it is. Raises as `acquire`."""
        job = self.find(id_)
        if job is None or job.ended is not None:
            return job
        await self.acquire()
        job = self._jobs.get(id_, job)
        if job in self._waiting:
            self._waiting.remove(job)
            await self._end(job, "stopped")
        elif self._current is job and job.ended is None:
            job.status, job.ended = "stopped", _now()
            if self._process is not None:
                self._process.stop()
            await self._save(job)  # so that no later server resumes it
        return job

    async def close(self) -> None:
        """Kill the process that runs, if any, and leave the queue. The next server resumes the job."""
        async with self._taking:
            self._closed = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait({self._worker})
        self._lock.release()

    # -- running ----------------------------------------------------------------------------------

    async def _create(self, job: TrainingJob, spec: JobSpec, examples: Sequence[Example]) -> TrainingJob:
        try:
            await asyncio.to_thread(self.store.create, job, spec, examples)
        except OSError as error:
            raise _not_writable(error) from None
        finally:
            self._starting.discard(job.name)
        self._jobs[job.id] = job
        self._enqueue(job)
        return job

    def _enqueue(self, job: TrainingJob) -> None:
        self._waiting.append(job)
        self._not_empty.set()
        if self._worker is None:
            self._worker = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        while True:
            while not self._waiting:
                self._not_empty.clear()
                await self._not_empty.wait()
            job = self._waiting.popleft()
            try:
                await self._run(job)
                continue
            except OSError as error:
                reason = error.strerror or "a file cannot be read or written"
            except Exception:
                log.exception("fine-tuning job %d failed", job.id)
                reason = "see the server's log"
            self._current = self._process = None
            await self._end(job, "failed", f"it could not be run: {reason}")

    async def _run(self, job: TrainingJob) -> None:
        store, result = self.store, None
        log.info("fine-tuning job %d starts: %s from %s", job.id, job.name, job.model)
        self._current = job
        self._process = runner.TrainingProcess(store.folder(job.id), store.log_path(job.id))
        with store.append_curve(job.id) as curve:

            async def on_event(event: ProgressEvent) -> None:
                nonlocal result
                if isinstance(event, TrainingStarted):
                    curve.begin(event)
                    await self._on_started(job, event)
                elif isinstance(event, Step):
                    curve.add(event)
                    job.last_step = event
                else:
                    result = event

            try:
                code = await self._process.run(on_event)
            finally:
                self._current = self._process = None
        await self._on_exit(job, code, result)

    async def _on_started(self, job: TrainingJob, event: TrainingStarted) -> None:
        job.training = event
        if job.last_step is not None and job.last_step.step > event.from_step:
            job.last_step = None
        if job.status == "initializing":
            job.status = "running"
            job.started = job.started or _now()
        await self._save(job)

    async def _on_exit(self, job: TrainingJob, code: int, result: Finished | TrainingFailed | None) -> None:
        out = self.model_path(job.name)
        if job.status == "stopped":
            out.unlink(missing_ok=True)  # it may have been finished at the same moment
            await self._end(job, "stopped")
        elif isinstance(result, Finished):
            try:
                job.result_id = await self._on_finished(job, out) or None
            except errors.TinyoaiError as error:
                await self._end(job, "failed", f"the new model cannot be registered: {error}")
            else:
                await self._end(job, "completed")
        elif isinstance(result, TrainingFailed):
            await self._end(job, "failed", result.message)
        else:
            await self._end(job, "failed", runner.describe_exit(code, self.store.log_lines(job.id)))

    async def _end(self, job: TrainingJob, status: Status, error: str | None = None) -> None:
        job.status, job.error, job.ended = status, error, _now()
        log.info("fine-tuning job %d %s%s", job.id, status, f": {error}" if error else "")
        await self._save(job)
        self.store.remove_partial(job, self.model_path(job.name))

    async def _save(self, job: TrainingJob) -> None:
        """Write the job's description. A full disk must not end the job."""
        try:
            async with self._saving:  # two writes at a time could leave the older state
                await asyncio.to_thread(self.store.save, job)
        except OSError as error:
            log.warning("fine-tuning job %d cannot be saved: %s", job.id, error.strerror or error)


def _now() -> float:
    return round(time.time(), 3)


def _not_writable(error: Exception) -> errors.Unavailable:
    reason = getattr(error, "strerror", None) or str(error)
    return errors.Unavailable(
        f"the data directory cannot be written: {reason}; start the server with another --home",
        code="not_kept",
        headers={"x-should-retry": "false"},
    )
