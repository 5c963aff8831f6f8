"""Jinja templates in the sandbox: what they may use, and one clear refusal for everything else."""

import datetime
from typing import Any

import pytest

from tinyoai.text.jinja import BadTemplate, JinjaTemplate, RenderError
from tinyoai.text.marker_guard import SENTINEL

MAX_OUTPUT = 20_000


def render(source: str, **variables: Any) -> str:
    """The output for one user message."""
    template = JinjaTemplate(source, bos="<s>", eos="</s>", max_output=MAX_OUTPUT)
    return template.render({"messages": [{"role": "user", "content": "hi"}], **variables})


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>hi</s>"),
        ("{% for m in messages %}\n  {{ m['role'] }}\n{% endfor %}", "  user\n"),  # trim_blocks, lstrip_blocks
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{{ {'b': 1, 'a': '\u00e9<'}|tojson }}", '{"b": 1, "a": "\u00e9<"}'),
        ("{{ {'b': [1]}|tojson(indent=2) }}", '{\n  "b": [\n    1\n  ]\n}'),
        ("{{ {'b': 1}|tojson(separators=(',', ':'), sort_keys=true) }}", '{"b":1}'),
        ("{{ ('[1, {\"a\": 2}]'|from_json)[1].a }}", "2"),
        ("{% set x = [] %}{% set _ = x.append(1) %}{{ x }}", "[1]"),
        ("{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}", "4"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') ~ 1 ~ none }}", "<a>1None"),
        ("{{ 'a,b'.split(',')|join('-') }}{{ ' x '|trim }}{{ '%s=%d' % ('a', 1) }}{{ '%02d'|format(3) }}", "a-bxa=103"),
        ("{{ '{}-{:>3}'.format('a', 1) }}{{ 'a\nb'|indent(2) }}{{ 'abc'[1:] }}{{ 'abc'[::-1] }}", "a-  1a\n  bbccba"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list|length }}", "1"),
        ("{{ undefined_name }}{{ (tools is defined) or false }}", "False"),
        ("{{ 2 ** 10 }}{{ 7 // 2 }}{{ [1] + [2] }}{{ 'ab' * 2 }}{{ 1.25|round(1) }}{{ [1, 2]|sum }}", "10243[1, 2]abab1.23"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x }}{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1a1"),
        ("{{ ''['__class__'] }}{{ ''|attr('__class__') }}", ""),
    ],
)  # fmt: skip
def test_output(source: str, output: str) -> None:
    assert render(source) == output


def test_a_date_is_no_finer_than_a_day() -> None:
    today = datetime.date.today()
    found = render("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}")
    assert found in {f"{day} 00:00:00.000000" for day in (today, datetime.date.today())}


def test_json_of_ascii_characters_keeps_sentinels_and_nothing_else() -> None:
    source = "{{ text|tojson(ensure_ascii=true) }}"
    assert render(source, text=f"<{SENTINEL}s>") == f'"<{SENTINEL}s>"'
    assert render(source, text=r"<\ufdd0s>") == r'"<\\ufdd0s>"'
    assert render(source, text=f"\\{SENTINEL}") == f'"\\\\{SENTINEL}"'


def test_nothing_is_kept_between_renderings() -> None:
    template = JinjaTemplate(
        "{% set _ = messages.append(1) %}{{ messages|length }}{% set x = (x or 0) + 1 %}{{ x }}",
        bos="", eos="", max_output=100,
    )  # fmt: skip
    assert [template.render({"messages": [0]}) for _ in range(3)] == ["21"] * 3


def test_each_rendering_has_a_budget_of_its_own() -> None:
    template = JinjaTemplate("{% for i in range(100) %}{% set x = 'x' * 200000 %}{% endfor %}a", bos="", eos="",
                             max_output=MAX_OUTPUT)  # fmt: skip
    assert [template.render({}) for _ in range(20)] == ["a"] * 20


