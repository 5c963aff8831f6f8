"""The only door to the C module: the sampler and the stop matcher (``csrc/``; ``csrc/api.h`` is its manual).

Owns the memory that the C side works in, and turns its return codes into exceptions. One object belongs to
one request: each C call lets go of the interpreter lock, so two threads must not share one. Knows nothing of
text, of requests, or of the engine whose logits it reads.
"""

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
"""Changes whenever an equal seed may give other tokens: a part of ``system_fingerprint``."""

MAX_TOP_LOGPROBS: Final[int] = lib.TOAI_MAX_TOP


class NativeError(Exception):
    """The C module refused a call."""


class NonFiniteLogits(NativeError):
    """The model gave a NaN, an infinity or no finite logit at all: it is broken."""


class NoCandidates(NativeError):
    """``logit_bias`` and ``suppress`` ban every token."""


_ERRORS: Final[dict[int, tuple[type[Exception], str]]] = {
    lib.TOAI_E_ARG: (NativeError, "an argument is out of its bounds"),
    lib.TOAI_E_TOKEN: (ValueError, "a token id is outside the vocabulary"),
    lib.TOAI_E_NONFINITE: (NonFiniteLogits, "the logits hold a NaN or an infinity, or nothing finite"),
    lib.TOAI_E_BANNED: (NoCandidates, "logit_bias and suppressed tokens leave no token to choose"),
    lib.TOAI_E_FULL: (NativeError, "more tokens were accepted than n_ctx allows for"),
}


def _error(code: int) -> Exception:
    kind, message = _ERRORS[code]
    return kind(message)


_BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0.0, 100.0),
    "top_k": (0, float("inf")),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repeat_penalty": (0.001, 1000.0),
    "repeat_last_n": (-1, float("inf")),
    "presence_penalty": (-1000.0, 1000.0),
    "frequency_penalty": (-1000.0, 1000.0),
}


def _check(n_vocab: int, params: Sampling, n_ctx: int, suppress: Sequence[int], top_logprobs: int) -> None:
    if not 1 <= n_vocab <= lib.TOAI_MAX_VOCAB:
        raise ValueError(f"n_vocab must lie between 1 and {lib.TOAI_MAX_VOCAB}, not {n_vocab}")
    if not 1 <= n_ctx < 2**31:
        raise ValueError(f"n_ctx must be positive, not {n_ctx}")
    for name, (low, high) in _BOUNDS.items():
        value = getattr(params, name)
        if not low <= value <= high:
            raise ValueError(f"{name} must lie between {low} and {high}, not {value}")
    if not -1 <= top_logprobs <= MAX_TOP_LOGPROBS:
        raise ValueError(f"top_logprobs must lie between -1 and {MAX_TOP_LOGPROBS}, not {top_logprobs}")
    for token in (*params.logit_bias, *suppress):
        if not 0 <= token < n_vocab:
            raise ValueError(f"token {token} is outside the vocabulary of {n_vocab}")
    for bias in params.logit_bias.values():
        if not isfinite(bias) or abs(bias) > 1e30:
            raise ValueError(f"a logit bias must be a number of reasonable size, not {bias}")


