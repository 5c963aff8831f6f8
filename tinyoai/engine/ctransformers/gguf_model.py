"""Opens GGUF files: model facts and vocabulary from the header."""

from pathlib import Path

from tinyoai import gguf, wire
from tinyoai.engine.ctransformers.engine import CTransformersEngine
from tinyoai.engine.ctransformers.library import VERSION, Library, Loader
from tinyoai.engine.ctransformers.vocabulary import END_TEXTS, Vocabulary
from tinyoai.wire import ModelInfo


def open_gguf(library: Library, header: gguf.Header, load: wire.Load) -> CTransformersEngine:
    """An engine for a file that `facts.supports` accepts. `load` has its n_ctx, n_slots and n_batch settled."""
    meta = header.metadata
    tokens: list[bytes] = meta["tokenizer.ggml.tokens"]
    spm = meta["tokenizer.ggml.model"] == "llama"
    pieces, special, byte_tokens = _tokens(tokens, meta["tokenizer.ggml.token_type"], spm)
    eos = int(meta.get("tokenizer.ggml.eos_token_id", 2 if spm else 11))
    bos = int(meta.get("tokenizer.ggml.bos_token_id", 1)) if spm else -1
    if not spm:
        # byte-pair vocabularies mark no control tokens: the header names the one that ends a text
        special.setdefault(tokens[eos].decode("utf-8", "replace"), eos)
        pieces[eos] = b""
        byte_tokens = {token[0]: i for i, token in enumerate(tokens) if len(token) == 1}
    ends = {eos, *(special[text] for text in END_TEXTS if text in special)}
    info = ModelInfo(
        name=load.name,
        architecture=header.architecture,
        quantization=header.quantization,
        engine="ctransformers",
        engine_version=VERSION,
        n_params=header.n_params,
        n_vocab=len(tokens),
        n_ctx=load.n_ctx,
        n_ctx_train=int(header.value("context_length")),
        n_embd=int(header.value("embedding_length")),
        file_size=header.file_size,
        bos_id=bos,
        eos_id=eos,
        eog_ids=tuple(sorted(ends)),
        special=special,
        chat_template=str(meta.get("tokenizer.chat_template", "")),
        add_bos=bos >= 0,
        add_space_prefix=spm,
    )
    loader = Loader(library, Path(header.path), "gguf", load.n_ctx, load.n_gpu_layers)
    vocabulary = Vocabulary(pieces, special, byte_tokens)
    return CTransformersEngine(loader, info, vocabulary, load.n_slots, load.n_batch)


def _tokens(
    tokens: list[bytes], types: "list[int]", spm: bool
) -> tuple[list[bytes], dict[str, int], dict[int, int]]:
    """Bytes by token, control tokens by text, and tokens by the byte that they stand for."""
    pieces: list[bytes] = []
    special: dict[str, int] = {}
    byte_tokens: dict[int, int] = {}
    for i, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ == gguf.BYTE:
            value = int(token[3:5], 16)
            byte_tokens[value] = i
            pieces.append(bytes([value]))
        elif type_ in (gguf.CONTROL, gguf.UNKNOWN, gguf.UNUSED):
            pieces.append(b"")
            if type_ == gguf.CONTROL:
                special[token.decode("utf-8", "replace")] = i
        else:
            pieces.append(token.replace(b"\xe2\x96\x81", b" ") if spm else token)
    return pieces, special, byte_tokens
