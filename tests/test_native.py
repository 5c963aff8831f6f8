"""Tests the sampler and the stop matcher against plain versions in numpy and Python."""

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from cffi import FFI
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyoai import native
from tinyoai.api.decode import sampling as resolve
from tinyoai.native import NativeError, NoCandidates, NonFiniteLogits, Sampler, StopMatcher
from tinyoai.sampling import Sampling, SamplingOverrides

Logits = np.ndarray[Any, np.dtype[np.float32]]


def normal_logits(n: int, scale: float = 1.0, seed: int = 0) -> Logits:
    return (np.random.default_rng(seed).normal(size=n) * scale).astype(np.float32)


def softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    weights = np.exp(x.astype(np.float64) - x.max())
    result: np.ndarray[Any, np.dtype[np.float64]] = weights / weights.sum()
    return result


def ranked(x: Logits) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Returns ids from the highest logit to the lowest, the lowest id first among equals."""
    return np.argsort(-x.astype(np.float64), kind="stable")


def candidates(x: Logits, params: Sampling, slack: float = 0.0) -> np.ndarray[Any, np.dtype[np.intp]]:
    """The reference: sorts everything in float64. Adds `slack` to top_p."""
    order = ranked(x)[: np.isfinite(x).sum()]
    if 0 < params.top_k < len(x):
        order = order[: params.top_k]
    p = softmax(x[order].astype(np.float64) / params.temperature)
    n = len(order)
    if params.top_p < 1:
        n = min(n, 1 + int(np.searchsorted(np.cumsum(p), params.top_p + slack)))
    if params.min_p > 0:
        n = min(n, int((p >= params.min_p * p.max()).sum()))
    return order[:n]


def adjusted(x: Logits, params: Sampling, prompt: list[int], generated: list[int]) -> Logits:
    x = x.copy()
    for token, bias in params.logit_bias.items():
        x[token] = -np.inf if bias <= -100 else x[token] + np.float32(bias)
    recent = [*prompt, *generated]
    recent = (
        recent if params.repeat_last_n < 0 else recent[len(recent) - min(params.repeat_last_n, len(recent)) :]
    )
    repeat = np.float32(params.repeat_penalty)
    for token in set(recent):
        x[token] = x[token] / repeat if x[token] > 0 else x[token] * repeat
    for token, count in Counter(generated).items():
        x[token] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * np.float32(
            count
        )
    return x


def drawn_from(sampler: Sampler, x: Logits) -> set[int]:
    """Returns the candidates of the sampler's last call, given the adjusted logits."""
    logit, last_id = sampler.cut
    above = set(np.flatnonzero(x > np.float32(logit)).tolist())
    ties = np.flatnonzero(x == np.float32(logit))
    return above | set(ties[ties <= last_id].tolist())


# ---- choosing


@pytest.mark.parametrize("n_vocab", [1, 2, 5, 63, 64, 65, 1000, 4000, 32000, 262144])
def test_greedy_takes_the_largest(n_vocab: int) -> None:
    for seed in range(5):
        x = normal_logits(n_vocab, seed=seed)
        assert Sampler(n_vocab, Sampling(temperature=0), 8).sample(x) == int(np.argmax(x))


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    x = np.zeros(1000, np.float32)
    x[[77, 300, 999]] = 1
    assert Sampler(1000, Sampling(temperature=0), 8).sample(x) == 77


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("n_vocab", [1, 50, 64, 4000, 32000, 128000, 262144])
@pytest.mark.parametrize(
    "params",
    [
        Sampling(),
        Sampling(top_k=1),
        Sampling(top_k=40, top_p=0.95, temperature=0.8),
        Sampling(top_k=100, min_p=0.02),
        Sampling(top_k=20000),
        Sampling(top_k=20000, top_p=0.5),
        Sampling(top_p=0.95, temperature=0.8),
        Sampling(top_p=0.1, temperature=1.7),
        Sampling(top_p=1e-9),
        Sampling(top_p=0.0),
        Sampling(min_p=1.0),
        Sampling(min_p=0.05, temperature=0.5),
        Sampling(top_p=0.9, min_p=0.3),
    ],
)
def test_candidates_are_the_reference_s(params: Sampling, n_vocab: int, scale: float) -> None:
    x = normal_logits(n_vocab, scale)
    sampler = Sampler(n_vocab, params, 8)
    token = sampler.sample(x)
    got = drawn_from(sampler, x)
    least, most = candidates(x, params, -1e-7), candidates(x, params, 1e-7)
    assert set(least.tolist()) <= got <= set(most.tolist())
    assert token in got
    assert len(most) - len(least) <= 1 + n_vocab * 1e-6, "the slack must only cover rounding"


