"""Opens legacy GGML files: the header's numbers where its layout is known, the rest from the library."""

import struct
from pathlib import Path

from msgspec import structs

from tinyoai import wire
from tinyoai.engine.contract import ModelRefused
from tinyoai.engine.ctransformers import facts
from tinyoai.engine.ctransformers.engine import CTransformersEngine
from tinyoai.engine.ctransformers.library import VERSION, Library, Loader
from tinyoai.engine.ctransformers.vocabulary import Vocabulary
from tinyoai.engine.memory_estimate import DEFAULT_CONTEXT
from tinyoai.wire import ModelInfo

_FIELDS = {
    # the order of the numbers after the magic, by architecture
    "gpt2": "n_vocab n_ctx n_embd n_head n_layer ftype",
    "gptj": "n_vocab n_ctx n_embd n_head n_layer n_rot ftype",
    "gptneox": "n_vocab n_ctx n_embd n_head n_layer n_rot par_res ftype",
    "dolly-v2": "n_vocab n_ctx n_embd n_head n_layer n_rot par_res ftype",
    "starcoder": "n_vocab n_ctx n_embd n_head n_layer ftype",
}
_DEFAULT_TRAINED = 2048
"""Tokens of context, for files whose header does not say."""


def open_legacy(library: Library, file: Path, load: wire.Load) -> CTransformersEngine:
    """An engine for a file of the architecture `load.model_type`. Raises ModelRefused."""
    model_type = str(load.model_type)
    size = file.stat().st_size
    known = read_header(file, size, model_type)
    n_train = known.get("n_ctx", _DEFAULT_TRAINED)
    load = structs.replace(load, n_ctx=min(load.n_ctx or DEFAULT_CONTEXT, n_train))
    loader = Loader(library, file, model_type, load.n_ctx, load.n_gpu_layers)
    handle = loader.load(load.n_batch)
    if handle is None:
        raise ModelRefused(f"ctransformers cannot load {file} as {model_type}; check --model-type")
    n_vocab, eos = handle.n_vocab(), handle.eos_id()
    pieces = [handle.piece(i) for i in range(n_vocab)]
    byte_tokens = {piece[0]: i for i, piece in enumerate(pieces) if len(piece) == 1}
    special: dict[str, int] = {}
    if 0 <= eos < n_vocab:
        special[pieces[eos].decode("utf-8", "replace") or "</s>"] = eos
        pieces[eos] = b""
    info = ModelInfo(
        name=load.name,
        architecture=model_type,
        quantization="GGML",
        engine="ctransformers",
        engine_version=VERSION,
        n_params=0,
        n_vocab=n_vocab,
        n_ctx=load.n_ctx,
        n_ctx_train=n_train,
        n_embd=known.get("n_embd", 0),
        file_size=size,
        bos_id=-1,
        eos_id=eos if 0 <= eos < n_vocab else -1,
        eog_ids=tuple(special.values()),
        special=special,
        chat_template="",
        add_bos=False,
        add_space_prefix=False,
    )
    vocabulary = Vocabulary(pieces, special, byte_tokens)
    return CTransformersEngine(loader, info, vocabulary, load.n_slots, load.n_batch, handle)


def read_header(file: Path, size: int, model_type: str) -> dict[str, int]:
    """The header's numbers by name; none if the layout is not known. Raises ModelRefused for impossible ones."""
    with file.open("rb") as opened:
        raw = opened.read(64)
    names = _FIELDS.get(model_type, "").split()
    if not names:
        return {}
    if len(raw) < 4 + 4 * len(names):
        raise ModelRefused(f"{file} is cut short: it ends within its header; copy or download it again")
    values = dict(zip(names, struct.unpack_from(f"<{len(names)}i", raw, 4), strict=True))
    most = {
        "n_vocab": size // 4,
        "n_ctx": 1 << 20,
        "n_embd": 1 << 16,
        "n_head": 1024,
        "n_layer": 1024,
        "n_rot": 1024,
    }
    for key, limit in most.items():
        if key in values and not 0 < values[key] <= limit:
            raise ModelRefused(f"{file} is not a {model_type} model: its {key} is {values[key]}")
    if values["n_embd"] % values["n_head"]:
        raise ModelRefused(f"{file} is not a {model_type} model: its heads do not divide its width")
    n_embd = values["n_embd"]
    # 0 is F32 and 1 F16; thousands count the format's versions
    if values["ftype"] % 1000 > 1 and facts.odd_on_arm(n_embd):
        raise ModelRefused(f"{file} {facts.odd_rows(f'quantized rows of {n_embd} values')}")
    # twelve square matrices a layer, and at least half a byte a weight
    least = (12 * values["n_layer"] * n_embd + values["n_vocab"]) * n_embd // 2
    if least > size:
        raise ModelRefused(
            f"{file} is cut short or not a {model_type} model: its header describes over {least} bytes of weights "
            f"and the file has {size}; copy or download it again"
        )
    return values
