"""OpenAI's SDK lists, retrieves and deletes models."""

from pathlib import Path

import openai
import pytest
from openai import OpenAI

from tests.serving import environment, serve

BUILTIN = Path(__file__).parents[4] / "tinyoai" / "builtin" / "tinyoai-chat.gguf"


def test_models_are_listed_retrieved_and_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / "org").mkdir(parents=True)
    (folder / "org" / "small.gguf").write_bytes(BUILTIN.read_bytes())
    (folder / "org" / "small.json").write_text('{"aliases": ["gpt-4o"]}')
    env = environment(TINYOAI_HOME=str(tmp_path / "home"))
    with (
        serve("--engine", "fake", "--models-dir", str(folder), env=env) as server,
        OpenAI(base_url=server.url, api_key="any") as client,
    ):
        assert "org/small" in [model.id for model in client.models.list()]
        assert client.models.retrieve("org/small").id == "org/small"
        assert client.models.retrieve("gpt-4o").id == "org/small"
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("gpt-5")
        assert caught.value.code == "model_not_found"
    with (
        serve("--engine", "fake", env=env) as server,
        OpenAI(base_url=server.url, api_key="any") as client,
    ):
        assert client.models.delete("org/small").deleted
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("org/small")
