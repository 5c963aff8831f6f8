"""Rate limits: buckets, errors, headers, and the syntax of a rate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai.errors import RateLimited, UsageError
from tinyoai.web import rate_limits
from tinyoai.web.rate_limits import Bucket, Rate, Rates


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limited(rate: Rate) -> tuple[Rates, Clock]:
    """Returns rates and the clock that they read."""
    clock = Clock()
    return Rates(rate, clock, lambda: clock.now + 1e9), clock


def test_requests_a_minute() -> None:
    made, clock = limited(Rate(requests=3))
    for left in (2, 1, 0):
        made.take("a")
        assert dict(made.headers("a"))["x-ratelimit-remaining"] == str(left)
    with pytest.raises(RateLimited) as caught:
        made.take("a")
    assert caught.value.headers == {"retry-after": "20", "retry-after-ms": "20000"}
    assert caught.value.code == "rate_limit_exceeded"
    assert "Please retry" in caught.value.message
    made.take("b")
    clock.now += 19.9
    with pytest.raises(RateLimited) as caught:
        made.take("a")
    assert caught.value.headers["retry-after"] == "1"
    assert 90 <= int(caught.value.headers["retry-after-ms"]) <= 101
    clock.now += 0.11
    made.take("a")


def test_tokens_are_charged_afterwards_and_can_be_overdrawn() -> None:
    made, clock = limited(Rate(tokens=600))
    made.take("a")
    made.charge("a", 660)
    with pytest.raises(RateLimited, match="600 tokens per minute") as caught:
        made.take("a")
    assert caught.value.headers["retry-after"] == "7"  # 61 tokens at 10 a second
    headers = dict(made.headers("a"))
    assert headers["x-ratelimit-remaining-tokens"] == headers["x-ratelimit-remaining"] == "0"
    assert headers["x-ratelimit-reset-tokens"] == "1m6s"
    assert int(headers["x-ratelimit-reset"]) == 1_000_001_066
    clock.now += 7
    made.take("a")


def test_headers_in_both_spellings() -> None:
    made, _ = limited(Rate(60, 1000))
    made.take("a")
    assert dict(made.headers("a")) == {
        "x-ratelimit-limit": "60",
        "x-ratelimit-remaining": "59",
        "x-ratelimit-reset": "1000001001",
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "1000",
        "x-ratelimit-reset-tokens": "0ms",
    }


def test_the_number_of_remembered_clients_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limits, "MAX_CLIENTS", 10)
    made, _ = limited(Rate(requests=1))
    for i in range(100):
        made.take(str(i))
    assert len(made._clients) == 10
    with pytest.raises(RateLimited):
        made.take("99")


@given(st.integers(1, 1000), st.lists(st.tuples(st.floats(0, 100), st.floats(0, 2000)), max_size=30))
def test_a_bucket_never_gives_more_than_its_rate(per_minute: int, steps: list[tuple[float, float]]) -> None:
    now, taken = 0.0, 0.0
    bucket = Bucket(per_minute, now)
    for pause, amount in steps:
        now += pause
        wait = bucket.until(min(amount, per_minute), now)
        assert wait >= 0
        if amount <= bucket.level(now):
            bucket.take(amount, now)
            taken += amount
        assert taken <= per_minute * (1 + now / 60) + 1e-6
        assert bucket.level(now) <= per_minute
        assert (
            bucket.level(now - 50) <= bucket.level(now) + 1e-9
        )  # reading the clock out of order does no harm


@pytest.mark.parametrize(
    ("text", "rate"),
    [("", (0, 0)), ("60", (60, 0)), ("60,500", (60, 500)), (",500", (0, 500)), (" 1 , 2 ", (1, 2))],
)
def test_valid_rates(text: str, rate: tuple[int, int]) -> None:
    assert rate_limits.parse(text) == rate


@pytest.mark.parametrize("text", ["x", "0", "-1", "1,2,3", "1.5", "60/min", "1,0", "9" * 30])
def test_invalid_rates(text: str) -> None:
    with pytest.raises(UsageError, match="--rate-limit"):
        rate_limits.parse(text)
