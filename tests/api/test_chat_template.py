"""A model's own Jinja template, from the file to the answer, over real sockets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import Server, environment, serve

TEMPLATE = """
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ raise_exception('there are no tools here') }}{% endif %}
{%- if hang %}{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}{% endif %}
<|im_start|>{{ m.role }}
{{ m.content }}{{ suffix.text if suffix else '' }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The scripted engine with a template."""
    path = tmp_path_factory.mktemp("template") / "own.jinja"
    path.write_text(TEMPLATE)
    with serve("--engine", "fake", "--chat-template", str(path), "--log-level", "error") as started:
        yield started


def user(text: str) -> list[dict[str, Any]]:
    """One message."""
    return [{"role": "user", "content": text}]


def test_the_card_of_a_model_names_the_template_of_the_flag(server: Server) -> None:
    assert server.get("/v1/models").json["data"][0]["template"] == "own.jinja"


def test_an_answer_and_its_template(server: Server) -> None:
    assert server.say("hello <|im_end|> you") == "hello <|im_end|> you"
    assert server.get("/v1/models/status").json["data"][0]["state"] == "ready"


@pytest.mark.parametrize("stream", [False, True])
def test_arguments_reach_the_template(server: Server, stream: bool) -> None:
    reply = server.chat(
        "ab", stream=stream, temperature=0, chat_template_kwargs={"suffix": {"text": "<|im_end|>!"}}
    )
    assert reply.status == 200
    if stream:
        text = "".join(
            e["choices"][0]["delta"].get("content", "")
            for e in reply.events
            if e != "[DONE]" and e["choices"]
        )
    else:
        text = reply.json["choices"][0]["message"]["content"]
    assert text == "ab<|im_end|>!"


def test_apply_template(server: Server) -> None:
    plain = server.post("/apply-template", messages=user("ab")).json
    assert plain["prompt"] == "<s><|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    forged = server.post(
        "/apply-template", messages=user("ab</s>"), chat_template_kwargs={"suffix": {"text": "!"}}
    ).json
    assert forged["prompt"] == plain["prompt"].replace("ab", "ab</s>!")
    assert forged["count"] == plain["count"] + len("</s>!")


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_template_refuses_is_a_400_in_its_words(server: Server, stream: bool) -> None:
    reply = server.chat("", messages=[*user("a"), {"role": "tool", "content": "b"}], stream=stream)
    assert reply.status == 400
    assert reply.error["message"] == "the chat template refuses this conversation: there are no tools here"
    assert reply.error["param"] == "messages"
    reply = server.post("/apply-template", messages=[{"role": "tool", "content": "b"}])
    assert (reply.status, reply.error["param"]) == (400, "messages")
    assert "there are no tools here" in reply.error["message"]


def test_a_variable_of_the_server_s_own_is_refused(server: Server) -> None:
    for reply in (
        server.chat("a", chat_template_kwargs={"messages": []}),
        server.post("/apply-template", messages=user("a"), chat_template_kwargs={"messages": []}),
    ):
        assert reply.status == 400
        assert reply.error["message"] == "chat_template_kwargs: 'messages' is set by the server; remove it"
        assert reply.error["param"] == "chat_template_kwargs"


def test_an_endless_rendering_ends_and_the_model_stays(server: Server) -> None:
    workers = server.workers
    reply = server.chat("a", chat_template_kwargs={"hang": True})
    assert (reply.status, reply.error["message"]) == (400, "the chat template did not end within 2 seconds")
    assert server.say("b") == "b"
    assert server.workers == workers


def test_a_named_format_takes_arguments_without_effect(fake: Server) -> None:
    assert fake.say("a", chat_template_kwargs={"suffix": "!"}) == "a"


def test_the_template_of_a_settings_file(tmp_path: Path) -> None:
    from tests.engines import make

    make.llama(tmp_path / "m.gguf")
    (tmp_path / "m.json").write_text('{"template": "own.jinja", "kind": "chat"}')
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }} by a file")
    with serve("--model", str(tmp_path / "m.gguf"), env=environment()) as server:
        assert server.get("/v1/models/m").json["template"] == "own.jinja"
        assert server.post("/apply-template", messages=user("ab")).json["prompt"].endswith("ab by a file")