def test_candidates_with_holes_and_ties() -> None:
    x = np.round(normal_logits(5000, 3.0)).astype(np.float32)
    x[::3] = -np.inf
    for params in (Sampling(top_k=700), Sampling(top_k=4000), Sampling(top_k=33, top_p=0.5)):
        sampler = Sampler(5000, params, 8)
        for _ in range(20):
            assert np.isfinite(x[sampler.sample(x)])
        assert drawn_from(sampler, x) - set(np.flatnonzero(np.isneginf(x)).tolist()) == set(
            candidates(x, params).tolist()
        )


def chi_square(sampler: Sampler, x: Logits, expected: np.ndarray[Any, Any], n_draws: int) -> None:
    """Fails if the draws deviate from `expected` by more than five standard deviations of the statistic."""
    counts = np.zeros(len(x))
    for _ in range(n_draws):
        counts[sampler.sample(x)] += 1
    assert not counts[expected == 0].any()
    order = np.argsort(-expected, kind="stable")
    wanted, got = expected[order] * n_draws, counts[order]
    n_own = int((wanted >= 10).sum())  # the rest share one cell
    wanted = np.append(wanted[:n_own], wanted[n_own:].sum())
    got = np.append(got[:n_own], got[n_own:].sum())
    wanted, got = wanted[wanted > 1e-9], got[wanted > 1e-9]
    freedom = len(wanted) - 1
    if freedom:
        statistic = ((got - wanted) ** 2 / wanted).sum()
        assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize(("n_vocab", "scale"), [(2, 1.0), (70, 1.5), (1000, 2.0), (32000, 3.0)])
@pytest.mark.parametrize(
    "params",
    [
        Sampling(seed=1),
        Sampling(seed=2, temperature=0.7),
        Sampling(seed=3, temperature=2.0, top_k=30),
        Sampling(seed=4, temperature=1.2, top_p=0.8),
        Sampling(seed=5, min_p=0.1),
        Sampling(seed=6, top_k=50, top_p=0.9, min_p=0.05, temperature=1.5),
        Sampling(seed=7, logit_bias={0: 2.0, 1: -100}, temperature=0.9),
    ],
)
def test_draws_follow_the_distribution(params: Sampling, n_vocab: int, scale: float) -> None:
    x = normal_logits(n_vocab, scale, seed=9)
    view = adjusted(x, params, [], [])
    chosen = candidates(view, params)
    expected = np.zeros(n_vocab)
    expected[chosen] = softmax(view[chosen].astype(np.float64) / params.temperature)
    chi_square(Sampler(n_vocab, params, 8), x, expected, 20000)


def test_a_wrong_distribution_is_detected() -> None:
    x = normal_logits(70, 1.5, seed=9)
    with pytest.raises(AssertionError):
        chi_square(Sampler(70, Sampling(seed=1), 8), x, softmax(x / 1.1), 20000)


@given(
    n_vocab=st.integers(2, 400),
    seed=st.integers(0, 2**64 - 1),
    repeat_last_n=st.integers(-1, 30),
    repeat_penalty=st.sampled_from([1.0, 1.1, 1.5, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.7, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -0.2]),
    biases=st.dictionaries(
        st.integers(0, 399), st.sampled_from([-100.0, -1.5, 0.0, 2.0, 100.0]), max_size=20
    ),
    greedy=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_penalties_and_bias(
    n_vocab: int,
    seed: int,
    repeat_last_n: int,
    repeat_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
    biases: dict[int, float],
    greedy: bool,
) -> None:
    params = Sampling(
        temperature=0.0 if greedy else 1.0,
        top_k=0 if greedy else 3,
        seed=seed,
        repeat_last_n=repeat_last_n,
        repeat_penalty=repeat_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias={token: bias for token, bias in biases.items() if token < n_vocab - 1},
    )
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, n_vocab, 15).tolist()
    generated: list[int] = []
    sampler = Sampler(n_vocab, params, 60)
    sampler.accept_prompt(prompt)
    for _ in range(25):
        x = (rng.normal(size=n_vocab) * 2).astype(np.float32)
        view = adjusted(x, params, prompt, generated)
        token = sampler.sample(x)
        if greedy:
            assert token == int(np.argmax(view))
        else:
            assert drawn_from(sampler, view) == set(candidates(view, params).tolist())
            assert token in drawn_from(sampler, view)
        generated.append(token)


