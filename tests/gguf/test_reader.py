"""Headers of sound and broken files. Judging whether an engine runs a file is tested in engine/test_facts.py."""

import random
import struct
from array import array
from pathlib import Path
from typing import Any

import gguf as reference
import pytest

from tests.engines import make
from tinyoai import gguf


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a valid llama file."""
    return make.llama(tmp_path_factory.mktemp("gguf") / "sound.gguf", n_embd=32, n_ff=64, n_layer=1)


def refused(path: Path) -> str:
    """Returns the error message for an invalid file."""
    with pytest.raises(gguf.BadModelFile) as caught:
        gguf.read_header(path)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_sound_files_pass(sound: Path, tmp_path: Path) -> None:
    header = gguf.read_header(sound)
    assert (header.architecture, header.quantization, header.value("block_count")) == ("llama", "Q8_0", 1)
    assert header.n_params > 10_000
    assert gguf.read_header(make.falcon(tmp_path / "falcon.gguf")).architecture == "falcon"
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
def test_files_that_are_not_models(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    assert words in refused(path)


def test_paths_that_are_not_files(tmp_path: Path) -> None:
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


def test_the_tensor_table_is_checked_against_the_file_size(sound: Path, tmp_path: Path) -> None:
    whole, header = bytearray(sound.read_bytes()), gguf.read_header(sound)
    name = b"output.weight"
    at = whole.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    entry = struct.unpack_from("<IQQIQ", whole, at)
    path = tmp_path / "table.gguf"
    first = header.tensors["token_embd.weight"].offset
    for changed, words in [
        ((0, *entry[1:]), "dimensions"),
        ((5, *entry[1:]), "dimensions"),
        ((*entry[:3], 30, entry[4]), "overlaps"),  # the tensor is larger in BF16
        ((*entry[:4], entry[4] + 1), "offset"),
        ((*entry[:4], 1 << 62), "cut short"),
        ((*entry[:4], first), "overlaps"),
        ((entry[0], 31, *entry[2:]), "shape"),
        ((entry[0], 1 << 40, 1 << 40, *entry[3:]), "shape"),
    ]:
        copy = bytearray(whole)
        struct.pack_into("<IQQIQ", copy, at, *changed)
        path.write_bytes(copy)
        assert words in refused(path)


def test_sizes_of_tensor_types_are_those_of_ggml() -> None:
    sizes = {int(type_): size for type_, size in reference.GGML_QUANT_SIZES.items()}
    assert set(sizes) <= set(gguf.TENSOR_TYPES)
    for number, (name, *size) in gguf.TENSOR_TYPES.items():
        if number in sizes:
            assert (name, tuple(size)) == (reference.GGMLQuantizationType(number).name, sizes[number])
    removed = {f"{base}_{rows}" for base in ("Q4_0", "IQ4_NL") for rows in ("4_4", "4_8", "8_8")}
    assert {gguf.TENSOR_TYPES[n].name for n in set(gguf.TENSOR_TYPES) - set(sizes)} == removed


# -- newer families ----------------------------------------------------------------------------------


def written(path: Path, arch: str, values: dict[str, Any], types: dict[str, int] | None = None) -> Path:
    """Writes a file with these metadata values and small tensors of these types."""
    numbers = {bool: 7, int: 4, float: 6, str: 8}

    def string(text: str | bytes) -> bytes:
        raw = text.encode() if isinstance(text, str) else text
        return struct.pack("<Q", len(raw)) + raw

    def value(x: Any) -> bytes:
        if isinstance(x, list):
            if not x or isinstance(x[0], list):
                return struct.pack("<IIQ", 9, 9, len(x)) + b"".join(value(y)[4:] for y in x)
            code, items = value(x[0])[:4], [value(y)[4:] for y in x]
            return struct.pack("<I", 9) + code + struct.pack("<Q", len(x)) + b"".join(items)
        if isinstance(x, array):
            code = {"f": 6, "i": 5, "I": 4, "B": 0, "d": 12}[x.typecode]
            return struct.pack("<IIQ", 9, code, len(x)) + x.tobytes()
        if isinstance(x, bytes):
            return struct.pack("<I", 8) + string(x)
        body = (
            string(x) if isinstance(x, str) else struct.pack({7: "<?", 4: "<I", 6: "<f"}[numbers[type(x)]], x)
        )
        return struct.pack("<I", numbers[type(x)]) + body

    values = {"general.architecture": arch} | values
    types = {"x.weight": 0} if types is None else types
    raw = b"GGUF" + struct.pack("<IQQ", 3, len(types), len(values))
    raw += b"".join(string(key) + value(x) for key, x in values.items())
    for i, (name, type_) in enumerate(types.items()):
        raw += string(name) + struct.pack("<IQIQ", 1, 256, type_, 2048 * i)
    raw += bytes(-len(raw) % 32) + bytes(2048 * len(types))
    path.write_bytes(raw)
    return path


def test_a_byte_pair_vocabulary_has_token_types_without_scores(tmp_path: Path) -> None:
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [b"a", b"b", "\u0120c".encode()],
        "tokenizer.ggml.token_type": array("i", [1, 3, 1]),
        "tokenizer.ggml.merges": [b"a b"],
    }
    header = gguf.read_header(written(tmp_path / "m.gguf", "qwen3", values))
    assert header.architecture == "qwen3"
    assert header.metadata["tokenizer.ggml.tokens"] == values["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    "values",
    [
        {"gemma3.attention.head_count": array("I", [4, 8]), "gemma3.rope.pattern": [True, False]},
        {"tokenizer.ggml.bos_token_id": 10**6},
        {"general.tags": [b"text-generation"], "general.license/link": "x", "k" * 300: 1},
        {"general.alignment": 4},
    ],
)
def test_values_of_newer_families_are_valid(tmp_path: Path, values: dict[str, Any]) -> None:
    header = gguf.read_header(written(tmp_path / "m.gguf", "gemma3", values))
    assert {key: header.metadata[key] for key in values} == values


def test_a_type_of_a_newer_ggml_is_valid(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", "new", {}, {"a": 1000, "b": 8, "c": 99, "d": 0})
    header = gguf.read_header(path)
    assert header.tensors["a"] == gguf.Tensor("a", (256,), 1000, 0, 0)
    assert header.tensors["a"].type_name == "type 1000"
    assert (header.quantization, header.n_params) == ("F32", 4 * 256)
    whole = written(path, "new", {}, {"a": 8, "b": 1000}).read_bytes()
    path.write_bytes(whole[:-2048])
    assert gguf.read_header(path).tensors["b"].offset == 2048
    path.write_bytes(whole[:-2049])  # the offset of the last tensor is missing
    assert "cut short" in refused(path)


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    header = gguf.read_header(written(tmp_path / "vocabulary.gguf", "llama", {}, {}))
    assert (header.tensors, header.n_params, header.quantization) == ({}, 0, "none")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tokenizer.ggml.tokens": [1, 2]}, "array of strings"),
        ({"tokenizer.ggml.tokens": 7}, "array of strings"),
        ({"tokenizer.ggml.tokens": [b"a"], "tokenizer.ggml.scores": array("f", [0, 0])}, "scores"),
        ({"tokenizer.ggml.tokens": [b"a"], "tokenizer.ggml.scores": array("i", [0])}, "scores"),
        ({"tokenizer.ggml.tokens": [b"a"], "tokenizer.ggml.token_type": array("i", [])}, "token_type"),
        ({"tokenizer.ggml.tokens": [b"a"], "tokenizer.ggml.token_type": array("f", [1])}, "token_type"),
        ({"general.alignment": 24}, "alignment"),
        ({"general.alignment": 0}, "alignment"),
        ({"general.alignment": True}, "alignment"),
        ({"a key": 1}, "key"),
        ({"": 1}, "key"),
        ({"x.y": [[1], [2]]}, "nested arrays"),
    ],
)
def test_metadata_that_is_invalid_in_every_family(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    assert words in refused(written(tmp_path / "m.gguf", "llama", values))


def test_a_header_cannot_fill_the_memory(tmp_path: Path) -> None:
    # sparse files with the size that their header claims
    path = tmp_path / "m.gguf"
    start = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 9)
    for array_, words in (
        (struct.pack("<IQ", 8, 1 << 30), "strings"),
        (struct.pack("<IQ", 4, 1 << 30), "longer"),
    ):
        path.write_bytes(start + array_)
        with path.open("r+b") as file:
            file.truncate(1 << 35)
        assert words in refused(path)


def test_bit_flips_raise_only_bad_model_file(sound: Path, tmp_path: Path) -> None:
    whole, draw = sound.read_bytes(), random.Random(5)
    data_at, n_refused = gguf.read_header(sound).data_at, 0
    path = tmp_path / "flipped.gguf"
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(data_at)] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            gguf.read_header(path)
        except gguf.BadModelFile:
            n_refused += 1
    assert 30 < n_refused < 300
