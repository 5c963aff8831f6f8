"""The messages between the server and the training process.

The server writes a JobSpec into the job's folder. The process writes ProgressEvents as JSON lines to stdout.
Field and tag names are stored in the folders of jobs, so those of version 0.1 stay.
"""

from pathlib import Path

import msgspec
from msgspec import Struct, field

from tinyoai.finetune.train_config import TrainConfig

SPEC_FILE = "order.json"
DATA_FILE = "data.jsonl"
CHECKPOINT_FILE = "checkpoint.pt"
LOCK_FILE = "lock"
"""The process holds a lock on it, so that no two processes work in one folder."""


class JobSpec(Struct, frozen=True, kw_only=True):
    """The work of one training process."""

    path: str
    """The model's file."""
    template: str
    """The chat template; "auto" is the model's own."""
    chat: bool
    """A prompt is a user's message; otherwise it is plain text to be continued."""
    out: str
    """The new model's file."""
    config: TrainConfig = field(name="spec")


class TrainingStarted(Struct, frozen=True, kw_only=True, tag="Running"):
    """The first event: the size of the run."""

    n_examples: int
    n_samples: int
    """An example has one sample for each answer in it."""
    n_cut: int
    """Samples longer than max_length."""
    n_trained: int
    """Trained parameters."""
    n_steps: int
    from_step: int
    """Steps that a checkpoint has saved."""


class Step(Struct, frozen=True, kw_only=True, tag="Step"):
    """One training step."""

    step: int
    epoch: float
    loss: float
    """Mean over the learned tokens, in nats."""
    learning_rate: float
    n_tokens: int
    """Learned tokens."""
    seconds: float
    """Since the process began to train."""


class Finished(Struct, frozen=True, kw_only=True, tag="Made"):
    """The last event of a success: the new file is in place."""

    size: int


class TrainingFailed(Struct, frozen=True, kw_only=True, tag="Failed"):
    """The last event of a failure: one sentence that says why."""

    message: str


ProgressEvent = TrainingStarted | Step | Finished | TrainingFailed

encode = msgspec.json.Encoder().encode
_spec = msgspec.json.Decoder(JobSpec)
_event: msgspec.json.Decoder[ProgressEvent] = msgspec.json.Decoder(ProgressEvent)


def read_spec(folder: Path) -> JobSpec:
    """The specification in a job's folder. Raises OSError or msgspec.MsgspecError."""
    return _spec.decode((folder / SPEC_FILE).read_bytes())


def read_event(line: bytes) -> ProgressEvent:
    """The event of one line. Raises msgspec.MsgspecError."""
    return _event.decode(line)
