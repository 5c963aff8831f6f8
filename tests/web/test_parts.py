"""Router and event bytes: tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai import errors
from tinyoai.web import sse
from tinyoai.web.exchange import Exchange
from tinyoai.web.routing import Router


async def one(exchange: Exchange) -> None:
    """A handler."""


async def two(exchange: Exchange) -> None:
    """Another."""


async def three(exchange: Exchange) -> None:
    """A third."""


@pytest.fixture
def router() -> Router:
    """As the server's."""
    made = Router(prefixes=("/v1",))
    made.add("GET", "/v1/models", one)
    made.add("GET", "/v1/models/{id:path}", two)
    made.add("GET", "/v1/models/status", three)
    made.add("POST", "/v1/models/{id:path}", three)
    made.add("POST", "/v1/chat/completions", three)
    made.add("GET", "/health", three)
    return made


@pytest.mark.parametrize(
    ("method", "target", "handler", "params"),
    [
        ("GET", b"/v1/models", one, {}),
        ("GET", b"/models", one, {}),
        ("GET", b"/v1/models/", one, {}),
        ("HEAD", b"/v1/models", one, {}),
        ("GET", b"/v1/models?x=/y", one, {}),
        ("GET", b"/v1/models/a", two, {"id": "a"}),
        ("GET", b"/models/org/name", two, {"id": "org/name"}),
        ("GET", b"/v1/models/org%2Fname", two, {"id": "org/name"}),
        ("GET", b"/v1/models/a%2520b", two, {"id": "a%20b"}),
        ("GET", b"/v1/models/%C3%A9", two, {"id": "\u00e9"}),
        ("GET", b"/v1/models/status", three, {}),
        ("POST", b"/v1/models/a", three, {"id": "a"}),
        ("GET", b"/v1/health", three, {}),
    ],
)
def test_routes(router: Router, method: str, target: bytes, handler: object, params: dict[str, str]) -> None:
    assert router.resolve(method, target)[:2] == (handler, params)


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", b"/", 404),
        ("GET", b"/nowhere", 404),
        ("GET", b"/v1", 404),
        ("GET", b"/v1/v1/models", 404),
        ("GET", b"/v1/models/../health", 404),
        ("GET", b"/v1/models/%2e%2e/x", 404),
        ("GET", b"/v1/models/%00", 400),
        ("GET", b"/v1/models/%ff", 400),
        ("GET", b"/v1/models/%zz", 400),
        ("GET", b"/v1/models/%0d%0aX:y", 400),
        ("DELETE", b"/v1/models", 405),
        ("GET", b"/v1/chat/completions", 405),
    ],
)
def test_no_route(router: Router, method: str, target: bytes, status: int) -> None:
    with pytest.raises(errors.ApiError) as caught:
        router.resolve(method, target)
    assert caught.value.status == status
    if status == 405:
        assert "OPTIONS" in caught.value.headers["allow"]


@given(st.binary(max_size=40))
def test_any_path_is_a_route_or_a_refusal(path: bytes) -> None:
    router = Router(prefixes=("/v1",))
    router.add("GET", "/v1/models/{id:path}", one)
    try:
        router.resolve("GET", b"/models/" + path)
    except errors.ApiError as error:
        assert error.status in (400, 404)


def test_event_bytes() -> None:
    assert sse.event(b'{"a":1}', False) == b'data: {"a":1}\n\n'
    assert sse.event(b'{"a":1}', True) == b'f\r\ndata: {"a":1}\n\n\r\n'
    assert sse.comment("ping", False) == b": ping\n\n"
    assert sse.comment("ping", True) == b"8\r\n: ping\n\n\r\n"
    assert sse.done(True) == b"e\r\ndata: [DONE]\n\n\r\n"
