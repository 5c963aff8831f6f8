"""The configuration file: get, set, unset, what wins over what, and what is said of a file that is wrong."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import command, environment, serve
from tinyoai.config import config_file, options
from tinyoai.config.options import OPTIONS, resolve
from tinyoai.errors import UsageError

KEY = "sk-0123456789abcdefghij"


def tiny(home: Path, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """The command on a data directory, to its end."""
    return subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(TINYOAI_HOME=str(home), **env),
        check=False,
    )


def refused(done: "subprocess.CompletedProcess[str]", code: int) -> str:
    """The one line that it said."""
    assert done.returncode == code, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("tinyoai: ")
    return line


def file_of(home: Path) -> Path:
    """The configuration file."""
    return home / "config.json"


# -- keys --------------------------------------------------------------------------------------------


def test_every_option_has_a_key_of_its_own_and_is_found_by_every_name() -> None:
    assert len({option.key for option in OPTIONS}) == len(OPTIONS)
    for option in OPTIONS:
        plain = option.name.replace("_", "-")
        for name in (option.key, plain, option.name, option.key.upper(), f"{options.group(option)}.{plain}"):
            assert options.find(name) is option


def test_an_unknown_key_has_its_nearest_named() -> None:
    with pytest.raises(UsageError, match=r"did you mean http\.port"):
        options.find("http.prot")
    with pytest.raises(UsageError, match="tinyoai get"):
        options.find("zzzzzzzzzz")


def test_an_unknown_key_of_the_file_can_be_taken_off_as_it_says(tmp_path: Path) -> None:
    file_of(tmp_path).write_text('{"zz zz": 1, "http.port": 9090}')
    assert refused(tiny(tmp_path, "get"), 1).endswith("tinyoai unset 'zz zz' takes it off")
    assert tiny(tmp_path, "unset", "zz zz").returncode == 0
    assert json.loads(file_of(tmp_path).read_text()) == {"http.port": 9090}


# -- what wins ---------------------------------------------------------------------------------------


def test_flags_win_over_variables_over_the_file_over_defaults() -> None:
    stored = options.stored({"http.port": 1, "http.host": "0.0.0.0", "model.ctx-size": 5}, "/x/config.json")
    got = resolve({"port": "3"}, {"TINYOAI_PORT": "2", "TINYOAI_CTX_SIZE": "64"}, stored)
    assert (got.port, got.ctx_size, got.host, got.parallel) == (3, 64, "0.0.0.0", 4)


def test_a_server_takes_the_file_and_a_flag_wins(tmp_path: Path) -> None:
    done = tiny(tmp_path, "set", "model.engine=fake", "model.name=from-file", "model.parallel=2")
    assert done.returncode == 0, done
    env = environment(TINYOAI_HOME=str(tmp_path))
    with serve("--model-name", "from-flag", env=env) as server:
        assert server.model == "from-flag"
        assert "2 requests at a time" in server.banner
    with serve(env={**env, "TINYOAI_PARALLEL": "3"}) as server:
        assert server.model == "from-file"
        assert "3 requests at a time" in server.banner


def test_get_tells_what_holds_and_where_it_comes_from(tmp_path: Path) -> None:
    assert tiny(tmp_path, "set", "http.port=9090", "grace=5").returncode == 0
    rows = {
        row[0]: row[1:]
        for row in map(str.split, tiny(tmp_path, "get", TINYOAI_GRACE="7").stdout.splitlines())
    }
    assert len(rows) == len(OPTIONS)
    groups = [key.partition(".")[0] for key in rows]
    assert (
        sum(one != other for one, other in itertools.pairwise(groups)) == len(set(groups)) - 1
    )  # each in one piece
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


def test_set_writes_for_its_owner_alone_and_unset_takes_back(tmp_path: Path) -> None:
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
    assert tiny(home, "set", "port=9091").returncode == 0  # the same key under its plain name
    assert json.loads(file_of(home).read_text())["http.port"] == 9091
    assert "http.port" in tiny(home, "unset", "port", "http.cors-origin").stdout
    assert json.loads(file_of(home).read_text()) == {}
    assert "none" in tiny(home, "unset", "port").stdout
    assert sorted(path.name for path in home.iterdir()) == ["config.json", "config.lock"]  # nothing temporary


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("http.prot=1", "did you mean http.port"),
        ("http.port=x", "http.port: 'x' is not a whole number"),
        ("http.port=70000", "http.port: 70000 is not between"),
        ("model.engine=vllm", "ctransformers, fake"),
        ("http.port", "key=value"),
        ("model-name=again", "model.name is given twice"),
        ("home=/tmp", "--home"),
        ("access.api-key=", "access.api-key: it is empty"),
        ("access.rate-limit=many", "access.rate-limit: 'many'"),
        ("access.api-key-file=/none/keys", "access.api-key-file: /none/keys"),
        ("models.memory-budget=much", "models.memory-budget: 'much'"),
        ("models.keep-alive=long", "models.keep-alive: 'long'"),
        ("models.dir=/none", "models.dir: /none"),
        ("model.file=/none.gguf", "/none.gguf cannot be read"),
        ("http.cors-origin=app.example", "http.cors-origin: 'app.example'"),
        ("http.host=no such host", "http.host: 'no such host'"),
        ("http.host=a\nb", "printed"),
    ],
)
def test_what_a_flag_would_not_take_is_not_written(pair: str, words: str, tmp_path: Path) -> None:
    file_of(tmp_path).write_text('{"model.parallel": 2}')
    assert words in refused(tiny(tmp_path, "set", "model.name=good", pair), 2)
    assert file_of(tmp_path).read_text() == '{"model.parallel": 2}'


def test_several_values_of_one_key_go_with_commas(tmp_path: Path) -> None:
    done = tiny(tmp_path, "set", "http.cors-origin=https://a.example", "cors-origin=https://b.example")
    assert "http.cors-origin is given twice; put commas" in refused(done, 2)
    assert not file_of(tmp_path).exists()


def test_paths_are_remembered_whole(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tinyoai", "set", "models.dir=models"],
        cwd=tmp_path,
        env=environment(TINYOAI_HOME="home", PYTHONPATH=str(Path(__file__).parent.parent)),
        timeout=120,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"models.dir = {tmp_path}/models\n"
    assert json.loads(file_of(tmp_path / "home").read_text()) == {"models.dir": f"{tmp_path}/models"}


def test_keys_are_never_shown_whole(tmp_path: Path) -> None:
    told = tiny(tmp_path, "set", f"access.api-key={KEY},short").stdout
    for words in (["get"], ["get", "access"], ["get", "api-key"], ["get", "--json"]):
        told += tiny(tmp_path, *words).stdout
    told += tiny(tmp_path, "get", "access.api-key", TINYOAI_API_KEY="another-very-long-secret").stdout
    assert told.count("sk-0****") == 5
    assert "anot****" in told
    assert KEY[:8] not in told
    assert "short" not in told
    assert "secret" not in told
    env = environment(TINYOAI_HOME=str(tmp_path))
    with serve("--engine", "fake", env=env) as server:  # and they do ask for them
        assert server.get("/v1/models").status == 401
        assert server.request("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status == 200


def test_settings_of_many_at_once_are_all_kept(tmp_path: Path) -> None:
    keys = ["http.port=1", "model.parallel=2", "log.level=debug", "http.grace=3"]
    env = environment(TINYOAI_HOME=str(tmp_path))
    running = [subprocess.Popen(command("set", key), env=env, stdout=subprocess.DEVNULL) for key in keys]
    assert [process.wait(120) for process in running] == [0, 0, 0, 0]
    assert len(json.loads(file_of(tmp_path).read_text())) == 4


# -- a wrong file ------------------------------------------------------------------------------------


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
        (b'{"http.port": true}', "http.port in {}: it must be a text or a number"),
        (b'{"http.port": 1, "port": 2}', "port in {}: it is set twice"),
        (b'{"http.cors-origin": [1]}', "http.cors-origin in {}: it must be a text or a list"),
        (b'{"access.api-key": []}', "access.api-key in {}: it is empty"),
        (b'{"model.file": "m.gguf"}', "model.file in {}: 'm.gguf' is no whole path"),
        (b'{"access.rate-limit": "many"}', "access.rate-limit in {}: 'many'"),
        (b'{"http.host": "no such host"}', "http.host in {}: 'no such host'"),
        (b'{"home": "/tmp"}', "home in {}: that is where this file is"),
    ],
)
def test_a_wrong_file_is_one_line_with_file_and_key(content: bytes, words: str, tmp_path: Path) -> None:
    path = file_of(tmp_path)
    path.write_bytes(content)
    line = refused(tiny(tmp_path, "--engine", "fake"), 1)
    assert words.format(path) in line
    assert str(path) in line
    assert path.read_bytes() == content


def test_a_complaint_names_the_variable_that_a_value_came_from(tmp_path: Path) -> None:
    line = refused(tiny(tmp_path, "--engine", "fake", TINYOAI_CORS_ORIGIN="app.example"), 2)
    assert line.startswith("tinyoai: TINYOAI_CORS_ORIGIN: 'app.example'")
    line = refused(tiny(tmp_path, "--engine", "fake", "--api-key-file", "/none", TINYOAI_RATE_LIMIT="1"), 1)
    assert line.startswith("tinyoai: --api-key-file: /none")


def test_unset_mends_a_wrong_file(tmp_path: Path) -> None:
    file_of(tmp_path).write_text('{"http.prot": 1, "http.port": "x", "model.parallel": 2}')
    assert tiny(tmp_path, "unset", "http.prot", "port").returncode == 0
    assert json.loads(file_of(tmp_path).read_text()) == {"model.parallel": 2}


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    file_of(tmp_path).mkdir()
    assert "is no file" in refused(tiny(tmp_path, "get"), 1)


def test_a_home_where_nothing_can_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for words in (["set", "http.port=1"], ["unset", "http.port"], ["agent", "start", "--engine", "fake"]):
        assert "--home" in refused(tiny(tmp_path / "file", *words), 1)
    assert tiny(tmp_path / "file", "get", "http.port").stdout == "8000\n"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    import resource

    file_of(tmp_path).write_text('{"model.parallel": 2}')
    pairs = ["model.name=" + "x" * 5000]
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.RLIM_INFINITY}));"
        f"from pathlib import Path; from tinyoai import settings;"
        f"settings.change(Path({str(tmp_path)!r}), {pairs!r}, lambda config: None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        check=False,
    )
    assert "cannot be written: File too large" in done.stderr
    assert file_of(tmp_path).read_text() == '{"model.parallel": 2}'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "config.lock"]


def test_what_is_short_is_masked_whole() -> None:
    assert config_file.masked("secret") == "********"
    assert config_file.masked(KEY) == "sk-0********"
