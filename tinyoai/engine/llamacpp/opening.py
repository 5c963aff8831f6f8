"""Opens a model in libllama: checks file and memory, loads it, and evaluates a token before it is served."""

import math
import os
import time
from pathlib import Path
from typing import Any

from msgspec import structs

from tinyoai import gguf, wire
from tinyoai.engine import threads
from tinyoai.engine.contract import (
    Capabilities,
    Copies,
    EngineError,
    ModelRefused,
    PairForm,
    Row,
    Truncates,
    Want,
)
from tinyoai.engine.llamacpp import facts, rank_head, reproducible
from tinyoai.engine.llamacpp.architectures import reads_whole_texts
from tinyoai.engine.llamacpp.context import Context
from tinyoai.engine.llamacpp.engine import LlamaCppEngine
from tinyoai.engine.llamacpp.library import Library
from tinyoai.engine.llamacpp.memory import CACHE_TYPES, CELL_STEP, SCORED_ROWS, n_cells_of
from tinyoai.engine.llamacpp.reproducible import OneByOneContext
from tinyoai.engine.llamacpp.vocabulary import SPM, Vocabulary
from tinyoai.engine.threads import ThreadChoice
from tinyoai.host import memory

_POOLINGS = {1: "mean", 2: "cls", 3: "last"}
"""Values of a GGUF file's pooling_type."""
_DEFAULT_POOLING = {True: "mean", False: "weighted-mean"}
"""For files that name none: encoders, and models that were not trained to embed (see bench/pooling.py)."""
_POOLING_NONE = 0
_MMAP, _MLOCK = 1, 2
"""Bits of llama_load_mode."""


def open_engine(load: wire.Load, library: Library | None = None) -> LlamaCppEngine:
    """A loaded and warmed-up model. Raises ModelRefused or EngineError with one sentence."""
    if load.reproducible:
        load = structs.replace(load, kv="separate")
    header = _header(Path(load.path), load)
    if load.n_gpu_layers > 0:
        raise ModelRefused(
            "the llama.cpp library here computes on processors only; start without --gpu-layers"
        )
    library = library or Library()
    model = _load_model(library, header, load)
    try:
        adapters = _load_adapters(library, model, header, load)
        return _open(library, model, header, load, adapters)
    except EngineError:
        library.lib.llama_model_free(model)
        raise


def _header(file: Path, load: wire.Load) -> gguf.Header:
    """The file's header, checked. Raises ModelRefused."""
    try:
        header = gguf.read_header(file)
        reason = facts.supports(header)
        if reason is not None:
            raise ModelRefused(f"{file} {reason}")
        available = memory.available()
        estimate = facts.estimate(facts.hparams(header), header.file_size, load)
    except gguf.BadModelFile as error:
        raise ModelRefused(str(error)) from None
    except OSError as error:
        raise ModelRefused(f"{file} cannot be read: {error.strerror or error}") from None
    if available is not None and estimate.total > available:
        raise ModelRefused(f"{file} {estimate.shortage(available, load.n_slots)}")
    return header


def _load_model(library: Library, header: gguf.Header, load: wire.Load) -> Any:
    params = library.lib.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mode = (_MMAP if load.mmap else 0) | (_MLOCK if load.mlock else 0)
    library.log.clear()
    model = library.lib.llama_model_load_from_file(os.fsencode(header.path), params)
    if not model:
        raise ModelRefused(
            f"llama.cpp cannot load {header.path}: {library.log.last_line() or 'no reason given'}; download it "
            "again or choose another model"
        )
    return model


