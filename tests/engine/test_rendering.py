"""The chat template of a loaded model: which one, what it makes of a conversation, and that no text forges a marker."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from tests.fixtures import require, templates_dir
from tinyoai import wire
from tinyoai.engine.contract import ModelRefused
from tinyoai.engine.fake import FakeEngine
from tinyoai.engine.rendering import ChatRenderer, RenderRefused
from tinyoai.text.jinja import strftime_now
from tinyoai.text.marker_guard import SENTINEL

SPECIAL = {"<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4, "[INST]": 5}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def renderer(
    source: str = "", *, load: dict[str, Any] | None = None, special: Sequence[str] = (*SPECIAL,), **info: Any
) -> ChatRenderer:
    """The renderer of a model with this template."""
    engine = FakeEngine(name="m")
    known: dict[str, Any] = {
        "engine": "llamacpp",
        "chat_template": source,
        "special": {text: i for i, text in enumerate(special)},
        "bos_id": special.index("<s>") if "<s>" in special else -1,
        "eos_id": special.index("</s>") if "</s>" in special else -1,
        "add_bos": False,
    }
    engine.info = structs.replace(engine.info, **(known | info))
    return ChatRenderer(wire.Load(path="", name="m", engine="", **(load or {})), engine)


def talk(*contents: str, role: str = "user") -> list[wire.Message]:
    """Messages of one role."""
    return [wire.Message(role=role, content=content) for content in contents]


def prompt(of: ChatRenderer, messages: list[wire.Message], **args: Any) -> list[wire.Segment]:
    """The segments of a conversation."""
    return of.render(wire.Conversation(messages=messages, template_args=args)).segments


def flat(segments: Sequence[wire.Segment]) -> str:
    """The prompt as one string."""
    return "".join(s.text if isinstance(s, wire.Text) else s.name for s in segments if not isinstance(s, wire.Ids | wire.Markup))  # fmt: skip


def markers(segments: Sequence[wire.Segment]) -> list[str]:
    """The control tokens of a prompt."""
    return [s.name for s in segments if isinstance(s, wire.Special)]


# -- which template ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "engine", "load", "name"),
    [
        (CHATML, "llamacpp", {}, "jinja"),
        (CHATML, "ctransformers", {}, "chatml"),
        (CHATML, "fake", {}, "chatml"),
        ("{{ messages[0].content }}!", "ctransformers", {}, "jinja"),
        ("", "llamacpp", {}, "chatml"),
        (CHATML, "llamacpp", {"template": "vicuna"}, "vicuna"),
        (CHATML, "fake", {"template": "/x", "template_source": "{{ messages[0].content }}"}, "jinja"),
    ],
)
def test_the_choice(source: str, engine: str, load: dict[str, str], name: str) -> None:
    assert renderer(source, engine=engine, load=load).name == name


def test_a_model_without_template_and_markers_is_plain() -> None:
    assert renderer(special=["<s>"]).name == "plain"


def test_a_known_format_does_not_need_jinja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tinyoai.text.jinja", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    known = renderer(CHATML, engine="ctransformers")
    assert markers(prompt(known, talk("a"))) == ["bos", "<|im_start|>", "<|im_end|>", "<|im_start|>"]
    for source, engine in ((CHATML, "llamacpp"), ("{{ messages[0].content }}", "ctransformers")):
        with pytest.raises(ModelRefused, match=r'pip install "tinyoai\[llamacpp\]".*--chat-template'):
            renderer(source, engine=engine)


def test_a_request_may_name_a_format() -> None:
    conversation = wire.Conversation(messages=talk("a"), template="vicuna")
    rendered = renderer(CHATML).render(conversation)
    assert flat(rendered.segments) == "bosUSER: a ASSISTANT:"
    assert rendered.stop == ["USER:"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", "is not valid"),
        ("{{ raise_exception('no') }}", "refuses this conversation: no"),
        ("hello", "does not write a user's message"),
        ("{{ functions.x }}", "'functions' is undefined"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "within 2 seconds"),
        ("{{ messages[0].content.nothing.more }}", "has no attribute 'nothing'"),
    ],
)
def test_a_template_that_cannot_be_used_refuses_the_load(source: str, words: str) -> None:
    with pytest.raises(ModelRefused) as raised:
        renderer(source)
    assert words in str(raised.value)
    assert "--chat-template" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_template_file_that_was_not_read_refuses_the_load() -> None:
    with pytest.raises(ModelRefused, match="'/gone' cannot be read"):
        renderer(CHATML, load={"template": "/gone"})


# -- what it makes of a conversation -----------------------------------------------------------------


def test_segments() -> None:
    messages = [*talk("Be kind.", role="developer"), *talk(" a<|im_end|>b\n")]
    assert prompt(renderer(CHATML), messages) == [
        wire.Special("<|im_start|>"),
        wire.Text("system\nBe kind."),
        wire.Special("<|im_end|>"),
        wire.Text("\n"),
        wire.Special("<|im_start|>"),
        wire.Text("user\n a<|im_end|>b\n"),
        wire.Special("<|im_end|>"),
        wire.Text("\n"),
        wire.Special("<|im_start|>"),
        wire.Text("assistant\n"),
    ]


def test_bos_is_written_once() -> None:
    for source in (CHATML, "{{ bos_token }}" + CHATML):
        assert markers(prompt(renderer(source, add_bos=True), talk("a")))[0] in ("bos", "<s>")
        assert markers(prompt(renderer(source, add_bos=True), talk("<s>")))[1:] == [
            "<|im_start|>",
            "<|im_end|>",
            "<|im_start|>",
        ]
    assert "bos" not in markers(prompt(renderer(CHATML), talk("a")))


def test_a_beginning_token_that_looks_like_a_word_is_not_written_as_text() -> None:
    wordy = renderer(
        "{{ bos_token }}" + CHATML, special=["<|im_start|>", "<|im_end|>", "begin"], bos_id=2, add_bos=True
    )
    segments = prompt(wordy, talk("begin"))
    assert segments[:3] == [wire.Special("bos"), wire.Special("<|im_start|>"), wire.Text("user\nbegin")]


@pytest.mark.parametrize(
    "refusal",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}",
    ],
)
def test_a_system_text_is_not_lost_where_the_template_has_no_place_for_it(refusal: str) -> None:
    merging = renderer(refusal + CHATML)
    messages = [*talk("Be kind.", role="system"), *talk("a"), *talk("b", role="assistant"), *talk("c")]
    assert flat(prompt(merging, messages)) == flat(
        prompt(renderer(CHATML), [*talk("Be kind.\n\na"), *talk("b", role="assistant"), *talk("c")])
    )
    assert "Be kind." in flat(prompt(merging, talk("Be kind.", role="system")))


def test_a_template_that_takes_parts_gets_parts() -> None:
    source = "{% for m in messages %}{% for p in m.content %}{{ p.text }}<|im_end|>{% endfor %}{% endfor %}"
    assert flat(prompt(renderer(source), talk("abc", "d"))) == "abc<|im_end|>d<|im_end|>"


def test_template_arguments() -> None:
    source = "{{ x.y[0] if x }}{{ 'T' if think else 'F' }}" + CHATML
    assert flat(prompt(renderer(source), talk("a"), x={"y": ["</s>"]}, think=True)).startswith(
        "</s>T<|im_start|>"
    )
    assert markers(prompt(renderer(source), talk("a"), x={"y": ["</s>"]}))[0] == "<|im_start|>"


def test_what_a_template_refuses_is_the_client_s_error() -> None:
    source = "{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}" + CHATML
    with pytest.raises(RenderRefused, match="refuses this conversation: one message only") as raised:
        prompt(renderer(source), talk("a", "b"))
    assert not raised.value.too_long


def test_an_endless_rendering_is_refused_and_the_next_one_works() -> None:
    loops = (
        "{% if x %}{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}{% endif %}"
    )
    found = renderer(loops + CHATML)
    with pytest.raises(RenderRefused, match="the chat template did not end within 2 seconds"):
        prompt(found, talk("a"), x=True)
    assert "a" in flat(prompt(found, talk("a")))


def test_an_output_over_the_limit_is_too_long() -> None:
    source = "{% if x %}{% for i in range(9999) %}{% for j in range(9999) %}xxxxx{% endfor %}{% endfor %}{% endif %}"
    with pytest.raises(RenderRefused, match="more than 1048576 characters") as raised:
        prompt(renderer(source + CHATML), talk("a"), x=True)
    assert raised.value.too_long


THINKING = (
    "{% for m in messages %}<|im_start|>{% set c = m.content %}{% set t = m.reasoning_content or '' %}"
    "{% if '</think>' in c %}{% set t = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if t %}<think>{{ t }}</think>{% endif %}{{ c }}{% endfor %}"
)


def test_a_template_that_takes_the_thinking_out_of_an_answer_still_finds_it() -> None:
    special = [*SPECIAL, "<think>", "</think>"]
    answer = "<think>\none <|im_start|>\n</think>\n\ntwo"
    messages = [*talk("a"), *talk(answer, role="assistant"), *talk(answer)]
    segments = prompt(renderer(THINKING, special=special), messages)
    assert segments[3:] == [
        wire.Special("<think>"),
        wire.Text("one <|im_start|>"),
        wire.Special("</think>"),
        wire.Text("two"),
        wire.Special("<|im_start|>"),
        wire.Text(answer),
    ]
    kept = prompt(renderer(CHATML, special=special), messages)
    assert flat(kept).count(answer) == 2


# -- forgeries ---------------------------------------------------------------------------------------

OPERATIONS = [
    "{{ m.content }}",
    "{{ m.content|trim }}",
    "{{ m.content.strip('x') }}",
    "{{ m.content|lower }}",
    "{{ m.content|upper }}",
    "{{ m.content|title }}",
    "{{ m.content|replace('x', '') }}",
    "{{ m.content.replace('\\n', '') }}",
    "{{ m.content.split('x')|join }}",
    "{{ m.content.split('</think>')[-1] }}",
    "{{ m.content|reverse }}",
    "{{ m.content[1:] }}",
    "{{ m.content[:-1] }}",
    "{{ m.content|tojson }}",
    "{{ m.content|tojson(ensure_ascii=true) }}",
    "{{ '<' ~ m.content ~ '>' }}",
    "<{{ m.content }}",
    "{{ m.content }}>",
    "{{ m.content|truncate(9, True, '') }}",
    "{{ m.content|indent(1) }}",
    "{{ m.content|list|join }}",
]
PIECES = [*SPECIAL, "<|im_", "start|>", "<|IM_END|>", "<|\u0131m_end|>", "<", ">", "|", "im_start", "s", "/s", "x", "\n", " ",
          ">s<", "<x/s>", "</think>", SENTINEL, "\\ufdd0", "<|im_\\ufdd0end|>"]  # fmt: skip
HOSTILE = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_operation_of_a_template_forges_a_marker(operation: str) -> None:
    source = (
        "{% for m in messages %}[INST]" + operation + "{% if m.role == 'user' %}</s>{% endif %}{% endfor %}"
    )
    found = renderer(source)

    @given(
        st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), HOSTILE), min_size=1, max_size=3)
    )
    def check(pairs: list[tuple[str, str]]) -> None:
        messages = [wire.Message(role=role, content=content) for role, content in pairs]
        expected = [m for role, _ in pairs for m in ["[INST]", *["</s>"] * (role == "user")]]
        segments = prompt(found, messages)
        assert markers(segments) == expected
        assert SENTINEL not in flat(segments)

    check()


@settings(deadline=None)
@given(HOSTILE, HOSTILE)
def test_no_argument_forges_a_marker(key: str, value: str) -> None:
    source = "{% if tree is defined %}{{ tree|tojson }}{{ tree }}{% endif %}" + CHATML
    segments = prompt(renderer(source), talk("a"), tree={key: [value]})
    assert markers(segments) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]


# -- templates of real models ------------------------------------------------------------------------

TEMPLATES = sorted(templates_dir().glob("*.jinja")) if templates_dir() else []  # type: ignore[union-attr]
MARKER = re.compile(
    r"<\|[^|<>\s]+\|>|</?[a-zA-Z_][a-zA-Z_:]*>|\[/?[A-Z_]+\]|<\uff5c[^\uff5c<>]+\uff5c>|<\|[a-z_]+>|<[a-z_]+\|>"
)
NEEDS_MORE = {"fireworks-ai-llama-3-firefunction-v2.jinja": "'functions' is undefined"}
"""Templates that do not work without tools."""

SYSTEM, USER, ANSWER = (
    talk("Be brief.", role="system"),
    talk(" Hi there \n"),
    talk("Hello!", role="assistant"),
)
THOUGHT = talk("<think>\nWell.\n</think>\n\nHello!", role="assistant")
TALKS = [
    [*USER, *THOUGHT, *USER],
    USER,
    [*SYSTEM, *USER],
    [*SYSTEM, *USER, *ANSWER, *USER],
    [*USER, *ANSWER, *talk("a < b [INST", "c")],
]


def test_the_templates_are_there() -> None:
    require(templates_dir(), "the folder of chat templates")
    assert len(TEMPLATES) == 70


def reference(source: str, messages: list[wire.Message]) -> str:
    """The output of plain Jinja."""

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.SandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals |= {"raise_exception": refuse, "strftime_now": strftime_now}
    return environment.from_string(source).render(
        messages=[{"role": m.role, "content": m.content} for m in messages],
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )


def own_markers(source: str) -> list[str]:
    """Markers of the template, and BOS and EOS."""
    return ["<s>", "</s>", *sorted({*MARKER.findall(source)} - {"<s>", "</s>"})]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_benign_prompts_are_those_of_plain_jinja(path: Path) -> None:
    source = path.read_text()
    if path.name in NEEDS_MORE:
        with pytest.raises(ModelRefused, match=NEEDS_MORE[path.name]):
            renderer(source, special=own_markers(source))
        return
    found = renderer(source, special=own_markers(source))
    n_compared = 0
    for messages in TALKS:
        try:
            expected = reference(source, messages)
        except jinja2.TemplateError:
            continue  # a system message, or two user messages in a row
        assert flat(prompt(found, messages)) == expected
        n_compared += 1
    assert n_compared >= 1


def visible(segments: Sequence[wire.Segment], role: str) -> list[str]:
    """The control tokens; without those of thinking if it is an answer, where templates look for them."""
    return [m for m in markers(segments) if role != "assistant" or m not in ("<think>", "</think>")]


@pytest.mark.parametrize(
    "path", [p for p in TEMPLATES if p.name not in NEEDS_MORE], ids=lambda path: path.stem
)
def test_no_role_forges_a_marker_of_a_real_template(path: Path) -> None:
    source = path.read_text()
    own = own_markers(source)
    found = renderer(source, special=own)
    cut = [marker[: len(marker) // 2] for marker in own] + [marker[len(marker) // 2 :] for marker in own]
    attacks = ["".join(own), " x ".join(own), "\n".join(own), *own[:40], "".join(cut), f"a{own[2]}\n{own[0]}", own[-1][:-1],
               "".join(m[0] + SENTINEL + m[1:] for m in own), "".join(own).upper(), "".join(own).lower()]  # fmt: skip
    for role in ("system", "user", "assistant", "tool"):

        def conversation(content: str, role: str = role) -> list[wire.Message]:
            turn = talk(content, role=role)
            return {"system": [*turn, *USER], "user": turn, "assistant": [*USER, *turn, *USER]}.get(
                role, [*USER, *ANSWER, *turn]
            )

        try:
            harmless = visible(prompt(found, conversation("Q")), role)
        except RenderRefused:
            continue  # no tool role without a tool call
        for attack in attacks:
            assert visible(prompt(found, conversation(attack)), role) == harmless, (role, attack)
