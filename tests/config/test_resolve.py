"""Precedence, types and bounds of options, and the source that an error message names."""

import json
from pathlib import Path

import pytest

from tinyoai.cli.parser import Parser
from tinyoai.config import config_file, options
from tinyoai.config.options import OPTIONS
from tinyoai.config.resolve import attribute_error, resolve
from tinyoai.errors import UsageError


def test_flags_override_variables_override_defaults() -> None:
    env = {"TINYOAI_PORT": "1", "TINYOAI_CTX_SIZE": "64", "TINYOAI_HOST": ""}
    config = resolve({"port": "2"}, env)
    assert (config.port, config.ctx_size, config.host) == (2, 64, "127.0.0.1")


def test_variables_override_the_file() -> None:
    file = config_file.from_json(
        {"http.port": 1, "http.host": "0.0.0.0", "model.ctx-size": 5}, "/x/config.json"
    )
    got = resolve({"port": "3"}, {"TINYOAI_PORT": "2", "TINYOAI_CTX_SIZE": "64"}, file)
    assert (got.port, got.ctx_size, got.host, got.parallel) == (3, 64, "0.0.0.0", 0)


def test_every_option_is_checked_against_its_bounds() -> None:
    for option in OPTIONS:
        if not isinstance(option.default, str | tuple | bool):
            for wrong in (option.low - 1, option.high + 1):
                with pytest.raises(UsageError, match=option.flag):
                    resolve({option.name: str(int(wrong))}, {})


def test_lists_are_flags_given_again_or_separated_by_commas() -> None:
    assert resolve({"api_key": ["a", "b, c"]}, {}).api_key == ("a", "b", "c")
    assert resolve({}, {"TINYOAI_API_KEY": "a,b"}).api_key == ("a", "b")
    with pytest.raises(UsageError, match="--api-key: the value is empty"):
        resolve({"api_key": [""]}, {})


def test_a_boolean_option_is_a_flag_without_a_value() -> None:
    parser = Parser(about="", examples="")
    parser.add_options()
    assert parser.flags(["--mlock"]) == {"mlock": "true"}
    with pytest.raises(UsageError, match="mlock"):
        parser.flags(["--mlock=false"])
    assert resolve({}, {}).mlock is False
    assert resolve({"mlock": "true"}, {}).mlock is True
    assert resolve({}, {"TINYOAI_MLOCK": "true"}).mlock is True
    assert resolve({}, {"TINYOAI_MLOCK": "1", "TINYOAI_NO_MMAP": "false"}).mlock is True
    file = config_file.from_json({"model.mlock": True, "model.no-mmap": False}, "/x/config.json")
    assert (resolve({}, {}, file).mlock, resolve({}, {}, file).no_mmap) == (True, False)
    with pytest.raises(UsageError, match="TINYOAI_MLOCK: 'maybe' is not true or false"):
        resolve({}, {"TINYOAI_MLOCK": "maybe"})
    with pytest.raises(UsageError, match=r"model\.mlock in /x/config\.json: '2' is not true or false"):
        resolve({}, {}, config_file.from_json({"model.mlock": 2}, "/x/config.json"))
    with pytest.raises(UsageError, match=r"http\.port in /x/config\.json: must be a string or a number"):
        config_file.from_json({"http.port": True}, "/x/config.json")


def test_a_boolean_is_shown_and_stored_as_json_has_it(tmp_path: Path) -> None:
    config_file.set_values(tmp_path, ["model.mlock=true"], lambda config: None)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model.mlock": True}
    option = options.find("model.mlock")
    value, source = config_file.effective(option, {}, config_file.read(tmp_path))
    assert (config_file.one_line(option, value), source) == ("true", "config.json")


def test_an_error_about_a_flag_names_the_source_of_the_value() -> None:
    error = UsageError("--rate-limit: bad")
    file = config_file.from_json({"access.rate-limit": "x"}, "/x/config.json")
    env = {"TINYOAI_RATE_LIMIT": "x"}
    named = attribute_error(error, {"rate_limit": "x"}, env, file)
    assert (str(named), named.exit_code) == ("--rate-limit: bad", 2)
    named = attribute_error(error, {}, env, file)
    assert (str(named), named.exit_code) == ("TINYOAI_RATE_LIMIT: bad", 2)
    named = attribute_error(error, {}, {}, file)
    assert (str(named), named.exit_code) == ("access.rate-limit in /x/config.json: bad", 1)
    assert attribute_error(error, {}, {}, None) is error
