"""`get`, `set` and `unset`: precedence, checks, and errors of an invalid file."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import KEY, ROOT, refused
from tests.serving import command, environment, serve
from tinyoai.config.options import OPTIONS


def tiny(home: Path, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Runs the command on a data directory and waits for its end."""
    return subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(TINYOAI_HOME=str(home), **env),
        check=False,
    )


def file_of(home: Path) -> Path:
    """Returns the path of the configuration file."""
    return home / "config.json"


def test_an_unknown_key_of_the_file_can_be_removed_as_the_error_says(tmp_path: Path) -> None:
    file_of(tmp_path).write_text('{"zz zz": 1, "http.port": 9090}')
    assert refused(tiny(tmp_path, "get"), 1).endswith("remove it with: tinyoai unset 'zz zz'")
    assert tiny(tmp_path, "unset", "zz zz").returncode == 0
    assert json.loads(file_of(tmp_path).read_text()) == {"http.port": 9090}


# -- precedence ---------------------------------------------------------------------------------------


def test_a_server_uses_the_file_and_a_flag_overrides_it(tmp_path: Path) -> None:
    done = tiny(tmp_path, "set", "model.engine=fake", "model.name=from-file", "model.parallel=2")
    assert done.returncode == 0, done
    env = environment(TINYOAI_HOME=str(tmp_path))
    with serve("--model-name", "from-flag", env=env) as server:
        assert server.model == "from-flag"
        assert "2 requests at a time" in server.banner
    with serve(env={**env, "TINYOAI_PARALLEL": "3"}) as server:
        assert server.model == "from-file"
        assert "3 requests at a time" in server.banner


def test_get_shows_values_and_sources(tmp_path: Path) -> None:
    assert tiny(tmp_path, "set", "http.port=9090", "grace=5").returncode == 0
    rows = {
        row[0]: row[1:]
        for row in map(str.split, tiny(tmp_path, "get", TINYOAI_GRACE="7").stdout.splitlines())
    }
    assert len(rows) == len(OPTIONS)
    groups = [key.partition(".")[0] for key in rows]
    assert (
        sum(one != other for one, other in itertools.pairwise(groups)) == len(set(groups)) - 1
    )  # each group is contiguous
    assert rows["http.port"] == ["9090", "config.json"]
    assert rows["http.grace"] == ["7.0", "TINYOAI_GRACE"]
    assert rows["http.host"] == ["127.0.0.1"]
    assert rows["home"] == [str(tmp_path), "TINYOAI_HOME"]
    group = tiny(tmp_path, "get", "http").stdout
    assert {"http.host", "http.port"} <= {line.split()[0] for line in group.splitlines()}
    assert "model." not in group
    assert tiny(tmp_path, "get", "http.port").stdout == "9090\n"
    assert tiny(tmp_path, "get", "ctx_size").stdout == "0\n"
    assert json.loads(tiny(tmp_path, "get", "http.port", "log.level", "--json").stdout) == {
        "http.port": {"value": 9090, "source": "config.json"},
        "log.level": {"value": "info", "source": "default"},
    }


# -- set and unset -----------------------------------------------------------------------------------


def test_set_writes_for_the_owner_alone_and_unset_removes(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    assert (
        tiny(home, "set", "http.port=9090", "http.cors-origin=https://a.example,https://b.example").returncode
        == 0
    )
    assert file_of(home).stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    assert json.loads(file_of(home).read_text()) == {
        "http.cors-origin": ["https://a.example", "https://b.example"],
        "http.port": 9090,
    }
    assert tiny(home, "set", "port=9091").returncode == 0  # short for http.port
    assert json.loads(file_of(home).read_text())["http.port"] == 9091
    assert "http.port" in tiny(home, "unset", "port", "http.cors-origin").stdout
    assert json.loads(file_of(home).read_text()) == {}
    assert "none of these keys was set" in tiny(home, "unset", "port").stdout
    assert sorted(path.name for path in home.iterdir()) == ["config.json", "config.lock"]  # no temporary file


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("http.prot=1", "did you mean http.port"),
        ("http.port=x", "http.port: 'x' is not a whole number"),
        ("http.port=70000", "http.port: 70000 is not between"),
        ("model.engine=vllm", "auto, ctransformers, llamacpp, fake"),
        ("http.port", "key=value"),
        ("model-name=again", "model.name is given twice"),
        ("home=/tmp", "--home"),
        ("access.api-key=", "access.api-key: the value is empty"),
        ("access.rate-limit=many", "access.rate-limit: 'many'"),
        ("access.api-key-file=/none/keys", "access.api-key-file: cannot read /none/keys"),
        ("models.memory-budget=much", "models.memory-budget: 'much'"),
        ("models.keep-alive=long", "models.keep-alive: 'long'"),
        ("models.dir=/none", "models.dir: /none"),
        ("model.chat-template=/none", "model.chat-template: '/none' is not one of auto, chatml"),
        ("model.file=/none.gguf", "cannot read the model file /none.gguf"),
        ("http.cors-origin=app.example", "http.cors-origin: 'app.example'"),
        ("http.host=no such host", "http.host: 'no such host'"),
        ("http.host=a\nb", "unprintable"),
    ],
)
def test_an_invalid_value_is_not_written(pair: str, words: str, tmp_path: Path) -> None:
    file_of(tmp_path).write_text('{"model.parallel": 2}')
    assert words in refused(tiny(tmp_path, "set", "model.name=good", pair), 2)
    assert file_of(tmp_path).read_text() == '{"model.parallel": 2}'


