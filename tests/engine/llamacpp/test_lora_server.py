"""LoRA adapters through the server: requests that choose them, at once and in turns, and wrong ones."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import adapters, fixtures, llama_server
from tests.engines import make
from tests.serving import Server, command, environment, serve
from tinyoai import gguf

HELLO = "Tell me in one sentence about the sea."
SETS: list[Any] = [[], ["one"], ["two"], [{"id": 0, "scale": 0.5}, {"name": "two", "scale": -0.5}]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama in F32: what else is in the KV cache changes its answers too little to be seen."""
    if not llama_server.installed():
        fixtures.absent("xllamacpp is not installed: run `make test`")
    folder = tmp_path_factory.mktemp("model")
    return adapters.in_f32(folder / "m.gguf", make.llama(folder / "q8.gguf"))


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the model."""
    folder = tmp_path_factory.mktemp("lora")
    return [
        adapters.adapter(folder / f"{name}.gguf", model, seed=seed)
        for seed, name in enumerate(("one", "two"))
    ]


def flags(model: Path, *lora: object) -> list[str]:
    """The flags of a server with adapters."""
    named = [text for each in lora for text in ("--lora", str(each))]
    exact = ["--threads", "1", "--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"]
    return ["--model", str(model), "--engine", "llamacpp", "--ctx-size", "512", *exact, *named]


@pytest.fixture(scope="module")
def server(model: Path, files: list[Path]) -> Iterator[Server]:
    """A server whose first adapter applies by default."""
    with serve(*flags(model, files[0], f"{files[1]}=0"), "--parallel", "4") as found:
        yield found


def answer(server: Server, lora: Any = None, **fields: Any) -> Any:
    """The greedy answer to HELLO."""
    chosen = {} if lora is None else {"lora": lora}
    fields = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, **chosen, **fields}
    reply = server.chat(HELLO, **fields)
    assert reply.status == 200, reply.json
    return reply.json


def said(reply: Any) -> str:
    """The text of an answer."""
    return str(reply["choices"][0]["message"]["content"])


def test_each_set_answers_in_its_own_way(server: Server) -> None:
    texts = [said(answer(server, lora)) for lora in SETS]
    assert len(set(texts)) == len(SETS)
    assert said(answer(server)) == texts[1]  # the default
    assert said(answer(server, [{"id": 0, "scale": 0.0}])) == texts[0]
    assert [said(answer(server, lora)) for lora in reversed(SETS)] == texts[::-1]


def test_an_answer_is_that_of_the_merged_model(server: Server, model: Path, tmp_path: Path) -> None:
    changes = adapters.pairs(gguf.read_header(model), seed=1)
    merged = adapters.in_f32(tmp_path / "merged.gguf", model, changes, 0.5 * 8.0 / adapters.RANK)
    with serve(*flags(merged)) as alone:
        expected = said(answer(alone))
    assert said(answer(server, [{"name": "two", "scale": 0.5}])) == expected
    assert said(answer(server, [])) != expected


def test_sets_that_run_at_once_answer_as_alone(server: Server) -> None:
    alone = [said(answer(server, lora)) for lora in SETS]
    for _ in range(2):
        with ThreadPoolExecutor(len(SETS)) as pool:
            assert [said(reply) for reply in pool.map(lambda lora: answer(server, lora), SETS)] == alone


def test_a_prefix_is_reused_in_its_own_set_only(model: Path, files: list[Path]) -> None:
    with serve(*flags(model, *files), "--parallel", "4") as server:
        cached = [
            answer(server, lora)["usage"]["prompt_tokens_details"]["cached_tokens"] for lora in [*SETS, *SETS]
        ]
    assert cached[:4] == [0, 0, 0, 0]
    assert all(n > 20 for n in cached[4:])


def test_completions_and_streams_take_adapters(server: Server) -> None:
    def complete(**fields: Any) -> str:
        reply = server.post(
            "/v1/completions", prompt="The sea is", temperature=0, max_tokens=12, ignore_eos=True, **fields
        )
        assert reply.status == 200, reply.json
        return str(reply.json["choices"][0]["text"])

    assert len({complete(lora=lora) for lora in SETS}) == len(SETS)
    assert complete() == complete(lora=["one"])
    streamed = server.chat(
        HELLO, lora=["two"], stream=True, temperature=0, max_tokens=24, ignore_eos=True
    ).events
    deltas = [event["choices"][0]["delta"] for event in streamed if event != "[DONE]"]
    assert "".join(delta.get("content") or "" for delta in deltas) == said(answer(server, ["two"]))


@pytest.mark.parametrize(
    ("lora", "param", "words"),
    [
        (["three"], "lora", "no LoRA adapter 'three'; available: 'one', 'two'"),
        ([{"id": 2}], "lora", "no LoRA adapter with the id 2; available"),
        (["one", {"id": 0}], "lora", "'one' is named twice"),
        ([{"name": "one", "scale": 101}], "lora[0].scale", "at most 100"),
        ([{"name": "one", "scale": -1e300}], "lora[0].scale", "at least -100"),
        ([{"scale": 1}], "lora[0]", "by one of 'name' and 'id'"),
        ([{"name": "one", "id": 0}], "lora[0]", "by one of 'name' and 'id'"),
        ([{"id": -1}], "lora[0].id", "at least 0"),
        ([1], "lora[0]", "int"),
        ("one", "lora", "array"),
        (["one"] * 33, "lora", "at most 32 items"),
    ],
)
def test_wrong_choices_are_refused_in_words(server: Server, lora: Any, param: str, words: str) -> None:
    reply = server.chat(HELLO, lora=lora)
    error = reply.json["error"]
    assert (reply.status, error["param"]) == (400, param)
    assert words in error["message"]


def test_the_adapters_are_listed_without_their_folder(server: Server, files: list[Path]) -> None:
    reply = server.get("/lora-adapters")
    assert reply.json == [
        {"id": 0, "name": "one", "path": "one.gguf", "scale": 1.0},
        {"id": 1, "name": "two", "path": "two.gguf", "scale": 0.0},
    ]
    assert server.get("/v1/models").json["data"][0]["adapters"] == reply.json
    assert server.status()["adapters"] == ["one", "two"]
    for path in ("/lora-adapters", "/v1/models", "/v1/models/status"):
        assert str(files[0].parent) not in server.get(path).body.decode()


def test_a_model_without_adapters_says_so(model: Path) -> None:
    with serve(*flags(model)) as server:
        assert server.get("/lora-adapters").json == []
        assert said(answer(server, [])) == said(answer(server))
        reply = server.chat(HELLO, lora=["one"])
        assert reply.status == 400
        assert "this model has no LoRA adapters" in reply.json["error"]["message"]


@pytest.mark.parametrize("case", ["gone", "junk", "other", "scale", "double", "engine", "fake"])
def test_a_wrong_flag_ends_the_start_with_one_sentence(
    model: Path, files: list[Path], tmp_path: Path, case: str
) -> None:
    one, junk = files[0], tmp_path / "junk.gguf"
    junk.write_bytes(b"GGUF" + bytes(100))
    lora: dict[str, tuple[list[object], str]] = {
        "gone": ([tmp_path / "gone.gguf"], "--lora: "),
        "junk": ([junk], "the LoRA adapter junk.gguf"),
        "other": ([model], "is not a LoRA adapter"),
        "scale": ([f"{one}=500"], "choose one between -100 and 100"),
        "double": ([one, one], "two LoRA adapters have the name 'one'"),
        "engine": ([one], "only the llamacpp engine applies"),
        "fake": ([one], "the fake engine applies no LoRA adapters"),
    }
    given, words = lora[case]
    wanted = flags(model, *given)
    if case in ("engine", "fake"):
        wanted = ["--engine", {"engine": "ctransformers", "fake": "fake"}[case], *wanted[4:]]
    done = subprocess.run(
        command("--port", "0", *wanted),
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=False,
    )
    assert done.returncode == (2 if case == "fake" else 1)
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
