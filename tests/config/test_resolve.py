"""Precedence, types and bounds of options, and the source that an error message names."""

import pytest

from tinyoai.config import config_file
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
    assert (got.port, got.ctx_size, got.host, got.parallel) == (3, 64, "0.0.0.0", 4)


def test_every_option_is_checked_against_its_bounds() -> None:
    for option in OPTIONS:
        if not isinstance(option.default, str | tuple):
            for wrong in (option.low - 1, option.high + 1):
                with pytest.raises(UsageError, match=option.flag):
                    resolve({option.name: str(int(wrong))}, {})


def test_lists_are_flags_given_again_or_separated_by_commas() -> None:
    assert resolve({"api_key": ["a", "b, c"]}, {}).api_key == ("a", "b", "c")
    assert resolve({}, {"TINYOAI_API_KEY": "a,b"}).api_key == ("a", "b")
    with pytest.raises(UsageError, match="--api-key: the value is empty"):
        resolve({"api_key": [""]}, {})


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
