"""Chat formats by name: their markers, their stop strings, and how to recognise them in a model file.

`template` writes prompts in these formats. This module only describes them, so the server may import it.
"""

from collections.abc import Collection

from msgspec import Struct


class ChatFormat(Struct, frozen=True, kw_only=True):
    """One chat format."""

    markers: tuple[str, ...]
    """Strings that separate messages. Inside a message they are broken up unless they are control tokens."""
    stop: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    """If a model's own template contains one of these, the model uses this format."""


FORMATS = {
    "chatml": ChatFormat(
        markers=("<|im_start|>", "<|im_end|>"), stop=("<|im_end|>",), signs=("<|im_start|>",)
    ),
    "zephyr": ChatFormat(
        markers=("<|system|>", "<|user|>", "<|assistant|>"),
        stop=("<|user|>",),
        signs=("<|assistant|>", "<|user|>"),
    ),
    "llama2": ChatFormat(
        markers=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"), stop=("[INST]",), signs=("<<SYS>>",)
    ),
    "mistral": ChatFormat(markers=("[INST]", "[/INST]"), stop=("[INST]",), signs=("[INST]",)),
    "vicuna": ChatFormat(markers=("USER:", "ASSISTANT:"), stop=("USER:",), signs=("USER:", "ASSISTANT:")),
    "alpaca": ChatFormat(
        markers=("### Instruction:", "### Input:", "### Response:"),
        stop=("### Instruction:",),
        signs=("### Instruction:",),
    ),
    "plain": ChatFormat(markers=("User:", "Tool:", "Assistant:"), stop=("\nUser:",)),
}

NAMES = tuple(FORMATS)


def detect(chat_template: str, special: Collection[str]) -> str:
    """The name of the format that a model uses, by its template's text; empty if the text has no known sign.

    A model without a template uses the format that its control tokens are made for, else "plain".
    """
    for name, chat_format in FORMATS.items():
        if any(sign in chat_template for sign in chat_format.signs):
            return name
    if chat_template:
        return ""
    for name, chat_format in FORMATS.items():
        if chat_format.signs and all(marker in special for marker in chat_format.markers):
            return name
    return "plain"
