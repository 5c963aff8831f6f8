"""Chat templates: a conversation to a prompt of control tokens and text.

It writes the formats that `chat_format` describes. A model's Jinja template is never executed. User text only
ever becomes Text. A marker that is not a control token of the model is written as text; the same marker inside a
message is broken by a zero-width space after its first character, so that it marks nothing.
"""

from collections.abc import Callable, Collection, Sequence

import msgspec

from tinyoai.text.chat_format import FORMATS
from tinyoai.wire import Message, Segment, Special, Text

_ZERO_WIDTH_SPACE = "\N{ZERO WIDTH SPACE}"


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt, and the stop strings that its format needs."""

    segments: list[Segment]
    stop: list[str]


class _Writer:
    """Collects segments and merges adjacent text, since each Text is tokenized on its own."""

    def __init__(self, markers: Sequence[str], special: Collection[str]) -> None:
        self.segments: list[Segment] = [Special("bos")]
        self._special = special
        self._inert = [m for m in markers if m not in special]

    def marker(self, marker: str) -> None:
        """A piece of the format: a control token where the model has it, else text."""
        if marker in self._special:
            self.segments.append(Special(marker))
        else:
            self.text(marker)

    def content(self, content: str) -> None:
        """A message's content."""
        for marker in self._inert:
            content = content.replace(marker, marker[0] + _ZERO_WIDTH_SPACE + marker[1:])
        self.text(content)

    def text(self, text: str) -> None:
        """Text, unchanged."""
        last = self.segments[-1]
        if isinstance(last, Text):
            self.segments[-1] = Text(last.text + text)
        elif text:
            self.segments.append(Text(text))

    def eos(self) -> None:
        """The end token after an earlier answer."""
        self.segments.append(Special("eos"))


def _chatml(w: _Writer, messages: Sequence[Message]) -> None:
    for message in messages:
        w.marker("<|im_start|>")
        w.text(message.role + "\n")
        w.content(message.content)
        w.marker("<|im_end|>")
        w.text("\n")
    w.marker("<|im_start|>")
    w.text("assistant\n")


def _zephyr(w: _Writer, messages: Sequence[Message]) -> None:
    for message in messages:
        w.marker(f"<|{'user' if message.role == 'tool' else message.role}|>")
        w.text("\n")
        w.content(message.content)
        w.eos()
        w.text("\n")
    w.marker("<|assistant|>")
    w.text("\n")


def _llama2(w: _Writer, messages: Sequence[Message]) -> None:
    system, rest = _split_turns(messages)
    first = True
    for message in rest:
        if message.role == "assistant":
            w.text(" ")
            w.content(message.content.strip())
            w.text(" ")
            w.eos()
            w.segments.append(Special("bos"))
            continue
        w.marker("[INST]")
        w.text(" ")
        if first and system:
            w.marker("<<SYS>>")
            w.text("\n")
            w.content(system)
            w.text("\n")
            w.marker("<</SYS>>")
            w.text("\n\n")
        first = False
        w.content(message.content.strip())
        w.text(" ")
        w.marker("[/INST]")


def _mistral(w: _Writer, messages: Sequence[Message]) -> None:
    system, rest = _split_turns(messages)
    first = True
    for message in rest:
        if message.role == "assistant":
            w.text(" ")
            w.content(message.content.strip())
            w.eos()
            continue
        w.marker("[INST]")
        w.text(" ")
        if first and system:
            w.content(system)
            w.text("\n\n")
        first = False
        w.content(message.content)
        w.text(" ")
        w.marker("[/INST]")


def _headed(
    heads: dict[str, str], between: str, tail: str, *, ends: bool = False
) -> Callable[[_Writer, Sequence[Message]], None]:
    """A format of plain headings: `heads` by role, `between` messages, `tail` for the answer.

    With `ends`, an assistant message is followed by the end token and nothing else.
    """

    def write(w: _Writer, messages: Sequence[Message]) -> None:
        system, rest = _split_system(messages)
        if system:
            w.content(system)
            w.text(between)
        for message in rest:
            w.marker(heads[message.role])
            w.content(message.content)
            if ends and message.role == "assistant":
                w.eos()
            else:
                w.text(between)
        w.text(tail)

    return write


_WRITERS: dict[str, Callable[[_Writer, Sequence[Message]], None]] = {
    "chatml": _chatml,
    "zephyr": _zephyr,
    "llama2": _llama2,
    "mistral": _mistral,
    "vicuna": _headed(
        {"user": "USER: ", "tool": "USER: ", "assistant": "ASSISTANT: "}, " ", "ASSISTANT:", ends=True
    ),
    "alpaca": _headed(
        {"user": "### Instruction:\n", "tool": "### Input:\n", "assistant": "### Response:\n"},
        "\n\n",
        "### Response:\n",
    ),
    "plain": _headed({"user": "User: ", "tool": "Tool: ", "assistant": "Assistant: "}, "\n", "Assistant:"),
}
assert _WRITERS.keys() == FORMATS.keys()


def render(name: str, messages: Sequence[Message], *, special: Collection[str]) -> Rendered:
    """The prompt for the next answer. `special` holds the model's control tokens by text."""
    form = FORMATS[name]
    writer = _Writer(form.markers, special)
    _WRITERS[name](
        writer,
        [Message(role="system", content=m.content) if m.role == "developer" else m for m in messages],
    )
    return Rendered(segments=writer.segments, stop=[stop for stop in form.stop if stop not in special])


def _split_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """All system messages as one text, and the others in order."""
    system = "\n".join(m.content for m in messages if m.role == "system")
    return system, [m for m in messages if m.role != "system"]


def _split_turns(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """As `_split_system`, plus an empty user message if no other could carry the system text."""
    system, rest = _split_system(messages)
    if system and all(m.role == "assistant" for m in rest):
        rest = [Message(role="user", content=""), *rest]
    return system, rest
