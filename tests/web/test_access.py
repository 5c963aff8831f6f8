"""Access: hosts, origins, keys, rate limits and media types, and headers of the responses."""

from typing import Any, cast

import pytest

from tinyoai import errors
from tinyoai.web import api_keys
from tinyoai.web.access import Access
from tinyoai.web.exchange import Exchange
from tinyoai.web.rate_limits import Rate
from tinyoai.web.request_head import Limits, read_head


class Link:
    """A connection with nothing but a clock."""

    def clock(self) -> float:
        """Returns 0: the time is constant."""
        return 0.0


def request(
    *lines: bytes,
    method: bytes = b"POST",
    peer: str = "10.0.0.1",
    route: str = "/chat/completions",
    local_pages: bool = False,
    host: bytes = b"localhost",
) -> Exchange:
    """Returns a request with these header lines."""
    head = read_head(
        method + b" / HTTP/1.1\r\n" + b"\r\n".join([b"Host: " + host, *lines]) + b"\r\n\r\n", Limits()
    )
    assert head is not None
    exchange = Exchange(cast(Any, Link()), head, peer)
    exchange.route, exchange.local_pages = route, local_pages
    return exchange


def headers(exchange: Exchange) -> dict[str, str]:
    """Returns the headers of the response. No header may occur twice."""
    assert len({name for name, _ in exchange.extra_headers}) == len(exchange.extra_headers)
    return dict(exchange.extra_headers)


def refusal(access: Access, asked: Exchange) -> errors.ApiError | None:
    """Returns the error that the access check raises, or None."""
    try:
        access.check(asked)
    except errors.ApiError as error:
        return error
    return None


def verdict(access: Access, *lines: bytes, method: bytes = b"POST", host: bytes = b"localhost:8000") -> int:
    """Returns 0 if the access check accepts the request, otherwise the error's status."""
    error = refusal(access, request(*lines, method=method, host=host))
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
    assert verdict(LOCAL, method=b"GET", host=host) == local
    assert verdict(OPEN, method=b"GET", host=host) == anywhere


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
def test_media_types_and_origins_of_a_post(line: bytes, status: int) -> None:
    assert verdict(LOCAL, line) == status


def test_foreign_pages_may_send_a_get() -> None:
    assert verdict(LOCAL, b"Origin: http://evil.example", method=b"GET") == 0


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
def test_the_owner_of_a_key(line: bytes, client: str | None) -> None:
    asked = request(line)
    error = refusal(KEYED, asked)
    if client:
        assert error is None
        assert asked.client == client
    else:
        assert error is not None
        assert (error.status, error.type, error.code) == (401, "authentication_error", "invalid_api_key")
        assert error.headers["www-authenticate"] == "Bearer"
        assert "sk-" not in error.message


def test_a_valid_key_beside_a_placeholder() -> None:
    assert refusal(KEYED, request(b"Authorization: Bearer not-needed", b"x-api-key: sk-one")) is None


@pytest.mark.parametrize(
    "line", [b"x: y", b"Authorization: Bearer", b"Authorization: Bearer anything", b"x-api-key: z"]
)
def test_without_keys_any_key_is_accepted(line: bytes) -> None:
    assert refusal(Access(loopback=True), request(line)) is None


def test_health_needs_no_key_and_only_health() -> None:
    for route in ("/health", "/health/live"):
        assert refusal(KEYED, request(method=b"GET", route=route)) is None
    for route in ("/healthy", "/models", ""):
        assert refusal(KEYED, request(method=b"GET", route=route)) is not None


def test_guessing_keys_limits_only_the_address_that_guesses() -> None:
    access = Access(loopback=True, keys=api_keys.Keys([("good", "Ann")]))
    statuses = [refusal(access, request(b"x-api-key: %d" % i, peer="10.0.0.9")) for i in range(100)]
    assert [error.status for error in statuses if error][:5] == [401] * 5
    last = statuses[-1]
    assert last is not None
    assert last.status == 429
    assert int(last.headers["retry-after"]) >= 1
    assert refusal(access, request(b"x-api-key: good", peer="10.0.0.9")) is None
    other = refusal(access, request(b"x-api-key: bad", peer="10.0.0.8"))
    assert other is not None
    assert other.status == 401


def test_a_foreign_page_with_a_valid_key_is_accepted() -> None:
    origin = b"Origin: http://app.example"
    assert refusal(KEYED, request(origin, b"x-api-key: sk-one")) is None
    error = refusal(KEYED, request(origin))
    assert error is not None
    assert error.status == 403


# -- rate limits -----------------------------------------------------------------------------------------------


def test_one_client_is_a_key_an_address_or_a_network() -> None:
    access = Access(loopback=False, keys=api_keys.Keys([("k", "Ann")]), rate=Rate(requests=1))
    assert refusal(access, request(b"x-api-key: k", peer="10.0.0.1")) is None
    again = refusal(access, request(b"x-api-key: k", peer="10.0.0.2"))
    assert again is not None
    assert again.status == 429
    access = Access(loopback=False, rate=Rate(requests=1))
    assert refusal(access, request(peer="2001:db8::1")) is None
    assert refusal(access, request(peer="2001:db8::2")) is not None
    assert refusal(access, request(peer="2001:db8:0:1::2")) is None
    assert refusal(access, request(peer="10.0.0.2")) is None


