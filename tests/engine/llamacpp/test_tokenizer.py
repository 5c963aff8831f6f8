"""Text to token ids: llama.cpp's reference tokenizations, control tokens, and texts over which its regular expressions
overflow the stack.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from tests import architectures, fixtures
from tests.serving import environment, serve
from tinyoai import wire
from tinyoai.engine.contract import EngineError
from tinyoai.engine.llamacpp.library import Library
from tinyoai.engine.llamacpp.vocabulary import Vocabulary
from tinyoai.wire import Markup, Special, Text

NAMES = [
    "bert-bge",
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gemma-4",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
    "starcoder",
]
"""The vocabularies with reference tokenizations."""
SEPARATOR = "\n__ggml_vocab_test__\n"


@pytest.fixture(scope="module")
def library() -> Library:
    """The llama.cpp library; without it the test is skipped, or fails with CI=true."""
    try:
        return Library()
    except EngineError as error:
        fixtures.absent(str(error))


def open_vocabulary(library: Library, path: Path) -> tuple[Vocabulary, Any]:
    """The vocabulary of a file, read without weights, and its model."""
    params = library.lib.llama_model_default_params()
    params.vocab_only = True
    model = library.lib.llama_model_load_from_file(str(path).encode(), params)
    assert model, library.log.last_line()
    vocab = library.lib.llama_model_get_vocab(model)
    vocabulary = Vocabulary(library, vocab)
    vocabulary.info = wire.ModelInfo(
        name="m", architecture="", quantization="", engine="llamacpp", n_params=0, n_vocab=vocabulary.n_vocab,
        n_ctx=0, n_ctx_train=0, n_embd=0, file_size=0, bos_id=library.lib.llama_vocab_bos(vocab),
        eos_id=library.lib.llama_vocab_eos(vocab), eog_ids=vocabulary.eog_ids, special=vocabulary.special,
        chat_template="", add_bos=bool(library.lib.llama_vocab_get_add_bos(vocab)), add_space_prefix=False,
    )  # fmt: skip
    return vocabulary, model


def file_of(name: str) -> Path:
    """The file of a vocabulary; without it the test is skipped, or fails with CI=true."""
    return fixtures.require(fixtures.vocabularies(), "the vocabularies") / f"ggml-vocab-{name}.gguf"


@pytest.fixture(scope="module", params=NAMES)
def named(request: pytest.FixtureRequest, library: Library) -> Iterator[tuple[Path, Vocabulary]]:
    """Each vocabulary with its file."""
    path = file_of(request.param)
    vocabulary, model = open_vocabulary(library, path)
    yield path, vocabulary
    library.lib.llama_model_free(model)


def test_every_vocabulary_with_references_is_tested() -> None:
    folder = fixtures.require(fixtures.vocabularies(), "the vocabularies")
    found = {path.name.removesuffix(".gguf.out").removeprefix("ggml-vocab-") for path in folder.glob("*.out")}
    assert found == set(NAMES)


def references(path: Path) -> list[tuple[str, list[int]]]:
    """Texts and their ids without special tokens."""
    texts = Path(f"{path}.inp").read_bytes().decode().removesuffix(SEPARATOR).split(SEPARATOR)
    lines = Path(f"{path}.out").read_text().removesuffix("\n").split("\n")
    assert len(texts) == len(lines) > 40
    return [(text, [int(number) for number in line.split()]) for text, line in zip(texts, lines, strict=True)]


def test_the_ids_equal_the_reference(named: tuple[Path, Vocabulary]) -> None:
    path, vocabulary = named
    for text, ids in references(path):
        assert vocabulary.encode([Text(text)]) == ids, text


def test_a_prompt_begins_with_bos_where_the_vocabulary_says_so(named: tuple[Path, Vocabulary]) -> None:
    path, vocabulary = named
    text, ids = references(path)[0]
    given = vocabulary.encode([Special("bos"), Text(text)])
    assert given == ([vocabulary.info.bos_id, *ids] if vocabulary.info.add_bos else ids)


def test_control_tokens_come_from_markup_alone(named: tuple[Path, Vocabulary]) -> None:
    _, vocabulary = named
    controls = {text: token for text, token in vocabulary.special.items() if len(text) > 2}
    assert controls
    for text, token in list(controls.items())[:20]:
        assert token in vocabulary.encode([Markup(text)])
        assert not set(controls.values()) & set(vocabulary.encode([Text(text)])), text


def test_a_vocabulary_that_reads_control_tokens_in_plain_text_spells_them_out(
    library: Library, tmp_path: Path
) -> None:
    texts = ["<s>", *(f"\\x{byte:02x}" for byte in range(256)), "hello", "<|end|>"]
    writer = gguf.GGUFWriter(tmp_path / "rwkv.gguf", "rwkv7")
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(texts)
    writer.add_token_types([3] + [1] * 257 + [3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    vocabulary, model = open_vocabulary(library, tmp_path / "rwkv.gguf")
    assert vocabulary.special == {"<s>": 0, "<|end|>": 258}
    for text in ("<s>", "<|end|>", "hello<s>hello", "a<|end|>"):
        ids = vocabulary.tokenize(text)
        assert not {0, 258} & set(ids)
        assert b"".join(map(vocabulary.piece, ids)) == text.encode()
    assert vocabulary.tokenize("hello") == [257]
    library.lib.llama_model_free(model)


RUNS = {
    "spaces": " " * 100_000,
    "letters": "a" * 40_000,
    "digits": "7" * 40_000,
    "punctuation": "!" * 40_000,
    "characters": "\u6f22" * 40_000,
    "lines": "\n" * 40_000,
    "emoji": "\N{GRINNING FACE}" * 20_000,
    "mixed": "a1! " * 20_000 + "\t" * 20_000,
}


def encode_runs(path: Path) -> None:
    """Tokenizes every long run and compares the text of the tokens. For a process of its own: a crash ends it."""
    vocabulary, _ = open_vocabulary(Library(), path)
    for name, text in RUNS.items():
        raw = b"".join(map(vocabulary.piece, vocabulary.encode([Text(text)]))).decode()
        if "bert" not in path.name:
            assert raw in (text, " " + text), name


@pytest.mark.parametrize("name", NAMES)
def test_a_long_run_of_one_character_does_not_crash(library: Library, name: str) -> None:
    code = (
        f"from pathlib import Path; from tests.engine.llamacpp import test_tokenizer as t; "
        f"t.encode_runs(Path({str(file_of(name))!r}))"
    )
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("name", ["llama", "falcon-h1"])
def test_the_worker_survives_long_runs(library: Library, name: str) -> None:
    with serve("--model", str(architectures.model(name)), "--engine", "llamacpp", "--threads", "1") as server:
        workers = server.workers
        for run, text in RUNS.items():
            reply = server.post("/tokenize", content=text)
            assert reply.status == 200, (run, reply.body)
        assert server.workers == workers
