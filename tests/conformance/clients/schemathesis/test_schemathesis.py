"""Requests generated from the server's OpenAPI document: no 5xx, no status or body that it does not describe."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving import Server, serve

with serve("--engine", "fake") as _server:
    DOCUMENT = _server.get("/openapi.json").json
    CAN_TRAIN = _server.request("POST", "/api/finetune/start", {}).status != 404

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def cases() -> list[Any]:
    """Returns every operation with valid requests and, if it has a body, with invalid ones."""
    found = [one.ok() for one in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()]
    return [
        pytest.param(operation, mode, id=f"{operation.label} {mode.value}")
        for operation in found
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or operation.body
    ]


def test_the_document_is_valid() -> None:
    schemathesis.openapi.from_dict(DOCUMENT).validate()


@pytest.mark.parametrize(("operation", "mode"), cases())
def test_answers_match_the_document(operation: Any, mode: GenerationMode, fake: Server) -> None:
    n_examples = 60 if operation.body else 20 if operation.path_parameters else 1
    statuses: set[int] = set()

    @given(st.data())
    @settings(
        max_examples=n_examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    def ask(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "fake"  # an unknown name is rejected before anything else
        response = case.call(base_url=f"http://127.0.0.1:{fake.port}")
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    ask()
    if operation.body:
        good = 200
        if "finetune" in operation.path:
            good = 400 if CAN_TRAIN else 404  # the scripted engine cannot be trained
        assert (good if mode is GenerationMode.POSITIVE else 400) in statuses, (
            "no request reached the handler"
        )
