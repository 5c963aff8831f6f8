"""Requests drawn from the server's own description: no 5xx, no status and no body that is not described."""

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

from tests.serving import Server
from tinyoai.api.openapi import document
from tinyoai.finetune.jobs import installed

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def cases() -> list[Any]:
    """Everything that is described: asked as it should be and, where there is anything to get wrong, wrongly."""
    found = [one.ok() for one in schemathesis.openapi.from_dict(document("fake")).get_all_operations()]
    return [
        pytest.param(operation, mode, id=f"{operation.label} {mode.value}")
        for operation in found
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or operation.body
    ]


@pytest.mark.parametrize(("operation", "mode"), cases())
def test_whatever_is_asked_is_answered_as_described(
    operation: Any, mode: GenerationMode, fake: Server
) -> None:
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
            case.body["model"] = "fake"  # an unknown name would be told so before anything else is looked at
        response = case.call(base_url=f"http://127.0.0.1:{fake.port}")
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    ask()
    if operation.body:
        good = 200 if installed() or "finetune" not in operation.path else 404
        good = (
            400 if installed() and "finetune" in operation.path else good
        )  # the scripted engine learns nothing
        assert (good if mode is GenerationMode.POSITIVE else 400) in statuses, "nothing was really tried"