def test_the_tokens_of_an_answer_are_charged_at_its_end() -> None:
    access = Access(loopback=False, rate=Rate(tokens=100))
    asked = request()
    assert refusal(access, asked) is None
    asked.n_tokens = 150
    access.on_request_finished(asked)
    refused = request()
    assert refusal(access, refused) is not None
    assert headers(refused)["x-ratelimit-remaining-tokens"] == "0"


# -- cross-origin ----------------------------------------------------------------------------------------

APP = Access(loopback=True, origins=("https://App.example",), keys=api_keys.Keys([("k", "Ann")]))
ANY = Access(loopback=True, origins=("*",))
PREFLIGHT = (
    b"Access-Control-Request-Method: POST",
    b"Access-Control-Request-Headers: authorization,content-type,x-stainless-os",
)


def test_preflight_is_answered_without_a_key() -> None:
    asked = request(b"Origin: https://app.example", *PREFLIGHT, method=b"OPTIONS")
    assert refusal(APP, asked) is None
    assert headers(asked)["access-control-allow-origin"] == "https://app.example"
    assert headers(asked)["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
    assert "POST" in headers(asked)["access-control-allow-methods"]
    assert headers(asked)["vary"] == "Origin"
    assert "access-control-allow-credentials" not in headers(asked)


def test_private_network_access_is_allowed_only_on_request() -> None:
    asked = request(
        b"Origin: https://x.example",
        *PREFLIGHT,
        b"Access-Control-Request-Private-Network: true",
        method=b"OPTIONS",
    )
    assert refusal(ANY, asked) is None
    assert headers(asked)["access-control-allow-private-network"] == "true"
    assert headers(asked)["access-control-allow-origin"] == "*"


def test_other_origins_get_no_cors_headers() -> None:
    asked = request(b"Origin: https://evil.example", *PREFLIGHT, method=b"OPTIONS")
    assert refusal(APP, asked) is None
    assert set(headers(asked)) == {"vary"}
    error = refusal(APP, request(b"Origin: https://evil.example"))
    assert error is not None
    assert error.status == 403
    assert "--cors-origin" in error.message


def test_allowed_pages_can_read_errors() -> None:
    asked = request(b"Origin: https://app.example")
    error = refusal(APP, asked)
    assert error is not None
    assert error.status == 401
    assert headers(asked)["access-control-allow-origin"] == "https://app.example"
    assert "retry-after" in headers(asked)["access-control-expose-headers"]


def test_an_allowed_page_may_post() -> None:
    assert refusal(ANY, request(b"Origin: null", b"Sec-Fetch-Site: cross-site")) is None
    assert refusal(APP, request(b"Origin: HTTPS://app.example", b"x-api-key: k")) is None


def test_invalid_bytes_in_requested_headers_are_not_echoed() -> None:
    asked = request(
        b"Origin: https://x.example", PREFLIGHT[0], b"Access-Control-Request-Headers: \xe9", method=b"OPTIONS"
    )
    assert refusal(ANY, asked) is None
    assert headers(asked)["access-control-allow-headers"].isascii()


@pytest.mark.parametrize(
    "origin",
    [
        b"chrome-extension://abcdefgh",
        b"moz-extension://2d3e-4f",
        b"vscode-webview://1a2b",
        b"app://obsidian.md",
        b"app://",
        b"https://app.example:8443",
        b"null",
    ],
)
def test_origins_of_every_scheme_can_be_allowed(origin: bytes) -> None:
    for spelling in (origin.decode(), origin.decode().upper(), origin.decode().rstrip("/") + "/"):
        if spelling.lower() == "app:/":
            continue
        access = Access(loopback=True, origins=(spelling,))
        asked = request(b"Origin: " + origin)
        assert refusal(access, asked) is None
        assert headers(asked)["access-control-allow-origin"] == origin.decode()
        assert refusal(access, request(b"Origin: " + origin + b"x")) is not None
    assert refusal(Access(loopback=True, origins=("https://app.example",)), request(b"Origin: " + origin))


def test_more_headers_can_be_exposed() -> None:
    access = Access(loopback=True, origins=("*",), expose_headers=("x-cost", "x-queue"))
    asked = request(b"Origin: https://x.example")
    assert refusal(access, asked) is None
    exposed = headers(asked)["access-control-expose-headers"].split(", ")
    assert {"x-cost", "x-queue", "x-request-id", "retry-after"} <= set(exposed)


# -- local pages: pages of loopback origins ------------------------------------------------------------------

PAGE = b"Origin: http://localhost:3000"
CORS = {"access-control-allow-origin", "access-control-expose-headers", "vary"}


@pytest.mark.parametrize(
    "origin",
    [
        b"http://localhost:3000",
        b"https://localhost",
        b"http://app.localhost:5173",
        b"http://127.0.0.1:8080",
        b"http://127.1.2.3",
        b"http://[::1]:3000",
    ],
)
@pytest.mark.parametrize("site", [b"same-site", b"cross-site"])
def test_local_pages_can_use_routes_with_the_flag(origin: bytes, site: bytes) -> None:
    line = b"Origin: " + origin
    asked = request(line, b"Sec-Fetch-Site: " + site, local_pages=True)
    assert refusal(LOCAL, asked) is None
    assert set(headers(asked)) == CORS
    assert headers(asked)["access-control-allow-origin"] == origin.decode()
    asked = request(line, *PREFLIGHT, method=b"OPTIONS", local_pages=True)
    assert refusal(LOCAL, asked) is None
    assert headers(asked)["access-control-allow-origin"] == origin.decode()
    assert headers(asked)["access-control-allow-methods"] == "POST", "browsers remember every listed method"
    assert headers(asked)["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"


@pytest.mark.parametrize(
    "origin",
    [
        b"null",
        b"file://",
        b"http://evil.example",
        b"http://localhost.evil.example",
        b"http://127.0.0.1.evil.example",
        b"http://localhost@evil.example",
        b"http://192.168.1.5",
        b"http://0.0.0.0:8000",
        b"chrome-extension://localhost",
    ],
)
def test_other_pages_can_use_no_route(origin: bytes) -> None:
    line = b"Origin: " + origin
    asked = request(line, local_pages=True)
    error = refusal(LOCAL, asked)
    assert error is not None
    assert error.status == 403
    assert (
        error.message == f"requests from origin {origin.decode()} are not allowed; "
        f"add --cors-origin {origin.decode()} to allow them"
    )
    assert set(headers(asked)) == {"vary"}
    for method in (b"OPTIONS", b"GET"):
        asked = request(line, *PREFLIGHT, method=method, local_pages=True)
        assert refusal(LOCAL, asked) is None
        assert set(headers(asked)) == {"vary"}


def test_local_pages_can_use_no_other_route() -> None:
    error = refusal(LOCAL, request(PAGE))
    assert error is not None
    assert error.status == 403
    for method in (b"OPTIONS", b"GET"):
        asked = request(PAGE, *PREFLIGHT, method=method)
        assert refusal(LOCAL, asked) is None
        assert headers(asked) == {}


def test_local_pages_can_use_all_routes_with_cors_origin() -> None:
    access = Access(loopback=True, origins=("http://localhost:3000",))
    assert refusal(access, request(PAGE)) is None
    asked = request(PAGE, *PREFLIGHT, method=b"OPTIONS", local_pages=True)
    assert refusal(access, asked) is None
    assert "DELETE" in headers(asked)["access-control-allow-methods"]


def test_allowing_another_origin_does_not_restrict_local_pages() -> None:
    asked = request(PAGE, b"x-api-key: k", local_pages=True)
    assert refusal(APP, asked) is None
    assert headers(asked)["access-control-allow-origin"] == "http://localhost:3000"


def test_local_pages_need_a_key_if_the_server_has_keys() -> None:
    asked = request(PAGE, local_pages=True)
    error = refusal(KEYED, asked)
    assert error is not None
    assert error.status == 401
    assert "access-control-allow-origin" in headers(asked), "the page must be able to read the error"


def test_local_pages_need_a_loopback_server() -> None:
    asked = request(PAGE, local_pages=True)
    error = refusal(OPEN, asked)
    assert error is not None
    assert error.status == 403
    asked = request(PAGE, *PREFLIGHT, method=b"OPTIONS", local_pages=True)
    assert refusal(OPEN, asked) is None
    assert headers(asked) == {}


@pytest.mark.parametrize("method", [b"POST", b"GET", b"OPTIONS"])
def test_a_rebound_dns_name_gives_no_access(method: bytes) -> None:
    for origin in (b"http://evil.example", b"http://localhost:3000", b"null"):
        asked = request(b"Origin: " + origin, method=method, local_pages=True, host=b"evil.example")
        error = refusal(LOCAL, asked)
        assert error is not None
        assert error.status == 403
        assert "--allowed-host evil.example" in error.message


def test_each_key_has_a_scope_of_its_own_that_does_not_tell_the_key() -> None:
    keys = api_keys.Keys([("sk-secret-a", "Ann"), ("sk-secret-b", "Ann")])  # two keys of one owner

    def scope(key: bytes, **settings: bool) -> str:
        asked = request(b"x-api-key: " + key)
        Access(loopback=True, keys=keys, **settings).check(asked)
        return asked.scope

    keys.use_salt(bytes(32))
    a, b = scope(b"sk-secret-a"), scope(b"sk-secret-b")
    assert (len(a), len(b), len({a, b})) == (32, 32, 2)
    assert "secret" not in a
    assert scope(b"sk-secret-a") == a
    assert scope(b"sk-secret-a", shared_prefixes=True) == ""
    keys.use_salt(b"another")
    assert scope(b"sk-secret-a") != a
    asked = request()
    Access(loopback=True).check(asked)
    assert asked.scope == ""  # without keys everybody shares
