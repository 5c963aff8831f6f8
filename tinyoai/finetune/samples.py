"""Examples become samples of token ids, tokenized as a request for the finished model will be."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tinyoai.finetune.dataset import Example
from tinyoai.finetune.protocol import JobSpec
from tinyoai.text import chat_format, template
from tinyoai.wire import Markup, Message, ModelInfo, Segment, Special, Text

Prompt = Sequence[Segment]
Encode = Callable[[Prompt], list[int]]
"""Returns the token ids of a prompt."""


class Sample(NamedTuple):
    """Token ids; the first `n_prompt` of them are read, the rest are learned."""

    ids: list[int]
    n_prompt: int


def tokenize(example: Example, encode: Encode, info: ModelInfo, spec: JobSpec) -> list[Sample]:
    """One sample for each message of the assistant, or one for a plain text."""
    if example.text is not None:
        ids = encode([Special("bos"), Text(example.text)])
        return [Sample([*ids, info.eos_id] if info.eos_id >= 0 else ids, 1)]
    if not spec.chat and example.messages is None:
        prompt, completion = (turn.content for turn in example.turns)
        return [_sample([Special("bos"), Text(prompt)], completion.lstrip(" "), info.eos_id, encode)]
    end = info.special.get("<|im_end|>", info.eos_id) if spec.template == "chatml" else info.eos_id
    messages = [Message(role=turn.role, content=turn.content) for turn in example.turns]
    return [
        _sample(_render(spec.template, messages[:i], info), message.content, end, encode)
        for i, message in enumerate(messages)
        if message.role == "assistant" and message.content.strip()
    ]


def cut(samples: Sequence[Sample], n_max: int) -> list[Sample]:
    """At most `n_max` tokens of each sample, without the samples that have nothing left to learn."""
    return [
        Sample(sample.ids[:n_max], sample.n_prompt)
        for sample in samples
        if sample.n_prompt < min(len(sample.ids), n_max)
    ]


def own_template(info: ModelInfo) -> str:
    """The name of the model's own chat format. Raises ValueError if it is not a known one."""
    name = chat_format.detect(info.chat_template, info.special)
    if not name:
        raise ValueError(
            "the model's chat template is none of the formats that training knows; name one with --chat-template"
        )
    return name


def _render(name: str, messages: Sequence[Message], info: ModelInfo) -> Sequence[Segment]:
    return template.render(name, messages, special=info.special).segments


def _sample(prompt: Sequence[Segment], answer: str, end: int, encode: Encode) -> Sample:
    start, ids = encode(prompt), encode(_with_answer(prompt, answer))
    # the answer can change how the prompt's last characters are tokenized: those tokens are learned too
    same = next((i for i, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), len(start))
    return Sample([*ids, end] if end >= 0 else ids, max(1, same))


def _with_answer(prompt: Sequence[Segment], answer: str) -> list[Segment]:
    """The prompt and its answer. After a word, the answer begins with a space."""
    last = prompt[-1]
    if isinstance(last, Text | Markup) and not last.text.endswith((" ", "\n")):
        answer = " " + answer
    if isinstance(last, Text):  # one text, since a tokenizer may put a space before each
        return [*prompt[:-1], Text(last.text + answer)]
    return [*prompt, Text(answer)]
