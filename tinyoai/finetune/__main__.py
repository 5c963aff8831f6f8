"""The training process: `python -m tinyoai.finetune FOLDER` runs the job in that folder.

It tokenizes with the engine that will serve the new model, trains, and writes the new file. It ends when stdin
closes, because then the server is gone.
"""

import contextlib
import ctypes
import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tinyoai import gguf
from tinyoai.engine import threads
from tinyoai.engine.contract import EngineError
from tinyoai.engine.ctransformers.facts import require
from tinyoai.engine.ctransformers.opening import open_model
from tinyoai.finetune import dataset, llama, protocol, samples, train, weights
from tinyoai.finetune.protocol import (
    CHECKPOINT_FILE,
    DATA_FILE,
    LOCK_FILE,
    Finished,
    JobSpec,
    ProgressEvent,
    TrainingFailed,
    TrainingStarted,
)
from tinyoai.host import subproc

NICE = 10
"""Serving has priority."""
OOM_SCORE = 800
"""The kernel kills this process before the workers."""
M_MMAP_THRESHOLD = -3
"""From glibc's <malloc.h>."""
MMAP_THRESHOLD_BYTES = 128 << 10
"""Tensors of this size and above are returned to the system when they are freed. By default glibc raises this to
32 MiB and keeps the gaps between freed tensors: a quarter to a third more memory, and not the same in each run."""
SAVE_S = 30.0
"""Seconds between two checkpoints, and so the most work that a power cut can lose."""

Report = Callable[[ProgressEvent], None]


def _set_up() -> Report:
    """Make this process safe to kill and low in priority; return a function that writes an event."""
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    subproc.isolate(OOM_SCORE)
    os.nice(NICE)
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # only glibc has it
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
    threading.Thread(target=_exit_with_server, daemon=True).start()

    def report(event: ProgressEvent) -> None:
        events.write(protocol.encode(event) + b"\n")

    return report


def _exit_with_server() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tokenize(spec: JobSpec, examples: list[dataset.Example]) -> list[samples.Sample]:
    """All samples, at full length."""
    engine = open_model(spec.path, model_type=None, name="", n_ctx=64, n_slots=1, n_batch=32, gpu_layers=0)
    try:
        if spec.template == "auto":
            spec = msgspec.structs.replace(spec, template=samples.own_template(engine.info))
        found = [samples.tokenize(example, engine.encode, engine.info, spec) for example in examples]
        return [sample for of_example in found for sample in of_example]
    finally:
        engine.close()


def network_config(header: gguf.Header, n_ctx: int) -> llama.LlamaConfig:
    """The network's configuration from a model file, for samples of at most `n_ctx` tokens."""
    n_head = int(header.value("attention.head_count"))
    return llama.LlamaConfig(
        n_layer=int(header.value("block_count")),
        n_head=n_head,
        n_head_kv=int(header.value("attention.head_count_kv", n_head)),
        n_embd=int(header.value("embedding_length")),
        n_ctx=n_ctx,
        epsilon=float(header.value("attention.layer_norm_rms_epsilon")),
        rope_base=float(header.value("rope.freq_base", 10_000.0)),
        rope_scale=1.0 / float(header.value("rope.scale_linear", 1.0)),
    )


def _read_model(path: Path) -> gguf.Header:
    """The header of a model file that can be trained or was just written. Raises gguf.BadModelFile, ValueError."""
    header = gguf.read_header(path)
    require(header)
    if header.architecture != "llama":
        raise ValueError(f"the model's architecture is now {header.architecture}; only llama can be trained")
    return header


def run_id(spec: JobSpec) -> str:
    """Identifies the model file and configuration that a checkpoint belongs to. The form is that of version 0.1."""
    status, config = os.stat(spec.path), msgspec.structs.asdict(spec.config)
    fields = ", ".join(f"{name}={value!r}" for name, value in config.items())
    return f"{status.st_size}:{status.st_mtime_ns}:Spec({fields})"


def _run(folder: Path, report: Report) -> None:
    """Run the job and report its progress and success; failures are raised or reported."""
    spec = protocol.read_spec(folder)
    examples = dataset.parse((folder / DATA_FILE).read_bytes())
    run = run_id(spec)
    header = _read_model(Path(spec.path))
    n_max = min(spec.config.max_length, int(header.value("context_length")))
    _log(f"reading {len(examples)} examples")
    whole = _tokenize(spec, examples)
    found = samples.cut(whole, n_max)
    if not found:
        report(TrainingFailed(message=f"no example has anything to learn within max_length, {n_max} tokens"))
        return
    train.set_threads(max(1, threads.available() - 1))
    model = llama.build(network_config(header, n_max), lambda name: weights.read(header, name), spec.config)
    n_trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    steps = train.train(model, found, spec.config, folder / CHECKPOINT_FILE, SAVE_S, time.monotonic, run)
    started = False
    for step in steps:
        if not started:
            started = True
            report(
                TrainingStarted(
                    n_examples=len(examples),
                    n_samples=len(found),
                    n_cut=sum(len(sample.ids) > n_max for sample in whole),
                    n_trained=n_trained,
                    n_steps=train.n_steps(len(found), spec.config),
                    from_step=step.step - 1,
                )
            )
        report(step)
    _log("writing the new model")
    out = Path(spec.out)
    weights.write(header, model.changed(), model.merged, out)
    _read_model(out)
    report(Finished(size=out.stat().st_size))


def main(folder: str) -> int:
    """Run one job; return the exit code, which is 0 if the last event was reported, success or failure."""
    report = _set_up()
    try:
        with open(Path(folder) / LOCK_FILE, "ab") as lock:
            # waits for the process of a killed server, which ends on its own
            fcntl.flock(lock, fcntl.LOCK_EX)
            _run(Path(folder), report)
    except (ArithmeticError, EngineError, gguf.BadModelFile, dataset.DatasetError, ValueError) as error:
        report(TrainingFailed(message=_without_paths(str(error), folder)))
    except OSError as error:
        what = _without_paths(str(error.filename or "a file"), folder)
        report(TrainingFailed(message=f"{what} cannot be read or written: {error.strerror or error}"))
    except Exception as error:
        # torch reports a lack of memory as a RuntimeError
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "enough memory" in str(error):
            report(TrainingFailed(message="out of memory; use a smaller batch_size or max_length"))
        else:
            reason = (str(error).splitlines() or [""])[0]
            text = f"training failed: {type(error).__name__}: {reason}"
            report(TrainingFailed(message=_without_paths(text, folder)))
    return 0


def _without_paths(text: str, folder: str) -> str:
    """The text with paths replaced: clients see names of models, never files."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        spec = protocol.read_spec(Path(folder))
        text = text.replace(spec.path, "the model's file").replace(spec.out, "the new file")
        text = text.replace(str(Path(spec.out).parent), "the folder of models")
    return text.replace(folder, "the job's folder")


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stderr.flush()
    os._exit(code)