class Sampler:
    """Chooses one request's tokens, one C call each.

    ``logits`` is always n_vocab floats that are only read: a ``float *`` of cffi (its length is taken on
    trust), or any contiguous float32 buffer such as a numpy array.
    """

    def __init__(
        self,
        n_vocab: int,
        params: Sampling,
        n_ctx: int,
        *,
        suppress: tuple[int, ...] = (),
        top_logprobs: int = -1,
    ) -> None:
        """Raises ValueError for a parameter out of its bounds. ``n_ctx`` bounds how many tokens can come."""
        _check(n_vocab, params, n_ctx, suppress, top_logprobs)
        self._n_vocab = n_vocab
        bias_ids = ffi.new("int32_t[]", list(params.logit_bias))
        bias = ffi.new("float[]", list(params.logit_bias.values()))
        banned = ffi.new("int32_t[]", list(suppress))
        native = ffi.new(
            "toai_sampler_params *",
            {
                "n_vocab": n_vocab,
                "n_ctx": n_ctx,
                "temperature": params.temperature,
                "top_k": min(params.top_k, n_vocab),
                "top_p": params.top_p,
                "min_p": params.min_p,
                "repeat_penalty": params.repeat_penalty,
                "repeat_last_n": min(params.repeat_last_n, n_ctx),
                "presence_penalty": params.presence_penalty,
                "frequency_penalty": params.frequency_penalty,
                "n_top": top_logprobs,
                "n_bias": len(bias_ids),
                "bias_id": bias_ids,
                "bias": bias,
                "n_suppress": len(banned),
                "suppress": banned,
                "seed": params.seed % 2**64,
            },
        )
        size = lib.toai_sampler_size(native)
        self._memory = ffi.new("uint64_t[]", (size + 7) // 8)
        self._state = ffi.cast("toai_sampler *", self._memory)
        code = lib.toai_sampler_init(self._state, size, native)
        if code < 0:
            raise _error(code)
        self._result = lib.toai_sampler_get_result(self._state)
        self._sample = lib.toai_sampler_sample

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """Adds a prompt to the history that ``repeat_penalty`` sees; ValueError for an id out of range."""
        try:
            native = ffi.new("int32_t[]", tokens if isinstance(tokens, list | tuple) else list(tokens))
        except OverflowError:
            raise _error(lib.TOAI_E_TOKEN) from None
        code = lib.toai_sampler_accept(self._state, native, len(native))
        if code < 0:
            raise _error(code)

    def sample(self, logits: Any, suppress: bool = False) -> int:
        """Chooses a token and adds it to the history; ``suppress`` bans the parameters' ``suppress`` ids.

        Raises NonFiniteLogits, NoCandidates, or NativeError once more distinct tokens came than n_ctx.
        """
        try:
            token: int = self._sample(self._state, logits, suppress)
        except TypeError:
            token = self._sample(self._state, self._pointer(logits), suppress)
        if token < 0:
            raise _error(token)
        return token

    def score(self, logits: Any, token: int) -> tuple[float, list[tuple[int, float]]]:
        """Log-probability of a given token, and the best ``top_logprobs`` as ``top`` gives them.

        Draws nothing and changes no history. Raises NonFiniteLogits, ValueError for an id out of range,
        NativeError if ``top_logprobs`` is -1.
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
        """Natural log-probability of the last token under softmax(logits), before any bias or temperature."""
        value: float = self._result.logprob
        return value

    @property
    def top(self) -> list[tuple[int, float]]:
        """The last call's best tokens as (id, log-probability), best first, lowest id first among equals."""
        result = self._result
        return [(result.top_id[i], result.top_logprob[i]) for i in range(result.n_top)]

    @property
    def cut(self) -> tuple[float, int]:
        """Which tokens the last ``sample`` drew from: those with an adjusted logit above the first number,
        and those equal to it with an id up to the second."""
        return self._result.cut_logit, self._result.cut_id

    def _pointer(self, logits: Any) -> Any:
        view = memoryview(logits)
        if view.format != "f" or view.nbytes != 4 * self._n_vocab:
            raise ValueError(
                f"logits must be {self._n_vocab} float32 values, not {view.nbytes} bytes of {view.format!r}"
            )
        return ffi.from_buffer("float[]", logits)


class StopMatcher:
    """Finds the first of several byte patterns in a stream, and holds back what could still become one.

    The match that ends first wins; of those that end at the same byte, the longest. What comes out stops
    before it.
    """

    def __init__(self, patterns: Sequence[bytes]) -> None:
        """No patterns: all bytes pass. Raises ValueError for an empty or too long pattern, or too many."""
        self._held = b""
        self._matched = False
        self._state = None
        if not patterns:
            return
        if len(patterns) > lib.TOAI_MAX_PATTERNS:
            raise ValueError(f"at most {lib.TOAI_MAX_PATTERNS} stop patterns, not {len(patterns)}")
        for pattern in patterns:
            if not 1 <= len(pattern) <= lib.TOAI_MAX_PATTERN_BYTES:
                limit = lib.TOAI_MAX_PATTERN_BYTES
                raise ValueError(f"a stop pattern has 1 to {limit} bytes, not {len(pattern)}")
        joined = b"".join(patterns)
        size = lib.toai_stop_size(len(patterns), len(joined))
        self._memory = ffi.new("uint64_t[]", (size + 7) // 8)
        self._state = ffi.cast("toai_stop *", self._memory)
        lengths = [len(pattern) for pattern in patterns]
        code = lib.toai_stop_init(self._state, size, joined, lengths, len(lengths))
        if code < 0:
            raise _error(code)

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Takes the stream's next bytes; returns those safe to emit now, and whether a pattern was found.

        After a match nothing more comes out, and every later call says True.
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
        """The stream has ended: the held bytes, which began a pattern and did not finish it. Call it last."""
        held, self._held = self._held, b""
        return held
