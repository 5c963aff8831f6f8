"""Jobs on disk: a folder for each, with its description, examples, learning curve and log.

Files are replaced atomically, and a job's description is written last, so that every job found is complete.
Everything here blocks.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct, field

from tinyoai.finetune import protocol
from tinyoai.finetune.dataset import Example
from tinyoai.finetune.protocol import (
    CHECKPOINT_FILE,
    DATA_FILE,
    SPEC_FILE,
    JobSpec,
    Step,
    TrainingStarted,
)
from tinyoai.finetune.train_config import TrainConfig
from tinyoai.host import atomic

MAX_POINTS = 1000
"""Points kept of a learning curve. Of a longer one, evenly spaced points and the last are kept."""
MAX_LOG_LINES = 200
_JOB_FILE = "job.json"
_CURVE_FILE = "metrics.jsonl"
_LOG_FILE = "log.txt"
_LOG_TAIL = 1 << 16
"""Bytes read from the end of a log."""
_FOLDERS = re.compile(r"(?:/[^/\s'\":]+)+/(?=[^/\s'\":])")
"""The folders before a file's name."""

Status = Literal["initializing", "running", "completed", "failed", "stopped"]
"""State of a job."""


class TrainingJob(Struct, kw_only=True):
    """One job. Times are Unix seconds; None: not yet. The stored field names are those of version 0.1."""

    id: int
    status: Status = "initializing"
    model: str
    """Name of the model that is trained further."""
    model_id: int | None
    name: str
    """Name of the new model."""
    dataset: str
    config: TrainConfig = field(name="spec")
    created: float
    started: float | None = None
    ended: float | None = None
    error: str | None = None
    training: TrainingStarted | None = field(name="running", default=None)
    """The first event of its process."""
    last_step: Step | None = field(name="last", default=None)
    result_id: int | None = None
    """The new model's id in the registry."""


_job = msgspec.json.Decoder(TrainingJob)
_step = msgspec.json.Decoder(Step)


class JobStore:
    """The folders of all jobs, below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, id_: int) -> Path:
        """The folder of one job."""
        return self.root / str(id_)

    def log_path(self, id_: int) -> Path:
        """The log of one job: stderr of its processes."""
        return self.folder(id_) / _LOG_FILE

    def read_all(self) -> list[TrainingJob]:
        """Every job, in order of ids. Damaged ones are left out."""
        jobs = []
        try:
            folders = [path for path in self.root.iterdir() if re.fullmatch(r"[1-9]\d{0,17}", path.name)]
        except OSError:
            return []
        for folder in folders:
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                job = _job.decode((folder / _JOB_FILE).read_bytes())
                if job.id == int(folder.name):
                    jobs.append(job)
        return sorted(jobs, key=lambda job: job.id)

    def create(self, job: TrainingJob, spec: JobSpec, examples: Sequence[Example]) -> None:
        """Give the job an id and write its folder, or leave nothing behind. Raises OSError."""
        Path(spec.out).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        job.id = 1 + max((int(p.name) for p in self.root.iterdir() if p.name.isdecimal()), default=0)
        while True:
            try:
                self.folder(job.id).mkdir(mode=0o700)
                break
            except FileExistsError:
                job.id += 1  # another thread was faster
        folder = self.folder(job.id)
        try:
            atomic.replace(folder / DATA_FILE, b"\n".join(map(protocol.encode, examples)))
            atomic.replace(folder / SPEC_FILE, protocol.encode(spec))
            self.save(job)
            atomic.sync_folder(self.root)
        except BaseException:
            import shutil  # late: servers that never train start faster

            shutil.rmtree(folder, ignore_errors=True)
            raise

    def save(self, job: TrainingJob) -> None:
        """Write the job's description. Raises OSError."""
        atomic.replace(self.folder(job.id) / _JOB_FILE, protocol.encode(job))

    def remove_partial(self, job: TrainingJob, out: Path) -> None:
        """Remove the checkpoint of a job that has ended, and temporary files of it and of the new model."""
        folder = self.folder(job.id)
        checkpoints = (folder / CHECKPOINT_FILE, folder / f".{CHECKPOINT_FILE}.part")
        for path in (*checkpoints, out.with_name(f".{out.name}.part")):
            with contextlib.suppress(OSError):
                path.unlink()

    def curve(self, job: TrainingJob) -> list[Step]:
        """The learning curve: at most MAX_POINTS steps, and the last one."""
        try:
            lines = (self.folder(job.id) / _CURVE_FILE).read_bytes().splitlines()
        except OSError:
            return []
        steps = []
        for line in lines:
            with contextlib.suppress(msgspec.MsgspecError):  # the last line may be half written
                steps.append(_step.decode(line))
        last = job.last_step
        return [*steps, last] if last is not None and steps and last.step > steps[-1].step else steps

    def log_lines(self, id_: int) -> list[str]:
        """The last lines of the job's log. Paths are cut to file names."""
        try:
            with open(self.log_path(id_), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL))
                lines = file.read().decode("utf-8", "replace").splitlines()[-MAX_LOG_LINES:]
        except OSError:
            return []
        return [_FOLDERS.sub("", line) for line in lines]

    @contextlib.contextmanager
    def append_curve(self, id_: int) -> Iterator["CurveWriter"]:
        """Open the job's learning curve for writing. Raises OSError."""
        path = self.folder(id_) / _CURVE_FILE
        with open(path, "ab") as file:
            yield CurveWriter(path, file.fileno())


class CurveWriter:
    """Appends steps to a learning curve, only as many as are kept."""

    def __init__(self, path: Path, number: int) -> None:
        self._path, self._number, self._every = path, number, 1

    def begin(self, event: TrainingStarted) -> None:
        """Take the length of the run, and drop what follows its first step: those steps are repeated."""
        self._every = max(1, -(-event.n_steps // MAX_POINTS))
        size = 0
        for line in self._path.read_bytes().splitlines(keepends=True):
            try:
                keep = line.endswith(b"\n") and _step.decode(line).step <= event.from_step
            except msgspec.MsgspecError:
                break
            if not keep:
                break
            size += len(line)
        os.ftruncate(self._number, size)

    def add(self, step: Step) -> None:
        """Write a step if it is one of those that are kept."""
        if (step.step - 1) % self._every == 0:
            os.write(self._number, protocol.encode(step) + b"\n")