DOUBLED = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
TEXT = "makes a text of more than"
WIDTH = "pads a text"
MEMORY = "MB of memory"
ITEMS = "items or 64 levels"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}", "more than 20000 characters"),
        ("{% for i in range(10001) %}{% endfor %}", "a range of 10001 numbers"),
        ("{{ 'x' * 10**9 }}", TEXT),
        ("{{ 10**9 * 'x' }}", TEXT),
        ("{% set x = [0] * 10**9 %}", MEMORY),
        ("{{ 10 ** 100000000 }}", "4096 bits"),
        ("{% set ns = namespace(x=99) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", "4096 bits"),
        ("{{ '%1000000000d' % 1 }}", WIDTH),
        ("{{ '%.1000000000f' % 1.0 }}", WIDTH),
        ("{{ '%*d' % (1000000000, 1) }}", "width of a padding"),
        ("{{ '%1000000000d'|format(1) }}", WIDTH),
        ("{{ ('%s' * 9999) % (('x' * 9999,) * 9999) }}", TEXT),
        ("{{ '{:1000000000}'.format(1) }}", WIDTH),
        ("{{ '{:{}}'.format(1, 1000000000) }}", "width of a padding"),
        ("{{ ('{0}' * 9999).format('x' * 9999) }}", TEXT),
        ("{{ 'x'|center(1000000000) }}", WIDTH),
        ("{{ 'x'.center(1000000000) }}", WIDTH),
        ("{{ 'x'.ljust(width=1000000000) }}", WIDTH),
        ("{{ 'x'.zfill(1000000000) }}", WIDTH),
        ("{{ '\t'.expandtabs(1000000000) }}", WIDTH),
        ("{{ 'x\ny'|indent(1000000000) }}", WIDTH),
        ("{{ ('\n' * 9999)|indent('x' * 9999) }}", TEXT),
        ("{{ [1]|tojson(indent=1000000000) }}", "indents JSON"),
        ("{{ [1]|tojson(separators=('x' * 9999, '')) }}", "separates JSON"),
        ("{% set x = 'a' * 9999 %}{{ x.replace('a', x) }}", TEXT),
        ("{% set x = 'a' * 9999 %}{{ x|replace('a', x) }}", TEXT),
        ("{% set x = 'a' * 9999 %}{{ x.join(x) }}", TEXT),
        ("{% set x = 'a' * 9999 %}{{ x|join(x) }}", TEXT),
        ("{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", TEXT),
        ("{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", TEXT),
        ("{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", MEMORY),
        ("{% set x = [1] %}{% for i in range(60) %}{% set _ = x.extend(x) %}{% endfor %}", MEMORY),
        ("{% set x = [] %}{% for i in range(9999) %}{% set _ = x.append('a' * 200000) %}{% endfor %}", MEMORY),
        ("{% set x = [] %}{% for i in range(9999) %}{% set _ = x.append(range(9999)|list) %}{% endfor %}", MEMORY),
        ("{% set s = 'a' * 200000 %}{% set x = [] %}{% for i in range(9999) %}{% set _ = x.append(s[1:]) %}{% endfor %}",
         MEMORY),
        (DOUBLED + "{{ ns.x }}", ITEMS),
        (DOUBLED + "{{ ns.x ~ 1 }}", ITEMS),
        (DOUBLED + "{{ ns.x|tojson }}", ITEMS),
        (DOUBLED + "{{ ns.x|upper }}", ITEMS),
        (DOUBLED + "{{ '%s' % ns.x }}", ITEMS),
        (DOUBLED + "{{ '{}'.format(ns.x) }}", ITEMS),
        (DOUBLED + "{{ raise_exception(ns.x) }}", ITEMS),
        (DOUBLED + "{{ ns }}", "type Namespace"),
        (DOUBLED + "{{ [ns] }}", "type Namespace"),
        (DOUBLED + "{{ {}[ns.x].a }}", "takes an item by a list"),
        (DOUBLED + "{{ ns.x() }}", "calls a value of type list"),
        ("{{ range(9999)|list|sum(start=[]) }}", "fails"),
        ("{{ 1.5|round(1000000000) }}", "rounds"),
        ("{{ strftime_now('%1000000000d') }}", "date"),
        ("{{ [1]|map('upper') }}", "type generator"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself"),
        ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "calls itself"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "may not"),
        ("{{ namespace.__init__.__globals__ }}", "may not"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "may not"),
        ("{{ cycler.__init__.__globals__.os.popen('id') }}", "may not"),
        ("{{ ([1]|map('upper')).gi_frame.f_globals }}", "may not"),
        ("{{ raise_exception.__func__.__globals__ }}", "may not"),
        ("{{ messages.append.__self__.x }}", "may not"),
        ("{{ ''.encode() }}", "str.encode"),
        ("{{ '{a}'.format_map({}) }}", "str.format_map"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{{ foo.bar }}", "'foo' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('roles must ' ~ 'alternate') }}", "refuses this conversation: roles must alternate"),
    ],
)  # fmt: skip
def test_a_rendering_is_refused_in_words(source: str, words: str) -> None:
    with pytest.raises(RenderError) as raised:
        render(source)
    message = str(raised.value)
    assert message.startswith(("the chat template", "the prompt"))
    assert words in message
    assert "\n" not in message
    assert len(message) < 600
    assert raised.value.too_long is ("20000 characters" in message and "prompt" in message)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x" * (256 << 10) + "x", "has 262145 bytes; the limit is 262144"),
        ("{% if %}", "is not valid"),
        ("a\n{{ x", "(line 2)"),
        ("{{ 1|nothing }}", "No filter named 'nothing'"),
        ("{% nothing %}", "unknown tag"),
        ("{% include '/etc/passwd' %}", "loads another file in line 1"),
        ("{% import 'x' as y %}", "loads another file"),
        ("{% from 'x' import y %}", "loads another file"),
        ("{% extends 'x' %}", "loads another file"),
        ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "nested too deeply"),
        ("{{ " + "[" * 20000 + "]" * 20000 + " }}", "nested too deeply"),
        ("{{ " + "not " * 50000 + "1 }}", "nested too deeply"),
        ("{% if 1 %}" * 5000 + "{% endif %}" * 5000, "nested too deeply"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "cannot be compiled"),
        ("{{ \ud800 }}", "is not valid"),
    ],
)
def test_a_template_is_refused_in_words(source: str, words: str) -> None:
    with pytest.raises(BadTemplate) as raised:
        render(source)
    message = str(raised.value)
    assert message.startswith("the chat template")
    assert words in message
    assert "\n" not in message


def test_an_old_jinja_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jinja2.__version__", "3.1.5")
    with pytest.raises(BadTemplate, match=r"jinja2 3\.1\.5 .* pip install 'jinja2>=3\.1\.6'"):
        render("")