def test_several_values_of_one_key_need_commas(tmp_path: Path) -> None:
    done = tiny(tmp_path, "set", "http.cors-origin=https://a.example", "cors-origin=https://b.example")
    assert "http.cors-origin is given twice; separate its values by commas" in refused(done, 2)
    assert not file_of(tmp_path).exists()


def test_paths_are_stored_as_absolute_paths(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    done = subprocess.run(
        [sys.executable, "-m", "tinyoai", "set", "models.dir=models", "model.chat-template=own.jinja"],
        cwd=tmp_path,
        env=environment(TINYOAI_HOME="home", PYTHONPATH=str(ROOT)),
        timeout=120,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"models.dir = {tmp_path}/models\nmodel.chat-template = {tmp_path}/own.jinja\n"
    assert json.loads(file_of(tmp_path / "home").read_text()) == {
        "models.dir": f"{tmp_path}/models",
        "model.chat-template": f"{tmp_path}/own.jinja",
    }


def test_a_chat_format_is_no_path(tmp_path: Path) -> None:
    assert tiny(tmp_path, "set", "model.chat-template=vicuna").stdout == "model.chat-template = vicuna\n"


def test_api_keys_are_never_shown_in_full(tmp_path: Path) -> None:
    text = tiny(tmp_path, "set", f"access.api-key={KEY},short").stdout
    for words in (["get"], ["get", "access"], ["get", "api-key"], ["get", "--json"]):
        text += tiny(tmp_path, *words).stdout
    text += tiny(tmp_path, "get", "access.api-key", TINYOAI_API_KEY="another-very-long-secret").stdout
    assert text.count("sk-0****") == 5
    assert "anot****" in text
    assert KEY[:8] not in text
    assert "short" not in text
    assert "secret" not in text
    env = environment(TINYOAI_HOME=str(tmp_path))
    with serve("--engine", "fake", env=env) as server:  # the server really requires the keys
        assert server.get("/v1/models").status == 401
        assert server.request("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status == 200


def test_simultaneous_changes_are_all_kept(tmp_path: Path) -> None:
    keys = ["http.port=1", "model.parallel=2", "log.level=debug", "http.grace=3"]
    env = environment(TINYOAI_HOME=str(tmp_path))
    running = [subprocess.Popen(command("set", key), env=env, stdout=subprocess.DEVNULL) for key in keys]
    assert [process.wait(120) for process in running] == [0, 0, 0, 0]
    assert len(json.loads(file_of(tmp_path).read_text())) == 4


# -- an invalid file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is damaged"),
        (b"", "is damaged"),
        (b"[1]", "is damaged"),
        (b'{"a": "\xff"}', "is damaged"),
        (b'{"http.prot": 1}', "did you mean http.port"),
        (b'{"http.port": "x"}', "http.port in {}: 'x' is not a whole number"),
        (b'{"http.port": 1.5}', "http.port in {}: '1.5' is not a whole number"),
        (b'{"http.port": true}', "http.port in {}: must be a string or a number"),
        (b'{"http.port": 1, "port": 2}', "port in {}: set twice"),
        (b'{"http.cors-origin": [1]}', "http.cors-origin in {}: must be a string or a list"),
        (b'{"access.api-key": []}', "access.api-key in {}: the value is empty"),
        (b'{"model.file": "m.gguf"}', "model.file in {}: 'm.gguf' is not an absolute path"),
        (b'{"access.rate-limit": "many"}', "access.rate-limit in {}: 'many'"),
        (b'{"http.host": "no such host"}', "http.host in {}: 'no such host'"),
        (b'{"home": "/tmp"}', "home in {}: the file cannot set its own folder"),
    ],
)
def test_an_error_of_the_file_is_one_line_with_file_and_key(
    content: bytes, words: str, tmp_path: Path
) -> None:
    path = file_of(tmp_path)
    path.write_bytes(content)
    line = refused(tiny(tmp_path, "--engine", "fake"), 1)
    assert words.format(path) in line
    assert str(path) in line
    assert path.read_bytes() == content


def test_an_error_names_the_variable_that_a_value_came_from(tmp_path: Path) -> None:
    line = refused(tiny(tmp_path, "--engine", "fake", TINYOAI_CORS_ORIGIN="app.example"), 2)
    assert line.startswith("tinyoai: TINYOAI_CORS_ORIGIN: 'app.example'")
    line = refused(tiny(tmp_path, "--engine", "fake", "--api-key-file", "/none", TINYOAI_RATE_LIMIT="1"), 1)
    assert line.startswith("tinyoai: --api-key-file: cannot read /none")


def test_unset_repairs_an_invalid_file(tmp_path: Path) -> None:
    file_of(tmp_path).write_text('{"http.prot": 1, "http.port": "x", "model.parallel": 2}')
    assert tiny(tmp_path, "unset", "http.prot", "port").returncode == 0
    assert json.loads(file_of(tmp_path).read_text()) == {"model.parallel": 2}


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    file_of(tmp_path).mkdir()
    assert "is not a regular file" in refused(tiny(tmp_path, "get"), 1)


def test_a_data_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for words in (["set", "http.port=1"], ["unset", "http.port"], ["agent", "start", "--engine", "fake"]):
        assert "--home" in refused(tiny(tmp_path / "file", *words), 1)
    assert tiny(tmp_path / "file", "get", "http.port").stdout == "8000\n"
