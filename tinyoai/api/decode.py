"""JSON bodies: decodes requests into typed structs, explains what is wrong with them, encodes answers.

`null` in an optional field means absent. Unknown fields are ignored, known ones are checked. Every check here
raises errors.BadRequest with the field's path in `param`.
"""

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from tinyoai import errors, units
from tinyoai.sampling import Sampling, SamplingOverrides

MAX_STOPS = 60
MAX_STOP_BYTES = 1024
MAX_LOGIT_BIAS = 1024

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Natural = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
ModelName = Annotated[str, Meta(min_length=1, max_length=512)]
Model = Annotated[
    ModelName,
    Meta(description="An id from `GET /v1/models`. An unknown one is a 404, never another model."),
]
KeepAlive = Annotated[
    float | Annotated[str, Meta(min_length=1, max_length=32)],
    Meta(
        description="How long the model stays loaded after this request: seconds, or a time such as `10m`; "
        "0 unloads it at once, -1 never."
    ),
]

encode = msgspec.json.Encoder().encode
"""Returns the JSON of an answer."""

T = TypeVar("T")

# the forms of msgspec's messages
_PATH = re.compile(r"^(?P<what>.*) - at `(?P<path>[^`]*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`$")
_BOUND = re.compile(r"^Expected `(?P<type>\w+)`(?P<length> of length)? (?P<sign>[<>]=?) (?P<bound>\S+)$")
_SIGNS = {">=": "at least", ">": "more than", "<=": "at most", "<": "less than"}
_UNITS = {"array": " items", "str": " characters"}


_decoders: "dict[type, msgspec.json.Decoder[Any]]" = {}


def decode(kind: type[T], body: bytes) -> T:
    """Returns a request of this type. Raises errors.BadRequest."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        body.decode()  # msgspec skips the contents of unknown fields, so broken UTF-8 there needs its own check
        request: T = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error), kind) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        if not body.strip():
            raise errors.InvalidJson("the request has no body; send a JSON object") from None
        raise errors.InvalidJson(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise errors.InvalidJson("the body is nested too deeply") from None
    return request


def _explain(message: str, kind: Any) -> errors.BadRequest:
    """Rewords msgspec's message, such as `... - at `$.messages[0].role``; unknown forms pass through as they are."""
    found = _PATH.match(message)
    what, path = (found["what"], found["path"]) if found else (message, "$")
    param = path.removeprefix("$").removeprefix(".").replace("[...]", "")
    missing = _MISSING.match(what)
    if missing:
        param = f"{param}.{missing['field']}" if param else missing["field"]
        return errors.BadRequest(f"the field {param!r} is required", param=param)
    if not param:
        return errors.BadRequest(f"the body must be a JSON object: {_lower(what)}")
    if what.startswith("Invalid enum value") and (values := _enum_values(kind, param)):
        what += f"; use one of {', '.join(values)}"
    if bound := _BOUND.match(what):
        return errors.BadRequest(f"{param}: {_limit(bound)}", param=param)
    return errors.BadRequest(f"{param}: {_lower(what)}", param=param)


def _limit(bound: re.Match[str]) -> str:
    """Rewords "Expected `float` <= 2.0"."""
    if not bound["length"]:
        return f"must be {_SIGNS[bound['sign']]} {bound['bound']}"
    if bound["sign"] + bound["bound"] == ">=1":
        return "must not be empty"
    return f"must be {_SIGNS[bound['sign']]} {bound['bound']}{_UNITS.get(bound['type'], '')} long"


