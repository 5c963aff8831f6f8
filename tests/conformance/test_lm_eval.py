"""EleutherAI's lm-evaluation-harness scores the built-in model over the legacy endpoint.

Its `local-completions` model tokenizes with the server itself, sends prompts as token ids and reads the prompt's
log-probabilities back, so the task's score is right only if all of that is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import Server, environment

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
            sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments,
            "--tasks", "capitals", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "scores"), "--log_samples",
        ],
        capture_output=True, text=True, timeout=180, cwd=tmp_path,
        env={**environment(), "HF_HOME": os.fspath(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (scores,) = (tmp_path / "scores").rglob("results_*.json")
    assert json.loads(scores.read_text())["results"]["capitals"]["acc,none"] == 1.0
    (samples,) = (tmp_path / "scores").rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == len(CAPITALS)
    # the right one is what the model would say by itself, and the wrong ones are not
    for line in lines:
        for i, (logprob, greedy) in enumerate(line["filtered_resps"]):
            assert float(logprob) < 0
            assert (greedy in (True, "True")) is (i == line["doc"]["answer"])
