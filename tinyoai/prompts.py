"""Prompts, as the server sends them to a worker: structure alone makes control tokens, never a text's content."""

from typing import Any

import msgspec


class Text(msgspec.Struct, frozen=True, tag="t", array_like=True):
    """Text that a user wrote. It is never parsed for control tokens."""

    text: str


class Markup(msgspec.Struct, frozen=True, tag="m", array_like=True):
    """Text that a template wrote. Control tokens in it are parsed."""

    text: str


class Special(msgspec.Struct, frozen=True, tag="s", array_like=True):
    """A control token by its text in the vocabulary, or the pseudo names "bos" and "eos"."""

    name: str


class Ids(msgspec.Struct, frozen=True, tag="i", array_like=True):
    """Token ids as the client gave them."""

    ids: list[int]


Segment = Text | Markup | Special | Ids


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of a conversation. The role "developer" means "system"."""

    role: str
    content: str


class Conversation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Messages that the worker renders with a chat template."""

    messages: list[Message]
    template: str = "auto"
    """A name from `text.chat_format`; "auto" is the model's own."""
    template_args: dict[str, Any] = {}
    """Further variables for the model's own Jinja template."""


Prompt = list[Segment] | Conversation