def _enum_values(kind: Any, path: str) -> list[str]:
    """Returns the values of the enumeration at a path such as messages[0].role; msgspec's message lacks them."""
    from msgspec import inspect  # a wrong value is rare

    def flat(entry: inspect.Type) -> list[inspect.Type]:
        if isinstance(entry, inspect.Metadata):
            return flat(entry.type)
        if isinstance(entry, inspect.UnionType):
            return [part for option in entry.types for part in flat(option)]
        return [entry]

    found = flat(inspect.type_info(kind))
    for step in re.findall(r"[A-Za-z_]\w*|\[", path):
        if step == "[":
            found = [
                t for entry in found if isinstance(entry, inspect.ListType) for t in flat(entry.item_type)
            ]
        else:
            fields = [f for entry in found if isinstance(entry, inspect.StructType) for f in entry.fields]
            found = [t for field in fields if field.encode_name == step for t in flat(field.type)]
    return [str(value) for entry in found if isinstance(entry, inspect.LiteralType) for value in entry.values]


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


# -- checks that several endpoints share ------------------------------------------------------------


def reject_nul(field: str, text: str) -> None:
    """Raises errors.BadRequest for a NUL character, which C strings in the engines cannot hold."""
    if "\0" in text:
        raise errors.BadRequest(f"{field}: the text contains a NUL character; remove it", param=field)


def stop_sequences(stop: str | list[str] | None) -> list[str]:
    """Returns the checked `stop` field as a list. Raises errors.BadRequest."""
    found = [] if stop is None else [stop] if isinstance(stop, str) else stop
    for text in found:
        if not text:
            raise errors.BadRequest("stop: an empty string would stop every answer at once", param="stop")
        if len(text.encode("utf-8", "replace")) > MAX_STOP_BYTES:
            raise errors.BadRequest(f"stop: a sequence is over {MAX_STOP_BYTES} bytes long", param="stop")
    if len(found) > MAX_STOPS:
        raise errors.BadRequest(f"stop: at most {MAX_STOPS} sequences are possible", param="stop")
    return found


def logit_bias(given: dict[str, float] | None) -> dict[int, float]:
    """Returns the checked `logit_bias` field: biases by token id. Raises errors.BadRequest."""
    if len(given or {}) > MAX_LOGIT_BIAS:
        raise errors.BadRequest(f"logit_bias: at most {MAX_LOGIT_BIAS} tokens", param="logit_bias")
    found = {}
    for key, bias in (given or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 9):
            raise errors.BadRequest(f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
        found[int(key)] = bias
    return found


def sampling(*overrides: SamplingOverrides, **more: Any) -> Sampling:
    """Returns the parameters of a request: the first of `overrides` that sets a field wins, then the defaults.

    `more` sets fields that overrides do not have, such as `seed` and `logit_bias`.
    """
    for field in SamplingOverrides.__struct_fields__:
        value = next((v for o in overrides if (v := getattr(o, field)) is not None), None)
        if value is not None:
            more[field] = max(0, value) if field == "top_k" else value
    return Sampling(**more)


def keep_alive(given: float | str | None) -> float | None:
    """Returns seconds, -1 for no limit, None if the field is absent. Raises errors.BadRequest."""
    if given is None:
        return None
    try:
        seconds = units.seconds(given) if isinstance(given, str) else given
    except ValueError as error:
        raise errors.BadRequest(f"keep_alive: {given!r}: {error}", param="keep_alive") from None
    return -1.0 if seconds < 0 else min(seconds, units.MAX_SECONDS)


def texts_or_ids(given: str | list[str | int | list[int]], field: str, most: int) -> list[str | list[int]]:
    """Returns the texts or token lists of a field that takes one or several. Raises errors.BadRequest."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise errors.BadRequest(f"{field}: the list is empty", param=field)
    if all(isinstance(item, int) for item in given):
        return [[item for item in given if isinstance(item, int)]]
    if len(given) > most:
        raise errors.BadRequest(f"{field}: at most {most} {field}s in one request", param=field)
    if all(isinstance(item, str) for item in given):
        return [item for item in given if isinstance(item, str)]
    if all(isinstance(item, list) for item in given):
        return [item for item in given if isinstance(item, list)]
    raise errors.BadRequest(f"{field}: texts, token ids and lists of token ids cannot be mixed", param=field)
