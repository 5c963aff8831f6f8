"""The OpenAPI 3.1 document of this server.

It is made from the table of routes, the types that decode requests and encode answers, and the exception tree.
It is imported by the first request for it.
"""

import re
from collections.abc import Iterable
from types import UnionType
from typing import Any, get_args, get_origin

import msgspec

from tinyoai import __version__, errors
from tinyoai.api.examples import bodies
from tinyoai.api.routes import ROUTES, Route

Json = dict[str, Any]

_ANY = (errors.BadRequest, errors.Forbidden, errors.HeadersTooLarge, errors.InternalError, errors.Unavailable)
"""Refusals of every route."""
_KEYED = (errors.Unauthorized, errors.RateLimited)
"""Refusals of every route that is not public."""

_INFO = """\
A small local LLM server that speaks OpenAI's HTTP API.

* Every path works with and without `/v1`.
* `null` in an optional field means absent. Unknown fields are ignored, known ones are checked.
* Errors have OpenAI's error body, and its `message` says what to do.
* Every response has an `X-Request-ID`: the request's own if it is short plain ASCII, else a new one.
* A key is needed only if the server was started with one: `Authorization: Bearer KEY` or `x-api-key: KEY`.
"""

_TAGS = {
    "Answers": "Chats, completions, embeddings, ranks of documents and tokens.",
    "Models": "List, load and unload models.",
    "Fine-tuning": "Train a new model from an existing one.",
    "Operation": "Health, metrics and documentation.",
}

_REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)\}")


def document(model: str) -> Json:
    """Returns the whole document, with this model in its examples."""
    paths: dict[str, Json] = {}
    for route in ROUTES:
        if route.tag:
            paths.setdefault(_path(route), {})[route.method.lower()] = _operation(route, model)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tinyoai",
            "version": __version__,
            "description": _INFO,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _path(route: Route) -> str:
    return route.path.replace(":path}", "}")


# -- schemas -----------------------------------------------------------------------------------------


def _schemas() -> Json:
    """The schemas of all types by name."""
    kinds: list[Any] = [errors.ErrorBody]
    for route in ROUTES:
        kinds += [kind for kind in (route.request, route.answer, route.event) if kind not in (None, dict)]
    _, schemas = msgspec.json.schema_components(list(dict.fromkeys(kinds)), ref_template=_REF)
    for schema in schemas.values():
        for field in schema.get("properties", {}).values():
            _describe(field)
    return dict(sorted(schemas.items()))


def _describe(field: Json) -> None:
    """Gives an optional field the description of its type, which msgspec puts inside the union with null."""
    inner = [option["description"] for option in field.get("anyOf", ()) if "description" in option]
    if inner and "description" not in field:
        field["description"] = inner[0]


def _shape(kind: Any) -> Json:
    if isinstance(kind, UnionType):
        return {"anyOf": [_shape(option) for option in get_args(kind)]}
    if get_origin(kind) is list:
        return {"type": "array", "items": _shape(*get_args(kind))}
    return {"type": "object"} if kind is dict else {"$ref": _REF.format(name=kind.__name__)}


# -- operations --------------------------------------------------------------------------------------


def _operation(route: Route, model: str) -> Json:
    made: Json = {
        "operationId": route.id,
        "tags": [route.tag],
        "summary": route.summary,
        "responses": _responses(route),
        "security": [] if route.public else [{}, {"bearer": []}, {"x-api-key": []}],
    }
    if route.description:
        made["description"] = route.description
    parameters = _PARAMETER.findall(_path(route))
    if parameters:
        made["parameters"] = [_parameter(name, model) for name in parameters]
    if route.request is not None:
        examples = {title: {"value": body} for title, body in bodies(route, model).items()}
        made["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _shape(route.request), "examples": examples}},
        }
    return made


def _parameter(name: str, model: str) -> Json:
    text = name == "id"
    return {
        "name": name,
        "in": "path",
        "required": True,
        "schema": {"type": "string", "minLength": 1} if text else {"type": "integer", "minimum": 1},
        "example": model if text else 1,
    }


def _responses(route: Route) -> Json:
    schema = {"type": "string"} if route.answer is None else _shape(route.answer)
    content: Json = {route.content_type: {"schema": schema}}
    description = "OK"
    if route.event is not None:
        name = route.event.__name__
        description = f"The whole answer; with `stream`, events that are each a `{name}`"
        content["text/event-stream"] = {
            "schema": _event(route.event),
            "examples": {
                "A stream": {
                    "value": f"data: {{a {name}}}\n\ndata: {{the next}}\n\ndata: [DONE]\n\n",
                }
            },
        }
    responses = {"200": _response(description, content)}
    refusals = [*_ANY, *(() if route.public else _KEYED), *route.refusals]
    for status in sorted({refusal.status for refusal in refusals}):
        kinds = list(dict.fromkeys(refusal for refusal in refusals if refusal.status == status))
        responses[str(status)] = _refusal(kinds)
    if route.answers_503:
        shape = {"oneOf": [_shape(route.answer), _shape(errors.ErrorBody)]}
        responses["503"] = _response(
            "Requests cannot be answered now; the body has the state of each model",
            {"application/json": {"schema": shape}},
        )
    return responses


def _event(kind: Any) -> Json:
    """The schema of a stream's event: its data is JSON, except for the last."""
    known = {"anyOf": [_shape(kind), _shape(errors.ErrorBody)]}
    data = {
        "type": "string",
        "anyOf": [{"const": "[DONE]"}, {"contentMediaType": "application/json", "contentSchema": known}],
    }
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def _refusal(kinds: Iterable[type[errors.ApiError]]) -> Json:
    """The response of one error status, with an example for each exception that has it."""
    texts = {kind.__name__: (kind.__doc__ or "").strip().partition("\n")[0] for kind in kinds}
    examples = {
        kind.__name__: {
            "summary": texts[kind.__name__],
            "value": msgspec.json.decode(kind(texts[kind.__name__]).body()),
        }
        for kind in kinds
    }
    content = {"schema": _shape(errors.ErrorBody), "examples": examples}
    return _response(" ".join(texts.values()), {"application/json": content})


def _response(description: str, content: Json) -> Json:
    return {"description": description, "content": content}
