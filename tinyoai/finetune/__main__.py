"""The training program: `python -m tinyoai.finetune <folder>`, one job in a process of its own.

Owns the process: it reads the order and the examples in the folder, tokenizes them with the very engine that
will serve the model, trains, and writes the new file. It says how far it is in JSON lines on stdout, and ends
when stdin does, for then the server is gone. It must not know jobs, nor other models.
"""

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tinyoai import gguf
from tinyoai.engine import threads
from tinyoai.engine.contract import EngineError
from tinyoai.engine.ctransformers.engine import CTransformersEngine
from tinyoai.engine.ctransformers.facts import require
from tinyoai.engine.ctransformers.opening import open_model
from tinyoai.finetune import dataset, train, weights
from tinyoai.finetune.train_config import Failed, Made, Order, Running, Said
from tinyoai.host import subproc
from tinyoai.text import template
from tinyoai.text.segments import encode
from tinyoai.wire import Segment, Special, Text

NICE = 10
"""Serving goes first."""
OOM_SCORE = 800
"""Before the workers."""
M_MMAP_THRESHOLD = -3
"""glibc's <malloc.h>."""
MMAPPED_FROM = 128 << 10
"""Bytes. Tensors of this size and above go back to the system when they are freed. Left to itself, glibc raises
this to 32 MiB and keeps the holes between freed tensors: a quarter to a third more memory, and not the same twice."""
SAVE_S = 30.0
"""Seconds between two checkpoints: at most so much is done again after a power cut."""

Say = Callable[[Said], None]


def _settle() -> Say:
    """Makes this process safe to lose and easy to yield; returns what says something to the server."""
    words = os.fdopen(os.dup(1), "wb", buffering=0)
    subproc.settle(OOM_SCORE)
    os.nice(NICE)
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # glibc's; others have none
        mallopt(M_MMAP_THRESHOLD, MMAPPED_FROM)
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    encoder = msgspec.json.Encoder()

    def say(said: Said) -> None:
        words.write(encoder.encode(said) + b"\n")

    return say


def _end_with_the_server() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


# -- examples to tokens ----------------------------------------------------------------------------


def _answer(segments: Sequence[Segment], text: str) -> list[Segment]:
    """The prompt and its answer: what follows a word begins with a space."""
    last = segments[-1]
    if not isinstance(last, Text):
        return [*segments, Text(text)]
    space = "" if last.text.endswith((" ", "\n")) else " "
    return [*segments[:-1], Text(last.text + space + text)]


def _sample(prompt: Sequence[Segment], text: str, end: int, engine: CTransformersEngine) -> train.Sample:
    read, whole = encode(prompt, engine), encode(_answer(prompt, text), engine)
    same = next((i for i, (a, b) in enumerate(zip(read, whole, strict=False)) if a != b), len(read))
    return train.Sample([*whole, end] if end >= 0 else whole, max(1, same))


def samples(example: dataset.Example, engine: CTransformersEngine, order: Order) -> list[train.Sample]:
    """What an example teaches: a sample for each thing that the assistant says in it."""
    info = engine.info
    if example.text is not None:
        whole = encode([Special("bos"), Text(example.text)], engine)
        return [train.Sample([*whole, info.eos_id] if info.eos_id >= 0 else whole, 1)]
    if not order.chat and example.messages is None:
        turns = example.turns
        return [
            _sample(
                [Special("bos"), Text(turns[0].content)], turns[1].content.lstrip(" "), info.eos_id, engine
            )
        ]
    end = info.special.get("<|im_end|>", info.eos_id) if order.template == "chatml" else info.eos_id
    said = [template.Message(role=turn.role, content=turn.content) for turn in example.turns]
    return [
        _sample(
            template.render(order.template, said[:i], special=info.special).segments,
            message.content,
            end,
            engine,
        )
        for i, message in enumerate(said)
        if message.role == "assistant" and message.content.strip()
    ]


def _cut(found: Sequence[train.Sample], n_most: int) -> list[train.Sample]:
    """At most so many tokens of each; what has nothing left to learn is left out."""
    return [train.Sample(ids[:n_most], n_read) for ids, n_read in found if n_read < min(len(ids), n_most)]


