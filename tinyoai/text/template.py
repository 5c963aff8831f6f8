"""Chat templates: messages to a prompt of control tokens and text.

Owns the prompt formats of the model families that ctransformers can run, and the choice among them
from a model's own metadata. A model's Jinja template is read for its markers and never executed.
What a user wrote only ever becomes Text; it must not know ids, nor how text is tokenized.

A marker that is no control token of the model has to be written as text. Then the same marker inside
a message is broken by a zero-width space after its first character, so that it marks nothing.
"""

from collections.abc import Callable, Collection, Sequence

import msgspec

from tinyoai.wire import Segment, Special, Text

_ZERO_WIDTH_SPACE = "\N{ZERO WIDTH SPACE}"


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message; `developer` means `system`."""

    role: str
    content: str


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt, and the stop strings that its format needs."""

    segments: list[Segment]
    stop: list[str]


class _Writer:
    """Collects segments: adjacent text becomes one, for every text is tokenized on its own."""

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

    def said(self, content: str) -> None:
        """What somebody wrote."""
        for marker in self._inert:
            content = content.replace(marker, marker[0] + _ZERO_WIDTH_SPACE + marker[1:])
        self.text(content)

    def text(self, text: str) -> None:
        """Text as it is."""
        last = self.segments[-1]
        if isinstance(last, Text):
            self.segments[-1] = Text(last.text + text)
        elif text:
            self.segments.append(Text(text))

    def eos(self) -> None:
        """The end of an answer in the conversation so far."""
        self.segments.append(Special("eos"))


def _chatml(w: _Writer, messages: Sequence[Message]) -> None:
    for message in messages:
        w.marker("<|im_start|>")
        w.text(message.role + "\n")
        w.said(message.content)
        w.marker("<|im_end|>")
        w.text("\n")
    w.marker("<|im_start|>")
    w.text("assistant\n")


def _zephyr(w: _Writer, messages: Sequence[Message]) -> None:
    for message in messages:
        w.marker(f"<|{'user' if message.role == 'tool' else message.role}|>")
        w.text("\n")
        w.said(message.content)
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
            w.said(message.content.strip())
            w.text(" ")
            w.eos()
            w.segments.append(Special("bos"))
            continue
        w.marker("[INST]")
        w.text(" ")
        if first and system:
            w.marker("<<SYS>>")
            w.text("\n")
            w.said(system)
            w.text("\n")
            w.marker("<</SYS>>")
            w.text("\n\n")
        first = False
        w.said(message.content.strip())
        w.text(" ")
        w.marker("[/INST]")


def _mistral(w: _Writer, messages: Sequence[Message]) -> None:
    system, rest = _split_turns(messages)
    first = True
    for message in rest:
        if message.role == "assistant":
            w.text(" ")
            w.said(message.content.strip())
            w.eos()
            continue
        w.marker("[INST]")
        w.text(" ")
        if first and system:
            w.said(system)
            w.text("\n\n")
        first = False
        w.said(message.content)
        w.text(" ")
        w.marker("[/INST]")


def _headed(
    heads: dict[str, str], between: str, tail: str, *, ends: bool = False
) -> Callable[[_Writer, Sequence[Message]], None]:
    """A format of plain headings: `heads` by role, `between` messages, `tail` for the answer.

    With `ends`, what the assistant said is followed by the end token and nothing else.
    """

    def write(w: _Writer, messages: Sequence[Message]) -> None:
        system, rest = _split_system(messages)
        if system:
            w.said(system)
            w.text(between)
        for message in rest:
            w.marker(heads[message.role])
            w.said(message.content)
            if ends and message.role == "assistant":
                w.eos()
            else:
                w.text(between)
        w.text(tail)

    return write


class _Format(msgspec.Struct, frozen=True, kw_only=True):
    write: Callable[[_Writer, Sequence[Message]], None]
    markers: tuple[str, ...]
    """Broken in messages unless control tokens; headings without the blank that follows them."""
    stop: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    """Any of these in a model's own template means this format."""


_FORMATS = {
    "chatml": _Format(
        write=_chatml,
        markers=("<|im_start|>", "<|im_end|>"),
        stop=("<|im_end|>",),
        signs=("<|im_start|>",),
    ),
    "zephyr": _Format(
        write=_zephyr,
        markers=("<|system|>", "<|user|>", "<|assistant|>"),
        stop=("<|user|>",),
        signs=("<|assistant|>", "<|user|>"),
    ),
    "llama2": _Format(
        write=_llama2,
        markers=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
        stop=("[INST]",),
        signs=("<<SYS>>",),
    ),
    "mistral": _Format(write=_mistral, markers=("[INST]", "[/INST]"), stop=("[INST]",), signs=("[INST]",)),
    "vicuna": _Format(
        write=_headed(
            {"user": "USER: ", "tool": "USER: ", "assistant": "ASSISTANT: "}, " ", "ASSISTANT:", ends=True
        ),
        markers=("USER:", "ASSISTANT:"),
        stop=("USER:",),
        signs=("USER:", "ASSISTANT:"),
    ),
    "alpaca": _Format(
        write=_headed(
            {
                "user": "### Instruction:\n",
                "tool": "### Input:\n",
                "assistant": "### Response:\n",
            },
            "\n\n",
            "### Response:\n",
        ),
        markers=("### Instruction:", "### Input:", "### Response:"),
        stop=("### Instruction:",),
        signs=("### Instruction:",),
    ),
    "plain": _Format(
        write=_headed(
            {"user": "User: ", "tool": "Tool: ", "assistant": "Assistant: "},
            "\n",
            "Assistant:",
        ),
        markers=("User:", "Tool:", "Assistant:"),
        stop=("\nUser:",),
    ),
}


def names() -> list[str]:
    """The formats there are."""
    return list(_FORMATS)


def detect(chat_template: str, special: Collection[str]) -> str:
    """The format that a model's metadata speaks of: its template's markers, else its control tokens."""
    for name, form in _FORMATS.items():
        if any(sign in chat_template for sign in form.signs):
            return name
    if not chat_template:
        for name, form in _FORMATS.items():
            if form.signs and all(marker in special for marker in form.markers):
                return name
    return "plain"


def render(name: str, messages: Sequence[Message], *, special: Collection[str]) -> Rendered:
    """The prompt that asks for the next answer. `special` are the model's control tokens."""
    form = _FORMATS[name]
    writer = _Writer(form.markers, special)
    form.write(
        writer,
        [Message(role="system", content=m.content) if m.role == "developer" else m for m in messages],
    )
    return Rendered(segments=writer.segments, stop=[stop for stop in form.stop if stop not in special])


def _split_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """All system messages as one text, and the others in order."""
    system = "\n".join(m.content for m in messages if m.role == "system")
    return system, [m for m in messages if m.role != "system"]


def _split_turns(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """As above, with an empty user message where there is none that could carry the system's text."""
    system, rest = _split_system(messages)
    if system and all(m.role == "assistant" for m in rest):
        rest = [Message(role="user", content=""), *rest]
    return system, rest
