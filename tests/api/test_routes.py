"""The route table: the router serves every route, and the access rules follow from the table."""

import re

from tests.serving import Server, serve
from tinyoai.api import routes
from tinyoai.api.routes import PUBLIC, ROUTES, Endpoints, Route


class _Anything:
    """Has an attribute for every handler name."""

    def __getattr__(self, name: str) -> object:
        return self


def path_of(route: Route) -> str:
    """Returns a path that matches the route."""
    return re.sub(r"\{\w+:path\}", "1", route.path)


def test_the_router_has_every_route_once() -> None:
    endpoints = Endpoints(*[_Anything()] * len(Endpoints._fields))  # type: ignore[arg-type]
    routed = [(method, path.replace(":path}", "}")) for method, path in routes.router(endpoints).routes]
    assert sorted(routed) == sorted((route.method, route.name) for route in ROUTES)
    assert len(set(routed)) == len(routed)


def test_routes_that_need_no_key() -> None:
    expected = {"/", "/health", "/health/live", "/health/ready", "/docs", "/docs/{name}", "/openapi.json"}
    assert expected == PUBLIC


def test_public_routes_answer_without_a_key_and_all_others_do_not() -> None:
    with serve("--engine", "fake", "--api-key", "secret") as server:
        for route in ROUTES:
            path = path_of(route)
            status = server.request(route.method, path, {} if route.method == "POST" else None).status
            assert (status == 401) == (not route.public), (route.method, path, status)


def test_routes_open_to_pages_of_loopback_origins(fake: Server) -> None:
    origin = "http://localhost:3000"
    refused = set()
    for route in ROUTES:
        asked = {"Origin": origin, "Access-Control-Request-Method": route.method}
        reply = fake.request("OPTIONS", path_of(route), headers=asked)
        if reply.headers["access-control-allow-origin"] != origin:
            refused.add((route.method, route.name))
    assert refused == {
        ("POST", "/models/load"),
        ("POST", "/models/unload"),
        ("DELETE", "/models/{id}"),
        ("POST", "/api/finetune/start"),
        ("GET", "/api/finetune/jobs"),
        ("GET", "/api/finetune/status/{job_id}"),
        ("POST", "/api/finetune/stop/{job_id}"),
        ("GET", "/metrics"),
    }


def test_head_of_the_root_is_a_probe_and_get_leads_to_the_docs(fake: Server) -> None:
    reply = fake.request("HEAD", "/")
    assert (reply.status, reply.body) == (200, b"")
    reply = fake.get("/")
    assert (reply.status, reply.headers["location"]) == (302, "docs")
