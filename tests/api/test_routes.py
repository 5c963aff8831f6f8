"""The table of routes: the router serves it, and the access rules follow from it."""

from tests.serving import Server, serve
from tinyoai.api import routes
from tinyoai.api.routes import LOCAL_PAGES, PUBLIC, ROUTES, Endpoints


class _Anything:
    """Has every handler."""

    def __getattr__(self, name: str) -> object:
        return self


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
            path = (
                route.path.replace("{name:path}", "style.css")
                .replace("{id:path}", "x")
                .replace("{job_id:path}", "1")
            )
            status = server.request(route.method, path, {} if route.method == "POST" else None).status
            assert (status == 401) == (not route.public), (route.method, path, status)


def test_what_pages_of_loopback_origins_may_use() -> None:
    refused = {(route.method, route.name) for route in ROUTES} - LOCAL_PAGES
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
    assert ("GET", "/models/{id}") in LOCAL_PAGES


def test_head_of_the_root_is_a_probe_and_get_leads_to_the_docs(fake: Server) -> None:
    reply = fake.request("HEAD", "/")
    assert (reply.status, reply.body) == (200, b"")
    reply = fake.get("/")
    assert (reply.status, reply.headers["location"]) == (302, "docs")
