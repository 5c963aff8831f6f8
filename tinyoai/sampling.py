"""Sampling parameters: their names, bounds, defaults and descriptions.

This is the one definition. Requests and model settings inherit from `SamplingOverrides`, the worker gets a
`Sampling`, and `native` copies its fields into the C struct. `csrc/api.h` says exactly what each number does.
"""

from typing import Annotated

from msgspec import Meta, Struct, structs

Temperature = Annotated[
    float, Meta(ge=0, le=2, description="0 takes the likeliest token; above 1 is more random")
]
TopP = Annotated[
    float, Meta(ge=0, le=1, description="Keep the likeliest tokens whose probabilities add up to this")
]
MinP = Annotated[
    float, Meta(ge=0, le=1, description="Drop tokens less likely than this share of the likeliest")
]
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1, description="Keep the K likeliest tokens; 0 or -1 keeps all")]
Penalty = Annotated[float, Meta(ge=-2, le=2, description="Subtracted from the logits of generated tokens")]
RepeatPenalty = Annotated[
    float, Meta(gt=0, le=10, description="Divides the logits of recent tokens, the prompt's included")
]
Seed = Annotated[
    int, Meta(ge=-(2**63), le=2**63 - 1, description="Equal seeds and requests give equal answers")
]
Bias = Annotated[float, Meta(ge=-100, le=100)]


class SamplingOverrides(Struct, frozen=True, kw_only=True):
    """Sampling parameters that a request or a model's settings file may set. None: not set."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repeat_penalty: RepeatPenalty | None = None


class Sampling(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. The defaults are OpenAI's."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    """Tokens that `repeat_penalty` looks back over, the prompt's included; -1: the whole context."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0


def for_choice(base: Sampling, choice: int) -> Sampling:
    """Returns the parameters of one of several choices. Each choice has its own seed."""
    return structs.replace(base, seed=(base.seed + choice) & (2**64 - 1)) if choice else base
