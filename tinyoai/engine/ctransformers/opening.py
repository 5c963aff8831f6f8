"""Opens a model: checks its file and memory, loads it, and evaluates a token before it is served."""

import math
import time
from pathlib import Path

from msgspec import structs

from tinyoai import gguf, wire
from tinyoai.engine import threads
from tinyoai.engine.contract import EngineError, ModelRefused, Row
from tinyoai.engine.ctransformers import facts
from tinyoai.engine.ctransformers.engine import MAX_ROW, CTransformersEngine
from tinyoai.engine.ctransformers.exact_prefix import ATTN_BLOCK
from tinyoai.engine.ctransformers.gguf_model import open_gguf
from tinyoai.engine.ctransformers.legacy_model import open_legacy
from tinyoai.engine.ctransformers.library import MAX_HANDLES, Library
from tinyoai.engine.memory_estimate import DEFAULT_CONTEXT
from tinyoai.host import memory

_POOLINGS = {1: "mean", 3: "last"}
"""Values of a GGUF file's pooling_type; 2 is for models that read in both directions."""
_DEFAULT_POOLING = "weighted-mean"
"""The best of the three for models that were not trained to embed: bench/pooling.py measures it."""


def open_engine(load: wire.Load) -> CTransformersEngine:
    """A loaded and warmed-up model. Raises ModelRefused or EngineError with one sentence."""
    file = Path(load.path)
    load = structs.replace(
        load,
        n_slots=min(load.n_slots, MAX_HANDLES),
        n_batch=max(ATTN_BLOCK, min(load.n_batch, MAX_ROW) // ATTN_BLOCK * ATTN_BLOCK),
    )
    header = _header(file, load)
    if header is None:
        engine = open_legacy(Library(load.n_gpu_layers > 0), file, load)
    else:
        if not load.n_ctx:
            n_ctx = min(int(header.value("context_length")), DEFAULT_CONTEXT)
            load = structs.replace(load, n_ctx=n_ctx)
        _check_memory(header, load)
        engine = open_gguf(Library(load.n_gpu_layers > 0), header, load)
    try:
        _check_output(engine, file)
        _find_states(engine, header, load.pooling)
        _measure(engine, load.n_threads)
    except EngineError:
        engine.close()
        raise
    return engine


def open_model(
    path: str,
    *,
    model_type: str | None,
    name: str,
    n_ctx: int,
    n_slots: int,
    n_batch: int,
    gpu_layers: int,
    pooling: str = "",
) -> CTransformersEngine:
    """As open_engine, with a step on one thread, for callers that have no wire.Load."""
    load = wire.Load(
        path=path,
        name=name,
        engine="ctransformers",
        model_type=model_type,
        n_ctx=n_ctx,
        n_slots=n_slots,
        n_batch=n_batch,
        n_threads=1,
        n_gpu_layers=gpu_layers,
        pooling=pooling,
    )
    return open_engine(load)


def _header(file: Path, load: wire.Load) -> gguf.Header | None:
    """The header of a GGUF file that the library can run; None for a legacy file."""
    try:
        if gguf.kind(file) == "legacy":
            if not load.model_type:
                raise ModelRefused(f"{file} is a legacy GGML file; name its architecture with --model-type")
            return None
        header = gguf.read_header(file)
        facts.require(header)
        return header
    except gguf.BadModelFile as error:
        raise ModelRefused(str(error)) from None
    except OSError as error:
        raise ModelRefused(f"{file} cannot be read: {error.strerror or error}") from None


def _check_memory(header: gguf.Header, load: wire.Load) -> None:
    """Raises ModelRefused if the load needs more memory than is available."""
    available = memory.available()
    estimate = facts.estimate(facts.hparams(header), header.file_size, load)
    if available is not None and estimate.total > available:
        raise ModelRefused(f"{header.path} {estimate.shortage(available, load.n_slots)}")


def _check_output(engine: CTransformersEngine, file: Path) -> None:
    """Evaluates a token and tokenizes a text: a model that fails now would fail later."""
    info = engine.info
    engine.eval([Row(0, [max(info.bos_id, 0)], 0)])
    logits = engine.handle(0).copy_logits()
    engine.truncate(0, 0)
    if not all(map(math.isfinite, logits)) or min(logits) == max(logits):
        raise ModelRefused(f"{file} is damaged: it computes nonsense instead of logits; download it again")
    text = "Hello \N{GRINNING FACE}"
    spelled = b"".join(engine.piece(token) for token in engine.tokenize(text)).decode("utf-8", "replace")
    if info.add_space_prefix and spelled.strip() != text:
        raise ModelRefused(f"{file} has a vocabulary that does not spell {text!r} back; it is damaged")


def _find_states(engine: CTransformersEngine, header: gguf.Header | None, pooling: str) -> None:
    """Completes the model's facts: whether the library keeps hidden states, and how they become an embedding."""
    n = engine.handle(0).n_embd()
    if n:
        stated = header.value("pooling_type") if header else None
        pooling = pooling or _POOLINGS.get(stated if isinstance(stated, int) else 0, _DEFAULT_POOLING)
        # last-token pooling expects the end of the text
        engine.info = structs.replace(engine.info, n_embd_out=n, pooling=pooling, add_eos=pooling == "last")


def _measure(engine: CTransformersEngine, n_threads: int) -> None:
    """Chooses the engine's threads, and measures a decode step for its capabilities."""
    token = max(engine.info.bos_id, 0)

    def step(n: int) -> None:
        engine.truncate(0, 0)
        engine.n_threads = n
        engine.eval([Row(0, [token], 0)])

    engine.n_threads, seconds = threads.measure(step, n_threads, time.perf_counter)
    engine.truncate(0, 0)
    engine.caps = structs.replace(engine.caps, step_cost={1: 1000.0 * seconds})
