"""The OpenAPI document compared with the running server: its routes, fields and examples."""

import json
import re
from typing import Any

import jsonschema
import pytest

from tests.serving import Server
from tinyoai.api.examples import EXAMPLES, bodies
from tinyoai.api.openapi import document
from tinyoai.api.routes import ROUTES, Route
from tinyoai.finetune.jobs import installed

POSTS = [route for route in ROUTES if route.request is not None]
CASES = [
    pytest.param(route, title, id=f"{route.path} {title}") for route in POSTS for title in EXAMPLES[route.id]
]


def test_every_example_belongs_to_a_route() -> None:
    assert set(EXAMPLES) == {route.id for route in POSTS}


def test_every_documented_route_is_in_the_document() -> None:
    paths = document("x")["paths"]
    described = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert described == {(r.method, r.path.replace(":path}", "}")) for r in ROUTES if r.tag}
    undocumented = {route.name for route in ROUTES if not route.tag}
    assert undocumented == {"/", "/docs/{name}", "/reranking", "/v2/rerank"}


def test_the_document_is_valid(fake: Server) -> None:
    reply = fake.get("/openapi.json")
    assert reply.status == 200
    assert reply.json["openapi"].startswith("3.1")
    for shape in reply.json["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(shape)


def test_every_reference_resolves(fake: Server) -> None:
    made = fake.get("/openapi.json").json
    found: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            found.extend(value for key, value in node.items() if key == "$ref")
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(made)
    assert len(found) > 50
    for ref in found:
        node = made
        for part in ref.removeprefix("#/").split("/"):
            node = node[part]


def sent(shapes: dict[str, Any]) -> set[str]:
    """Returns the names of all types that requests consist of."""
    waiting, found = [route.request.__name__ for route in POSTS], set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += re.findall(r"#/components/schemas/(\w+)", json.dumps(shapes[name]))
    return found


def test_every_request_field_has_a_description() -> None:
    shapes = document("x")["components"]["schemas"]
    names = sent(shapes)
    assert {"ChatMessage", "ContentPart", "StreamOptions", "FinetuneRequest"} <= names
    for name in sorted(names):
        for field, shape in shapes[name]["properties"].items():
            assert shape.get("description"), f"{name}.{field} has no description"


def test_names_and_ids_are_unique() -> None:
    ids = [route.id for route in ROUTES if route.tag]
    assert len(set(ids)) == len(ids)
    tags = {tag["name"] for tag in document("x")["tags"]}
    assert {route.tag for route in ROUTES if route.tag} == tags


def test_every_status_has_openais_error_body() -> None:
    for path, methods in document("x")["paths"].items():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if status == "200":
                    continue
                schema = response["content"]["application/json"]["schema"]
                shapes = schema.get("oneOf", [schema])
                assert {"$ref": "#/components/schemas/ErrorBody"} in shapes, (path, status)


@pytest.mark.parametrize(("route", "title"), CASES)
def test_every_example_is_answered_as_described(
    builtin: Server, fake: Server, route: Route, title: str
) -> None:
    server = fake if route.id == "rerank" else builtin  # the built-in model has no rank head
    made = server.get("/openapi.json").json
    method = made["paths"][route.path][route.method.lower()]
    body = method["requestBody"]["content"]["application/json"]["examples"][title]["value"]
    assert body == bodies(route, server.model)[title]
    reply = server.request(route.method, route.path, body)
    if route.id == "startFinetune" and not installed():
        assert (reply.status, reply.error["code"]) == (404, "finetune_not_installed")
        return
    assert reply.status == 200, reply.body
    content = method["responses"]["200"]["content"]
    kind = reply.headers["content-type"].partition(";")[0]
    assert kind in content
    if kind == "text/event-stream":
        assert route.event is not None
        assert reply.events[-1] == "[DONE]"
        answers, schema = reply.events[:-1], {"$ref": f"#/components/schemas/{route.event.__name__}"}
    else:
        answers, schema = [reply.json], content[kind]["schema"]
    validator = jsonschema.Draft202012Validator({**schema, "components": made["components"]})
    for answer in answers:
        validator.validate(answer)


def test_it_names_the_served_models(fake: Server, builtin: Server) -> None:
    assert b'"model":"fake"' in fake.get("/openapi.json").body
    assert b'"model":"tinyoai-chat"' in builtin.get("/openapi.json").body


def test_it_is_served_under_every_path(fake: Server) -> None:
    first = fake.get("/openapi.json")
    assert json.loads(first.body) == fake.get("/v1/openapi.json").json
    assert fake.request("HEAD", "/openapi.json").headers["content-length"] == str(len(first.body))