def test_many_biases_over_a_large_vocabulary() -> None:
    rng = np.random.default_rng(3)
    bias = {int(token): float(rng.normal() * 5) for token in rng.choice(32000, 300, replace=False)}
    x = normal_logits(32000, 2.0)
    params = Sampling(logit_bias=bias, top_k=64, frequency_penalty=0.5, repeat_penalty=1.2, repeat_last_n=-1)
    sampler = Sampler(32000, params, 4096)
    prompt = rng.integers(0, 32000, 3000).tolist()
    sampler.accept_prompt(prompt)
    generated: list[int] = []
    for _ in range(50):
        view = adjusted(x, params, prompt, generated)
        generated.append(sampler.sample(x))
        assert drawn_from(sampler, view) == set(candidates(view, params).tolist())


def test_suppress_is_switched_by_call() -> None:
    x = np.zeros(100, np.float32)
    x[[7, 8]] = 50
    sampler = Sampler(100, Sampling(), 200, suppress=(7, 8))
    for _ in range(50):
        assert sampler.sample(x) in (7, 8)
        assert sampler.sample(x, suppress=True) not in (7, 8)


def test_equal_seeds_give_equal_tokens() -> None:
    x = normal_logits(500)

    def run(seed: int) -> list[int]:
        sampler = Sampler(500, Sampling(seed=seed, frequency_penalty=0.1), 100)
        return [sampler.sample(x) for _ in range(40)]

    assert run(7) == run(7)
    assert run(7) != run(8)
    assert run(-1) == run(2**64 - 1)


def test_a_seed_means_the_same_in_every_version() -> None:
    """These ids may change only together with `native.VERSION`."""
    x = (np.arange(300) * 7919 % 300 / 50).astype(np.float32)
    sampler = Sampler(300, Sampling(seed=42, top_p=0.9), 20)
    assert native.VERSION == "3"
    assert [sampler.sample(x) for _ in range(8)] == [214, 45, 78, 98, 10, 252, 65, 242]


# ---- masks


