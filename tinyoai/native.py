"""The only module that imports the C module: the sampler and the stop matcher.

Owns the memory that the C code works in, and turns its return codes into exceptions. `csrc/api.h` is the C side's
manual. Each C call releases the interpreter lock, so two threads must not use one object at the same time.
"""

from array import array
from collections.abc import Sequence
from math import isfinite
from typing import Any, Final

from tinyoai.sampling import Sampling

try:
    from tinyoai._native import ffi, lib  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError as error:
    raise ImportError(
        "tinyoai's C module is not built for this Python: run 'pip install -e .' in the project's folder "
        "(it needs a C compiler, such as gcc)"
    ) from error

__all__ = [
    "MAX_TOP_LOGPROBS",
    "VERSION",
    "NativeError",
    "NoCandidates",
    "NonFiniteLogits",
    "Sampler",
    "StopMatcher",
]

VERSION: Final = str(lib.TOAI_VERSION)
"""Changes whenever an equal seed may give other tokens: a part of `system_fingerprint`."""

MAX_TOP_LOGPROBS: Final[int] = lib.TOAI_MAX_TOP

MAX_BIAS: Final = 1e30
"""Greatest absolute value of a bias; keeps it within a C float."""


class NativeError(Exception):
    """The C module refused a call."""


class NonFiniteLogits(NativeError):
    """The logits hold a NaN or an infinity, or no finite number: the model is broken."""


class NoCandidates(NativeError):
    """`logit_bias`, `suppress` and the mask together ban every token.

    Without bias and suppressed tokens it means that the mask allows no token: a grammar is stuck.
    """


_ERRORS: Final[dict[int, tuple[type[Exception], str]]] = {
    lib.TOAI_E_ARG: (NativeError, "an argument is out of bounds or misaligned"),
    lib.TOAI_E_TOKEN: (ValueError, "a token id is outside the vocabulary"),
    lib.TOAI_E_NONFINITE: (NonFiniteLogits, "the logits hold a NaN or an infinity, or no finite number"),
    lib.TOAI_E_BANNED: (NoCandidates, "logit_bias, suppressed tokens and the mask leave no token to choose"),
    lib.TOAI_E_FULL: (NativeError, "more tokens were accepted than n_ctx allows"),
}

_BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repeat_penalty": (1e-30, 1000.0),
    "repeat_last_n": (-1, 2**31 - 1),
    "presence_penalty": (-1000.0, 1000.0),
    "frequency_penalty": (-1000.0, 1000.0),
}
"""Fields of Sampling that go into the C struct under the same name, and the numbers that the C code takes.

The API's bounds, in `sampling`, are narrower.
"""


def _error(code: int) -> Exception:
    kind, message = _ERRORS[code]
    return kind(message)


