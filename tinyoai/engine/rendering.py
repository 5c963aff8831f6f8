"""Conversations to prompts: the model's own Jinja template, or a named format of `text.template`.

The choice is made once, when the model is loaded. A Jinja template is tried then: a template that cannot be used
refuses the load.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from tinyoai import wire
from tinyoai.engine.contract import Engine, ModelRefused
from tinyoai.engine.time_limit import TimedOut, TimeLimit
from tinyoai.text import chat_format, template
from tinyoai.text.marker_guard import MarkerGuard, map_strings, strings
from tinyoai.text.template import Rendered

JINJA = "jinja"
"""The name of a template that is not one of `chat_format`."""
RENDER_S = 2.0
"""Seconds for one request, and for the trial at load."""
HARD_S = 10.0
"""Seconds after which a rendering ends the process."""
MIN_OUTPUT = 1 << 20
"""Characters that a prompt may have, whatever the context window is; it may be counted without being used."""
THINK, END_THINK = "<think>", "</think>"
OTHER = "choose another one with --chat-template"


class RenderRefused(ValueError):
    """The conversation cannot be rendered; the message is one sentence for the client."""

    def __init__(self, message: str, *, too_long: bool = False) -> None:
        super().__init__(message)
        self.too_long = too_long


class ChatRenderer:
    """Renders the conversations of one loaded model."""

    def __init__(self, load: wire.Load, engine: Engine) -> None:
        """Raises ModelRefused with one sentence."""
        self._special = engine.info.special
        source, self.name = _choose(load, engine.info)
        self._jinja = _JinjaChat(source, engine) if self.name == JINJA else None

    def render(self, prompt: wire.Prompt) -> Rendered:
        """The segments and stop strings of a prompt; a raw prompt has its segments already. Raises RenderRefused."""
        if not isinstance(prompt, wire.Conversation):
            return Rendered(segments=prompt, stop=[])
        if prompt.template == "auto" and self._jinja is not None:
            segments = self._jinja.render(prompt.messages, prompt.template_args)
            return Rendered(segments=segments, stop=[])
        name = self.name if prompt.template == "auto" else prompt.template
        return template.render(name, prompt.messages, special=self._special)


def preload() -> None:
    """Imports jinja2, if it is installed, so that the renderer need not."""
    with contextlib.suppress(ImportError):
        from tinyoai.text import jinja  # noqa: F401


def _choose(load: wire.Load, info: wire.ModelInfo) -> tuple[str, str]:
    """The source of the Jinja template to use, if any, and the template's name."""
    if load.template_source:
        return load.template_source, JINJA
    if load.template != "auto":
        if load.template not in chat_format.FORMATS:
            raise ModelRefused(f"the chat template {load.template!r} cannot be read; {OTHER}")
        return "", load.template
    if not info.chat_template:
        return "", chat_format.detect("", info.special)
    # jinja2 takes 9 MB, which a worker of the built-in model should not need
    known = "" if info.engine == "llamacpp" else chat_format.detect(info.chat_template, ())
    return ("", known) if known else (info.chat_template, JINJA)