def _load_adapters(library: Library, model: Any, header: gguf.Header, load: wire.Load) -> dict[str, Any]:
    """Opens the LoRA adapters of the load, by name. They are freed with the model. Raises ModelRefused.

    The context comes later: it makes room in its graphs for all adapters that the model has.
    """
    found: dict[str, Any] = {}
    for file in load.adapters:
        try:
            reason = facts.supports_adapter(gguf.read_header(Path(file.path)), header)
        except gguf.BadModelFile as error:
            raise ModelRefused(str(error)) from None
        except OSError as error:
            raise ModelRefused(f"{file.path} cannot be read: {error.strerror or error}") from None
        if reason is not None:
            raise ModelRefused(f"{file.path} {reason}")
        library.log.clear()
        adapter = library.lib.llama_adapter_lora_init(model, os.fsencode(file.path))
        if not adapter:
            raise ModelRefused(
                f"llama.cpp cannot load the LoRA adapter {file.path}: "
                f"{library.log.last_line() or 'no reason given'}; copy or convert it again"
            )
        found[file.name] = adapter
    return found


def _open(
    library: Library, model: Any, header: gguf.Header, load: wire.Load, adapters: dict[str, Any]
) -> LlamaCppEngine:
    lib = library.lib
    try:
        vocabulary = Vocabulary(library, lib.llama_model_get_vocab(model))
    except ValueError as error:
        raise ModelRefused(f"{header.path}: {error}") from None
    encoder = bool(lib.llama_model_has_encoder(model))
    if encoder and lib.llama_model_has_decoder(model):
        raise ModelRefused(f"{header.path} has an encoder and a decoder, which tinyoai does not run")
    encoder = encoder or reads_whole_texts(header)
    info = _info(library, model, header, load, vocabulary, encoder=encoder)
    caps = _capabilities(
        library, model, header, load, encoder=encoder, longest_piece=vocabulary.longest_piece
    )
    pointer = _new_context(library, model, header, load, caps)
    if load.reproducible:
        block = 0 if caps.whole_rows else caps.align
        n_threads = load.n_threads or threads.available()
        context: Context = OneByOneContext(library, pointer, caps, info, block=block, n_threads=n_threads)
    else:
        context = Context(library, pointer, caps.n_batch)
    engine = LlamaCppEngine(
        library,
        context,
        vocabulary,
        info,
        caps,
        free_model=lambda: lib.llama_model_free(model),
        adapters=adapters,
    )
    try:
        # on one thread: if other programs take the cores, several could take seconds
        seconds = _warm_up(engine, header)
        for file in load.adapters:
            _try_adapter(engine, file)
    except EngineError:
        context.close()
        raise
    n = load.n_threads or threads.available()
    if not load.reproducible:
        engine.use_threads(n, None if load.n_threads else ThreadChoice(n, seconds, time.monotonic))
        return engine
    engine.use_threads(n)
    try:
        bit_exact = reproducible.promised(engine, load)
    except EngineError:
        context.close()
        raise
    engine.caps = structs.replace(engine.caps, bit_exact=bit_exact)
    return engine


def _info(
    library: Library,
    model: Any,
    header: gguf.Header,
    load: wire.Load,
    vocabulary: Vocabulary,
    *,
    encoder: bool,
) -> wire.ModelInfo:
    lib, meta = library.lib, header.metadata
    vocab = lib.llama_model_get_vocab(model)
    chat_template = meta.get("tokenizer.chat_template", "")
    chat_template = chat_template if isinstance(chat_template, str) else ""
    vocabulary.mark(chat_template + rank_head.template(header))
    stated, ranks = header.value("pooling_type"), rank_head.ranks(header)
    pooling = load.pooling or _POOLINGS.get(
        stated if isinstance(stated, int) else 0, _DEFAULT_POOLING[encoder]
    )
    ends_with_sep = bool(lib.llama_vocab_get_add_sep(vocab))
    eos = int(lib.llama_vocab_sep(vocab) if ends_with_sep else lib.llama_vocab_eos(vocab))
    return wire.ModelInfo(
        name=load.name,
        architecture=header.architecture,
        quantization=header.quantization,
        engine="llamacpp",
        engine_version=library.version,
        n_params=header.n_params,
        n_vocab=vocabulary.n_vocab,
        n_ctx=load.n_ctx,
        n_ctx_train=int(lib.llama_model_n_ctx_train(model)),
        n_embd=int(lib.llama_model_n_embd(model)),
        file_size=header.file_size,
        bos_id=int(lib.llama_vocab_bos(vocab)),
        eos_id=eos,
        eog_ids=vocabulary.eog_ids,
        special=vocabulary.special,
        chat_template=chat_template,
        add_bos=bool(lib.llama_vocab_get_add_bos(vocab)),
        add_eos=ends_with_sep or bool(lib.llama_vocab_get_add_eos(vocab)),
        add_space_prefix=vocabulary.type == SPM and bool(meta.get("tokenizer.ggml.add_space_prefix", True)),
        n_embd_out=0 if ranks else int(lib.llama_model_n_embd_out(model)),
        pooling="" if ranks else pooling,
        adapters=tuple(wire.Adapter(file.name, file.scale) for file in load.adapters),
    )