def _check(n_vocab: int, sampling: Sampling, n_ctx: int, suppress: Sequence[int], top_logprobs: int) -> None:
    for name, value, low, high in (
        ("n_vocab", n_vocab, 1, lib.TOAI_MAX_VOCAB),
        ("n_ctx", n_ctx, 1, lib.TOAI_MAX_CTX),
        ("top_logprobs", top_logprobs, -1, MAX_TOP_LOGPROBS),
        *((name, getattr(sampling, name), *bounds) for name, bounds in _BOUNDS.items()),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must be between {low} and {high}, not {value}")
    for token in (*sampling.logit_bias, *suppress):
        if not 0 <= token < n_vocab:
            raise ValueError(f"token {token} is outside the vocabulary of {n_vocab}")
    for bias in sampling.logit_bias.values():
        if not isfinite(bias) or abs(bias) > MAX_BIAS:
            raise ValueError(f"a logit bias must be between {-MAX_BIAS:g} and {MAX_BIAS:g}, not {bias}")


class Sampler:
    """Chooses one request's tokens, one C call each.

    `logits` is always n_vocab floats, which are only read: a `float *` of cffi, whose length is not checked, or any
    contiguous float32 buffer such as a numpy array.
    """

    def __init__(
        self,
        n_vocab: int,
        sampling: Sampling,
        n_ctx: int,
        *,
        suppress: tuple[int, ...] = (),
        top_logprobs: int = -1,
    ) -> None:
        """Raises ValueError for a parameter that is out of bounds.

        `n_ctx` is the greatest number of tokens in the history. `suppress` holds the tokens that a call of `sample`
        may ban. `top_logprobs`: -1 for no log-probabilities, 0 for that of the chosen token, 1 to 20 also for
        that many best tokens. `sampling.seed` is taken modulo 2**64.
        """
        _check(n_vocab, sampling, n_ctx, suppress, top_logprobs)
        self._n_vocab = n_vocab
        bias_ids = ffi.new("int32_t[]", list(sampling.logit_bias))
        bias = ffi.new("float[]", list(sampling.logit_bias.values()))
        suppress_ids = ffi.new("int32_t[]", suppress)
        params = ffi.new(
            "toai_sampler_params *",
            {
                **{name: getattr(sampling, name) for name in _BOUNDS},
                "n_vocab": n_vocab,
                "n_ctx": n_ctx,
                "n_top": top_logprobs,
                "n_bias": len(bias_ids),
                "bias_id": bias_ids,
                "bias": bias,
                "n_suppress": len(suppress_ids),
                "suppress": suppress_ids,
                "seed": sampling.seed % 2**64,
            },
        )
        size = lib.toai_sampler_size(params)
        self._memory = ffi.new("uint64_t[]", (size + 7) // 8)
        self._state = ffi.cast("toai_sampler *", self._memory)
        code = lib.toai_sampler_init(self._state, size, params)
        if code < 0:
            raise _error(code)
        self._result = lib.toai_sampler_get_result(self._state)
        self._sample = lib.toai_sampler_sample

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """Adds a prompt to the history that `repeat_penalty` looks at. Raises ValueError for an id out of range."""
        try:
            ids = array("i", tokens)
        except OverflowError:
            raise _error(lib.TOAI_E_TOKEN) from None
        code = lib.toai_sampler_accept(self._state, ffi.from_buffer("int32_t[]", ids), len(ids))
        if code < 0:
            raise _error(code)

    def sample(self, logits: Any, suppress: bool = False, allowed: Any = None) -> int:
        """Chooses a token, adds it to the history and returns it.

        `suppress` bans the sampler's `suppress` tokens. `allowed` is a mask of one bit per token: a `uint64_t *` of
        cffi, or a contiguous buffer of at least ceil(n_vocab / 64) * 8 bytes whose bit i % 64 of word i // 64 says
        that token i is allowed. Log-probabilities stay those before the mask.

        Raises NonFiniteLogits, NoCandidates, or NativeError if the history has more distinct tokens than n_ctx.
        """
        if not isinstance(logits, ffi.CData):
            logits = self._pointer(logits)
        if allowed is None:
            allowed = ffi.NULL
        elif not isinstance(allowed, ffi.CData):
            allowed = self._mask(allowed)
        token: int = self._sample(self._state, logits, suppress, allowed)
        if token < 0:
            raise _error(token)
        return token

    def score(self, logits: Any, token: int) -> tuple[float, list[tuple[int, float]]]:
        """Returns the log-probability of a given token, and the best `top_logprobs` in the form of `top`.

        Draws nothing and does not change the history. Raises NonFiniteLogits, ValueError for an id out of range,
        NativeError if `top_logprobs` is -1.
        """
        if not 0 <= token < self._n_vocab:
            raise _error(lib.TOAI_E_TOKEN)
        if not isinstance(logits, ffi.CData):
            logits = self._pointer(logits)
        code = lib.toai_sampler_score(self._state, logits, token)
        if code < 0:
            raise _error(code)
        return self.logprob, self.top

    @property
    def logprob(self) -> float:
        """Natural log-probability of the last token under softmax(logits), before bias, mask and temperature."""
        value: float = self._result.logprob
        return value

    @property
    def top(self) -> list[tuple[int, float]]:
        """The best tokens of the last call as (id, log-probability), best first, lowest id first among equals."""
        result = self._result
        return [(result.top_id[i], result.top_logprob[i]) for i in range(result.n_top)]

    @property
    def cut(self) -> tuple[float, int]:
        """The candidates of the last `sample` as (x, id): the tokens whose adjusted logit is greater than x, and
        those equal to x with an id of at most `id`."""
        return self._result.cut_logit, self._result.cut_id

    def _pointer(self, logits: Any) -> Any:
        view = memoryview(logits)
        if view.format != "f" or view.nbytes != 4 * self._n_vocab:
            raise ValueError(
                f"logits must be {self._n_vocab} float32 values, not {view.nbytes} bytes of {view.format!r}"
            )
        return ffi.from_buffer("float[]", logits)

    def _mask(self, allowed: Any) -> Any:
        mask = ffi.from_buffer("uint64_t[]", allowed)
        n_words = (self._n_vocab + 63) // 64
        if len(mask) < n_words:
            raise ValueError(f"a mask of {self._n_vocab} tokens has {n_words} 64-bit words, not {len(mask)}")
        return mask


class StopMatcher:
    """Finds the first of several byte patterns in a stream, and holds back bytes that could begin one.

    The match that ends first wins; of those that end at the same byte, the longest. The output ends before the match.
    """

    def __init__(self, patterns: Sequence[bytes]) -> None:
        """Without patterns, all bytes pass. Raises ValueError for an empty or too long pattern, or too many."""
        self._held = b""
        self._matched = False
        self._state = None
        if not patterns:
            return
        if len(patterns) > lib.TOAI_MAX_PATTERNS:
            raise ValueError(
                f"at most {lib.TOAI_MAX_PATTERNS} stop patterns are allowed, not {len(patterns)}"
            )
        for pattern in patterns:
            if not 1 <= len(pattern) <= lib.TOAI_MAX_PATTERN_BYTES:
                limit = lib.TOAI_MAX_PATTERN_BYTES
                raise ValueError(f"a stop pattern must have 1 to {limit} bytes, not {len(pattern)}")
        joined = b"".join(patterns)
        size = lib.toai_stop_size(len(patterns), len(joined))
        self._memory = ffi.new("uint64_t[]", (size + 7) // 8)
        self._state = ffi.cast("toai_stop *", self._memory)
        lengths = [len(pattern) for pattern in patterns]
        code = lib.toai_stop_init(self._state, size, joined, lengths, len(lengths))
        if code < 0:
            raise _error(code)

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Takes the next bytes. Returns the bytes that are safe to emit, and whether a pattern was found.

        After a match every call returns (b"", True).
        """
        if self._state is None:
            return data, False
        n_safe = lib.toai_stop_feed(self._state, data, len(data))
        text = self._held + data
        if n_safe < 0:
            self._held = b""
            safe = b"" if self._matched else text[: -1 - n_safe]
            self._matched = True
            return safe, True
        self._held = text[n_safe:]
        return text[:n_safe], False

    def flush(self) -> bytes:
        """Ends the stream. Returns the held bytes, which began a pattern and did not complete it."""
        held, self._held = self._held, b""
        return held