class _JinjaChat:
    """A Jinja template, tried and ready."""

    def __init__(self, source: str, engine: Engine) -> None:
        info = self._info = engine.info
        self._guard = MarkerGuard(info.special)
        self._limit = TimeLimit(HARD_S)
        self._merges_system = self._takes_parts = False
        self._after_thinking: Callable[[str], str] | None = None
        """What the template makes of the text after an answer's thinking; None: it looks for no thinking."""
        longest = max(engine.caps.longest_piece, max(map(len, info.special), default=1))
        try:
            from tinyoai.text.jinja import BadTemplate, JinjaTemplate, RenderError  # imports jinja2
        except ImportError:
            raise ModelRefused(
                "the model has a chat template of its own, which needs jinja2; install it with "
                'pip install "tinyoai[llamacpp]", or name a format with --chat-template'
            ) from None
        self._errors = RenderError
        bos, eos = (info.token_text(token) for token in (info.bos_id, info.eos_id))

        def open_template() -> None:
            self._template: JinjaTemplate = JinjaTemplate(
                source,
                bos=bos if bos in self._guard.markers else "",
                eos=eos if eos in self._guard.markers else "",
                max_output=max(MIN_OUTPUT, info.n_ctx * longest),
            )
            self._try()

        try:
            self._limit.run(open_template, RENDER_S)
        except TimedOut as error:
            raise ModelRefused(f"the chat template {error}; {OTHER}") from None
        except (BadTemplate, RenderError) as error:
            raise ModelRefused(f"{error}; {OTHER}") from None

    def _try(self) -> None:
        """Finds out what the template takes. Raises ModelRefused or RenderError."""
        problem: Exception | None = None
        for self._takes_parts in (False, True):
            try:
                if self._writes("user"):
                    break
            except self._errors as error:
                problem = problem or error
        else:
            raise problem or ModelRefused(f"the chat template does not write a user's message; {OTHER}")
        try:
            self._merges_system = not self._writes("system", wire.Message(role="user", content="a"))
        except self._errors:
            self._merges_system = True
        if END_THINK in self._guard.markers:
            self._try_thinking()

    def _try_thinking(self) -> None:
        """Finds out whether the template takes the thinking out of an answer. Guarded tags would hide it."""
        question = wire.Message(role="user", content="a")
        answer = wire.Message(role="assistant", content=f"{THINK}\nApple\n{END_THINK}\n\nStone")

        def output() -> str:
            try:
                return self._once([question, answer, question], {}, str)
            except self._errors as error:
                return str(error)

        whole = output()
        for self._after_thinking in (_without_newlines, str, _without_a_newline, None):
            if output() == whole:
                return

    def _writes(self, role: str, *after: wire.Message) -> bool:
        """Whether the output depends on the content of a message of this role. Raises RenderError."""
        trials = [[wire.Message(role=role, content=content), *after] for content in ("Apple", "Stone")]
        one, other = (self._once(messages, {}, self._guard.weak) for messages in trials)
        return one != other

    def render(self, messages: Sequence[wire.Message], template_args: dict[str, Any]) -> list[wire.Segment]:
        """The prompt. Raises RenderRefused."""
        try:
            return self._limit.run(lambda: self._segments(messages, template_args), RENDER_S)
        except TimedOut as error:
            raise RenderRefused(f"the chat template {error}") from None
        except self._errors as error:
            raise RenderRefused(str(error), too_long=error.too_long) from None

    def _segments(
        self, messages: Sequence[wire.Message], template_args: dict[str, Any]
    ) -> list[wire.Segment]:
        messages = [
            wire.Message(role="system", content=m.content) if m.role == "developer" else m for m in messages
        ]
        if self._merges_system:
            messages = _merge_system(messages)
        guard = self._guard
        segments = guard.split(self._once(messages, template_args, guard.weak))
        written = strings([[m.content for m in messages], *template_args.values()])
        if any(map(guard.suspicious, written)):
            parted = guard.split(self._once(messages, template_args, guard.strong))
            if _markers(parted) != _markers(segments):
                segments = parted
        info = self._info
        first, bos = segments[0] if segments else None, info.token_text(info.bos_id)
        if info.add_bos and info.bos_id >= 0 and not (isinstance(first, wire.Special) and first.name == bos):
            segments.insert(0, wire.Special("bos"))
        return segments

    def _once(
        self, messages: Sequence[wire.Message], template_args: dict[str, Any], guard: Callable[[str], str]
    ) -> str:
        """The template's output for guarded copies of these values. Raises RenderError."""
        variables = {name: map_strings(value, guard) for name, value in template_args.items()}
        variables["messages"] = [self._fields(message, guard) for message in messages]
        variables["add_generation_prompt"] = True
        return self._template.render(variables)

    def _fields(self, message: wire.Message, guard: Callable[[str], str]) -> dict[str, Any]:
        """A message as templates see it."""
        fields: dict[str, Any] = {"role": message.role}
        content = message.content
        thinking, found, answer = content.rpartition(END_THINK)
        if self._after_thinking is not None and message.role == "assistant" and found and answer.strip():
            thinking = thinking.partition(END_THINK)[0].rpartition(THINK)[2]
            fields["reasoning_content"] = guard(thinking.strip("\n"))
            content = self._after_thinking(answer)
        content = guard(content)
        fields["content"] = [{"type": "text", "text": content}] if self._takes_parts else content
        return fields


def _merge_system(messages: Sequence[wire.Message]) -> list[wire.Message]:
    """The same conversation with all system texts at the beginning of the first user message."""
    system = "\n\n".join(m.content for m in messages if m.role == "system")
    rest = [m for m in messages if m.role != "system"]
    if not system:
        return rest
    at = next((i for i, m in enumerate(rest) if m.role == "user"), None)
    if at is None:
        return [wire.Message(role="user", content=system), *rest]
    rest[at] = wire.Message(role="user", content=f"{system}\n\n{rest[at].content}")
    return rest


def _markers(segments: Sequence[wire.Segment]) -> list[str]:
    return [segment.name for segment in segments if isinstance(segment, wire.Special)]


def _without_newlines(text: str) -> str:
    return text.lstrip("\n")


def _without_a_newline(text: str) -> str:
    return text.removeprefix("\n")
