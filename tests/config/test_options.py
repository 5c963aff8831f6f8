"""The option table and the names of its keys."""

import pytest

from tinyoai.config import options
from tinyoai.config.options import OPTIONS, Config
from tinyoai.engine import facts
from tinyoai.errors import UsageError
from tinyoai.text import chat_format


def test_every_option_is_a_field_of_the_configuration() -> None:
    assert [option.name for option in OPTIONS] != []
    assert {option.name for option in OPTIONS} == set(Config.__struct_fields__)


def test_every_option_has_its_own_key_and_is_found_by_all_its_names() -> None:
    assert len({option.key for option in OPTIONS}) == len(OPTIONS)
    for option in OPTIONS:
        plain = option.name.replace("_", "-")
        for name in (option.key, plain, option.name, option.key.upper(), f"{options.group(option)}.{plain}"):
            assert options.find(name) is option


def test_every_chat_format_is_a_choice() -> None:
    assert options.find("chat-template").choices == ("auto", *chat_format.NAMES)


@pytest.mark.parametrize("name", ["model.engine", "model.pooling", "model.chat-template"])
def test_auto_is_the_default(name: str) -> None:
    option = options.find(name)
    assert option.default == "auto" == option.choices[0]


def test_an_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'http.prot'; did you mean http\.port\?"):
        options.find("http.prot")
    with pytest.raises(UsageError, match="tinyoai get lists all keys"):
        options.find("zzzzzzzzzz")


def test_the_engine_option_offers_every_engine() -> None:
    assert (facts.AUTO, *facts.ENGINES) == options.ENGINES
