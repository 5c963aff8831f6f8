"""README.md and docs/: links resolve, tables are complete, and the examples work as written."""

import json
import os
import re
import subprocess
from pathlib import Path

import msgspec
import pytest

from tests import clients
from tests.serving import Server, command, environment, serve, wait_until
from tinyoai.api.routes import ROUTES
from tinyoai.config.options import OPTIONS
from tinyoai.finetune.jobs import installed
from tinyoai.models.catalog import Settings

ROOT = Path(__file__).parent.parent
BUILTIN = ROOT / "tinyoai" / "builtin" / "tinyoai-chat.gguf"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def blocks(page: str, language: str) -> list[str]:
    """Returns the code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def block(page: str, language: str, words: str) -> str:
    """Returns the only code block that contains these words."""
    (found,) = (text for text in blocks(page, language) if words in text)
    return found


def at(server: Server, text: str) -> str:
    """Returns an example with the server's address in place of the default one."""
    assert ADDRESS in text
    return text.replace(ADDRESS, f"http://127.0.0.1:{server.port}")


def shell(text: str, **variables: str) -> str:
    """Runs an example and returns its output. Fails if a command fails."""
    done = subprocess.run(
        ["bash", "-e", "-c", text],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def anchors(path: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_table_of_flags_is_complete() -> None:
    named = re.findall(r"^\| `(--[a-z-]+)", README, re.MULTILINE)
    assert sorted(named) == sorted("--" + option.name.replace("_", "-") for option in OPTIONS)


def test_the_table_of_endpoints_is_complete() -> None:
    table = README[README.index("## Endpoints") : README.index("## Clients")]
    for route in ROUTES:
        if route.tag:
            path = route.path.replace(":path}", "}")
            assert f"`{path}`" in table or f"{route.method} {path}`" in table, path


def test_the_settings_file_of_a_model_is_valid() -> None:
    settings = msgspec.json.decode(block("README.md", "json", "aliases"), type=Settings)
    assert settings.defaults.max_tokens == 256


def test_the_first_request(builtin: Server) -> None:
    answer = shell(at(builtin, block("README.md", "sh", '"stream": true')))
    chunks = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == "The capital of France is Paris."


@pytest.mark.parametrize(
    ("page", "words", "expected"),
    [
        ("README.md", "My name is Alice", r"Your name is Alice\."),
        ("docs/embeddings.md", "embeddings.create", r"0\.\d+"),
    ],
)
def test_python_examples(builtin: Server, page: str, words: str, expected: str) -> None:
    done = subprocess.run(
        [clients.python("openai"), "-c", at(builtin, block(page, "python", words))],
        capture_output=True, text=True, timeout=60, check=False, env=clients.quiet_environment(),
    )  # fmt: skip
    assert re.fullmatch(expected, done.stdout.strip()), done.stdout + done.stderr


def test_the_example_for_node(builtin: Server, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(clients.node_modules())
    (tmp_path / "example.mjs").write_text(at(builtin, block("README.md", "js", "openai")))
    done = subprocess.run(
        ["node", "example.mjs"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False, env=clients.quiet_environment(),
    )  # fmt: skip
    assert done.stdout.strip() == "The capital of France is Paris.", done.stderr


def test_several_models(tmp_path: Path) -> None:
    (tmp_path / "models" / "org").mkdir(parents=True)
    (tmp_path / "models" / "org" / "small.gguf").write_bytes(BUILTIN.read_bytes())
    with serve("--models-dir", str(tmp_path / "models")) as server:
        lines = at(server, block("README.md", "sh", "/v1/models/load")).strip().splitlines()
        listed, status, loaded, unloaded = (
            json.loads(shell(line.replace("curl", "curl -s"))) for line in lines
        )
    assert [card["id"] for card in listed["data"]] == ["tinyoai-chat", "org/small"]
    assert [row["state"] for row in status["data"]] == ["ready", "unloaded"]
    assert (loaded["status"], unloaded["status"]) == ("loaded", "unloaded")


def test_counting_tokens(builtin: Server) -> None:
    found = json.loads(
        shell(at(builtin, block("docs/embeddings.md", "sh", "/tokenize")).replace("curl", "curl -s"))
    )
    assert found["count"] == len(found["tokens"]) > 3


def test_ranking_documents() -> None:
    shown = json.loads(block("docs/rerank.md", "json", "relevance_score"))
    with serve("--engine", "fake", "--model-name", shown["model"]) as server:
        command_line = at(server, block("docs/rerank.md", "sh", "/v1/rerank")).replace("curl", "curl -s")
        found = json.loads(shell(command_line))
    assert found.keys() == shown.keys()
    assert found["model"] == shown["model"]
    assert [row.keys() for row in found["results"]] == [row.keys() for row in shown["results"]]
    assert found["results"][0] == {"index": 1, "relevance_score": 3.0}


def test_the_configuration_file(tmp_path: Path) -> None:
    env = environment(TINYOAI_HOME=str(tmp_path))
    outputs = {}
    for line in block("docs/operations.md", "sh", "tinyoai set").splitlines():
        words = line.partition("#")[0].split()
        if words[:2] != ["tinyoai", "agent"]:
            done = subprocess.run(
                command(*words[1:]), capture_output=True, text=True, timeout=60, check=False, env=env
            )
            assert done.returncode == 0, done.stderr
            outputs[" ".join(words[1:])] = done.stdout
    assert outputs["get http.port"].strip() == "8000"
    assert {"http.port", "http.host"} <= set(outputs["get http"].split()) < set(outputs["get"].split())
    (example,) = re.findall(r'`(\{"http\.port".*?\})`', (ROOT / "docs/operations.md").read_text())
    (tmp_path / "config.json").write_text(example)
    done = subprocess.run(
        command("get", "http.port"), capture_output=True, text=True, timeout=60, check=False, env=env
    )
    assert done.stdout.strip() == "9090", done.stderr


def test_a_file_of_keys(tmp_path: Path) -> None:
    lines = block("docs/operations.md", "sh", "chmod 600").splitlines()
    shell(f"cd {tmp_path}\n" + "\n".join(lines[:2]))
    key, owner = (tmp_path / "keys").read_text().strip().split(" ", 1)
    assert owner == "my laptop"
    flags = lines[2].split()[1:]
    flags[flags.index("keys")] = str(tmp_path / "keys")
    flags[flags.index("0.0.0.0")] = "127.0.0.1"
    with serve("--engine", "fake", *flags) as server:
        assert server.get("/v1/models").error["code"] == "invalid_api_key"
        reply = server.request("GET", "/v1/models", headers={"x-api-key": key})
        assert reply.headers["x-ratelimit-limit-requests"] == "60"


@pytest.mark.skipif(not installed(), reason="torch is not installed: run `make finetune`")
def test_fine_tuning() -> None:
    start, ask = blocks("docs/finetuning.md", "sh")
    with serve() as server:
        shell(at(server, start))

        def row() -> dict[str, str]:
            return dict(server.get("/api/finetune/status/1").json)

        wait_until(lambda: row()["status"] in ("completed", "failed"), "the job did not end")
        assert row()["status"] == "completed"
        answer = json.loads(shell(at(server, ask).replace("curl", "curl -s")))
    assert answer["choices"][0]["message"]["content"] == "Under the blue mat."
