"""Model files of every broken kind: refused with a sentence, and what is not refused harms nobody."""

import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines import make
from tinyoai import gguf


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good llama."""
    return make.llama(tmp_path_factory.mktemp("gguf") / "sound.gguf", n_embd=32, n_ff=64, n_layer=1)


def refused(path: Path) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(gguf.BadModelFile) as caught:
        gguf.check(gguf.read_header(path))
    assert path.name in str(caught.value)
    return str(caught.value)


def test_sound_files_pass(sound: Path, tmp_path: Path) -> None:
    header = gguf.read_header(sound)
    gguf.check(header)
    assert (header.architecture, header.quantization, header.value("block_count")) == ("llama", "Q8_0", 1)
    assert header.n_params > 10_000
    gguf.check(gguf.read_header(make.falcon(tmp_path / "falcon.gguf")))
    assert gguf.kind(make.gpt2_ggml(tmp_path / "gpt2.bin")) == "legacy"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"hello, this is text\n" * 9, "text file"),
        (b"<html>" + bytes(200), "text file"),
        (bytes(300), "not a GGUF"),
        (b"PK\x03\x04" + bytes(300), "PyTorch"),
        (b"\x80\x02" + bytes(300), "PyTorch"),
        (struct.pack("<Q", 64) + b'{"a"' + bytes(300), "safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"FUGG" + bytes(300), "big-endian"),
        (struct.pack("<I", 0x67676D6C) + bytes(300), "--model-type"),
        (b"GGUF", "cut short"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(300), "version 1"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(300), "version 4"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(300), "version"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + bytes(300), "damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**63) + bytes(300), "damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 1) + bytes(300), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**64 - 1) + bytes(300), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1 << 20) + bytes(300), "cut short"),
    ],
)
def test_what_is_no_model(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    assert words in refused(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(gguf.BadModelFile, match="directory"):
        gguf.kind(tmp_path)
    with pytest.raises(gguf.BadModelFile, match="regular file"):
        gguf.kind(Path("/dev/zero"))


def test_every_truncation_is_refused(sound: Path, tmp_path: Path) -> None:
    whole = sound.read_bytes()
    data_at = gguf.read_header(sound).data_at
    places = [
        *range(64),
        *range(64, data_at, data_at // 40),
        data_at,
        data_at + 1,
        len(whole) // 2,
        len(whole) - 1,
    ]
    path = tmp_path / "cut.gguf"
    for place in places:
        path.write_bytes(whole[:place])
        refused(path)


CHANGES: list[tuple[str, Callable[[gguf.Header], None], str]] = [
    ("an architecture that is not run", lambda h: put(h, "general.architecture", "qwen2"), "'qwen2'"),
    ("no architecture", lambda h: drop(h, "general.architecture"), "architecture"),
    ("no heads", lambda h: put(h, "llama.attention.head_count", 0), "head_count"),
    ("no key-value heads", lambda h: put(h, "llama.attention.head_count_kv", 0), "head_count_kv"),
    ("heads that do not divide", lambda h: put(h, "llama.attention.head_count", 3), "heads"),
    ("a width of another type", lambda h: put(h, "llama.embedding_length", "32"), "embedding_length"),
    ("a width of true", lambda h: put(h, "llama.embedding_length", True), "embedding_length"),
    ("no layers", lambda h: drop(h, "llama.block_count"), "block_count"),
    ("more layers than there are", lambda h: put(h, "llama.block_count", 2), "blk.1"),
    ("no context", lambda h: put(h, "llama.context_length", 0), "context_length"),
    (
        "an epsilon of nothing",
        lambda h: put(h, "llama.attention.layer_norm_rms_epsilon", float("nan")),
        "epsilon",
    ),
    ("another rotary width", lambda h: put(h, "llama.rope.dimension_count", 8), "rotary"),
    ("no vocabulary", lambda h: drop(h, "tokenizer.ggml.tokens"), "vocabulary"),
    ("an empty vocabulary", lambda h: put(h, "tokenizer.ggml.tokens", []), "vocabulary"),
    ("numbers for tokens", lambda h: put(h, "tokenizer.ggml.tokens", [1, 2]), "vocabulary"),
    ("too few tokens", lambda h: h.metadata["tokenizer.ggml.tokens"].pop(), "scores"),
    ("too few scores", lambda h: h.metadata["tokenizer.ggml.scores"].pop(), "scores"),
    ("no token types", lambda h: drop(h, "tokenizer.ggml.token_type"), "token_type"),
    (
        "a byte token missing",
        lambda h: h.metadata["tokenizer.ggml.tokens"].__setitem__(20, b"x"),
        "byte tokens",
    ),
    ("a byte-pair llama", lambda h: put(h, "tokenizer.ggml.model", "gpt2"), "Llama 3"),
    ("an unknown tokenizer", lambda h: put(h, "tokenizer.ggml.model", "rwkv"), "'rwkv'"),
    ("bos beyond the vocabulary", lambda h: put(h, "tokenizer.ggml.bos_token_id", 10**6), "bos_token_id"),
    ("eos below the vocabulary", lambda h: put(h, "tokenizer.ggml.eos_token_id", -1), "eos_token_id"),
    ("a tensor missing", lambda h: h.tensors.pop("output.weight"), "output.weight"),
    ("a tensor of another shape", lambda h: reshape(h, "output.weight", (32, 5)), "output.weight"),
    ("a norm that is quantized", lambda h: retype(h, "output_norm.weight", 8), "output_norm.weight"),
]


def put(header: gguf.Header, key: str, value: object) -> None:
    """Another value."""
    header.metadata[key] = value


def drop(header: gguf.Header, key: str) -> None:
    """No value."""
    del header.metadata[key]


def reshape(header: gguf.Header, name: str, shape: tuple[int, ...]) -> None:
    """Another shape."""
    header.tensors[name] = header.tensors[name]._replace(shape=shape)


def retype(header: gguf.Header, name: str, type_: int) -> None:
    """Another type."""
    header.tensors[name] = header.tensors[name]._replace(type=type_)


@pytest.mark.parametrize(("change", "words"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_what_the_engine_cannot_run_is_told(
    sound: Path, change: Callable[[gguf.Header], None], words: str
) -> None:
    header = gguf.read_header(sound)
    change(header)
    with pytest.raises(gguf.BadModelFile) as caught:
        gguf.check(header)
    assert words in str(caught.value)


def test_a_falcon_as_newer_converters_write_it_is_refused(tmp_path: Path) -> None:
    header = gguf.read_header(make.falcon(tmp_path / "falcon.gguf"))
    header.metadata["tokenizer.ggml.tokens"][31] = "\u0120".encode()
    with pytest.raises(gguf.Unsupported, match="October 2023"):
        gguf.check(header)


def test_tensor_table_is_held_against_the_file(sound: Path, tmp_path: Path) -> None:
    whole, header = bytearray(sound.read_bytes()), gguf.read_header(sound)
    name = b"output.weight"
    at = whole.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    entry = struct.unpack_from("<IQQIQ", whole, at)
    path = tmp_path / "table.gguf"
    first = header.tensors["token_embd.weight"].offset
    for changed, words in [
        ((0, *entry[1:]), "dimensions"),
        ((5, *entry[1:]), "dimensions"),
        ((*entry[:3], 1000, entry[4]), "type"),
        ((*entry[:3], 30, entry[4]), "type"),
        ((*entry[:4], entry[4] + 1), "place"),
        ((*entry[:4], 1 << 62), "cut short"),
        ((*entry[:4], first), "overlaps"),
        ((entry[0], 31, *entry[2:]), "shape"),
        ((entry[0], 1 << 40, 1 << 40, *entry[3:]), "shape"),
    ]:
        copy = bytearray(whole)
        struct.pack_into("<IQQIQ", copy, at, *changed)
        path.write_bytes(copy)
        assert words in refused(path)


TRY = """
import sys
from tinyoai.engine.base import EngineError, Row
from tinyoai.engine.ctransformers import open_model
for path in sys.argv[1:]:
    try:
        engine = open_model(path, model_type=None, name="m", n_ctx=64, n_slots=1, n_batch=32, gpu_layers=0)
        engine.eval([Row(0, engine.tokenize("hello")[:32], 0)], 1)
        engine.close()
    except EngineError as error:
        assert "Traceback" not in str(error)
print("alive")
"""


def test_bit_flips_in_the_header_raise_nothing_else_and_crash_nobody(sound: Path, tmp_path: Path) -> None:
    whole, draw = sound.read_bytes(), random.Random(3)
    data_at = gguf.read_header(sound).data_at
    accepted: list[str] = []
    for number in range(600):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(data_at)] ^= 1 << draw.randrange(8)
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(changed)
        try:
            gguf.check(gguf.read_header(path))
        except gguf.BadModelFile:
            path.unlink()
        else:
            accepted.append(str(path))
    assert len(accepted) < 500
    done = subprocess.run(
        [sys.executable, "-c", TRY, *accepted[:60]], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "alive\n", done.stderr[-2000:]
