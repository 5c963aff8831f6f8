"""The reproducible mode over the real library: equal bits in any company, with any reused prefix."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import architectures, fixtures, llama_server
from tests.engines import make
from tinyoai import wire
from tinyoai.engine.contract import Row, Truncates, Want
from tinyoai.engine.llamacpp import reproducible
from tinyoai.engine.llamacpp.engine import LlamaCppEngine
from tinyoai.engine.llamacpp.opening import open_engine

BLOCK = 64
SLOTS = 4


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    """Without the library the tests are skipped, or fail with CI=true."""
    if not llama_server.installed():
        fixtures.absent("xllamacpp is not installed: run `make test`")


def opened(path: Path, **fields: Any) -> LlamaCppEngine:
    """Opens an engine in the reproducible mode."""
    options = {"n_ctx": 1024, "n_slots": SLOTS, "n_batch": 128, "n_threads": 1, "reproducible": True} | fields
    return open_engine(wire.Load(path=str(path), name="m", engine="llamacpp", **options))


KINDS = ["Q8_0", "F16", "F32", "Q6_K"]


@pytest.fixture(scope="module", params=[*KINDS, "gemma3", "qwen2", "falcon-h1"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models: of each family of kernels for weights, with a sliding window, and a hybrid one."""
    if request.param not in KINDS:
        return architectures.model(request.param)
    file = tmp_path_factory.mktemp("reproducible") / f"{request.param}.gguf"
    return make.llama(file, n_embd=256, n_head=4, n_ff=512, n_ctx=2048, weights=request.param)


@pytest.fixture(scope="module", params=[1, 2], ids=["one thread", "two threads"])
def engine(request: pytest.FixtureRequest, path: Path) -> Iterator[LlamaCppEngine]:
    """An engine in the reproducible mode."""
    made = opened(path, n_threads=request.param)
    assert made.caps.bit_exact
    yield made
    made.close()


def bits(engine: LlamaCppEngine, row: int) -> bytes:
    """Returns the logits of a row's last token."""
    return bytes(engine._ffi.buffer(engine.logits(row), 4 * engine.info.n_vocab))


class Conversation:
    """A prompt and forced tokens after it, evaluated as the scheduler does it in one sequence."""

    def __init__(self, ids: list[int], n_prompt: int) -> None:
        self.ids, self.n_prompt = ids, n_prompt
        self.seq, self.n = -1, 0
        self.found: list[bytes] = []

    def start(self, engine: LlamaCppEngine, seq: int, held: list[int]) -> None:
        """Begins in a sequence that holds tokens, of which it reuses what is exact."""
        same = 0
        while same < min(len(held), self.n_prompt - 1) and held[same] == self.ids[same]:
            same += 1
        self.seq = seq
        self.n = engine.truncate(seq, engine.exact_prefix(seq, same, self.n_prompt))

    def row(self, engine: LlamaCppEngine, budget: int) -> Row:
        """The next row, with at most so many prompt tokens."""
        if self.n >= self.n_prompt:
            return Row(self.seq, [self.ids[self.n]], self.n)
        end = min(self.n_prompt, self.n + budget, self.n + engine.caps.n_row)
        if end < self.n_prompt:
            end -= end % engine.caps.align
        return Row(
            self.seq, self.ids[self.n : end], self.n, Want.LAST if end == self.n_prompt else Want.NOTHING
        )

    def took(self, engine: LlamaCppEngine, row: Row, index: int) -> bool:
        """Takes the row's outputs; returns whether it is complete."""
        self.n += len(row.tokens)
        if self.n >= self.n_prompt:
            self.found.append(bits(engine, index))
        return self.n == len(self.ids)


def alone(engine: LlamaCppEngine, ids: list[int], n_prompt: int) -> list[bytes]:
    """Returns the logits of a conversation in an empty sequence without company."""
    engine.truncate(0, 0)
    one = Conversation(ids, n_prompt)
    one.start(engine, 0, [])
    ended = False
    while not ended:
        row = one.row(engine, BLOCK)
        engine.eval([row])
        ended = one.took(engine, row, 0)
    return one.found