# -- the way ---------------------------------------------------------------------------------------


def _shape(header: gguf.Header, n_ctx: int) -> train.Shape:
    n_head = int(header.value("attention.head_count"))
    return train.Shape(
        n_layer=int(header.value("block_count")),
        n_head=n_head,
        n_head_kv=int(header.value("attention.head_count_kv", n_head)),
        n_embd=int(header.value("embedding_length")),
        n_ctx=n_ctx,
        epsilon=float(header.value("attention.layer_norm_rms_epsilon")),
        rope_base=float(header.value("rope.freq_base", 10_000.0)),
        rope_scale=1.0 / float(header.value("rope.scale_linear", 1.0)),
    )


def _learn(folder: Path, say: Say) -> None:
    order = msgspec.json.decode((folder / "order.json").read_bytes(), type=Order)
    given = dataset.parse((folder / "data.jsonl").read_bytes())
    status = os.stat(order.path)
    of = f"{status.st_size}:{status.st_mtime_ns}:{order.spec}"
    header = gguf.read_header(Path(order.path))
    require(header)
    if header.architecture != "llama":
        raise ValueError(f"the model's file has become one of {header.architecture}; llama can be trained")
    n_most = min(order.spec.max_length, int(header.value("context_length")))
    print(f"reading {len(given)} examples", file=sys.stderr, flush=True)
    engine = open_model(order.path, model_type=None, name="", n_ctx=64, n_slots=1, n_batch=32, gpu_layers=0)
    if order.template == "auto":
        name = template.detect(engine.info.chat_template, engine.info.special)
        order = msgspec.structs.replace(order, template=name)
    whole = [sample for example in given for sample in samples(example, engine, order)]
    engine.close()
    found = _cut(whole, n_most)
    if not found:
        say(Failed(message=f"no example has anything to learn within max_length, {n_most} tokens"))
        return
    train.set_threads(max(1, threads.available() - 1))
    model = train.build(_shape(header, n_most), lambda name: weights.read(header, name), order.spec)
    checkpoint = folder / "checkpoint.pt"
    n_trained = sum(parameter.numel() for parameter in model.learnt().values())
    steps = train.train(model, found, order.spec, checkpoint, SAVE_S, time.monotonic, of)
    said = False
    for step in steps:
        if not said:
            said = True
            say(
                Running(
                    n_examples=len(given),
                    n_samples=len(found),
                    n_cut=sum(len(sample.ids) > n_most for sample in whole),
                    n_trained=n_trained,
                    n_steps=train.n_steps(len(found), order.spec),
                    from_step=step.step - 1,
                )
            )
        say(step)
    print("writing the new model", file=sys.stderr, flush=True)
    out = Path(order.out)
    weights.write(header, model.changed(), model.merged, out)
    require(gguf.read_header(out))
    say(Made(size=out.stat().st_size))


def main(folder: str) -> int:
    """One job; returns the exit code: 0 if it said its last word, good or bad."""
    say = _settle()
    try:
        _learn(Path(folder), say)
    except (ArithmeticError, EngineError, gguf.BadModelFile, dataset.DatasetError, ValueError) as error:
        say(Failed(message=_without_paths(str(error), folder)))
    except OSError as error:
        what = _without_paths(str(error.filename or "a file"), folder)
        say(Failed(message=f"{what} cannot be read or written: {error.strerror or error}"))
    except Exception as error:
        # torch tells of memory in a RuntimeError
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "enough memory" in str(error):
            say(Failed(message="memory ran out; take a smaller batch_size or max_length"))
        else:
            what = (str(error).splitlines() or [""])[0]
            say(Failed(message=_without_paths(f"training failed: {type(error).__name__}: {what}", folder)))
    return 0


def _without_paths(text: str, folder: str) -> str:
    """Clients are told of models, never of files."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        order = msgspec.json.decode((Path(folder) / "order.json").read_bytes(), type=Order)
        text = text.replace(order.path, "the model's file").replace(order.out, "the new file")
        text = text.replace(str(Path(order.out).parent), "the folder of models")
    return text.replace(folder, "the job's folder")


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stderr.flush()
    os._exit(code)