def _pair_form(library: Library, model: Any, header: gguf.Header) -> PairForm:
    """The file's own prompt for pairs, or else the ids that llama.cpp's server puts around them."""
    lib = library.lib
    vocab = lib.llama_model_get_vocab(model)
    sep, end = int(lib.llama_vocab_sep(vocab)), int(lib.llama_vocab_eos(vocab))
    bos = (int(lib.llama_vocab_bos(vocab)),) if lib.llama_vocab_get_add_bos(vocab) else ()
    eos = (end if end >= 0 else sep,) if lib.llama_vocab_get_add_eos(vocab) else ()
    between = (*eos, sep) if lib.llama_vocab_get_add_sep(vocab) else eos
    before, between, after = (tuple(token for token in ids if token >= 0) for ids in (bos, between, eos))
    return PairForm(rank_head.template(header), before, between, after)


def _capabilities(
    library: Library,
    model: Any,
    header: gguf.Header,
    load: wire.Load,
    *,
    encoder: bool,
    longest_piece: int,
) -> Capabilities:
    n_slots = load.n_slots
    pair = _pair_form(library, model, header) if rank_head.ranks(header) else None
    if encoder:
        # a text is one row of one batch, and each of its tokens has an output
        return Capabilities(
            n_seq=n_slots,
            n_ctx=load.n_ctx,
            n_batch=load.n_ctx,
            n_row=load.n_ctx,
            n_kv=load.n_ctx * n_slots,
            n_outputs=load.n_ctx,
            n_outputs_total=load.n_ctx,
            whole_rows=True,
            generates=False,
            pair=pair,
            bit_exact=False,
            interrupts=True,
            longest_piece=longest_piece,
        )
    recurrent = bool(library.lib.llama_model_is_recurrent(model) or library.lib.llama_model_is_hybrid(model))
    n_swa = int(library.lib.llama_model_n_swa(model))
    # a saved state of a sliding window lacks older tokens, and loads the others into other cells
    lossy = load.reproducible and n_swa > 0
    # files that are made to embed get outputs for every token of a step
    made_to_embed = header.value("pooling_type") and pair is None
    n_outputs = load.n_batch if made_to_embed else min(SCORED_ROWS, load.n_batch)
    return Capabilities(
        n_seq=n_slots,
        n_ctx=load.n_ctx,
        # tokens that decode ride beside a whole row of a prompt
        n_batch=load.n_batch + n_slots,
        n_row=load.n_batch,
        n_chunk=min(facts.N_CHUNK, load.n_batch),
        n_kv=n_cells(load),
        n_outputs=n_outputs,
        n_outputs_total=max(n_outputs, n_slots) + n_slots,
        align=min(facts.N_CHUNK, load.n_batch),
        bit_exact=False,
        n_least=min(facts.N_CHUNK, load.n_batch) if load.reproducible else 1,
        batches=not load.reproducible,
        shares_cells=load.kv != "separate",
        # a stream of its own is copied as a whole
        copies=Copies.NONE
        if lossy
        else Copies.WHOLE
        if recurrent or load.kv == "separate"
        else Copies.PREFIX,
        truncates=Truncates.NEVER if recurrent else Truncates.FREELY,
        saves=not lossy,
        # llama.cpp saves only those cells of a sliding window that the next token looks at
        cuts_saved=n_swa <= 0,
        generates=pair is None,
        pair=pair,
        interrupts=not recurrent,
        adapters=True,
        longest_piece=longest_piece,
    )