def test_logits_do_not_depend_on_company_cuts_and_reused_prefixes(engine: LlamaCppEngine) -> None:
    draw = random.Random(5)
    n_vocab = engine.info.n_vocab
    stem = [draw.randrange(3, n_vocab) for _ in range(700)]
    conversations = []
    for n_prompt in (700, 640, 577, 530, 129, 128, 90, 64, 63, 5, 1):
        tail = [draw.randrange(3, n_vocab) for _ in range(draw.randrange(1, 12))]
        conversations.append((stem[:n_prompt] + tail, n_prompt))
    expected = [alone(engine, *each) for each in conversations]
    held: dict[int, list[int]] = {seq: [] for seq in range(SLOTS)}
    for seq in held:
        engine.truncate(seq, 0)
    waiting = [*range(len(conversations))] * 2
    draw.shuffle(waiting)
    running: dict[int, Conversation] = {}
    n_reused = 0
    while waiting or running:
        free = [seq for seq in held if seq not in running]
        if waiting and free and draw.random() < 0.4:
            seq, number = draw.choice(free), waiting.pop()
            if engine.caps.saves and draw.random() < 0.3:  # as an answer that is cut off, or a pause
                source = draw.choice([*held])
                assert engine.load(seq, engine.save(source))
                held[seq] = list(held[source])
            running[seq] = one = Conversation(*conversations[number])
            one.start(engine, seq, held[seq])
            n_reused += one.n
            held[seq] = held[seq][: one.n]
        chosen = [one for one in running.values() if draw.random() < 0.8]
        draw.shuffle(chosen)
        rows: list[Row] = []
        for one in chosen:
            left = engine.caps.n_batch - sum(len(row.tokens) for row in rows)
            if left >= BLOCK:
                rows.append(one.row(engine, draw.choice([BLOCK, left])))
        engine.use_threads(draw.choice([1, 2]))  # the cores may be needed elsewhere
        if not rows:
            continue
        engine.eval(rows)
        for index, row in enumerate(rows):
            one = running[row.seq]
            held[row.seq] += row.tokens
            if one.took(engine, row, index):
                del running[row.seq]
                number = next(i for i, (ids, _) in enumerate(conversations) if ids is one.ids)
                assert one.found == expected[number], f"conversation {number} in sequence {row.seq}"
    assert n_reused > 500 or engine.caps.truncates is Truncates.NEVER


def test_the_number_of_rows_changes_results_without_the_mode(tmp_path: Path) -> None:
    """Otherwise the tests here would prove nothing."""
    path = make.llama(tmp_path / "f16.gguf", n_embd=256, n_head=4, n_ff=512, n_ctx=2048, weights="F16")
    engine = opened(path, reproducible=False, kv="separate")
    assert not engine.caps.bit_exact
    assert not reproducible.passes(engine)
    engine.close()


@pytest.mark.parametrize("name", ["bert", "llama-embed"])
def test_embeddings_do_not_depend_on_company(name: str) -> None:
    engine = opened(architectures.model(name), n_ctx=256)
    assert engine.caps.bit_exact
    texts = [[7 * i + j for j in range(1, n)] for i, n in enumerate((12, 3, 40, 16))]
    if not engine.caps.whole_rows:
        texts = [text[: engine.caps.n_outputs] for text in texts]

    def rows(numbers: list[int]) -> list[Row]:
        for number in numbers:
            engine.truncate(number, 0)
        return [Row(number, texts[number], 0, Want.EMBEDDING) for number in numbers]

    alone = []
    for number in range(4):
        engine.eval(rows([number]))
        alone.append(bytes(engine.embedding(0)))
    for company in ([0, 1, 2, 3], [3, 1], [2, 0, 1]):
        engine.eval(rows(company))
        assert [bytes(engine.embedding(i)) for i in range(len(company))] == [alone[n] for n in company]
    engine.close()


@pytest.mark.parametrize("name", ["qwen3-rank", "bert-rank"])
def test_scores_do_not_depend_on_company(name: str) -> None:
    engine = opened(architectures.model(name))
    whole = engine.caps.whole_rows
    texts = [[(7 * i + 11 * k) % 200 + 20 for i in range(30 + k)] for k in range(SLOTS)]

    def rows(seqs: list[int]) -> list[Row]:
        if whole:
            return [Row(seq, texts[seq], 0, Want.SCORE) for seq in seqs]
        engine.eval([Row(seq, texts[seq][:-1], 0, Want.NOTHING) for seq in seqs])
        return [Row(seq, texts[seq][-1:], len(texts[seq]) - 1, Want.SCORE) for seq in seqs]

    alone = []
    for seq in range(SLOTS):
        engine.eval(rows([seq]))
        alone.append(engine.score(0))
        engine.truncate(seq, 0)
    engine.eval(rows([2, 0, 3, 1]))
    assert [engine.score(i) for i in range(SLOTS)] == [alone[seq] for seq in (2, 0, 3, 1)]
    assert len(set(alone)) == SLOTS
    engine.close()