def mask_of(allowed: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Packs one bit per token into 64-bit words."""
    bits = np.packbits(allowed, bitorder="little")
    return np.pad(bits, (0, -len(bits) % 8)).view(np.uint64)


@given(
    n_vocab=st.integers(1, 400),
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([0.0, 0.02, 0.5, 0.99, 1.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 5, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.1]),
    min_p=st.sampled_from([0.0, 0.05]),
    repeat_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    biases=st.dictionaries(st.integers(0, 399), st.sampled_from([-100.0, -1.5, 100.0]), max_size=8),
)
@settings(max_examples=300, deadline=None)
def test_a_mask_is_logits_of_minus_infinity(
    n_vocab: int, seed: int, share: float, biases: dict[int, float], **fields: Any
) -> None:
    biases = {token: bias for token, bias in biases.items() if token < n_vocab}
    params = Sampling(seed=seed, logit_bias=biases, **fields)
    masked = Sampler(n_vocab, params, 60, suppress=(0,), top_logprobs=2)
    reference = Sampler(n_vocab, params, 60, suppress=(0,))
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, n_vocab, 15).tolist()
    masked.accept_prompt(prompt)
    reference.accept_prompt(prompt)
    for step in range(10):
        x = (rng.normal(size=n_vocab) * 2).astype(np.float32)
        allowed = rng.random(n_vocab) < share
        blocked = np.where(allowed, x, np.float32(-np.inf))
        try:
            expected = reference.sample(blocked, step % 3 == 0)
        except (NoCandidates, NonFiniteLogits):
            with pytest.raises(NoCandidates):
                masked.sample(x, step % 3 == 0, mask_of(allowed))
            continue
        assert masked.sample(x, step % 3 == 0, mask_of(allowed)) == expected
        assert allowed[expected]
        assert masked.cut == reference.cut
        exact = np.log(softmax(x))
        assert abs(masked.logprob - exact[expected]) < 1e-5
        assert [token for token, _ in masked.top] == ranked(x)[:2].tolist()


@pytest.mark.parametrize("n_vocab", [4000, 32000, 262144])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_masks_of_large_vocabularies(n_vocab: int, share: float) -> None:
    rng = np.random.default_rng(n_vocab)
    x = normal_logits(n_vocab, 2.0)
    for params in (Sampling(top_p=0.9, seed=1), Sampling(top_k=40, seed=2), Sampling(temperature=0.0)):
        masked, reference = Sampler(n_vocab, params, 60), Sampler(n_vocab, params, 60)
        for _ in range(5):
            allowed = rng.random(n_vocab) < share
            blocked = np.where(allowed, x, np.float32(-np.inf))
            assert masked.sample(x, allowed=mask_of(allowed)) == reference.sample(blocked)


def test_a_mask_as_a_pointer_and_a_longer_mask() -> None:
    x = normal_logits(130)
    mask = np.array([0, 1 << 3, 0, 2**64 - 1], np.uint64)
    sampler = Sampler(130, Sampling(), 8)
    assert sampler.sample(x, allowed=mask) == 67
    assert sampler.sample(x, allowed=FFI().cast("uint64_t *", mask.ctypes.data)) == 67
    assert sampler.sample(x, allowed=mask.tobytes()) == 67


def test_masks_out_of_bounds() -> None:
    x = normal_logits(130)
    sampler = Sampler(130, Sampling(), 8)
    with pytest.raises(ValueError, match="3 64-bit words, not 2"):
        sampler.sample(x, allowed=np.ones(2, np.uint64))
    with pytest.raises(ValueError, match="3 64-bit words, not 2"):
        sampler.sample(x, allowed=b"x" * 23)
    with pytest.raises(TypeError):
        sampler.sample(x, allowed=[1, 1, 1])
    with pytest.raises(NativeError, match="misaligned"):
        sampler.sample(x, allowed=memoryview(np.ones(5, np.uint64)).cast("B")[4:])
    with pytest.raises(NoCandidates, match="mask"):
        sampler.sample(x, allowed=np.zeros(3, np.uint64))


# ---- log-probabilities


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0, 60.0])
@pytest.mark.parametrize("n_vocab", [1, 64, 1000, 32000, 262144])
def test_log_probabilities_are_of_the_raw_logits(n_vocab: int, scale: float) -> None:
    x = normal_logits(n_vocab, scale)
    exact = x.astype(np.float64) - x.max()
    exact -= np.log(np.exp(exact).sum())
    sampler = Sampler(
        n_vocab,
        Sampling(temperature=0.5, top_p=0.9, repeat_penalty=1.5, logit_bias={0: 3.0}),
        50,
        top_logprobs=20,
    )
    sampler.accept_prompt([0])
    for _ in range(3):
        token = sampler.sample(x)
        assert abs(sampler.logprob - exact[token]) < 1e-5
        assert [best for best, _ in sampler.top] == ranked(x)[:20].tolist()
        assert np.allclose([value for _, value in sampler.top], exact[ranked(x)[:20]], rtol=0, atol=1e-5)
    for token in {0, n_vocab // 2, n_vocab - 1}:
        logprob, top = sampler.score(x, token)
        assert abs(logprob - exact[token]) < 1e-5
        assert [best for best, _ in top] == ranked(x)[:20].tolist()


def test_top_logprobs_of_equal_and_impossible_tokens() -> None:
    x = np.full(5000, -np.inf, np.float32)
    x[[4999, 70, 3000]] = 2
    sampler = Sampler(5000, Sampling(temperature=0), 8, top_logprobs=5)
    assert sampler.sample(x) == 70
    assert [token for token, _ in sampler.top] == [70, 3000, 4999]
    assert np.allclose([value for _, value in sampler.top], -np.log(3))
    assert sampler.score(x, 0)[0] == -np.inf


def test_scoring_leaves_the_sampler_as_it_was() -> None:
    x = normal_logits(300)
    params = Sampling(seed=3, frequency_penalty=1.0)
    plain, scored = (Sampler(300, params, 50, top_logprobs=2) for _ in range(2))
    for _ in range(30):
        scored.score(x, 5)
        assert plain.sample(x) == scored.sample(x)


def test_without_log_probabilities_scoring_is_an_error() -> None:
    with pytest.raises(NativeError):
        Sampler(10, Sampling(), 8).score(np.zeros(10, np.float32), 1)


# ---- refused arguments


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 63, 64, 100, 129])
def test_unsound_logits(bad: float, where: int) -> None:
    x = np.zeros(130, np.float32)
    x[where] = bad
    for params in (Sampling(), Sampling(temperature=0), Sampling(logit_bias={where: -100})):
        with pytest.raises(NonFiniteLogits):
            Sampler(130, params, 8).sample(x)
    with pytest.raises(NonFiniteLogits):
        Sampler(130, Sampling(), 8, top_logprobs=0).score(x, 1)


def test_nothing_finite() -> None:
    with pytest.raises(NonFiniteLogits):
        Sampler(130, Sampling(), 8).sample(np.full(130, -np.inf, np.float32))


def test_all_tokens_banned_and_the_next_call() -> None:
    x = np.zeros(3, np.float32)
    sampler = Sampler(3, Sampling(logit_bias={0: -100, 1: -1000}), 8, suppress=(2,))
    with pytest.raises(NoCandidates):
        sampler.sample(x, True)
    assert sampler.sample(x) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repeat_penalty": 0.0},
        {"repeat_last_n": -2},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {100: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {1: 1e39}},
    ],
)
def test_parameters_out_of_bounds(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|outside"):
        Sampler(100, Sampling(**change), 8)


@pytest.mark.parametrize(
    "change", [{"top_logprobs": 21}, {"top_logprobs": -2}, {"suppress": (100,)}, {"suppress": (-1,)}]
)
def test_options_out_of_bounds(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|outside"):
        Sampler(100, Sampling(), 8, **change)


def test_every_sampling_parameter_reaches_the_c_struct() -> None:
    assert set(native._BOUNDS) | {"logit_bias", "seed"} == set(Sampling.__struct_fields__)


def test_the_c_module_takes_every_number_that_the_api_takes() -> None:
    schema = msgspec.json.schema(SamplingOverrides)["$defs"]["SamplingOverrides"]["properties"]
    for name, field in schema.items():
        number = next(kind for kind in field["anyOf"] if kind["type"] != "null")
        low = number.get("minimum", number.get("exclusiveMinimum", 0) + 1e-9)
        for value in (low, number["maximum"]):
            Sampler(100, resolve(SamplingOverrides(**{name: value})), 8)


@pytest.mark.parametrize(("n_vocab", "n_ctx"), [(0, 8), (2**25, 8), (100, 0)])
def test_sizes_out_of_bounds(n_vocab: int, n_ctx: int) -> None:
    with pytest.raises(ValueError, match="must"):
        Sampler(n_vocab, Sampling(), n_ctx)


def test_tokens_out_of_range() -> None:
    sampler = Sampler(100, Sampling(repeat_penalty=1.1), 8, top_logprobs=0)
    for token in (-1, 100, 2**31, 2**40):
        with pytest.raises(ValueError, match="outside"):
            sampler.accept_prompt([1, token])
        with pytest.raises(ValueError, match="outside"):
            sampler.score(np.zeros(100, np.float32), token)


def test_logits_of_the_wrong_kind() -> None:
    sampler = Sampler(100, Sampling(), 8, top_logprobs=0)
    for wrong in (np.zeros(99, np.float32), np.zeros(100, np.float64), np.zeros(100, np.int32), b"x" * 400):
        with pytest.raises(ValueError, match="float32"):
            sampler.sample(wrong)
        with pytest.raises(ValueError, match="float32"):
            sampler.score(wrong, 0)
    with pytest.raises(TypeError):
        sampler.sample([0.0] * 5)
    with pytest.raises(TypeError):
        sampler.sample(FFI().cast("double *", 0))


def test_more_tokens_than_the_context() -> None:
    sampler = Sampler(100, Sampling(presence_penalty=1000), 5)
    for _ in range(5):
        sampler.sample(np.zeros(100, np.float32))
    with pytest.raises(NativeError, match="n_ctx"):
        sampler.sample(np.zeros(100, np.float32))


def test_a_float_pointer_of_another_library_and_untouched_logits() -> None:
    x = normal_logits(1000)
    before = x.copy()
    x.flags.writeable = False
    pointer = FFI().cast("float *", x.ctypes.data)
    params = Sampling(seed=5, top_p=0.9, logit_bias={3: -100})
    a, b = (Sampler(1000, params, 50, top_logprobs=3) for _ in range(2))
    assert [a.sample(pointer) for _ in range(20)] == [b.sample(x) for _ in range(20)]
    assert a.score(pointer, 4) == b.score(x, 4)
    assert np.array_equal(x, before)


def test_a_missing_build_says_what_to_do() -> None:
    code = "import sys; sys.modules['tinyoai._native'] = None; import tinyoai.native"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "pip install" in result.stderr.splitlines()[-1]


# ---- stop matcher


def search(patterns: list[bytes], text: bytes) -> tuple[bytes, bytes, bool]:
    """The plain version. Returns the bytes that pass, the bytes held, and whether there is a match."""
    for end in range(1, len(text) + 1):
        ending = [len(pattern) for pattern in patterns if text[:end].endswith(pattern)]
        if ending:
            return text[: end - max(ending)], b"", True
    n_held = max((k for p in patterns for k in range(len(p)) if text.endswith(p[:k])), default=0)
    return text[: len(text) - n_held], text[len(text) - n_held :], False


def run(patterns: list[bytes], pieces: list[bytes]) -> tuple[bytes, bytes, bool]:
    matcher = StopMatcher(patterns)
    out, matched = b"", False
    for piece in pieces:
        safe, found = matcher.feed(piece)
        assert found or not matched
        assert not (matched and safe)
        out, matched = out + safe, found
    return out, matcher.flush(), matched


few_letters = st.lists(st.sampled_from(b"ab\xf0"), max_size=60).map(bytes)
pattern_lists = st.lists(
    st.lists(st.sampled_from(b"ab\xf0"), min_size=1, max_size=7).map(bytes), min_size=1, max_size=12
)


@given(pattern_lists, few_letters, st.lists(st.integers(0, 60), max_size=6))
@settings(max_examples=400, deadline=None)
def test_stop_matcher_in_any_pieces(patterns: list[bytes], text: bytes, cuts: list[int]) -> None:
    expected = search(patterns, text)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert run(patterns, [text]) == expected
    assert run(patterns, [text[i : i + 1] for i in range(len(text))]) == expected
    assert run(patterns, [b"", *pieces, b""]) == expected


def test_stop_matcher_without_patterns_passes_all() -> None:
    matcher = StopMatcher([])
    assert matcher.feed(b"anything") == (b"anything", False)
    assert matcher.flush() == b""


def test_stop_matcher_with_the_largest_patterns() -> None:
    patterns = [b"a" * (1023 - i) + b"b" + b"a" * i for i in range(64)]
    assert all(len(pattern) == 1024 for pattern in patterns)
    text = b"c".join([b"a" * 1000] * 20) + patterns[40] + b"tail"
    assert run(patterns, [text]) == search(patterns, text)
    assert run(patterns, [text[i : i + 13] for i in range(0, len(text), 13)]) == search(patterns, text)


def test_stop_patterns_are_literal() -> None:
    assert run([b"(a+)+$"], [b"aaaa(a+)", b"+$ more"]) == (b"aaaa", b"", True)
    assert run([b"\x00"], [b"a\x00b"]) == (b"a", b"", True)


@pytest.mark.parametrize("patterns", [[b""], [b"x" * 1025], [b"x"] * 65, [b"ok", b""]])
def test_stop_patterns_out_of_bounds(patterns: list[bytes]) -> None:
    with pytest.raises(ValueError, match="pattern"):
        StopMatcher(patterns)