def n_cells(load: wire.Load) -> int:
    """KV cells of a load, rounded up as llama.cpp does it: in all, or in the stream of each slot."""
    n = load.n_slots if load.kv == "separate" else 1
    return n * (-(-n_cells_of(load) // (n * CELL_STEP)) * CELL_STEP)


def _new_context(
    library: Library, model: Any, header: gguf.Header, load: wire.Load, caps: Capabilities
) -> Any:
    params = library.context_params()
    params.n_ctx = caps.n_kv if not caps.whole_rows else caps.n_ctx
    params.n_batch = params.n_ubatch = caps.n_batch
    params.n_seq_max = caps.n_seq
    params.n_outputs_max = min(caps.n_batch, caps.n_outputs_total)
    params.n_threads = params.n_threads_batch = load.n_threads or threads.available()
    params.pooling_type = rank_head.RANK if caps.pair else _POOLING_NONE
    params.flash_attn_type = {"auto": -1, "off": 0, "on": 1}[load.flash_attn]
    params.type_k, params.type_v = CACHE_TYPES[load.cache_type_k], CACHE_TYPES[load.cache_type_v]
    library.set_unified(params, caps.whole_rows or load.kv != "separate")
    library.log.clear()
    context = library.lib.llama_init_from_model(model, params)
    if not context:
        raise ModelRefused(
            f"llama.cpp cannot run {header.path} with these settings: "
            f"{library.log.last_line() or 'no reason given'}"
        )
    return context


def _warm_up(engine: LlamaCppEngine, header: gguf.Header) -> float:
    """Evaluates a token: a model that fails now would fail later. Returns the seconds that it takes."""
    info, caps = engine.info, engine.caps
    damaged = f"{header.path} is damaged: it computes nonsense instead of {{}}; download it again"
    want = Want.EMBEDDING if caps.whole_rows else Want.LAST
    row = Row(0, [_first_token(info)], 0, Want.SCORE if caps.pair else want)
    seconds, values = math.inf, list[float]()
    for _ in range(2):
        begin = time.perf_counter()
        engine.eval([row])
        seconds = min(seconds, time.perf_counter() - begin)
        if caps.pair:
            values = [engine.score(0), -1.0]  # a probability of 0 is a score, too
        elif caps.whole_rows:
            values = [float(x) for x in memoryview(engine.embedding(0)).cast("B").cast("f")]
        else:
            values = engine.logits_list(0)
        engine.truncate(0, 0)
    if not all(map(math.isfinite, values)) or min(values) == max(values):
        kind = "scores" if caps.pair else "embeddings" if caps.whole_rows else "logits"
        raise ModelRefused(damaged.format(kind))
    engine.caps = structs.replace(caps, step_cost={1: 1000.0 * seconds})
    return seconds


def _try_adapter(engine: LlamaCppEngine, file: wire.AdapterFile) -> None:
    """Evaluates a token with an adapter. Raises ModelRefused if its numbers make nonsense of the model's."""
    adapters = (wire.Adapter(file.name, file.scale or 1.0),)
    want = Want.SCORE if engine.caps.pair else Want.LAST
    engine.eval([Row(0, [_first_token(engine.info)], 0, want, adapters)])
    values = [engine.score(0)] if engine.caps.pair else engine.logits_list(0)
    engine.truncate(0, 0)
    if not all(map(math.isfinite, values)):
        raise ModelRefused(
            f"the LoRA adapter {file.path} is damaged: with the scale {adapters[0].scale:g} the model computes "
            "nonsense; copy or download it again, or choose a smaller scale"
        )


def _first_token(info: wire.ModelInfo) -> int:
    """The token of a trial."""
    return info.bos_id if 0 <= info.bos_id < info.n_vocab else 0
