"""EleutherAI's lm-evaluation-harness scores the built-in model over /v1/completions.

Its `local-completions` model tokenizes with the server, sends prompts as token ids and reads their
log-probabilities, so the score is right only if all of these are right.
"""

import json
import subprocess
from pathlib import Path

import pytest

from tests import clients
from tests.serving import Server

TASK = """\
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Italy": "Rome", "Spain": "Madrid", "Peru": "Lima",
    "Kenya": "Nairobi", "Norway": "Oslo", "Cuba": "Havana", "Iraq": "Baghdad", "Poland": "Warsaw", "Ghana": "Accra",
}  # fmt: skip


@pytest.mark.parametrize("n_concurrent", [1, 4])
def test_a_loglikelihood_task(builtin: Server, tmp_path: Path, n_concurrent: int) -> None:
    cities = list(CAPITALS.values())
    with (tmp_path / "capitals.jsonl").open("w") as file:
        for i, (country, city) in enumerate(CAPITALS.items()):
            choices = [city, cities[(i + 1) % len(cities)], cities[(i + 5) % len(cities)]]
            choices = choices[i % 3 :] + choices[: i % 3]
            file.write(
                json.dumps({"country": country, "choices": choices, "answer": choices.index(city)}) + "\n"
            )
    (tmp_path / "capitals.yaml").write_text(
        TASK.format(data=tmp_path / "capitals.jsonl", cache=tmp_path / "cache")
    )
    arguments = f"model={builtin.model},base_url={builtin.url}/completions,num_concurrent={n_concurrent},max_length=1024"
    done = subprocess.run(
        [
            clients.python("lm_eval"), "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments,
            "--tasks", "capitals", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "scores"), "--log_samples",
        ],
        capture_output=True, text=True, timeout=180, cwd=tmp_path,
        env=clients.quiet_environment(HF_HOME=str(tmp_path / "hf")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (scores,) = (tmp_path / "scores").rglob("results_*.json")
    # the model is tiny and the prompts are not in its chat format; chance alone gives a third
    assert json.loads(scores.read_text())["results"]["capitals"]["acc,none"] > 0.8
    (samples,) = (tmp_path / "scores").rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == len(CAPITALS)
    for line in lines:
        for choice, (logprob, greedy) in zip(line["doc"]["choices"], line["filtered_resps"], strict=True):
            expected, likeliest = scored(builtin, f"The capital of {line['doc']['country']} is", f" {choice}")
            assert float(logprob) == pytest.approx(expected, abs=1e-3)
            assert (greedy in (True, "True")) is likeliest


def scored(server: Server, context: str, continuation: str) -> tuple[float, bool]:
    """Returns a continuation's log-probability in a direct request, and whether it is the greedy one."""
    ids = server.post("/tokenize", content=context + continuation).json["tokens"]
    n_context = len(server.post("/tokenize", content=context).json["tokens"])
    ask = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
    logprobs = server.post("/v1/completions", **ask).json["choices"][0]["logprobs"]
    values, tops = logprobs["token_logprobs"][n_context:], logprobs["top_logprobs"][n_context:]
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
