"""The numbered rules that OpenAI's clients depend on, and the tests that check each.

A test names its rules with `@pytest.mark.rule(number, ...)`. A rule without a test fails here.
"""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

RULES = {
    1: "chunks of a stream agree in id, created, model and object; finish_reason and logprobs are null until set",
    2: "a choice's first chunk has the role and empty content, its last one an empty delta and the reason",
    3: "usage has a chunk of its own if requested; no other chunk has empty choices",
    4: "[DONE] ends a good stream, an error event a failed one; errors come before the 200 if possible",
    5: "no code point is split, no stop sequence appears, and text that could become one is held back",
    6: "comments keep a silent stream alive",
    7: "headers of a stream; no chunked coding for HTTP/1.0",
    8: "indices of choices first appear in ascending order",
    9: "a request with tools is rejected, and the error names the field",
    10: "a choice, a message and the usage have all their fields",
    11: "finish_reason is stop or length, and correct",
    12: "ids are unique and have their prefixes; the model is the one served; the fingerprint is set",
    13: "timings are in the body and in the last chunk",
    14: "legacy completions: every form of prompt, 256 tokens, echo, suffix, best_of, logprobs in parallel lists",
    15: "embeddings: floats or base64, every form of input, dimensions, counts",
    16: "null means absent; content and roles in every form",
    17: "fields without effect are accepted, unknown ones ignored, known ones checked",
    18: "top_k, min_p, repeat_penalty, ignore_eos, min_tokens",
    19: "every error has the error body with status, type, code and param",
    20: "no client mistake is a 5xx; permanent failures say that a retry does not help",
    21: "request ids and processing times on every response, rate limits where they are on",
    22: "the SDKs' time limits end an answer or a wait before the client gives up",
    23: "keys: without keys any is accepted; with keys, a bearer token or x-api-key, except for health",
    24: "cross-origin requests: preflights, exposed headers, foreign hosts",
    25: "paths with and without /v1, trailing slashes, HEAD, ids with slashes",
    26: "100-continue, errors before the body was read, pipelining",
    27: "a client that disconnects frees its slot or its place in the queue",
    28: "JSON with any content type, unless a foreign page sends it or it is compressed",
}
TESTS = Path(__file__).parents[1]


def claims() -> dict[int, list[str]]:
    """Returns the names of the tests that claim each rule."""
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
def test_every_rule_has_a_test(number: int) -> None:
    assert claims()[number], f"no test checks rule {number}: {RULES[number]}"


def test_tests_name_known_rules() -> None:
    assert set(claims()) == set(RULES)
