"""Routes: the handler for each method and path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai import errors
from tinyoai.web.exchange import Exchange
from tinyoai.web.routing import Router


async def one(exchange: Exchange) -> None:
    """A handler."""


async def two(exchange: Exchange) -> None:
    """Another handler."""


async def three(exchange: Exchange) -> None:
    """A third handler."""


@pytest.fixture
def router() -> Router:
    """A router set up as the server's."""
    made = Router(prefixes=("/v1",), help_path="/docs")
    made.add("GET", "/v1/models", one, local_pages=True)
    made.add("GET", "/v1/models/{id:path}", two, local_pages=True)
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
    match = router.resolve(method, target)
    assert (match.handler, match.params) == (handler, params)


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


@pytest.mark.parametrize(
    ("method", "target", "allowed"),
    [
        ("GET", b"/v1/models", True),
        ("HEAD", b"/models/", True),
        ("GET", b"/v1/models/a", True),
        ("POST", b"/v1/models/a", False),
        ("GET", b"/v1/models/status", False),
        ("POST", b"/chat/completions", False),
    ],
)
def test_the_flag_for_local_pages_belongs_to_method_and_path(
    router: Router, method: str, target: bytes, allowed: bool
) -> None:
    assert router.resolve(method, target).local_pages is allowed


def test_a_match_names_the_route() -> None:
    router = Router(prefixes=("/v1", "/api/v2"))
    router.add("GET", "/v1/models/{id:path}", one)
    for path in (b"/models/a/b", b"/v1/models/a/b", b"/api/v2/models/a/b"):
        assert router.resolve("GET", path).route == "/models/{id}"
    assert router.routes == [("GET", "/models/{id:path}")]


def test_without_prefixes_only_the_exact_path_matches() -> None:
    router = Router()
    router.add("GET", "/v1/models", one)
    assert router.resolve("GET", b"/v1/models").route == "/v1/models"
    with pytest.raises(errors.NotFound, match=r"^path /models not found$"):
        router.resolve("GET", b"/models")


def test_a_404_points_to_the_help(router: Router) -> None:
    with pytest.raises(errors.NotFound, match="path /nowhere not found; /docs lists all endpoints"):
        router.resolve("GET", b"/nowhere")


@given(st.binary(max_size=40))
def test_any_path_is_a_route_or_an_error(path: bytes) -> None:
    router = Router(prefixes=("/v1",))
    router.add("GET", "/v1/models/{id:path}", one)
    try:
        router.resolve("GET", b"/models/" + path)
    except errors.ApiError as error:
        assert error.status in (400, 404)
