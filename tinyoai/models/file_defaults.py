"""The sampling parameters that a model file names, as defaults of requests."""

import logging
import math

import msgspec

from tinyoai import gguf
from tinyoai.models.registry import Defaults

log = logging.getLogger("tinyoai.catalog")

_SAMPLING_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
}
"""Keys of `general.sampling` in a file, and the fields that they set."""


def read(header: gguf.Header) -> Defaults:
    """The sampling parameters that a model file names. A value out of bounds is logged and left out."""
    found: dict[str, float | int] = {}
    for key, field in _SAMPLING_KEYS.items():
        value = header.metadata.get(f"general.sampling.{key}")
        if value is None:
            continue
        if isinstance(value, float):
            value = float(f"{value:.6g}")  # files have 32 bits, and people write 0.7
        try:
            if isinstance(value, float) and not math.isfinite(value):
                raise msgspec.ValidationError("not a number")
            msgspec.convert({field: value}, Defaults)
        except msgspec.ValidationError as error:
            log.warning("%s: its general.sampling.%s of %r is not used: %s", header.path, key, value, error)
            continue
        found[field] = value
    return msgspec.convert(found, Defaults)
