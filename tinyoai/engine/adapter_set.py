"""The LoRA adapters of a request, out of those of the load."""

from collections.abc import Sequence

from tinyoai.wire import MAX_ADAPTER_SCALE, Adapter


def chosen(asked: Sequence[Adapter] | None, known: Sequence[Adapter]) -> tuple[Adapter, ...]:
    """The adapters that change an answer, in the order of the load, so that equal sets are equal tuples.

    `known` are those of the load; `asked` are by name or by place in the load, None: as the load has them. Raises
    ValueError in words for the client.
    """
    if asked is None:
        return tuple(adapter for adapter in known if adapter.scale)
    if asked and not known:
        raise ValueError(
            "this model has no LoRA adapters; leave the field out, or start the server with --lora"
        )
    names = [str(adapter.name) for adapter in known]
    scales: dict[str, float] = {}
    for adapter in asked:
        name, scale = _name(adapter.name, names), adapter.scale
        if name in scales:
            raise ValueError(f"the adapter {name!r} is named twice; name it once")
        if not abs(scale) <= MAX_ADAPTER_SCALE:
            most = f"{MAX_ADAPTER_SCALE:g}"
            raise ValueError(f"the scale of {name!r} is {scale:g}; choose one between -{most} and {most}")
        scales[name] = scale
    return tuple(Adapter(name, scales[name]) for name in names if scales.get(name))


def _name(asked: str | int, names: list[str]) -> str:
    """The adapter's name."""
    if isinstance(asked, int) and 0 <= asked < len(names):
        return names[asked]
    if isinstance(asked, str) and asked in names:
        return asked
    shown = repr(asked[:80]) if isinstance(asked, str) else f"with the id {asked}"
    raise ValueError(f"this model has no LoRA adapter {shown}; available: {', '.join(map(repr, names))}")
