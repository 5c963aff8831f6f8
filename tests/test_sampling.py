"""Tests the sampling parameters: bounds, precedence and the seeds of choices."""

from typing import Any

import msgspec
import pytest

from tinyoai.api.decode import sampling as resolve
from tinyoai.sampling import Sampling, SamplingOverrides, for_choice

INT32_MAX = 2**31 - 1


def decode(**fields: Any) -> SamplingOverrides:
    return msgspec.json.decode(msgspec.json.encode(fields), type=SamplingOverrides)


@pytest.mark.parametrize(
    ("name", "least", "greatest"),
    [
        ("temperature", 0.0, 2.0),
        ("top_p", 0.0, 1.0),
        ("top_k", -1, INT32_MAX),
        ("min_p", 0.0, 1.0),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
        ("repeat_penalty", 0.0001, 10.0),
    ],
)
def test_bounds(name: str, least: float, greatest: float) -> None:
    assert getattr(decode(**{name: least}), name) == least
    assert getattr(decode(**{name: greatest}), name) == greatest
    step = 1 if name == "top_k" else 0.01
    for value in (least - step, greatest + step):
        with pytest.raises(msgspec.ValidationError, match=name):
            decode(**{name: value})


def test_the_bounds_above_are_of_every_override() -> None:
    assert len(SamplingOverrides.__struct_fields__) == 7


def test_a_repeat_penalty_of_zero_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="repeat_penalty"):
        decode(repeat_penalty=0)


@pytest.mark.parametrize("name", SamplingOverrides.__struct_fields__)
def test_null_means_not_set(name: str) -> None:
    assert getattr(decode(**{name: None}), name) is None
    assert resolve(decode(**{name: None})) == Sampling()


def test_every_override_is_a_sampling_parameter() -> None:
    assert set(SamplingOverrides.__struct_fields__) <= set(Sampling.__struct_fields__)


def test_the_defaults_are_openai_s() -> None:
    assert resolve() == Sampling()
    assert resolve(SamplingOverrides(), SamplingOverrides()) == Sampling(
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repeat_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
    )


@pytest.mark.parametrize(
    ("name", "request_value", "model_value"),
    [
        ("temperature", 0.0, 0.7),
        ("top_p", 0.0, 0.9),
        ("top_k", 0, 40),
        ("min_p", 0.0, 0.1),
        ("presence_penalty", 0.0, 1.5),
        ("frequency_penalty", 0.0, -1.5),
        ("repeat_penalty", 1.0, 1.1),
    ],
)
def test_a_request_wins_over_model_defaults(name: str, request_value: float, model_value: float) -> None:
    request, model = SamplingOverrides(**{name: request_value}), SamplingOverrides(**{name: model_value})
    assert getattr(resolve(request, model), name) == request_value
    assert getattr(resolve(SamplingOverrides(), model), name) == model_value
    assert getattr(resolve(request, SamplingOverrides()), name) == request_value


def test_overrides_are_merged_field_by_field() -> None:
    request = SamplingOverrides(temperature=0.5, top_p=0.8)
    model = SamplingOverrides(temperature=0.9, min_p=0.1)
    assert resolve(request, model) == Sampling(temperature=0.5, top_p=0.8, min_p=0.1)


@pytest.mark.parametrize(("given", "resolved"), [(-1, 0), (0, 0), (1, 1), (40, 40)])
def test_top_k_of_minus_one_means_zero(given: int, resolved: int) -> None:
    assert resolve(SamplingOverrides(top_k=given), SamplingOverrides(top_k=7)).top_k == resolved
    assert resolve(SamplingOverrides(), SamplingOverrides(top_k=given)).top_k == resolved


def test_fields_without_overrides() -> None:
    sampling = resolve(SamplingOverrides(top_k=3), seed=9, logit_bias={5: -100.0}, repeat_last_n=-1)
    assert sampling == Sampling(top_k=3, seed=9, logit_bias={5: -100.0}, repeat_last_n=-1)


def test_each_choice_has_its_own_seed() -> None:
    base = Sampling(seed=7, temperature=0.5, logit_bias={1: 2.0})
    assert for_choice(base, 0) == base
    assert for_choice(base, 3) == Sampling(seed=10, temperature=0.5, logit_bias={1: 2.0})
    assert len({for_choice(base, choice).seed for choice in range(16)}) == 16


def test_seeds_of_choices_stay_within_64_bits() -> None:
    assert for_choice(Sampling(seed=2**64 - 1), 1).seed == 0
    assert for_choice(Sampling(seed=-1), 1).seed == 0
    assert for_choice(Sampling(seed=-5), 1).seed == 2**64 - 4
