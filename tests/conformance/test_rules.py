"""What OpenAI's clients depend on, numbered; each rule names the tests that hold it.

A test says which rules it holds with `@pytest.mark.rule(number, ...)`; a rule without a test fails here.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

RULES = {
    1: "chunks of a stream agree in id, created, model and object; finish_reason and logprobs are there and null until set",
    2: "a choice's first chunk has the role and an empty content, its last one an empty delta and the reason",
    3: "usage comes in a chunk of its own, if asked for; else no chunk has empty choices",
    4: "[DONE] ends a good stream, an error event a bad one; what can be refused is refused before the 200",
    5: "no code point is split, no stop sequence appears, what could become one is held back",
    6: "a silent stream is kept awake by comments",
    7: "a stream's headers; no chunked coding for HTTP/1.0",
    8: "indices of choices first appear in ascending order",
    9: "tools are not called here: asking for them is refused, with the field's name",
    10: "a choice, a message and the usage have all their fields",
    11: "finish_reason is stop or length, truly",
    12: "ids are unique and begin as they should; the model is the one served; the fingerprint means something",
    13: "timings in the body and in the last chunk",
    14: "legacy completions: every form of prompt, 16 tokens, echo, suffix, best_of, logprobs in parallel lists",
    15: "embeddings: floats or base64, every form of input, dimensions, counts",
    16: "null is absent; contents and roles in every form",
    17: "fields without effect are welcome, unknown ones ignored, known ones checked",
    18: "top_k, min_p, repeat_penalty, ignore_eos, min_tokens",
    19: "every refusal has the error body, its status, type, code and param",
    20: "no client mistake is a 5xx; permanent failures say that trying again does not help",
    21: "request ids and processing times on every response, rate limits where they are on",
    22: "the SDKs' time limits are heeded",
    23: "keys: any when off; when on, as bearer token or x-api-key, and none for health",
    24: "cross-origin requests: preflights, exposed headers, foreign hosts",
    25: "paths with and without /v1, trailing slashes, HEAD, ids with slashes",
    26: "100-continue, errors before the body was read, pipelining",
    27: "a client that leaves frees its slot, in the queue and out of it",
    28: "JSON whatever its content type, but not from foreign pages, and not compressed",
}
TESTS = Path(__file__).parents[1]


def held() -> dict[int, list[str]]:
    """Rules by number, and the tests that claim them."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.rule":
                    for number in mark.args:
                        found[ast.literal_eval(number)].append(f"{path.name}::{node.name}")
    return found


@pytest.mark.parametrize("number", RULES)
def test_every_rule_is_held(number: int) -> None:
    assert held()[number], f"no test holds rule {number}: {RULES[number]}"


def test_there_are_no_other_rules() -> None:
    assert set(held()) == set(RULES)
