"""Access, keys and rates: who may ask, how much, and what the answer's headers tell."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai import errors
from tinyoai.errors import RateLimited, UsageError
from tinyoai.web import api_keys, rate_limits
from tinyoai.web.access import Access
from tinyoai.web.rate_limits import Bucket, Rate, Rates
from tinyoai.web.request_head import Head, Limits, read_head


@dataclass
class Visit:
    """What the guard needs of an exchange."""

    head: Head
    peer: str = "10.0.0.1"
    route: str = "/chat/completions"
    client: str = ""
    extra_headers: list[tuple[str, str]] = field(default_factory=list)
    n_tokens: int = 0
    local_pages: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """The headers, of which none may come twice."""
        assert len({name for name, _ in self.extra_headers}) == len(self.extra_headers)
        return dict(self.extra_headers)


def visit(
    *lines: bytes, method: bytes = b"POST", peer: str = "10.0.0.1", route: str = "/chat/completions"
) -> Visit:
    """A request with these header lines."""
    head = read_head(
        method + b" / HTTP/1.1\r\n" + b"\r\n".join([b"Host: localhost", *lines]) + b"\r\n\r\n", Limits()
    )
    assert head is not None
    return Visit(head, peer, route)


def refusal(guard: Access, asked: Visit) -> errors.ApiError | None:
    """What the guard raises."""
    try:
        guard.check(asked)
    except errors.ApiError as error:
        return error
    return None


def verdict(guard: Access, *lines: bytes, method: bytes = b"POST") -> int:
    """0 if the guard lets it pass, else the status."""
    head = read_head(method + b" / HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n", Limits())
    assert head is not None
    error = refusal(guard, Visit(head))
    return error.status if error else 0


LOCAL = Access(loopback=True, allowed_hosts=("box.example",))
OPEN = Access(loopback=False)


@pytest.mark.parametrize(
    ("host", "local", "anywhere"),
    [
        (b"localhost", 0, 0),
        (b"LOCALHOST:8000", 0, 0),
        (b"127.0.0.1:1", 0, 0),
        (b"127.8.8.8", 0, 0),
        (b"[::1]:80", 0, 0),
        (b"a.localhost", 0, 0),
        (b"box.example", 0, 0),
        (b"evil.example", 403, 0),
        (b"localhost.evil.example", 403, 0),
        (b"127.0.0.1.evil.example", 403, 0),
        (b"0.0.0.0", 403, 0),
        (b"192.168.1.5", 403, 0),
    ],
)
def test_hosts(host: bytes, local: int, anywhere: int) -> None:
    assert verdict(LOCAL, b"Host: " + host, method=b"GET") == local
    assert verdict(OPEN, b"Host: " + host, method=b"GET") == anywhere


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"Origin: http://localhost:8000", 0),
        (b"Origin: https://LOCALHOST:8000", 0),
        (b"Origin: http://localhost:9", 403),
        (b"Origin: http://evil.example", 403),
        (b"Origin: null", 403),
        (b"Sec-Fetch-Site: cross-site", 403),
        (b"Sec-Fetch-Site: same-origin", 0),
        (b"Sec-Fetch-Site: none", 0),
        (b"Content-Encoding: gzip", 415),
        (b"Content-Encoding: identity", 0),
        (b"Content-Type: application/json; charset=utf-8", 0),
        (b"Content-Type: application/x-www-form-urlencoded", 0),
        (b"Content-Type: text/plain", 0),
        (b"Content-Type: application/vnd.api+json", 0),
        (b"Content-Type: multipart/form-data; boundary=x", 415),
        (b"Content-Type: application/xml", 415),
    ],
)
def test_who_may_post_what(line: bytes, status: int) -> None:
    assert verdict(LOCAL, b"Host: localhost:8000", line) == status


def test_pages_from_elsewhere_may_still_get_nothing_that_matters() -> None:
    assert verdict(LOCAL, b"Host: localhost", b"Origin: http://evil.example", method=b"GET") == 0


# -- keys ------------------------------------------------------------------------------------------------

KEYED = Access(
    loopback=True, keys=api_keys.Keys([("sk-one", "Ann"), ("sk-two", "Ben")]), open_routes=("/health",)
)


@pytest.mark.parametrize(
    ("line", "client"),
    [
        (b"Authorization: Bearer sk-one", "key:Ann"),
        (b"authorization: bearer  sk-two ", "key:Ben"),
        (b"x-api-key: sk-one", "key:Ann"),
        (b"X-Api-Key:sk-two", "key:Ben"),
        (b"Authorization: Bearer sk-on", None),
        (b"Authorization: Bearer sk-onee", None),
        (b"Authorization: Bearer", None),
        (b"Authorization: Bearer ", None),
        (b"Authorization: Basic sk-one", None),
        (b"Authorization: sk-one", None),
        (b"x-api-key: ", None),
        (b"x-other: sk-one", None),
        (b"Authorization: Bearer \xff\xfe", None),
    ],
)
def test_whose_key(line: bytes, client: str | None) -> None:
    asked = visit(line)
    error = refusal(KEYED, asked)
    if client:
        assert error is None
        assert asked.client == client
    else:
        assert error is not None
        assert (error.status, error.type, error.code) == (401, "authentication_error", "invalid_api_key")
        assert error.headers["www-authenticate"] == "Bearer"
        assert "sk-" not in error.message


def test_a_good_key_beside_a_placeholder() -> None:
    assert refusal(KEYED, visit(b"Authorization: Bearer not-needed", b"x-api-key: sk-one")) is None


@pytest.mark.parametrize(
    "line", [b"x: y", b"Authorization: Bearer", b"Authorization: Bearer anything", b"x-api-key: z"]
)
def test_without_keys_everyone_is_welcome(line: bytes) -> None:
    assert refusal(Access(loopback=True), visit(line)) is None


def test_health_needs_no_key_and_only_health() -> None:
    for route in ("/health", "/health/live"):
        assert refusal(KEYED, visit(method=b"GET", route=route)) is None
    for route in ("/healthy", "/models", ""):
        assert refusal(KEYED, visit(method=b"GET", route=route)) is not None


def test_who_guesses_keys_is_slowed_down_and_nobody_else() -> None:
    guard = Access(loopback=True, keys=api_keys.Keys([("good", "Ann")]))
    statuses = [refusal(guard, visit(b"x-api-key: %d" % i, peer="10.0.0.9")) for i in range(100)]
    assert [error.status for error in statuses if error][:5] == [401] * 5
    last = statuses[-1]
    assert last is not None
    assert last.status == 429
    assert int(last.headers["retry-after"]) >= 1
    assert refusal(guard, visit(b"x-api-key: good", peer="10.0.0.9")) is None
    other = refusal(guard, visit(b"x-api-key: bad", peer="10.0.0.8"))
    assert other is not None
    assert other.status == 401


def test_a_page_from_elsewhere_that_knows_a_key_was_given_it() -> None:
    origin = b"Origin: http://app.example"
    assert refusal(KEYED, visit(origin, b"x-api-key: sk-one")) is None
    error = refusal(KEYED, visit(origin))
    assert error is not None
    assert error.status == 403


def test_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# comment\n\nsk-a Ann's laptop\n  sk-b\n")
    read = api_keys.read(["sk-c"], str(path))
    owners = {
        key: read.owner(visit(b"x-api-key: " + key).head) for key in (b"sk-a", b"sk-b", b"sk-c", b"sk-d")
    }
    assert owners == {b"sk-a": "Ann's laptop", b"sk-b": "line 4", b"sk-c": "key 1", b"sk-d": None}


@pytest.mark.parametrize("content", [b"", b"# only a comment\n", b"\xff\xfe", "schl\u00fcssel\n".encode()])
def test_a_key_file_that_would_let_everyone_in_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        api_keys.read([], str(path))
    with pytest.raises(UsageError, match="nothing-here"):
        api_keys.read([], str(tmp_path / "nothing-here"))


# -- rates -----------------------------------------------------------------------------------------------


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limited(rate: Rate) -> tuple[Rates, Clock]:
    """Rates on a clock that stands still."""
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
    told = dict(made.headers("a"))
    assert told["x-ratelimit-remaining-tokens"] == told["x-ratelimit-remaining"] == "0"
    assert told["x-ratelimit-reset-tokens"] == "1m6s"
    assert int(told["x-ratelimit-reset"]) == 1_000_001_066
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


def test_clients_are_forgotten_not_collected(monkeypatch: pytest.MonkeyPatch) -> None:
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
        )  # a clock that is read out of order does no harm


@pytest.mark.parametrize(
    ("text", "rate"),
    [("", (0, 0)), ("60", (60, 0)), ("60,500", (60, 500)), (",500", (0, 500)), (" 1 , 2 ", (1, 2))],
)
def test_how_a_rate_is_written(text: str, rate: tuple[int, int]) -> None:
    assert rate_limits.parse(text) == rate


@pytest.mark.parametrize("text", ["x", "0", "-1", "1,2,3", "1.5", "60/min", "1,0", "9" * 30])
def test_how_a_rate_is_not_written(text: str) -> None:
    with pytest.raises(UsageError, match="--rate-limit"):
        rate_limits.parse(text)


def test_one_client_is_a_key_an_address_or_a_network() -> None:
    guard = Access(loopback=False, keys=api_keys.Keys([("k", "Ann")]), rate=Rate(requests=1))
    assert refusal(guard, visit(b"x-api-key: k", peer="10.0.0.1")) is None
    again = refusal(guard, visit(b"x-api-key: k", peer="10.0.0.2"))
    assert again is not None
    assert again.status == 429
    guard = Access(loopback=False, rate=Rate(requests=1))
    assert refusal(guard, visit(peer="2001:db8::1")) is None
    assert refusal(guard, visit(peer="2001:db8::2")) is not None
    assert refusal(guard, visit(peer="2001:db8:0:1::2")) is None
    assert refusal(guard, visit(peer="10.0.0.2")) is None


def test_what_an_answer_cost_is_charged_at_its_end() -> None:
    guard = Access(loopback=False, rate=Rate(tokens=100))
    asked = visit()
    assert refusal(guard, asked) is None
    asked.n_tokens = 150
    guard.on_request_finished(asked)
    refused = visit()
    assert refusal(guard, refused) is not None
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


# -- cross-origin ----------------------------------------------------------------------------------------

APP = Access(loopback=True, origins=("https://App.example",), keys=api_keys.Keys([("k", "Ann")]))
ANY = Access(loopback=True, origins=("*",))
PREFLIGHT = (
    b"Access-Control-Request-Method: POST",
    b"Access-Control-Request-Headers: authorization,content-type,x-stainless-os",
)


def test_preflight_is_answered_without_a_key() -> None:
    asked = visit(b"Origin: https://app.example", *PREFLIGHT, method=b"OPTIONS")
    assert refusal(APP, asked) is None
    assert asked.headers["access-control-allow-origin"] == "https://app.example"
    assert asked.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert asked.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in asked.headers


def test_a_private_network_is_opened_only_on_request() -> None:
    asked = visit(
        b"Origin: https://x.example",
        *PREFLIGHT,
        b"Access-Control-Request-Private-Network: true",
        method=b"OPTIONS",
    )
    assert refusal(ANY, asked) is None
    assert asked.headers["access-control-allow-private-network"] == "true"
    assert asked.headers["access-control-allow-origin"] == "*"


def test_other_origins_learn_nothing() -> None:
    asked = visit(b"Origin: https://evil.example", *PREFLIGHT, method=b"OPTIONS")
    assert refusal(APP, asked) is None
    assert set(asked.headers) == {"vary"}
    error = refusal(APP, visit(b"Origin: https://evil.example"))
    assert error is not None
    assert error.status == 403
    assert "--cors-origin" in error.message


def test_refusals_can_be_read_by_allowed_pages() -> None:
    asked = visit(b"Origin: https://app.example")
    error = refusal(APP, asked)
    assert error is not None
    assert error.status == 401
    assert asked.headers["access-control-allow-origin"] == "https://app.example"
    assert "retry-after" in asked.headers["access-control-expose-headers"]


def test_an_allowed_page_may_post() -> None:
    assert refusal(ANY, visit(b"Origin: null", b"Sec-Fetch-Site: cross-site")) is None
    assert refusal(APP, visit(b"Origin: HTTPS://app.example", b"x-api-key: k")) is None


def test_odd_bytes_in_what_a_page_asks_for_are_not_sent_back() -> None:
    asked = visit(
        b"Origin: https://x.example", PREFLIGHT[0], b"Access-Control-Request-Headers: \xe9", method=b"OPTIONS"
    )
    assert refusal(ANY, asked) is None
    assert asked.headers["access-control-allow-headers"].isascii()
