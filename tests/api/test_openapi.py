"""The description of the server, held against the server: its routes, its fields, its examples."""

import json
from typing import Any

import jsonschema
import pytest

from tests.serving import Server
from tinyoai.api.openapi import FIELDS, OPERATIONS, bodies, document
from tinyoai.app import _App
from tinyoai.config.resolve import resolve
from tinyoai.finetune.jobs import installed

ASIDE = {("GET", "/docs/{name}"), ("GET", "/")}
"""Routes that are no part of the API: the files of the documentation's page, and the way to it."""

POSTS = [operation for operation in OPERATIONS if operation.body is not None]
EXAMPLES = [
    pytest.param(operation, title, id=f"{operation.path} {title}")
    for operation in POSTS
    for title in operation.examples
]


def test_every_route_is_described_and_everything_described_is_routed() -> None:
    router = _App(resolve({"engine": "fake"}, {}))._router()
    routed = {(method, path.replace(":path}", "}")) for method, path in router.routes} - ASIDE
    described = {(operation.method, operation.path.removeprefix("/v1")) for operation in OPERATIONS}
    assert routed == described


def test_it_is_valid(fake: Server) -> None:
    reply = fake.get("/openapi.json")
    assert reply.status == 200
    assert reply.json["openapi"].startswith("3.1")
    for shape in reply.json["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(shape)


def test_every_reference_leads_somewhere(fake: Server) -> None:
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


def test_every_field_of_a_request_is_explained() -> None:
    shapes = document("x")["components"]["schemas"]
    named = {operation.body.__name__ for operation in POSTS}
    for name in sorted(named):
        for field, shape in shapes[name]["properties"].items():
            assert shape.get("description"), f"{name}.{field} has no line in FIELDS"
    known = {field for shape in shapes.values() for field in shape.get("properties", ())}
    assert set(FIELDS) <= known, set(FIELDS) - known


def test_names_and_ids_are_unique() -> None:
    ids = [operation.id for operation in OPERATIONS]
    assert len(set(ids)) == len(ids)
    tags = {tag["name"] for tag in document("x")["tags"]}
    assert {operation.tag for operation in OPERATIONS} == tags


def test_every_status_has_openais_error_body() -> None:
    for path, methods in document("x")["paths"].items():
        for operation in methods.values():
            for status, response in operation["responses"].items():
                if status == "200":
                    continue
                schema = response["content"]["application/json"]["schema"]
                shapes = schema.get("oneOf", [schema])
                assert {"$ref": "#/components/schemas/ErrorBody"} in shapes, (path, status)


@pytest.mark.parametrize(("operation", "title"), EXAMPLES)
def test_every_example_is_answered_as_described(builtin: Server, operation: Any, title: str) -> None:
    made = builtin.get("/openapi.json").json
    method = made["paths"][operation.path][operation.method.lower()]
    body = method["requestBody"]["content"]["application/json"]["examples"][title]["value"]
    assert body == bodies(operation, builtin.model)[title]
    reply = builtin.request(operation.method, operation.path, body)
    if operation.id == "startFinetune" and not installed():
        assert (reply.status, reply.error["code"]) == (404, "finetune_not_installed")
        return
    assert reply.status == 200, reply.body
    content = method["responses"]["200"]["content"]
    kind = reply.headers["content-type"].partition(";")[0]
    assert kind in content
    if kind == "text/event-stream":
        assert operation.event is not None
        assert reply.events[-1] == "[DONE]"
        answers, name = reply.events[:-1], operation.event.__name__
    else:
        answers, name = [reply.json], operation.answer.__name__
    validator = jsonschema.Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": made["components"]}
    )
    for answer in answers:
        validator.validate(answer)


def test_it_says_what_is_served_here(fake: Server, builtin: Server) -> None:
    assert b'"model":"fake"' in fake.get("/openapi.json").body
    assert b'"model":"tinyoai-chat"' in builtin.get("/openapi.json").body


def test_it_answers_by_every_spelling(fake: Server) -> None:
    first = fake.get("/openapi.json")
    assert json.loads(first.body) == fake.get("/v1/openapi.json").json
    assert fake.request("HEAD", "/openapi.json").headers["content-length"] == str(len(first.body))
